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
from typing import Any

from fedhpc import registry
from fedhpc.approaches.base import Approach
from fedhpc.approaches.describe import headline, run_description
from fedhpc.approaches.report import Clock, collect, make_record
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.participation import forecast as forecasts
from fedhpc.ranks.transport.base import Transport
from fedhpc.ranks.verdict import on_server
from fedhpc.results.lock import Lock, take_lock
from fedhpc.results.progress import Progress
from fedhpc.results.record import OK, Event, FinalResults, Observer, RoundRecord
from fedhpc.results.recorder import Recorder, new_results, restored
from fedhpc.results.results_file import Results
from fedhpc.results.resume import decide
from fedhpc.results.run_directory import begin, remove_temporary_files, write_config
from fedhpc.results.status import read_status, write_status
from fedhpc.results.trackers.base import Guarded
from fedhpc.server.state import State
from fedhpc.training import client_state

AnyApproach = Approach[Any, Any, Any, Any]


@dataclass(frozen=True)
class Server:
    """What rank 0 has beside the approach: the state that rounds move, and who follows the run, in order."""

    state: State
    observers: Sequence[Observer]

    def message(self, text: str) -> None:
        """Tell all observers one line."""
        for observer in self.observers:
            observer.message(text)

    def record(self, record: RoundRecord) -> None:
        """Tell all observers of a round: first the results file, then the screen, so what is seen is on the disk."""
        for observer in self.observers:
            observer.round(record)

    def finish(self, results: FinalResults) -> None:
        """Tell all observers how the run ended."""
        for observer in self.observers:
            observer.finish(results)


def run_round(
    approach: AnyApproach, transport: Transport, server_state: State | None, round_: int
) -> RoundRecord | None:
    """One round; its record on rank 0. FedAvg's are lines 3 to 8 of algorithm 1 of McMahan et al. 2017."""
    wire_bytes, fitted, clock = transport.wire_bytes, approach.clients_that_fit, Clock()
    with clock("broadcast"):
        plan = approach.plan(round_)
        download = approach.download(transport, server_state, plan)
    with clock("local"):
        blocks = approach.blocks_of(plan, approach.topology.worker_of(transport.rank))
        results = [r for block in blocks for r in approach.local_in_parts(plan, block.clients, download)]
    with clock("reduce"):
        combined = approach.combine(transport, plan, results)
        reports = collect(transport, plan, results, approach, fitted, clock.seconds("local"), wire_bytes)
    if server_state is None or reports is None:
        return None
    with clock("server"):
        completed = reports.status(plan) == OK
        enough = completed.sum() >= approach.min_cohort or not approach.moves_server
        norm = approach.step(server_state, plan, combined) if enough and approach.moves_server else 0.0
        for client, ok in zip(plan.cohort, completed, strict=True) if enough and approach.keeps_client_state else ():
            if ok:
                server_state.name(client, round_)
    sent = approach.bytes_down(plan, download), approach.bytes_fetched(plan, combined)
    record = make_record(approach, plan, reports, clock, norm, *sent, transport.evaluators)
    if enough:
        return record
    void = Event("void", f"{record.completed} of {approach.min_cohort} needed clients completed")
    return replace(record, events=[*record.events, void])


def run(
    approach: AnyApproach,
    transport: Transport,
    fresh: bool,
    on_round: Callable[[int], None],
    writing: AbstractContextManager[object] | None = None,
) -> None:
    """Run or resume to the end. `on_round` is told which round is safely on disk; on ranks above 0 only the first.

    `writing` is held while rank 0 writes its files: who holds it for good keeps the run directory as it is.
    """
    with ExitStack() as stack:
        round_, server = _begin(approach, transport, fresh, on_round, writing or nullcontext(), stack)
        server_state = server.state if server else None
        while round_ < approach.rounds:
            round_ += 1
            record = run_round(approach, transport, server_state, round_)
            if round_ % approach.config.evaluation.every == 0 or round_ == approach.rounds:
                record = _evaluated(approach, transport, server_state, round_, record)
            if server and record:
                server.record(record)
        results = approach.finish(transport, server_state)
        if server and results:
            server.finish(results)
            adapter = approach.config.run_dir / "adapter"
            exported = f" and {adapter}" if adapter.exists() else ""
            server.message(f"complete: {approach.config.run_dir}/results.h5{exported}")


