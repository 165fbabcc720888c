"""The round loop: the one file that knows rank 0 from the rest.

A round: the server's state goes down, every rank computes the same plan, the workers let their blocks of clients work,
the contributions combine exactly, the server steps. What these are is the approach's (fedhpc.approaches); the loop is
the same for all of them and for every mode.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from fedhpc import planning, registry
from fedhpc.approaches.base import Approach, Returned
from fedhpc.book import Book, attributes, new_results
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import over_clients
from fedhpc.participation import Block, Plan
from fedhpc.ranks.devices import device_of
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.placement import Placement, place
from fedhpc.ranks.transport.base import Transport
from fedhpc.ranks.verdict import on_server
from fedhpc.results import run_directory
from fedhpc.results.progress import Progress
from fedhpc.results.results_file import Results
from fedhpc.server.state import State
from fedhpc.task import load_task

OK, DROPPED, REJECTED = 0, 1, 2
# What a client reports beside its update: one row of float64 per place in the cohort (64 bytes).
_REPORT = ("reported", "reason", "tokens", "steps", "loss_sum", "loss_first", "loss_last", "update_norm")
# And what a rank reports.
_RANK_REPORT = ("input_tokens", "padded_tokens", "seconds_local", "peak_memory_bytes", "wire_bytes", "fits")


def place_ranks(config: Config, transport: Transport, launch: Launch, gpus: Sequence[str]) -> Launch:
    """`launch` with the GPUs of all ranks, agreed by all. gpus: unique ids of those that this rank may use."""
    visible = transport.gather_json(list(gpus))
    quantized = config.model.quantize != "none"
    trains = getattr(registry.load("methods", config.method.name), "SERVER_TRAINS", False)
    chosen = on_server(transport, lambda: asdict(place(visible or [], config.runtime.server, quantized, trains)))
    placement = Placement(tuple(chosen["gpus"]), chosen["seen"])
    # Under an MPI launcher that runtime does not know, the transport alone knows the rank.
    launch = replace(launch, rank=transport.rank, placement=placement)
    device = device_of(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    transport.place(placement)
    return launch


def prepare(config: Config, transport: Transport, launch: Launch, write_cache: bool) -> Approach:
    """Load and check everything that needs no run directory; rank 0 first, so that mistakes are said once."""
    method = registry.load("methods", config.method.name)
    # Most methods say what is averaged; the others name what they do instead.
    kind: type[Approach] = registry.approach(method)

    def make() -> Approach:
        return kind(load_task(config, launch, transport.world_size, write_cache, kind.read))

    approach: Approach | None = None

    def first() -> None:
        nonlocal approach
        approach = make()

    on_server(transport, first)
    return approach or make()


def forecast(approach: Approach, counts: Sequence[int]) -> list[str]:
    """Lines of --check on other numbers of ranks, from the times of the run in the run directory, if there is one."""
    config, path = approach.config, approach.config.run_dir / "results.h5"
    run_directory.decide(config, config.run_dir, False, approach.data.fingerprint, approach.fingerprint)
    if not path.exists():
        return planning.lines(approach, counts, None, 1)
    pilot = Results.read(path)
    return planning.lines(approach, counts, pilot.rounds, int(pilot.attributes["world_size"]))


def is_finished(config: Config, transport: Transport, fresh: bool) -> bool:
    """Whether the run directory holds this very run, complete; says so. RefusedError where it holds another one."""
    finished = on_server(transport, lambda: run_directory.decide(config, config.run_dir, fresh) == "finished")
    if finished and transport.rank == 0:
        longer = "" if config.method.fixes_rounds else ", a larger federation.rounds extends it"
        print(f"{config.run_dir}: this run is finished; --fresh starts it over{longer}")
    return finished


def run(
    approach: Approach,
    transport: Transport,
    fresh: bool,
    on_round: Callable[[int], None],
    writing: AbstractContextManager[object] | None = None,
) -> None:
    """Run or resume to the end. `on_round` is told which round is safely on disk; on ranks above 0 only the first.

    `writing` is held while rank 0 writes its files: who holds it for good keeps the run directory as it is.
    """
    held: list[run_directory.Lock] = []
    try:
        _run(approach, transport, fresh, on_round, writing or nullcontext(), held)
    finally:
        for lock in held:
            lock.close()


def _run(
    approach: Approach,
    transport: Transport,
    fresh: bool,
    on_round: Callable[[int], None],
    writing: AbstractContextManager[object],
    held: list[run_directory.Lock],
) -> None:
    """`run` without its clean-up; rank 0 puts the lock of the run directory into `held`."""
    config, directory = approach.config, approach.config.run_dir
    is_server = transport.rank == 0

    def claim() -> str:
        before = run_directory.read_status(directory)
        found = run_directory.decide(config, directory, fresh, approach.data.fingerprint, approach.fingerprint)
        held.append(run_directory.lock(directory))
        if run_directory.read_status(directory) != before:
            raise UserError(f"{directory}: another run began or ended in it just now; give the same command again")
        return found

    def take() -> None:
        if decision == "fresh":
            run_directory.begin(directory)
        else:
            run_directory.sweep(directory)
            # Before the new configuration: a finished run that is being extended must not look finished any more.
            run_directory.write_status(directory, "running", round_)
        run_directory.write_config(directory, config)

    decision = on_server(transport, claim)
    round_, state, book = _begin(approach, transport, decision == "resume")  # first: a damaged run is left as it is
    on_server(transport, take)
    on_round(round_)
    progress = Progress(approach.rounds, round_) if is_server else None
    if progress:
        for message in [approach.headline(transport.world_size, transport.name), *approach.data.messages]:
            progress.message(message)
        if not held[0].held:
            progress.message(f"{directory}: this file system has no locks; do not start a second run in it")
        if decision == "resume":
            progress.message(f"resuming after round {round_}")
    if decision == "fresh":
        outcome = approach.evaluate(transport, state, 0)
        if book and state:
            book.initial(outcome)
            with writing:
                book.save(state, 0)
    while round_ < approach.rounds:
        round_ += 1
        row, clients, events = _round(approach, transport, state, round_)
        if round_ % config.evaluation.every == 0 or round_ == approach.rounds:
            began = time.perf_counter()
            outcome = approach.evaluate(transport, state, round_)
            if outcome:
                spent = time.perf_counter() - began
                row |= {f"eval_{name}": value for name, value in outcome.metrics.items()}
                row |= {"seconds_eval": spent, "seconds": row["seconds"] + spent}
        if book and state and progress:
            book.results.add_round(row)
            book.results.add_clients(clients)
            for kind, message in events:
                book.results.add_event(round_, kind, message)
                if kind == "memory":
                    progress.message(message)
            # What is on the screen is on the disk: checkpoint first, then results.h5, then a line to read.
            if round_ % config.checkpoint.every == 0 or round_ == approach.rounds:
                with writing:
                    book.save(state, round_)
                    on_round(round_)
            progress.round(row)
    _finish(approach, transport, state, book, progress, writing)


def _begin(approach: Approach, transport: Transport, resume: bool) -> tuple[int, State | None, Book | None]:
    """The round to go on from, and rank 0's state and book (None elsewhere)."""
    begun: dict[str, Any] = {}

    def restore() -> int:
        world_size, name = transport.world_size, transport.name
        state, round_ = approach.state(), 0
        results = new_results(approach, world_size, name)
        if resume:
            loaded = run_directory.load_checkpoint(approach.config.run_dir)
            if loaded is not None:
                tensors, meta = loaded
                path = approach.config.run_dir / "results.h5"
                # A run killed before its first results.h5 has every row in the checkpoint.
                results = Results.read(path) if path.exists() else results
                rows = {n.removeprefix("rows/"): t for n, t in tensors.items() if n.startswith("rows/")}
                round_ = int(meta["round"])
                results.restore((meta["rows"], rows), round_)
                results.attributes |= attributes(approach, world_size, name)
                results.add_event(round_, "resumed", f"on {world_size} ranks over {name}")
                state.load(tensors)
        begun.update(state=state, book=Book(approach, results))
        return round_

    round_ = on_server(transport, restore)
    return round_, begun.get("state"), begun.get("book")


