"""What a round costs where no machine matters: operators and allocations of a step, collectives and bytes of a round.

Bounds are what it takes today: who makes it cheaper lowers them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.approaches.describe import describe, idle_workers
from fedhpc.approaches.prepare import prepare
from fedhpc.data.population import Population
from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.methods.base import Method
from fedhpc.models.base import Base
from fedhpc.participation.schedules.synchronous import Synchronous
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.training.block import Work
from fedhpc.training.forwards import Step, make_step
from tests import tiny
from tests.federations import federate, final, settings, write_texts
from tests.federations import tree as small

LENGTH, BATCH = 12, 2


class Counter(TorchDispatchMode):
    """Operators that reach a kernel, and those of them that take new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.allocations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        result = function(*args, **(kwargs or {}))
        made = {t.untyped_storage().data_ptr() for t in _tensors(result) if t.numel()}
        if not function.is_view:
            self.operators += 1
            self.allocations += len(made - given)
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def equal_examples(count: int) -> Examples:
    """Rows of one length, so that a step is one forward."""
    ids = np.random.default_rng(0).integers(3, tiny.VOCABULARY, count * LENGTH).astype(np.int32)
    return examples_from(Tokens(ids, np.arange(count + 1) * LENGTH, np.full(count, 4, dtype=np.int32)))


def made(method: str, **options: Any) -> tuple[Base, Method]:
    base = tiny.base("llama", torch.float32)
    cls: Any = registry.choice("methods", method)
    return base, cls(cls.Options(**options), base, 0)


