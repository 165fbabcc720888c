"""What a local step is: its learning rate, its batches and the forwards that they are cut into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.approaches.inputs import _refuse_split_steps
from fedhpc.approaches.prepare import prepare
from fedhpc.errors import UserError
from fedhpc.methods.base import Method
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.training.block import Work, train_block
from fedhpc.training.forwards import cut_further
from fedhpc.training.schedule import batches, learning_rates
from tests import tiny
from tests.federations import federate, final, settings, table, tree, write_texts

LR, FLOOR, ROUNDS, STEPS = 0.3, 0.02, 7, 5


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def resolved(**client: Any) -> configuration.Config:
    return configuration.resolve({"partition": {"name": "iid"}, "client": client})


# ---------------------------------------------------------------- learning rates


def rates_of_torch(make: Any, count: int) -> list[float]:
    """What a scheduler of torch.optim gives in `count` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler, rates = make(optimizer), []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(**client: Any) -> list[float]:
    """The rates of all steps of a run, one after the other."""
    section = resolved(lr=LR, lr_min=FLOOR, **client).client
    return [rate for round_ in range(1, ROUNDS + 1) for rate in learning_rates(section, round_, ROUNDS, STEPS)]


def linear(count: int) -> Any:
    return lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, FLOOR / LR, count)


def cosine(count: int) -> Any:
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count, FLOOR)


@pytest.mark.parametrize(("schedule", "scheduler"), [("linear", linear), ("cosine", cosine)])
def test_rates_are_those_of_torch(schedule: str, scheduler: Any) -> None:
    count = ROUNDS * STEPS
    np.testing.assert_allclose(ours(schedule=schedule), rates_of_torch(scheduler(count), count), rtol=1e-12)
    by_round = rates_of_torch(scheduler(ROUNDS), ROUNDS)
    np.testing.assert_allclose(ours(schedule=schedule, schedule_per="round"), np.repeat(by_round, STEPS), rtol=1e-12)


def test_a_warm_up_rises_from_zero_to_the_cosine_with_a_floor() -> None:
    """As in transformers, whose total may not be a multiple of the warm-up."""
    count = ROUNDS * STEPS
    wanted = rates_of_torch(lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 7, count, min_lr=FLOOR), count)
    np.testing.assert_allclose(ours(schedule="cosine", warmup=7 / count), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ({"lr_min": 0.01}, "client.lr_min is of a learning rate that goes down"),
        ({"schedule_per": "round"}, "client.schedule_per is of a learning rate that goes down"),
        ({"lr": 0.01, "schedule": "cosine", "lr_min": 0.1}, "client.lr_min 0.1 is more than client.lr 0.01"),
        ({"schedule": "cosine", "schedule_per": "round", "warmup": 0.1}, "client.warmup begins with a rate of 0"),
        ({"micro_batch": 9, "batch_size": 8}, "client.micro_batch 9 is more than client.batch_size 8"),
    ],
)
def test_keys_that_do_nothing_are_refused(client: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(**client)


# ---------------------------------------------------------------- batches and forwards


def trained(family: str, method: str, client: dict[str, Any], works: list[Work] | None = None) -> Any:
    """Local training of three clients of unequal size, on a tiny model in 64 bits."""
    base, data = tiny.base(family), tiny.examples()
    options = {"prefix": {"num_virtual_tokens": 3, "init_text": "some words"}, "lora": {"rank": 2, "dropout": 0.2}}
    made: Method = registry.choice("methods", method)(registry.options("methods", method)(**options[method]), base, 0)
    start = made.payload.flatten({n: t.double() for n, t in made.initial().items()}).unsqueeze(0)
    works = works or [Work(i, np.arange(i * 20, i * 20 + size)) for i, size in enumerate((20, 7, 13))]
    settings = resolved(optimizer="sgd", lr=0.5, clip_norm=1.0, epochs=2, **client)
    return tiny.train(base, made, tiny.objective(base), start, works, data, settings)


def test_a_step_on_several_batches_has_all_their_examples() -> None:
    large, accumulated = (
        resolved(**client).client
        for client in ({"batch_size": 16, "steps": 5}, {"batch_size": 4, "gradient_accumulation_steps": 4, "steps": 5})
    )
    for one, other in zip(batches(37, large, 0, 2, 1), batches(37, accumulated, 0, 2, 1), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("gpt2", "prefix")])
