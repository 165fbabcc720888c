"""What a run says of itself before it begins: the first line of the log, and the plan that --check prints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedhpc import data, registry
from fedhpc.approaches.base import AnyApproach
from fedhpc.config import plugins
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.participation import forecast
from fedhpc.participation.plan import Plan
from fedhpc.participation.sampling import COHORT_SIZE, cohort_size
from fedhpc.ranks.transport.base import Transport
from fedhpc.ranks.verdict import on_server
from fedhpc.results.record import RunDescription, Scalar
from fedhpc.results.results_file import Results
from fedhpc.results.resume import decide

_ROUNDS = 50  # whose plans are looked at for the virtual time
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
    per_worker = {
        approach.topology.speaker(w): sum(b.cost for b in plan.blocks if b.worker == w) for w in approach.workers
    }
    largest = max((len(b.clients) for b in plan.blocks), default=0)
    on_server(transport, lambda: _rehearse(approach, plan))
    exchanged, *rest = approach.details(plan)
    return [
        headline(approach, transport),
        *approach.messages,
        *data.describe(splits.population, splits.train),
        f"examples: {len(splits.train):,} training, {len(splits.validation):,} validation, {len(splits.test):,} test",
        *([] if splits.train.spans is None else [first_chat(approach.base.tokenizer, splits.train)]),
        *([] if splits.train.pairs is None else first_pair(approach.base.tokenizer, splits.train.pairs)),
        evaluated(approach),
        f"rounds: {approach.rounds}; round 1: {len(plan.cohort)} clients, {len(plan.blocks)} blocks of at most "
        f"{largest}, {approach.work(plan)} each",
        "tokens of round 1 per worker: " + ", ".join(f"{w}: {cost:,.0f}" for w, cost in per_worker.items()),
        exchanged,
        *([] if plan.times is None else [_virtual_time(approach)]),
        f"bytes per round: {approach.bytes_down(plan):,} down, {approach.bytes_up(plan):,} up (protocol)",
        *rest,
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


def _rehearse(approach: AnyApproach, plan: Plan) -> None:
    """Try what a round does. UserError in one line, whatever it is that a model or a plugin raises."""
    try:
        approach.rehearse(plan)
    except UserError:
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
            "world_size": transport.world_size,
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
        columns=[*approach.schedule.columns, *approach.columns],
    )


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
