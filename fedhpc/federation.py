"""The round loop: the one file that knows rank 0 from the rest.

A round: rank 0 broadcasts theta_t, every rank computes the same plan, the workers train their blocks, the updates meet
in one exact sum, the server steps. Modes centralized and local are the same loop: there the clients keep their
optimizer state, and in local mode their own parameters, from round to round.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedhpc import clientstate, registry, rundir
from fedhpc.aggregation import Uploads, sharded, weighted_sum
from fedhpc.book import Book, attributes, new_results
from fedhpc.clients import Download, evaluate_clients, evaluate_personal, train
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Outcome, evaluate, over_clients, subset
from fedhpc.methods.base import Method
from fedhpc.participation import Plan
from fedhpc.progress import Progress
from fedhpc.runtime import Launch
from fedhpc.server import Server
from fedhpc.store import Results
from fedhpc.task import Task, build, evaluated_clients, exchanged_bytes, headline
from fedhpc.training.local import learning_rates, num_steps
from fedhpc.transport.base import Transport

OK, DROPPED, REJECTED = 0, 1, 2
# What a client reports beside its update: one row of float64 per place in the cohort (64 bytes).
_REPORT = ("reported", "status", "tokens", "steps", "loss_sum", "loss_first", "loss_last", "update_norm")
# And what a rank reports.
_RANK_REPORT = ("input_tokens", "padded_tokens", "seconds_local", "peak_memory_bytes", "wire_bytes")
T = TypeVar("T")


class RefusedError(Exception):
    """Rank 0 found a mistake that a person can mend; it says so, and every rank leaves with 2."""


def on_server(transport: Transport, step: Callable[[], T]) -> T:
    """The JSON-able result of `step` on rank 0, on every rank; its UserError ends all of them with RefusedError."""
    verdict: dict[str, Any] = {}
    if transport.rank == 0:
        try:
            verdict = {"value": step()}
        except UserError as error:
            verdict = {"error": str(error)}
    verdict = transport.broadcast_json(verdict)
    if "error" in verdict:
        raise RefusedError(verdict["error"])
    value: T = verdict["value"]
    return value


def prepare(config: Config, transport: Transport, launch: Launch, write_cache: bool) -> Task:
    """Load and check everything that needs no run directory; rank 0 first, so that mistakes are said once."""
    task: Task | None = None

    def first() -> None:
        nonlocal task
        task = build(config, launch, transport.world_size, write_cache)

    on_server(transport, first)
    return task or build(config, launch, transport.world_size, write_cache)


def is_finished(config: Config, transport: Transport, fresh: bool) -> bool:
    """Whether the run directory holds this very run, complete; says so. RefusedError where it holds another one."""
    finished = on_server(transport, lambda: rundir.decide(config, config.run_dir, fresh) == "finished")
    if finished and transport.rank == 0:
        print(f"{config.run_dir}: this run is finished; --fresh starts it over, a larger federation.rounds extends it")
    return finished


def run(
    task: Task,
    transport: Transport,
    fresh: bool,
    on_round: Callable[[int], None],
    writing: AbstractContextManager[object] | None = None,
) -> None:
    """Run or resume to the end. `on_round` is told which round is safely on disk; on ranks above 0 only the first.

    `writing` is held while rank 0 writes its files: who holds it for good keeps the run directory as it is.
    """
    held: list[rundir.Lock] = []
    try:
        _run(task, transport, fresh, on_round, writing or nullcontext(), held)
    finally:
        for lock in held:
            lock.close()


def _run(
    task: Task,
    transport: Transport,
    fresh: bool,
    on_round: Callable[[int], None],
    writing: AbstractContextManager[object],
    held: list[rundir.Lock],
) -> None:
    """`run` without its clean-up; rank 0 puts the lock of the run directory into `held`."""
    config, directory = task.config, task.config.run_dir
    is_server = transport.rank == 0

    def claim() -> str:
        before = rundir.read_status(directory)
        found = rundir.decide(config, directory, fresh, task.data.fingerprint, task.base.fingerprint)
        held.append(rundir.lock(directory))
        if rundir.read_status(directory) != before:
            raise UserError(f"{directory}: another run began or ended in it just now; give the same command again")
        return found

    def take() -> None:
        if decision == "fresh":
            rundir.begin(directory)
        else:
            rundir.sweep(directory)
            # Before the new configuration: a finished run that is being extended must not look finished any more.
            rundir.write_status(directory, "running", round_)
        rundir.write_config(directory, config)

    decision = on_server(transport, claim)
    round_, server, book = _begin(task, transport, decision == "resume")  # first: a damaged run is left as it is
    on_server(transport, take)
    on_round(round_)
    progress = Progress(task.rounds, round_) if is_server else None
    if progress:
        for message in [*headline(task, transport.world_size, transport.name), *task.data.messages]:
            progress.message(message)
        if not held[0].held:
            progress.message(f"{directory}: this file system has no locks; do not start a second run in it")
        if decision == "resume":
            progress.message(f"resuming after round {round_}")
    if decision == "fresh":
        outcome = _evaluate(task, transport, server, 0)
        if book and server:
            book.initial(outcome)
            with writing:
                book.save(server, 0)
    while round_ < task.rounds:
        round_ += 1
        row, clients, events = _round(task, transport, server, round_)
        if round_ % config.evaluation.every == 0 or round_ == task.rounds:
            began = time.perf_counter()
            outcome = _evaluate(task, transport, server, round_)
            if outcome:
                spent = time.perf_counter() - began
                row |= {f"eval_{name}": value for name, value in outcome.metrics.items()}
                row |= {"seconds_eval": spent, "seconds": row["seconds"] + spent}
        if book and server and progress:
            book.results.add_round(row)
            book.results.add_clients(clients)
            for kind, message in events:
                book.results.add_event(round_, kind, message)
            # What is on the screen is on the disk: checkpoint first, then results.h5, then a line to read.
            if round_ % config.checkpoint.every == 0 or round_ == task.rounds:
                with writing:
                    book.save(server, round_)
                    on_round(round_)
            progress.round(row)
    _finish(task, transport, server, book, progress, writing)


def _begin(task: Task, transport: Transport, resume: bool) -> tuple[int, Server | None, Book | None]:
    """The round to go on from, and rank 0's server and book (None elsewhere)."""
    state: dict[str, Any] = {}

    def restore() -> int:
        world_size, name = transport.world_size, transport.name
        server, round_ = Server(task.config, task.split.apart(task.initial_payload())[0]), 0
        results = new_results(task, world_size, name)
        if resume:
            loaded = rundir.load_checkpoint(task.config.run_dir)
            if loaded is not None:
                tensors, meta = loaded
                path = task.config.run_dir / "results.h5"
                # A run killed before its first results.h5 has every row in the checkpoint.
                results = Results.read(path) if path.exists() else results
                rows = {n.removeprefix("rows/"): t for n, t in tensors.items() if n.startswith("rows/")}
                round_ = int(meta["round"])
                results.restore((meta["rows"], rows), round_)
                results.attributes |= attributes(task, world_size, name)
                results.add_event(round_, "resumed", f"on {world_size} ranks over {name}")
                server.load(tensors)
        state.update(server=server, book=Book(task, results))
        return round_

    round_ = on_server(transport, restore)
    return round_, state.get("server"), state.get("book")