def _evaluated(
    approach: AnyApproach, transport: Transport, server_state: State | None, round_: int, record: RoundRecord | None
) -> RoundRecord | None:
    """The record with the evaluation after the round. Collective."""
    began = time.perf_counter()
    outcome = approach.evaluate(transport, server_state, round_)
    if record is None or outcome is None:
        return record
    seconds = time.perf_counter() - began if round_ else 0.0
    return replace(record, metrics=outcome.metrics, seconds_eval=seconds, seconds=record.seconds + seconds)


def _begin(
    approach: AnyApproach,
    transport: Transport,
    fresh: bool,
    on_round: Callable[[int], None],
    writing: AbstractContextManager[object],
    stack: ExitStack,
) -> tuple[int, Server | None]:
    """Take the run directory and go on from what it holds: the last round, and what rank 0 has.

    Lock and observers are closed with `stack`.
    """
    config, directory = approach.config, approach.config.run_dir
    run = run_description(approach, transport)
    begun: list[tuple[Results, State]] = []
    locks: list[Lock] = []

    def claim() -> str:
        before = read_status(directory)
        decision = decide(config, directory, fresh, approach.data.fingerprint, approach.fingerprint)
        locks.append(take_lock(directory))
        stack.callback(locks[0].close)
        if read_status(directory) != before:
            raise UserError(f"{directory}: another run began or ended in it just now; give the same command again")
        return decision

    def restore() -> int:
        state = approach.initial_state()
        if decision != "resume":
            begun.append((new_results(run), state))
            return 0
        results, round_, tensors = restored(run, f"{transport.world_size} ranks over {transport.name}")
        if tensors:
            state.load(tensors)
        begun.append((results, state))
        return round_

    def take() -> None:
        if decision == "fresh":
            begin(directory)
        else:
            remove_temporary_files(directory)
            # Before the new configuration: a finished run that is being extended must not look finished any more.
            write_status(directory, "running", round_)
        write_config(directory, config)

    decision = on_server(transport, claim)
    round_ = on_server(transport, restore)  # before anything is written: a damaged run is left as it is
    on_server(transport, take)
    on_round(round_)
    server = None
    if begun:
        results, state = begun[0]

        def saved(round_: int) -> None:
            # Only now is what the checkpoint no longer names of no use.
            for client in state.renewed:
                client_state.prune(directory, client, state.versions[client])
            state.renewed.clear()
            on_round(round_)

        observers: list[Observer] = [
            Recorder(run, results, state, config.checkpoint.every, writing, saved),
            Progress(run.rounds, round_),
        ]
        for tracker in config.trackers:
            made = registry.choice("trackers", tracker.name, "trackers.name")(tracker, run, round_)
            observers.append(Guarded(tracker.name, made, observers[:2]))
        for observer in observers:
            stack.callback(observer.close)
        server = Server(state, observers)
        for message in [headline(approach, transport), *approach.data.messages]:
            server.message(message)
        if not locks[0].held:
            server.message(f"{directory}: this file system has no locks; do not start a second run in it")
        if decision == "resume":
            server.message(f"resuming after round {round_}")
    if decision == "fresh":
        initial = _evaluated(approach, transport, server.state if server else None, 0, RoundRecord(0))
        if server and initial:
            server.record(initial)
    return round_, server


def is_finished(config: Config, transport: Transport, fresh: bool) -> bool:
    """Whether the run directory holds this very run, complete; says so. RefusedError where it holds another one."""
    finished = on_server(transport, lambda: decide(config, config.run_dir, fresh) == "finished")
    if finished and transport.is_server:
        longer = "" if config.method.fixes_rounds else ", a larger federation.rounds extends it"
        print(f"{config.run_dir}: this run is finished; --fresh starts it over{longer}")
    return finished


def forecast(approach: AnyApproach, counts: Sequence[int]) -> list[str]:
    """Lines of --check on other numbers of ranks, from the times of the run in the run directory, if there is one."""
    config, path = approach.config, approach.config.run_dir / "results.h5"
    decide(config, config.run_dir, False, approach.data.fingerprint, approach.fingerprint)
    if not path.exists():
        return forecasts.lines(approach, counts, None, 1)
    pilot = Results.read(path)
    return forecasts.lines(approach, counts, pilot.rounds, int(pilot.attributes["world_size"]))