def _round(
    approach: Approach, transport: Transport, state: State | None, round_: int
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]:
    """One round. On rank 0: the rows for /rounds and /clients, and events; empty elsewhere."""
    wire_before = transport.wire_bytes
    began = time.perf_counter()
    plan = approach.plan(round_)
    down = approach.download(transport, state, plan)
    sent = time.perf_counter()
    fitted = approach.fits
    returned = [
        done for block in approach.blocks_of(plan, transport.rank) for done in _local(approach, plan, block, down)
    ]
    trained = time.perf_counter()

    combined = approach.combine(transport, plan, returned)
    place = {client: i for i, client in enumerate(plan.cohort)}
    report = np.zeros((len(plan.cohort), len(_REPORT)))
    for block, back in returned:
        # Each place of the report is filled by one rank, so what is not finite here stays in its place.
        report[[place[client] for client in block.clients]] = np.column_stack(
            [
                np.ones(len(block.clients)),
                back.reason,
                back.tokens,
                back.steps,
                back.loss_sum,
                back.loss_first,
                back.loss_last,
                back.norms,
            ]
        )
    rank_report = np.zeros((transport.world_size, len(_RANK_REPORT)))
    size = report.nbytes + rank_report.nbytes
    wire = transport.wire_bytes - wire_before + size if transport.world_size > 1 else 0
    rank_report[transport.rank] = (
        sum(back.input_tokens for _, back in returned),
        sum(back.padded_tokens for _, back in returned),
        trained - sent,
        peak_memory(approach.base.device),
        wire,
        approach.fits if approach.fits != fitted and approach.fits else 0,
    )
    both = torch.from_numpy(np.concatenate([report.ravel(), rank_report.ravel()]))
    transport.reduce_sum(both)  # every rank fills its own places, so the sum is exact in any order
    reduced = time.perf_counter()
    if state is None:
        return {}, {}, []

    report = both[: report.size].reshape(report.shape).numpy()
    rank_report = both[report.size :].reshape(rank_report.shape).numpy()
    column = {name: report[:, i] for i, name in enumerate(_REPORT)}
    status = np.where((column["reported"] > 0) & (column["reason"] == 0), OK, REJECTED).astype(np.int8)
    status[[place[c] for c in plan.dropped]] = DROPPED
    completed = int((status == OK).sum())
    why = [approach.reasons[int(i)] for i in column["reason"]]
    events = [
        ("rejected", f"client {c}: {'it has no training examples' if c in plan.empty else why[i]}")
        for c, i in place.items()
        if status[i] == REJECTED
    ]
    ranks = {name: rank_report[:, i] for i, name in enumerate(_RANK_REPORT)}
    events += [
        ("memory", f"rank {rank}: its memory is enough for {fits:.0f} clients at a time; larger blocks train in parts")
        for rank, fits in enumerate(ranks["fits"])
        if fits
    ]
    norm = 0.0
    if approach.exchanges and completed < approach.min_cohort:
        events.append(("void", f"{completed} of {approach.min_cohort} needed clients completed"))
    else:
        norm = approach.step(state, plan, combined) if approach.exchanges else 0.0
        for client, i in place.items() if approach.keeps_client_state else ():
            if status[i] == OK:
                state.name(client, round_)
    stepped = time.perf_counter()

    bytes_down, bytes_up = approach.exchanged_bytes(plan, down)
    ok = status == OK
    seen = column["tokens"][ok].sum()
    # A worker may have begun a moment before rank 0 had sent all.
    local = min(float(ranks["seconds_local"].max()), reduced - sent)
    row = {
        "round": round_,
        "train_loss": column["loss_sum"][ok].sum() / seen if seen else float("nan"),
        "cohort_size": len(plan.cohort),
        "completed": completed,
        "dropped": len(plan.dropped),
        "rejected": int((status == REJECTED).sum()),
        "tokens": int(column["tokens"].sum()),
        "padded_tokens": int(ranks["padded_tokens"].sum()),
        "bytes_down": bytes_down,
        "bytes_up": bytes_up,
        "wire_bytes": int(ranks["wire_bytes"].max()),
        "update_norm": norm,
        "seconds": stepped - began,
        "seconds_broadcast": sent - began,
        "seconds_local": local,
        "seconds_reduce": reduced - sent - local,
        "seconds_server": stepped - reduced,
        "seconds_eval": 0.0,
        # Memory of a GPU and of a server on the CPU cannot be compared.
        "peak_memory_bytes": int(ranks["peak_memory_bytes"][list(transport.evaluators)].max()),
    }
    where = {c: (b.worker, i) for i, b in enumerate(plan.blocks) for c in b.clients}
    clients = {
        "round": np.full(len(plan.cohort), round_),
        "client_id": np.array(plan.cohort),
        "num_examples": np.array([approach.data.population.num_examples(c) for c in plan.cohort]),
        "tokens": column["tokens"],
        "steps": column["steps"],
        "loss_first": np.where(column["reported"] > 0, column["loss_first"], np.nan),
        "loss_last": np.where(column["reported"] > 0, column["loss_last"], np.nan),
        "update_norm": np.where(column["reported"] > 0, column["update_norm"], np.nan),
        "status": status,
        "worker": np.array([where.get(c, (-1, -1))[0] for c in plan.cohort]),
        "block": np.array([where.get(c, (-1, -1))[1] for c in plan.cohort]),
    }
    return row, clients, events


