"""The round loop.

A round: every rank computes the same plan, the server's state goes down, the workers let their blocks of clients work,
the contributions combine exactly, the server steps. What these are is the approach's (fedhpc.approaches); the loop is
the same for all of them and for every mode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedhpc.approaches.base import AnyApproach, BlockResult
from fedhpc.approaches.describe import evaluated, headline, run_description
from fedhpc.approaches.report import Before, Clock, collect, make_record
from fedhpc.ranks.transport.base import Transport
from fedhpc.ranks.verdict import on_server
from fedhpc.results.following import Following
from fedhpc.results.opening import Opening
from fedhpc.results.progress import Progress
from fedhpc.results.record import OK, Event, FinalResults, Observer, RoundRecord
from fedhpc.results.recorder import Recorder
from fedhpc.server.state import ServerState
from fedhpc.training import client_state


def run_round(
    approach: AnyApproach, transport: Transport, server_state: ServerState | None, round_: int
) -> RoundRecord | None:
    """One round; its record on rank 0. FedAvg's are lines 3 to 8 of algorithm 1 of McMahan et al. 2017."""
    before, fitted, clock = Before.of(transport), approach.fits, Clock()
    with clock("broadcast"):
        plan = approach.plan(round_)
        transport.progress.begin(round_, len(plan.training))
        download = approach.download(transport, server_state, plan)
    with clock("local"):
        blocks = approach.blocks_of(plan, transport.rank)
        results: list[BlockResult[Any]] = []
        for block in blocks:
            done = len(results)
            results += approach.local_in_parts(plan, block.clients, download)
            transport.progress.finish(sum(len(result.clients) for result in results[done:]))
    with clock("reduce"):
        results = approach.attacked(transport, plan, results)
        combined = approach.combine(transport, server_state, plan, results)
        reports = collect(transport, plan, results, approach, fitted, clock.seconds("local"), before)
    if server_state is None or reports is None:
        return None
    with clock("server"):
        completed = reports.status(plan) == OK
        shortfall = approach.shortfall(plan, completed) if approach.moves_server else ""
        norm = approach.step(server_state, plan, combined) if not shortfall and approach.moves_server else 0.0
        if not shortfall and approach.keeps_client_state:
            server_state.keep_versions([c for c, ok in zip(plan.cohort, completed, strict=True) if ok], round_)
    down = approach.bytes_down(plan, download) + approach.bytes_told(plan, combined)
    up = approach.bytes_fetched(plan, combined)
    spent = approach.spend(server_state, plan)
    record = make_record(approach, plan, reports, clock, norm, down, up, transport.evaluators, spent)
    if not shortfall:
        return record
    return replace(record, events=[*record.events, Event("void", shortfall)])


def run(
    approach: AnyApproach,
    transport: Transport,
    fresh: bool,
    on_round: Callable[[int], None],
    writing: AbstractContextManager[object] | None = None,
    until: int | None = None,
) -> None:
    """Run or resume to the end. `on_round` is told which round is safely on disk; on ranks above 0 only the first.

    `writing` is held while rank 0 writes its files: who holds it for good keeps the run directory as it is. With
    `until` the run pauses after that round, to be resumed, unless it was the last one.
    """
    approach.progress = transport.progress
    with ExitStack() as stack:
        round_, server = _begin(approach, transport, fresh, on_round, writing or nullcontext(), stack)
        server_state = server.state if server else None
        while round_ < approach.rounds and not approach.ends_early(transport, server_state):
            if until is not None and round_ >= until:
                if server:
                    server.pause(round_)
                return
            round_ += 1
            record = run_round(approach, transport, server_state, round_)
            if round_ % approach.config.evaluation.every == 0 or round_ == approach.rounds:
                record = _evaluated(approach, transport, server_state, round_, record)
            if server and record:
                server.record(record)
        transport.progress.activity = "test"
        results = approach.finish(transport, server_state)
        if server and results:
            server.finish(results)
            adapter = approach.config.run_dir / "adapter"
            exported = f" and {adapter}" if adapter.exists() else ""
            server.message(f"complete: {approach.config.run_dir}/results.h5{exported}")
        if approach.topology.group_size > 1:
            transport.barrier()  # who holds layers stays as long as the server may need them, as for an export


