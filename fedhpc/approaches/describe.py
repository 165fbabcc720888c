"""What a run says of itself before it begins: the first line of the log, and the plan that --check prints."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedhpc import data, registry
from fedhpc.approaches.base import AnyApproach
from fedhpc.config import plugins
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.models.base import Attached
from fedhpc.models.causal_lm import CausalLM
from fedhpc.participation import forecast
from fedhpc.participation.plan import Plan
from fedhpc.participation.sampling import COHORT_SIZE, cohort_size
from fedhpc.ranks.failed_collective import TransportError
from fedhpc.ranks.transport.base import Transport
from fedhpc.ranks.verdict import on_server
from fedhpc.results.record import RunDescription, Scalar
from fedhpc.results.results_file import OF_LAUNCH, Results
from fedhpc.results.resume import decide

_ROUNDS = 50  # whose plans are looked at for the virtual time
_TRIED = 32  # examples on which the load of experts is looked at
_LAYERS, _EXPERTS = 8, 16  # of which it is shown at most
_SHOWN = 400  # characters of a turn that --check shows


def headline(approach: AnyApproach, transport: Transport) -> str:
    """What is about to run, in one line."""
    config, population = approach.config, approach.data.population
    joined = approach.most_together > approach.block_size
    more = f" (up to {approach.most_together} on one GPU)" if joined else ""
    sampled = cohort_size(config, population)
    of_fewer = config.mode == "federated" and config.federation.cohort_size is None and sampled < COHORT_SIZE
    everybody = " (all of them)" if of_fewer and sampled == population.num_clients else ""
    return (
        f"{config.run.name}: {config.mode} {config.method.name} of {approach.base.name} "
        f"({approach.summary()}), {population.num_clients:,} clients, "
        f"{sampled} a round{everybody} in blocks of {approach.block_size}{more}, "
        f"{transport.world_size} ranks over {transport.name} on {approach.placement.describe()}"
    )


def describe(approach: AnyApproach, transport: Transport) -> list[str]:
    """The plan that --check prints: clients, blocks, steps, what is exchanged, bytes per round, memory."""
    splits, plan = approach.data, approach.plan(1)
    rank_of = approach.topology.rank_of
    per_worker = dict.fromkeys(approach.topology.training, 0.0)
    for block in plan.blocks:
        per_worker[rank_of(block.worker, block.member)] += block.cost
    largest = max((len(b.clients) for b in plan.blocks), default=0)
    _rehearse_on_ranks(approach, transport, plan)
    load: list[str] = on_server(transport, lambda: _load_of_experts(approach))
    exchanged, *rest = approach.details(plan)
    return [
        headline(approach, transport),
        *approach.messages,
        *data.describe(splits.population, splits.train),
        f"examples: {len(splits.train):,} training, {len(splits.validation):,} validation, {len(splits.test):,} test",
        *([] if splits.train.spans is None else [first_chat(approach.base.tokenizer, splits.train)]),
        *([] if splits.train.pairs is None else first_pair(approach.base.tokenizer, splits.train.pairs)),
        *load,
        evaluated(approach),
        f"rounds: {approach.rounds}; round 1: {len(plan.cohort)} clients, {len(plan.blocks)} blocks of at most "
        f"{largest}, {approach.work(plan)} each",
        _blocks(approach, plan),
        "tokens of round 1 per worker: " + ", ".join(f"{w}: {cost:,.0f}" for w, cost in per_worker.items()),
        exchanged,
        *([] if plan.times is None else [_virtual_time(approach)]),
        f"bytes per round: {approach.bytes_down(plan):,} down, {approach.bytes_up(plan):,} up (protocol)",
        *rest,
    ]


def _blocks(approach: AnyApproach, plan: Plan) -> str:
    """How many clients the blocks of a round have, what decides it, and how many of those that train have none."""
    runtime = approach.config.runtime
    sizes = Counter(len(block.clients) for block in plan.blocks)
    shown = ", ".join(f"{count} of {size}" for size, count in sorted(sizes.items(), reverse=True))
    made = f"for {runtime.workers} workers (runtime.workers)"
    why = (
        "every client alone, whatever runtime.workers is" if approach.block_size == 1
        else f"made {made}" if runtime.block_size == "auto"
        else f"at most {approach.block_size} (runtime.block_size), evened out {made}"
    )  # fmt: skip
    idle, there = _idle(approach, plan)
    return f"clients of the blocks: {shown or 'none'}; {why}" + (f"; {idle} of {there} have none" if idle else "")


def _idle(approach: AnyApproach, plan: Plan) -> tuple[int, int]:
    """How many of those that train have no block in a round, and how many there are."""
    # A client that is alone may be trained by all ranks of its worker.
    each = 1 if approach.block_size == 1 else approach.topology.group_size
    there = each * len(approach.workers)
    return there - len({(block.worker, block.member if each > 1 else 0) for block in plan.blocks}), there


def idle_workers(approach: AnyApproach) -> list[str]:
    """A line where a launch has more workers than a synchronous round has work for; else nothing."""
    config = approach.config
    if config.mode != "federated" or config.federation.schedule.name != "synchronous":
        return []
    plan = approach.plan(1)
    idle, there = _idle(approach, plan)
    if not idle:
        return []
    those = "workers" if there == len(approach.workers) else "ranks of workers"
    smaller = "" if approach.block_size == 1 else "smaller blocks (runtime.block_size), "
    return [
        f"{idle} of {there} {those} have nothing to do in round 1: its {len(plan.training)} clients with work are in "
        f"blocks of at most {approach.block_size}; give more clients a round (federation.cohort_size), {smaller}"
        "or several runs at once (fedhpc sweep with the same ranks in its `launch`)"
    ]


def _virtual_time(approach: AnyApproach) -> str:
    """What the devices make of the first rounds."""
    plans = [approach.plan(round_) for round_ in range(1, min(approach.rounds, _ROUNDS) + 1)]
    seconds = np.mean([plan.times.round for plan in plans if plan.times is not None])
    asked, late = (sum(len(clients) for clients in of) for of in zip(*((p.cohort, p.late) for p in plans), strict=True))
    blocks = [len(block.clients) for plan in plans for block in plan.blocks]
    staleness = [steps for plan in plans for steps in plan.staleness]
    return (
        f"virtual time: {seconds:,.1f} s a round (mean of {len(plans)}), {late / asked:.0%} of the clients late, "
        f"staleness {np.mean(staleness):.2f}, {np.mean(blocks or [0]):.2f} clients in a block"
    )


def first_pair(tokenizer: Any, pairs: Examples) -> list[str]:
    """The two answers of the first pair behind their prompt, a line each."""
    return [f"{name}: {first_chat(tokenizer, pairs, row)}" for row, name in enumerate(("chosen", "rejected"))]


def first_chat(tokenizer: Any, examples: Examples, row: int = 0) -> str:
    """The first example (or another one) in one line, with the tokens that are learned between >>> and <<<."""
    ids, positions = examples.tokens(row), examples.supervised(np.array([row]))[1]
    is_learned = np.isin(np.arange(len(ids)), positions)
    pieces = []
    for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(is_learned)) + 1):
        text = tokenizer.decode(ids[part].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = text.replace("\n", "\\n")
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
        pieces.append(f">>>{text}<<<" if is_learned[part[0]] else text)
    return f"first training example, {len(positions)} of {len(ids)} tokens learned (>>> <<<): {''.join(pieces)}"


def _load_of_experts(approach: AnyApproach) -> list[str]:
    """Which share of the tokens goes to each expert, layer by layer, as one forward of the base alone has it."""
    load, base, train = approach.experts, approach.base, approach.data.train
    if load is None or not load.layers or not isinstance(base, CausalLM):
        return []
    examples = train if train.pairs is None else train.pairs
    batch = base.batch(examples, np.arange(min(_TRIED, len(examples))))
    with torch.no_grad(), load.of(batch):
        base.states(Attached(), batch)
    counts = load.counts.double()
    shares = (counts / counts.sum(dim=1, keepdim=True)).tolist()
    uneven = sorted(range(len(shares)), key=lambda i: -max(shares[i]))[:_LAYERS]
    of_layers = [f"experts of layer {load.layers[i]}: {_shares(shares[i])}" for i in sorted(uneven)]
    most = f", the {_LAYERS} most uneven of {len(shares)} layers" if len(shares) > _LAYERS else ""
    rows = f"{len(batch.supervised):,} training examples"
    return [f"load of experts: one trial forward of the base alone on {rows}; shares of what is sent{most}", *of_layers]


def _shares(shares: Sequence[float]) -> str:
    """The share of each expert of a layer; of many, the largest and the smallest."""
    if len(shares) <= _EXPERTS:
        return ", ".join(f"{share:.1%}" for share in shares)
    return f"{max(shares):.1%} to {min(shares):.1%} ({1 / len(shares):.1%} if even)"


def _rehearse_on_ranks(approach: AnyApproach, transport: Transport, plan: Plan) -> None:
    """Rehearse on rank 0, or on all ranks that train, whose layers it does not have. Collective."""
    if approach.topology.group_size == 1:
        on_server(transport, lambda: _rehearse(approach, plan))
        return
    if not transport.is_server:
        _rehearse(approach, plan)
    peaks = transport.gather_json(approach.peak)
    if peaks is not None:
        approach.peak = max((peak for peak in peaks if peak is not None), default=None)


def _rehearse(approach: AnyApproach, plan: Plan) -> None:
    """Try what a round does. UserError in one line, whatever it is that a model or a plugin raises."""
    try:
        approach.rehearse(plan)
    except (UserError, TransportError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"a step of round 1 fails: {type(error).__name__}: {first[:300]}",
            key="method.name", remedy="choose another method, another model or a smaller block",
        ) from error  # fmt: skip


def evaluated(approach: AnyApproach) -> str:
    """What the numbers of the run will be measured on, in one line."""
    options, sizes = approach.config.evaluation, (len(approach.data.validation), len(approach.data.test))
    validation, test = (
        f"all {size:,}" if limit is None or size <= limit else f"{limit:,} of {size:,}"
        for size, limit in zip(sizes, (options.max_examples, options.test_max_examples), strict=True)
    )
    needs = {registry.choice("metrics", name).needs for name in options.metrics}
    of_texts = " (texts: as many distinct prompts)" if "texts" in needs else ""
    return (
        f"evaluated: {validation} validation examples every {options.every} rounds and after the last; at the end "
        f"{test} test examples{of_texts}"
    )


def run_description(approach: AnyApproach, transport: Transport) -> RunDescription:
    """What the observers of a run know before its first round."""
    config, device = approach.config, approach.base.device
    identity: dict[str, Scalar] = {
        "block_size": approach.block_size,
        "fingerprint_data": data_fingerprint(approach),
        "fingerprint_model": approach.fingerprint,
    }
    return RunDescription(
        directory=config.run_dir,
        rounds=approach.rounds,
        metrics=[*map(registry.short_name, config.evaluation.metrics), *approach.more_metrics],
        attributes={
            "config": config.to_yaml(),
            "method": config.method.name,
            "mode": config.mode,
            "model": config.model.name,
            "seed": config.run.seed,
            "rounds": approach.rounds,
            "world_size": transport.world_size,
            "worker_ranks": approach.topology.group_size,
            "transport": transport.name,
            # A server on the CPU sees the workers' GPUs, or at least knows of them.
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else approach.placement.trains_on,
            **approach.attributes(),
            **identity,
        },
        identity={
            **identity,
            "working_directory": os.getcwd(),
            **({"plugins": used} if (used := plugins(config)) else {}),
        },
        partition=_partition(approach),
        columns=[*approach.schedule.columns, *approach.columns, *_of_steps(approach), *_of_groups(approach)],
    )


def _of_steps(approach: AnyApproach) -> list[str]:
    return ["rounds/block_occupancy"] if approach.trains_in_steps else []


def _of_groups(approach: AnyApproach) -> list[str]:
    return [f"rounds/{name}" for name in OF_LAUNCH] if approach.topology.group_size > 1 else []


def data_fingerprint(approach: AnyApproach) -> str:
    """A hash of all data that a resumed run must find again: the splits, and devices that are read from a file."""
    return " ".join(filter(None, (approach.data.fingerprint, approach.schedule.devices.fingerprint)))


def _partition(approach: AnyApproach) -> dict[str, Any]:
    population, train = approach.data.population, approach.data.train
    if population.assignment is None:
        return {}
    indices, offsets = population.assignment
    labelled = train.labels is not None
    return {
        "num_examples": np.diff(offsets),
        "client_names": population.names,
        "label_counts": population.label_counts(train) if labelled else None,
        "label_names": train.label_names if labelled else None,
        "indices": indices,
        "offsets": offsets,
    }


def forecast_lines(approach: AnyApproach, counts: Sequence[int]) -> list[str]:
    """Lines of --check on other numbers of ranks, from the times of the run in the run directory, if there is one."""
    config, path = approach.config, approach.config.run_dir / "results.h5"
    decide(config, config.run_dir, False, data_fingerprint(approach), approach.fingerprint)
    if not path.exists():
        return forecast.lines(approach, counts, None, 1)
    pilot = Results.read(path)
    return forecast.lines(approach, counts, pilot.rounds, int(pilot.attributes["world_size"]))