PREFIX = {"method": "prefix", "num_virtual_tokens": 4, "init": "random"}
LORA = {"method": "lora", "rank": 2, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def of_step(setup: dict[str, Any], clients: int, **client: Any) -> np.ndarray:
    """Operators and allocations of one more step of a block of so many clients."""
    base, method = made(**setup)
    examples = equal_examples(clients * BATCH)
    works = [Work(c, np.arange(c * BATCH, (c + 1) * BATCH)) for c in range(clients)]
    start = method.payload.flatten(method.initial()).unsqueeze(0)
    counts = []
    for steps in (2, 3):
        given = {"optimizer": "sgd", "lr": 0.1, "batch_size": BATCH, "steps": steps, **client}
        config = configuration.resolve({"partition": {"name": "iid"}, "client": given})
        with Counter() as count:
            tiny.train(base, method, tiny.objective(base), start, works, examples, config, 1, 1)
        counts.append(np.array([count.operators, count.allocations]))
    return counts[1] - counts[0]


@pytest.mark.parametrize("setup", [PREFIX, LORA], ids=["prefix", "lora"])
def test_a_step_of_many_clients_has_the_operators_of_a_step_of_few(setup: dict[str, Any]) -> None:
    assert np.array_equal(of_step(setup, 2), of_step(setup, 8))


@pytest.mark.parametrize(
    ("setup", "client", "operators", "allocations"),
    [
        (PREFIX, {}, 316, 185),
        (LORA, {}, 451, 293),
        (PREFIX, {"optimizer": "adamw", "clip_norm": 1.0}, 336, 200),
    ],
    ids=["prefix", "lora", "prefix adamw"],
)
def test_operators_and_allocations_of_a_step(
    setup: dict[str, Any], client: dict[str, Any], operators: int, allocations: int
) -> None:
    found = of_step(setup, 4, **client)
    assert (found <= (operators, allocations)).all(), found


def rounds(folder: Path, run: Path, ranks: int, cohort: int, number: int) -> tuple[int, dict[str, np.ndarray]]:
    """Collectives of rank 0 in the whole run, and the columns of /rounds."""
    tree = {
        "model": {"name": str(folder / "model")},
        "data": {"source": str(folder), "max_length": 96},
        "partition": {"name": "virtual", "num_clients": 1000, "examples_per_client": 2},
        "method": {"name": "prefix", "num_virtual_tokens": 4},
        "federation": {"rounds": number, "cohort_size": cohort},
        "client": {"optimizer": "sgd", "lr": 0.1, "batch_size": 2, "steps": 1},
        "evaluation": {"every": number, "metrics": ["loss"], "max_examples": 2, "samples": 0},
    }
    collectives = federate(settings(run, tree), ranks)
    with h5py.File(run / "results.h5") as file:
        return collectives, {name: column[1:] for name, column in file["rounds"].items()}


def test_collectives_and_bytes_of_a_round(tmp_path: Path) -> None:
    folder, payload = write_texts(tmp_path), 4 * 2 * 2 * 2 * 8  # tokens, layers, keys and values, heads, head_dim
    for ranks, cohort in ((2, 3), (3, 6)):
        few, _ = rounds(folder, tmp_path / f"{ranks}-few", ranks, cohort, 1)
        many, columns = rounds(folder, tmp_path / f"{ranks}-many", ranks, cohort, 3)
        # The state down, who is in, the exponents, the sum, the reports.
        assert many - few <= 2 * 5
        assert (columns["bytes_down"] == 4 * payload * cohort).all()
        assert (columns["bytes_up"] == 4 * payload * cohort).all()
        # Each rank: 4 bytes a parameter down, 8 up; 8 and 72 a client; one exponent; 72 for the report of each rank.
        each = 12 * payload + 80 * cohort + 8 + 72 * ranks
        assert (columns["wire_bytes"] <= ranks * each).all(), columns["wire_bytes"]


def test_a_plan_draws_each_client_once() -> None:
    drawn: list[int] = []

    def draw(client: int) -> np.ndarray:
        drawn.append(client)
        return np.arange(4)

    config = configuration.resolve(
        {"partition": {"name": "virtual", "num_clients": 1000}, "federation": {"cohort_size": 20}}
    )
    plan = Synchronous(config, Population(1000, 0, 0.0, draw=draw, drawn=4), equal_examples(4), [0], 8).plan(1)
    assert sorted(drawn) == sorted(plan.cohort)


@pytest.mark.parametrize(
    ("runtime", "shapes", "said"),
    [
        ({}, [2] * 5, "5 of 2; made for 8 workers (runtime.workers)"),
        ({"workers": 2}, [5, 5], "2 of 5; made for 2 workers (runtime.workers); 1 of 3 have none"),
        (
            {"workers": 2, "block_size": 4},
            [3, 3, 2, 2],
            "2 of 3, 2 of 2; at most 4 (runtime.block_size), evened out for 2 workers (runtime.workers)",
        ),
        ({"workers": 2, "block_size": 1}, [1] * 10, "10 of 1; every client alone, whatever runtime.workers is"),
    ],
    ids=["default", "two workers", "two workers, blocks of four", "alone"],
)
def test_forwards_of_ten_clients_by_the_workers_that_blocks_are_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: dict[str, int], shapes: list[int], said: str
) -> None:
    """A round of equal clients has a forward for each block, and no other bits on more ranks or fewer."""
    forwards: list[int] = []  # clients in each

    def counted(*given: Any, **named: Any) -> Step:
        step = make_step(*given, **named)
        forwards.extend(len(forward.clients.unique()) for forward in step.forwards)
        return step

    monkeypatch.setattr("fedhpc.training.block.make_step", counted)
    folder = write_texts(tmp_path)
    row = (folder / "train.jsonl").read_text().splitlines(keepends=True)[0]
    (folder / "train.jsonl").write_text(row * 60)
    tree = {
        "model": {"name": str(folder / "model")},
        "data": {"source": str(folder), "max_length": 96},
        "partition": {"name": "iid", "num_clients": 20},
        "method": {"name": "prefix", "num_virtual_tokens": 4},
        "federation": {"rounds": 1, "cohort_size": 10},
        "client": {"optimizer": "sgd", "lr": 10.0, "batch_size": 3, "steps": 1},
        "evaluation": {"metrics": ["loss"], "max_examples": 2, "samples": 0},
        "runtime": runtime,
    }
    payloads = []
    for ranks in (1, 2, 3):
        forwards.clear()
        federate(settings(tmp_path / str(ranks), tree), ranks)
        assert sorted(forwards, reverse=True) == shapes
        payloads.append({name: values.tobytes() for name, values in final(tmp_path / str(ranks)).items()})
    assert payloads[0] == payloads[1] == payloads[2]
    transport = LoopbackTransport()
    transport.world_size = 4
    approach = prepare(settings(tmp_path / "check", tree), transport, Launch(), write_cache=False)
    assert f"clients of the blocks: {said}" in describe(approach, LoopbackTransport())
    line = "1 of 3 workers have nothing to do in round 1: its 10 clients with work are in blocks of at most 5; "
    idle = idle_workers(approach)
    assert len(idle) == int("have none" in said) and all(one.startswith(line) for one in idle)


def test_a_launch_with_too_many_workers_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, line = write_texts(tmp_path), "2 of 3 workers have nothing to do in round 1: its 2 clients"
    evaluation = {"metrics": ["loss"], "max_examples": 2, "test_max_examples": 2, "samples": 0}
    own = {"federation": {"rounds": 1, "cohort_size": 2}, "client": {"steps": 1}, "evaluation": evaluation}
    for name, changes in {"few": {}, "centralized": {"mode": "centralized"}}.items():
        federate(settings(tmp_path / name, {**small(folder, **own), **changes}), 4)
        assert (line in capsys.readouterr().out) == (name == "few")


def test_a_plan_seeds_its_virtual_clients_together(monkeypatch: pytest.MonkeyPatch) -> None:
    virtual = {"name": "virtual", "num_clients": 1000, "examples_per_client": 3}
    config = configuration.resolve({"partition": virtual, "federation": {"cohort_size": 100}})
    examples, seed = equal_examples(20), np.random.SeedSequence
    schedule = Synchronous(config, Population.divided(config, examples), examples, [0], 8)
    seeds: list[Any] = []
    monkeypatch.setattr(np.random, "SeedSequence", lambda words: seeds.append(words) or seed(words))
    assert len(schedule.plan(1).training) == 100
    assert len(seeds) == 1  # the cohort's