def _round(
    task: Task, transport: Transport, server: Server | None, round_: int
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]:
    """One round. On rank 0: the rows for /rounds and /clients, and events; empty elsewhere."""
    config, layout = task.config, task.split.shared
    wire_before = transport.wire_bytes
    began = time.perf_counter()
    plan = task.plan(round_)
    down = _download(task, transport, server, plan)
    sent = time.perf_counter()

    place = {client: i for i, client in enumerate(plan.cohort)}
    report = np.zeros((len(plan.cohort), len(_REPORT)))
    rank_report = np.zeros((transport.world_size, len(_RANK_REPORT)))
    uploads, tokens = _train(task, transport.rank, plan, down, report, place)
    trained = time.perf_counter()

    total = change = None
    if config.mode != "local":
        accepted = _accepted(transport, plan, uploads)
        total = _combine(task, transport, plan, accepted, uploads)
        if uploads.changes is not None:
            share = np.full(len(uploads.slots), 1.0 / task.data.population.num_clients)
            change = weighted_sum(transport, uploads.changes, share, layout, len(plan.cohort))
    size = report.nbytes + rank_report.nbytes
    wire = transport.wire_bytes - wire_before + size if transport.world_size > 1 else 0
    rank_report[transport.rank] = (*tokens, trained - sent, peak_memory(task.base.device), wire)
    both = torch.from_numpy(np.concatenate([report.ravel(), rank_report.ravel()]))
    transport.reduce_sum(both)  # every rank fills its own places, so the sum is exact in any order
    reduced = time.perf_counter()
    if server is None:
        return {}, {}, []

    report = both[: report.size].reshape(report.shape).numpy()
    rank_report = both[report.size :].reshape(rank_report.shape).numpy()
    column = {name: report[:, i] for i, name in enumerate(_REPORT)}
    status = np.where(column["reported"] > 0, column["status"], REJECTED).astype(np.int8)
    status[[place[c] for c in plan.dropped]] = DROPPED
    completed = int((status == OK).sum())
    events = [("rejected", f"client {c}: {_why(plan, c)}") for c, i in place.items() if status[i] == REJECTED]
    norm = 0.0
    if total is not None and completed < config.federation.min_cohort:
        events.append(("void", f"{completed} of {config.federation.min_cohort} needed clients completed"))
    else:
        norm = server.step(total) if total is not None else 0.0
        if change is not None:
            server.correct(change)
        for client, i in place.items() if config.keeps_client_state else ():
            if status[i] == OK:
                server.name(client, round_)
    stepped = time.perf_counter()

    bytes_down, bytes_up = exchanged_bytes(task, plan)
    ok = status == OK
    seen = column["tokens"][ok].sum()
    ranks = {name: rank_report[:, i] for i, name in enumerate(_RANK_REPORT)}
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
        "seconds_local": float(ranks["seconds_local"].max()),
        "seconds_reduce": max(0.0, reduced - sent - float(ranks["seconds_local"].max())),
        "seconds_server": stepped - reduced,
        "seconds_eval": 0.0,
        "peak_memory_bytes": int(ranks["peak_memory_bytes"].max()),
    }
    where = {c: (b.worker, i) for i, b in enumerate(plan.blocks) for c in b.clients}
    clients = {
        "round": np.full(len(plan.cohort), round_),
        "client_id": np.array(plan.cohort),
        "num_examples": np.array([task.data.population.num_examples(c) for c in plan.cohort]),
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


def _download(task: Task, transport: Transport, server: Server | None, plan: Plan) -> Download:
    theta = control = None
    if task.config.corrects_drift:
        size = task.split.shared.size
        both = server.with_control() if server else torch.empty(2 * size, dtype=task.payload_dtype)
        transport.broadcast(both)
        theta, control = both.split(size)
    elif task.config.mode != "local":
        theta = _broadcast_theta(task, transport, server)
    return Download(theta, control, _broadcast_versions(task, transport, server, plan.cohort))


def _broadcast_theta(task: Task, transport: Transport, server: Server | None) -> Tensor:
    """theta_t (S,) on the CPU of every rank."""
    theta = server.theta if server else torch.empty(task.split.shared.size, dtype=task.payload_dtype)
    transport.broadcast(theta)
    return theta


def _broadcast_versions(
    task: Task, transport: Transport, server: Server | None, clients: Sequence[int]
) -> dict[int, int]:
    """Which version of each client's state counts, 0 where it has none; empty where a run keeps no such states."""
    if not task.config.keeps_client_state:
        return {}
    # In local mode this is all that workers wait for.
    known = server.versions if server else {}
    versions = torch.tensor([known.get(c, 0) for c in clients], dtype=torch.int64)
    transport.broadcast(versions)
    return dict(zip(clients, versions.tolist(), strict=True))


def _train(
    task: Task, rank: int, plan: Plan, down: Download, report: np.ndarray, place: Mapping[int, int]
) -> tuple[Uploads, tuple[int, int]]:
    """Train this rank's blocks; fills its clients' rows of `report`. Also the input and padded tokens."""
    none = torch.empty(0, task.split.shared.size, dtype=task.payload_dtype)
    slots: list[int] = []
    updates, changes, tokens, padded = [none], [none], 0, 0
    for block in (block for block in plan.blocks if block.worker == rank):
        back = train(task, plan.round, block.clients, down)
        trained, finite = back.trained, back.finite
        norms = torch.linalg.vector_norm(back.updates.double(), dim=1).numpy()
        for k, client in enumerate(block.clients):
            # Each place of the report is filled by one rank, so what is not finite here stays in its place.
            report[place[client]] = (
                1,
                OK if finite[k] else REJECTED,
                trained.tokens[k],
                trained.steps[k],
                trained.loss_sum[k],
                trained.loss_first[k],
                trained.loss_last[k],
                norms[k],
            )
        if task.config.mode != "local":
            slots += [place[client] for k, client in enumerate(block.clients) if finite[k]]
            updates.append(back.updates[finite])
            if back.changes is not None:
                changes.append(back.changes[finite])
        tokens += trained.input_tokens
        padded += trained.padded_tokens
    sent = torch.cat(changes) if task.config.corrects_drift else None
    return Uploads(np.array(slots, np.int64), torch.cat(updates), sent), (tokens, padded)


def _shares(task: Task, plan: Plan) -> np.ndarray:
    """Share of each client in the weight of the planned cohort (C,): 0 for one that does not train, in all 1."""
    training = set(plan.training)
    examples = np.array([task.data.population.num_examples(c) if c in training else 0 for c in plan.cohort])
    counted = examples if task.config.server.weighting == "examples" else np.array([c in training for c in plan.cohort])
    return counted / max(counted.sum(), 1)


def _accepted(transport: Transport, plan: Plan, uploads: Uploads) -> np.ndarray:
    """Places in the cohort of the clients whose update is used, on every rank: int64 (A,)."""
    sent = torch.zeros(len(plan.cohort), dtype=torch.int64)
    sent[torch.from_numpy(uploads.slots)] = 1
    transport.all_reduce_max(sent)
    return np.flatnonzero(sent.numpy())


def _combine(task: Task, transport: Transport, plan: Plan, accepted: np.ndarray, uploads: Uploads) -> Tensor | None:
    """The aggregated pseudo-gradient of the accepted updates: float64 (S,) on rank 0, None elsewhere."""
    config, layout = task.config, task.split.shared
    if not len(accepted):
        return torch.zeros(layout.size, dtype=torch.float64) if transport.rank == 0 else None
    shares = _shares(task, plan)[accepted]
    rule = registry.load("aggregators", config.server.aggregator)
    if rule.LINEAR:
        sizes = [task.data.population.num_examples(plan.cohort[i]) for i in accepted]
        steps = [num_steps(n, config.client) for n in sizes]
        rates = {n: learning_rates(config.client, plan.round, task.rounds, n) for n in set(steps)}
        weights = np.zeros(len(plan.cohort))
        weights[accepted] = rule.weights(shares, [rates[n] for n in steps], config.client)
        return weighted_sum(transport, uploads.updates, weights[uploads.slots], layout, len(plan.cohort))
    owner = {c: b.worker for b in plan.blocks for c in b.clients}
    return sharded(
        transport,
        uploads,
        [owner[plan.cohort[i]] for i in accepted],
        shares,
        layout,
        lambda values, weights: rule.combine(values, weights, config.server),
    )


def _why(plan: Plan, client: int) -> str:
    return "it has no training examples" if client in plan.empty else "its update is not finite"


def _evaluated_payloads(task: Task, transport: Transport, server: Server | None, round_: int) -> Tensor:
    """What an evaluation after `round_` is of: (1, P), or in local mode (M, P), one row per client.

    Personal parts are the initial ones, those of a client that was never sampled.
    """
    if task.config.mode != "local" or round_ == 0:
        theta = _broadcast_theta(task, transport, server).unsqueeze(0)
        return task.split.join(theta, task.initial_personal).to(task.base.device)
    transport.barrier()  # another rank may have written the client's file
    clients = task.plan(round_).training
    rows = [clientstate.load(task.config.run_dir, c, round_)["theta"] for c in clients]
    return torch.stack(rows).to(task.base.device)


def _evaluate(task: Task, transport: Transport, server: Server | None, round_: int) -> Outcome | None:
    """Validation after `round_`; the outcome on rank 0."""
    config, examples = task.config, task.data.validation
    return evaluate(
        task.base,
        task.method,
        _evaluated_payloads(task, transport, server, round_),
        examples,
        subset(len(examples), config.evaluation.max_examples),
        config.evaluation.metrics,
        config.evaluation,
        config.runtime.precision,
        transport,
        label_targets=task.label_targets,
    )


def _evaluate_personal(
    task: Task, transport: Transport, server: Server | None, clients: Sequence[int]
) -> dict[str, np.ndarray] | None:
    """Per-client results with each client's own part and after its fine-tuning, `_personal` behind their names."""
    theta = _broadcast_theta(task, transport, server)
    versions = _broadcast_versions(task, transport, server, clients)
    metrics = ["loss", *(["accuracy"] if "accuracy" in task.config.evaluation.metrics_of_test else [])]
    # Blocks do not depend on the number of ranks, and each slot is filled by one of them.
    slots = torch.zeros(len(metrics), len(clients), dtype=torch.float64)
    for number, begin in enumerate(range(0, len(clients), task.block_size)):
        if number % transport.world_size == transport.rank:
            block = slice(begin, begin + task.block_size)
            columns = evaluate_personal(task, theta, clients[block], versions)
            slots[:, block] = torch.from_numpy(np.stack([columns[metric] for metric in metrics]))
    transport.reduce_sum(slots)
    if transport.rank != 0:
        return None
    return {f"{metric}_personal": slot.numpy() for metric, slot in zip(metrics, slots, strict=True)}


def _finish(
    task: Task,
    transport: Transport,
    server: Server | None,
    book: Book | None,
    progress: Progress | None,
    writing: AbstractContextManager[object],
) -> None:
    """Test, per-client evaluation, final payload, export; then the run is complete."""
    config, test = task.config, task.data.test
    limit = config.evaluation.test_max_examples or config.evaluation.max_examples
    indices = subset(len(test), limit)
    payloads = _evaluated_payloads(task, transport, server, task.rounds)

    def on_test(method: Method | None, samples: int) -> Outcome | None:
        return evaluate(
            task.base,
            method,
            payloads,
            test,
            indices,
            config.evaluation.metrics_of_test,
            config.evaluation,
            config.runtime.precision,
            transport,
            samples=samples,
            label_targets=task.label_targets,
        )

    untouched = on_test(None, 0)
    final = on_test(task.method, config.evaluation.samples)
    per_client = None
    if config.evaluation.client_fraction > 0:
        plan = task.plan(task.rounds)
        clients = plan.training if config.mode == "local" else evaluated_clients(task)
        per_client = evaluate_clients(task, payloads, clients, transport)
        if config.personalization.parts or config.personalization.finetune_steps:
            personal = _evaluate_personal(task, transport, server, clients)
            if per_client is not None and personal is not None:
                per_client |= personal
    if book is None or server is None or final is None or untouched is None or progress is None:
        return
    results = book.results
    results.set_test(final.metrics)
    results.set_base(untouched.metrics)
    results.set_samples(final.samples)
    if per_client is not None:
        results.set_client_eval(per_client, over_clients(per_client))
    layout = task.method.payload
    if config.mode == "local":
        clients = task.plan(task.rounds).training
        views = layout.views(payloads.cpu())
        for i, client in enumerate(clients):
            single = {name: view[i] for name, view in views.items()}
            task.method.export(single, config.run_dir / "adapter" / str(client))
    else:
        views = layout.views(task.split.join(server.theta, task.initial_personal))
        task.method.export(views, config.run_dir / "adapter")
    results.set_final({name: view.numpy() for name, view in views.items()})
    with writing:
        book.save(server, task.rounds, complete=True)
        rundir.write_status(config.run_dir, "complete", task.rounds)
    progress.close()
    for name, value in final.metrics.items():
        print(f"test {name} {value:.4f} (untouched base {untouched.metrics[name]:.4f})")
    for line in _client_lines(results.groups["client_summary"]):
        print(line)
    if task.split.personal.shapes:
        print("test, /final and the adapter: the shared part with the initial personal part of a client never sampled")
    print(f"complete: {config.run_dir}/results.h5 and {config.run_dir}/adapter")


def _client_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for each per-client result."""
    columns = dict.fromkeys(name.partition("/")[0] for name in summary)
    return [
        f"clients' {name.replace('_', ' ')}: mean {summary[f'{name}/mean']:.4f}, worst 10 % "
        f"{summary[f'{name}/worst_10_percent']:.4f}, standard deviation {summary[f'{name}/std']:.4f}"
        for name in columns
    ]


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far: allocated on its GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