def _local(approach: Approach, plan: Plan, block: Block, down: Any) -> list[tuple[Block, Returned]]:
    """What the block's clients do; in halves, from now on, where that takes more memory than the GPU has.

    A block that failed has changed nothing: what clients keep is a file of this round, written again.
    """
    clients = block.clients
    if approach.fits is None or len(clients) <= approach.fits:
        try:
            return [(block, approach.local(plan, clients, down))]
        except torch.OutOfMemoryError as error:
            if len(clients) == 1:
                raise UserError(
                    f"client {clients[0]} alone takes more memory than the GPU has: lower client.batch_size or "
                    "data.max_length, or set model.gradient_checkpointing"
                ) from error
        torch.cuda.empty_cache()  # not above, where the exception still holds the tensors
        approach.fits = math.ceil(len(clients) / 2)
    half = math.ceil(len(clients) / 2)
    parts = [replace(block, clients=of_half) for of_half in (clients[:half], clients[half:])]
    return [done for part in parts for done in _local(approach, plan, part, down)]


def _finish(
    approach: Approach,
    transport: Transport,
    state: State | None,
    book: Book | None,
    progress: Progress | None,
    writing: AbstractContextManager[object],
) -> None:
    """Test, per-client evaluation, final payload, export; then the run is complete."""
    config = approach.config
    final = approach.finish(transport, state)
    if book is None or state is None or final is None or progress is None:
        return
    results = book.results
    results.set_test(final.test)
    results.set_base(final.base)
    results.set_samples(final.samples)
    if final.client_eval is not None:
        results.set_client_eval(final.client_eval, over_clients(final.client_eval))
    results.set_final(final.tensors)
    results.set_tables(final.tables)
    with writing:
        book.save(state, approach.rounds, complete=True)
        run_directory.write_status(config.run_dir, "complete", approach.rounds)
    progress.close()
    for name, value in final.test.items():
        print(f"test {name} {value:.4f}" + (f" (untouched base {final.base[name]:.4f})" if name in final.base else ""))
    for line in final.lines:
        print(line)
    adapter = config.run_dir / "adapter"
    print(f"complete: {config.run_dir}/results.h5" + (f" and {adapter}" if adapter.exists() else ""))


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far: allocated on its GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