@pytest.mark.parametrize(
    "cut", [{"batch_size": 2, "gradient_accumulation_steps": 4}, {"batch_size": 8, "micro_batch": 3}]
)
def test_a_step_in_parts_is_the_step(family: str, method: str, cut: dict[str, Any]) -> None:
    """Dropout too: it is drawn for an example of a step, whatever forward it is in."""
    parts, large = trained(family, method, cut), trained(family, method, {"batch_size": 8})
    assert float(torch.linalg.vector_norm(large.updates)) > 0.01
    np.testing.assert_allclose(parts.updates, large.updates, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(parts.steps, large.steps)
    np.testing.assert_allclose(parts.loss_sum, large.loss_sum, rtol=1e-12)


def test_forwards_have_no_more_rows_than_allowed() -> None:
    assert cut_further([0, 5, 6, 13], 3) == [0, 2, 5, 6, 8, 10, 13]
    assert cut_further([0, 5, 6, 13], 7) == [0, 5, 6, 13]
    assert cut_further([0], 7) == [0]


@pytest.mark.parametrize("changes", [{"micro_batch": 4}, {"gradient_accumulation_steps": 2}])
def test_examples_that_are_compared_stay_together(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"client\..*compares all examples of a step"):
        _refuse_split_steps(resolved(**changes).client)


def crowded(monkeypatch: pytest.MonkeyPatch, fits: int) -> list[tuple[int, int]]:
    """Let forwards of more than `fits` examples run out of memory; clients and examples of each that were tried."""
    tried: list[tuple[int, int]] = []

    def train(
        base: Any,
        method: Any,
        objective: Any,
        start: Any,
        works: Any,
        examples: Any,
        local: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        tried.append((len(works), local.examples_at_once))
        if len(works) * local.examples_at_once > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_block(base, method, objective, start, works, examples, local, *rest, **more)

    for file in ("local", "personal"):
        monkeypatch.setattr(f"fedhpc.approaches.averaging.{file}.train_block", train)
    return tried


def test_a_client_without_memory_goes_on_with_smaller_forwards(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "client": {"batch_size": 8},
        "federation": {"rounds": 2, "cohort_size": 2},
        "runtime": {"block_size": 2},
    }
    federate(settings(tmp_path / "whole", tree(texts, **changes)))
    tried = crowded(monkeypatch, 3)
    federate(settings(tmp_path / "parts", tree(texts, **changes)))
    assert tried == [(2, 8), (1, 8), (1, 4), (1, 2), (1, 2), (1, 2), (1, 2)]
    told = table(tmp_path / "parts", "events")
    assert list(told["message"][told["kind"] == "memory"]) == [
        "rank 0: its memory is enough for 1 clients at a time; larger blocks train in parts",
        "rank 0: its memory is enough for 2 examples of a client at a time; larger batches train in parts",
    ]
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=0, atol=1e-6)


def test_check_says_that_steps_will_be_cut(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"client": {"batch_size": 8}, "federation": {"cohort_size": 2}, "runtime": {"block_size": 2}}
    approach = prepare(settings(tmp_path, tree(texts, **changes)), LoopbackTransport(), Launch(), False)
    plan = approach.plan(1)
    approach.rehearse(plan)
    assert not [line for line in approach.details(plan) if "in parts" in line]
    tried = crowded(monkeypatch, 3)
    approach.rehearse(plan)
    assert tried == [(2, 8), (1, 8), (1, 4), (1, 2), (1, 2)]
    assert approach.details(plan)[-1] == (
        "memory is enough for 1 clients, and 2 examples of a client at a time: larger blocks train in parts"
    )


def test_fine_tuning_goes_on_with_what_fits(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "client": {"batch_size": 8},
        "federation": {"cohort_size": 2},
        "runtime": {"block_size": 2},
        "personalization": {"finetune_steps": 1},
        "evaluation": {"client_fraction": 0.2, "max_clients": 3},
    }
    federate(settings(tmp_path / "whole", tree(texts, **changes)))
    tried = crowded(monkeypatch, 3)
    federate(settings(tmp_path / "parts", tree(texts, **changes)))
    assert tried == [(2, 8), (1, 8), (1, 4), *[(1, 2)] * 5]
    whole, parts = (table(tmp_path / name, "client_eval")["loss_personal"] for name in ("whole", "parts"))
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)
