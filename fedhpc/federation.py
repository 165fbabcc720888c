"""The round loop.

A round: every rank computes the same plan, the server's state goes down, the workers let their blocks of clients work,
the contributions combine exactly, the server steps. What these are is the approach's (fedhpc.approaches); the loop is
the same for all of them and for every mode. It is also the same for one run and for several in step, as those of a
sweep: each has a plan, a state, a run directory and a round of its own, and their clients train side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fedhpc.approaches.base import AnyApproach, BlockResult, Share
from fedhpc.approaches.describe import evaluated, headline, idle_workers, run_description
from fedhpc.approaches.report import Before, Clock, Stopwatch, collect, make_record
from fedhpc.participation.plan import Plan
from fedhpc.ranks.transport.base import Transport
from fedhpc.ranks.verdict import errors_of, on_server
from fedhpc.results.following import Following
from fedhpc.results.opening import Opening
from fedhpc.results.progress import Progress
from fedhpc.results.record import OK, Event, FinalResults, Observer, RoundRecord
from fedhpc.results.recorder import Recorder
from fedhpc.results.resume import Decision
from fedhpc.server.state import ServerState
from fedhpc.training import client_state


@dataclass
class Round:
    """A round of one run that is under way, on one rank."""

    plan: Plan
    download: Any  # of the approach
    before: Before
    opening_bytes: int  # that went over the wire until the clients could begin
    fitted: tuple[int, int]  # `approach.fits` before it
    clock: Clock
    results: list[BlockResult[Any]] = field(default_factory=list)


def open_round(approach: AnyApproach, transport: Transport, server_state: ServerState | None, round_: int) -> Round:
    """Plan a round, and bring to the clients what they need of the server. Collective."""
    before, clock = Before.of(transport), Clock()
    with clock("broadcast"):
        plan = approach.plan(round_)
        download = approach.download(transport, server_state, plan)
    return Round(plan, download, before, transport.wire_bytes - before.wire_bytes, approach.fits, clock)


def train(transport: Transport, rounds: Sequence[tuple[AnyApproach, Round]]) -> None:
    """Let the clients of this rank train, block after block; those of several runs in one forward, where they join.

    The time of a forward is divided among its runs by the local steps of their clients. Collective for several runs.
    """
    for forward in _forwards(transport.rank, rounds):
        shares = [share for share, _ in forward]
        began = time.perf_counter()
        results = shares[0].approach.local_in_parts(shares)
        seconds = time.perf_counter() - began
        transport.progress.finish(sum(len(result.clients) for of_share in results for result in of_share))
        steps = [sum(int(result.steps.sum()) for result in of_share) for of_share in results]
        for (_, round_), of_share, taken in zip(forward, results, steps, strict=True):
            round_.results += of_share
            round_.clock.add("local", seconds * taken / sum(steps) if len(shares) > 1 else seconds)
    if len(rounds) > 1:
        _wait_for_all(transport, [round_.clock for _, round_ in rounds])


def _wait_for_all(transport: Transport, clocks: Sequence[Clock]) -> None:
    """Let rank 0 wait until all ranks have trained, and divide the wait among the runs by what they took of these.

    Else the run that is closed first would wait for the clients of all. Collective.
    """
    began = time.perf_counter()
    local = torch.tensor([clock.seconds("local") for clock in clocks], dtype=torch.float64)
    transport.reduce_sum(local)
    if transport.is_server and local.sum() > 0:  # else nobody had anything to train
        waited = time.perf_counter() - began
        for clock, share in zip(clocks, (local / local.sum()).tolist(), strict=True):
            clock.add("reduce", waited * share)


def _forwards(rank: int, rounds: Sequence[tuple[AnyApproach, Round]]) -> list[list[tuple[Share, Round]]]:
    """What a rank trains, a forward each, in the order of the runs."""
    forwards: list[list[tuple[Share, Round]]] = []
    filling: dict[Hashable, list[tuple[Share, Round]]] = {}  # by what runs have in common: where there may be room left
    for approach, round_ in rounds:
        joins = approach.joins if len(rounds) > 1 else None
        for block in approach.blocks_of(round_.plan, rank):
            share = Share(approach, round_.plan, block.clients, round_.download)
            last = filling.get(joins, []) if joins is not None else []
            there = sum(len(other.clients) for other, _ in last)
            if last and there + len(share.clients) <= approach.most_of_runs:
                last.append((share, round_))
            else:
                filling[joins] = [(share, round_)]
                forwards.append(filling[joins])
    return forwards


def close_round(
    approach: AnyApproach, transport: Transport, server_state: ServerState | None, round_: Round
) -> RoundRecord | None:
    """Combine what the clients sent, and let the server step; the record of the round on rank 0. Collective."""
    plan, clock = round_.plan, round_.clock
    # Other runs may have sent something since it was opened.
    before = round_.before._replace(wire_bytes=transport.wire_bytes - round_.opening_bytes)
    with clock("reduce"):
        results = approach.attacked(transport, plan, round_.results)
        combined = approach.combine(transport, server_state, plan, results)
        reports = collect(transport, plan, results, approach, round_.fitted, clock.seconds("local"), before)
    if server_state is None or reports is None:
        return None
    with clock("server"):
        completed = reports.status(plan) == OK
        shortfall = approach.shortfall(plan, completed) if approach.moves_server else ""
        norm = approach.step(server_state, plan, combined) if not shortfall and approach.moves_server else 0.0
        if not shortfall and approach.keeps_client_state:
            accepted = [c for c, ok in zip(plan.cohort, completed, strict=True) if ok]
            server_state.keep_versions(accepted, plan.round)
    down = approach.bytes_down(plan, round_.download) + approach.bytes_told(plan, combined)
    up = approach.bytes_fetched(plan, combined)
    spent = approach.spend(server_state, plan)
    record = make_record(approach, plan, reports, clock, norm, down, up, transport.evaluators, spent)
    if not shortfall:
        return record
    return replace(record, events=[*record.events, Event("void", shortfall)])


@dataclass(frozen=True)
class Run:
    """A run of those that go on together in this process."""

    approach: AnyApproach
    on_round: Callable[[int], None]  # told which round is safely on disk; on ranks above 0 only the first
    #: Held while rank 0 writes its files: who holds it for good keeps the run directory as it is.
    writing: AbstractContextManager[object]
    on_end: Callable[[], None] = lambda: None  # told on every rank when it is complete, or pauses


def run(approach: AnyApproach, transport: Transport, fresh: bool, on_round: Callable[[int], None]) -> None:
    """Run or resume one run to the end: `run_together` of one, whose files nobody else waits for."""
    run_together([Run(approach, on_round, nullcontext())], transport, fresh)


def run_together(runs: Sequence[Run], transport: Transport, fresh: bool, until: int | None = None) -> None:
    """Run or resume all `runs` to their ends, a round of each at a time.

    FedAvg's rounds are lines 3 to 8 of algorithm 1 of McMahan et al. 2017. With `until` a run pauses after that round,
    to be resumed, unless it was the last one.
    """
    with ExitStack() as stack:
        # All of them first, since one that is refused ends the process, which is to leave every directory as it was.
        claimed: list[_Claimed] = []
        for one_run in runs:
            name = one_run.approach.config.run.name if len(runs) > 1 else ""
            with errors_of(name):
                claimed.append(_claimed(one_run, transport, fresh, name, stack))
        going: list[Going] = []
        for one_claimed in claimed:
            with errors_of(one_claimed.name):
                going.append(_begun(one_claimed, transport))
        while going := [one for one in going if not one.is_over(until)]:
            rounds = [(one.approach, one.open()) for one in going]
            clients = sum(len(round_.plan.training) for _, round_ in rounds)
            transport.progress.begin(going[0].round, clients)
            train(transport, rounds)
            for one, (_, round_) in zip(going, rounds, strict=True):
                one.close(round_)


@dataclass
class Going:
    """A run that has begun, on one rank. A UserError of one of several runs in this process names it."""

    name: str  # of one of several runs in this process, else empty
    approach: AnyApproach
    transport: Transport
    round: int  # the last that has begun
    server: Server | None
    closing: ExitStack  # what lets go of the run directory
    on_end: Callable[[], None]
    watch: Stopwatch

    @property
    def _state(self) -> ServerState | None:
        return self.server.state if self.server else None

    def open(self) -> Round:
        """Begin the next round."""
        self.round += 1
        with errors_of(self.name), self.watch():
            return open_round(self.approach, self.transport, self._state, self.round)

    def close(self, opened: Round) -> None:
        """End a round, whose clients have trained: sum, evaluation, record."""
        approach, round_ = self.approach, self.round
        self.watch.add(opened.clock.seconds("local") + opened.clock.seconds("reduce"))
        with errors_of(self.name), self.watch():
            record = close_round(approach, self.transport, self._state, opened)
            if round_ % approach.config.evaluation.every == 0 or round_ == approach.rounds:
                record = _evaluated(approach, self.transport, self._state, round_, record)
            if self.server and record:
                self.server.record(record)

    def is_over(self, until: int | None) -> bool:
        """Whether no round follows; the run is at its end then, or pauses after the round `until`. Collective."""
        with errors_of(self.name):
            ended = self.round >= self.approach.rounds or self.approach.ends_early(self.transport, self._state)
            if ended:
                with self.watch():
                    self._finish()
            elif until is None or self.round < until:
                return False
            elif self.server:
                self.server.pause(self.round)
        self.on_end()
        self.closing.close()
        return True

    def _finish(self) -> None:
        approach, transport = self.approach, self.transport
        transport.progress.activity = "test"
        results = approach.finish(transport, self._state)
        if self.server and results:
            self.server.finish(results)
            adapter = approach.config.run_dir / "adapter"
            exported = f" and {adapter}" if adapter.exists() else ""
            self.server.message(f"complete: {approach.config.run_dir}/results.h5{exported}")
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


@dataclass(frozen=True)
class _Claimed:
    """A run whose directory is taken, and as it was."""

    name: str  # of one of several runs in this process, else empty
    run: Run
    opening: Opening[ServerState]
    decision: Decision
    round: int  # the last one that is done
    closing: ExitStack


def _claimed(run: Run, transport: Transport, fresh: bool, name: str, stack: ExitStack) -> _Claimed:
    """Take the run directory and read what it holds; lock and observers are closed with `stack` at the latest.

    RefusedError where it cannot serve the run. name: what stands in front of its lines on the screen.
    """
    approach, closing = run.approach, stack.enter_context(ExitStack())
    approach.progress = transport.progress
    describe = partial(run_description, approach, transport)
    opening = Opening(approach.config, describe, fresh, approach.initial_state)  # used on rank 0 alone
    closing.callback(opening.close)
    decision = on_server(transport, opening.claim)
    round_ = on_server(transport, lambda: opening.restore(f"{transport.world_size} ranks over {transport.name}"))
    return _Claimed(name, run, opening, decision, round_, closing)


def _begun(claimed: _Claimed, transport: Transport) -> Going:
    """Begin or go on in the run directory. A new run evaluates the initial state first."""
    run, opening, closing, round_ = claimed.run, claimed.opening, claimed.closing, claimed.round
    approach, watch = run.approach, Stopwatch()
    on_server(transport, opening.begin)
    run.on_round(round_)
    server = None
    if transport.is_server:
        server = Server(opening.server_state, _observers(run, opening, claimed.name, watch))
        for observer in server.observers:
            closing.callback(observer.close)
        # Of several runs each has its blocks at another worker.
        idle = [] if claimed.name else idle_workers(approach)
        for message in [headline(approach, transport), *idle, evaluated(approach), *approach.messages]:
            server.message(message)
        if not opening.is_locked:
            server.message(f"{opening.run.directory}: this file system has no locks; do not start a second run in it")
        if claimed.decision == "resume":
            server.message(f"resuming after round {round_}")
    if claimed.decision == "fresh":
        notes = [Event("note", message) for message in approach.messages] if server else []
        state = server.state if server else None
        with watch():
            record = _evaluated(approach, transport, state, 0, RoundRecord(0, events=notes))
            if server and record:
                server.record(record)
    return Going(claimed.name, approach, transport, round_, server, closing, run.on_end, watch)


def _observers(one: Run, opening: Opening[ServerState], name: str, watch: Stopwatch) -> list[Observer]:
    """Who follows the run on rank 0, in order: the files, the screen, trackers."""
    config, run, state = one.approach.config, opening.run, opening.server_state

    def saved(round_: int) -> None:
        # Only now are the files of no use that the checkpoint no longer names.
        for client in state.renewed:
            client_state.prune(run.directory, client, state.versions[client])
        state.renewed.clear()
        one.on_round(round_)

    recorder = Recorder(run, opening.results, state, config.checkpoint.every, watch, one.writing, saved)
    screen = Progress(run.rounds, opening.round, one.approach.progress, name)
    trackers = [Following(config.trackers, run, opening.results, screen)] if config.trackers else []
    return [recorder, screen, *trackers]