@dataclass(frozen=True)
class Server:
    """What rank 0 has beside the approach: the state that rounds move, and who follows the run, in order."""

    state: ServerState
    observers: Sequence[Observer]

    def message(self, text: str) -> None:
        """Tell all observers one line."""
        for observer in self.observers:
            observer.message(text)

    def record(self, record: RoundRecord) -> None:
        """Tell all observers of a round: first the results file, then the screen, so what is seen is on the disk."""
        for observer in self.observers:
            observer.round(record)

    def pause(self, round_: int) -> None:
        """Tell all observers that the run stops after a round, to go on later."""
        for observer in self.observers:
            observer.pause(round_)

    def finish(self, results: FinalResults) -> None:
        """Tell all observers how the run ended."""
        for observer in self.observers:
            observer.finish(results)


def _evaluated(
    approach: AnyApproach,
    transport: Transport,
    server_state: ServerState | None,
    round_: int,
    record: RoundRecord | None,
) -> RoundRecord | None:
    """The record with the evaluation after the round. Collective."""
    began = time.perf_counter()
    transport.progress.activity = "evaluation"
    outcome = approach.evaluate(transport, server_state, round_)
    if record is None or outcome is None or server_state is None:
        return record
    approach.judge(server_state, round_, outcome.metrics)
    seconds = time.perf_counter() - began if round_ else 0.0
    seconds_so_far = record.seconds + seconds
    return replace(
        record,
        metrics=outcome.metrics,
        sampling=outcome.sampling,
        samples=outcome.samples,
        seconds_eval=seconds,
        seconds=seconds_so_far,
    )


def _begin(
    approach: AnyApproach,
    transport: Transport,
    fresh: bool,
    on_round: Callable[[int], None],
    writing: AbstractContextManager[object],
    stack: ExitStack,
) -> tuple[int, Server | None]:
    """Take the run directory and go on from what it holds: the last round that is done, and what rank 0 has.

    The lock and the observers are closed with `stack`. A new run evaluates the initial state first.
    """
    describe = partial(run_description, approach, transport)
    opening = Opening(approach.config, describe, fresh, approach.initial_state)  # used on rank 0 alone
    stack.callback(opening.close)
    decision = on_server(transport, opening.claim)
    round_ = on_server(transport, lambda: opening.restore(f"{transport.world_size} ranks over {transport.name}"))
    on_server(transport, opening.begin)
    on_round(round_)
    server = None
    if transport.is_server:
        server = Server(opening.server_state, _observers(approach, opening, on_round, writing))
        for observer in server.observers:
            stack.callback(observer.close)
        for message in [headline(approach, transport), evaluated(approach), *approach.messages]:
            server.message(message)
        if not opening.is_locked:
            server.message(f"{opening.run.directory}: this file system has no locks; do not start a second run in it")
        if decision == "resume":
            server.message(f"resuming after round {round_}")
    if decision == "fresh":
        notes = [Event("note", message) for message in approach.messages] if server else []
        state = server.state if server else None
        record = _evaluated(approach, transport, state, 0, RoundRecord(0, events=notes))
        if server and record:
            server.record(record)
    return round_, server


def _observers(
    approach: AnyApproach,
    opening: Opening[ServerState],
    on_round: Callable[[int], None],
    writing: AbstractContextManager[object],
) -> list[Observer]:
    """Who follows the run on rank 0, in order: the files, the screen, trackers."""
    config, run, state = approach.config, opening.run, opening.server_state

    def saved(round_: int) -> None:
        # Only now are the files of no use that the checkpoint no longer names.
        for client in state.renewed:
            client_state.prune(run.directory, client, state.versions[client])
        state.renewed.clear()
        on_round(round_)

    recorder = Recorder(run, opening.results, state, config.checkpoint.every, writing, saved)
    screen = Progress(run.rounds, opening.round, approach.progress)
    trackers = [Following(config.trackers, run, opening.results, screen)] if config.trackers else []
    return [recorder, screen, *trackers]
