"""Aggregators and transforms that the package does not have, through the whole round loop, against plain numpy.

They are what Cohort and Transform were made for: rules over whole vectors (Krum, geometric median), over coordinates
(trimmed mean), a transform with memory, draws and bytes of its own (8 bits with error feedback), and server halves.
The clients are the quadratic ones of test_quadratic.py. Each run also has the same bits on 3 ranks and after it died
in the middle of a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.rng import generator
from fedhpc.server.aggregators.base import Aggregator
from fedhpc.updates.cohort import Cohort
from fedhpc.updates.layout import Layout
from fedhpc.updates.pipeline import Pipeline
from fedhpc.updates.transforms.base import Transform, TransformContext
from tests.federations import table
from tests.test_quadratic import COHORT, ROUNDS, SIZE, START, STEPS, agree, cohorts, federated, sgd, thetas

# ---------------------------------------------------------------- aggregators


class TrimmedMean(Aggregator):
    """The mean of every coordinate without its largest and smallest values (Yin et al. 2018, arXiv 1803.01498)."""

    def combine(self, cohort: Cohort) -> Tensor:
        cut = int(self.options.trim * len(cohort))
        return cohort.by_coordinate(lambda values: values.sort(dim=0).values[cut : len(values) - cut].mean(dim=0))


class Krum(Aggregator):
    """The update that is closest to its neighbours (Blanchard et al. 2017, NeurIPS, section 4)."""

    def combine(self, cohort: Cohort) -> Tensor:
        gram = cohort.gram().numpy()
        distances = np.sort(gram.diagonal()[:, None] + gram.diagonal() - 2 * gram, axis=1)
        scores = distances[:, 1 : len(cohort) - self.options.byzantine - 1].sum(axis=1)
        return cohort.weighted_sum(np.eye(len(cohort))[scores.argmin()])


class GeometricMedian(Aggregator):
    """The point with the smallest sum of distances to the updates, by Weiszfeld steps (RFA, arXiv 1912.13445)."""

    def combine(self, cohort: Cohort) -> Tensor:
        gram, shares = cohort.gram().numpy(), cohort.shares / cohort.shares.sum()
        weights = shares
        for _ in range(self.options.iterations):
            squares = gram.diagonal() - 2 * gram @ weights + weights @ gram @ weights
            weights = shares / np.sqrt(np.maximum(squares, 1e-12))
            weights = weights / weights.sum()
        return cohort.weighted_sum(weights)


def trimmed_mean(updates: np.ndarray) -> np.ndarray:
    return np.sort(updates, axis=0)[1:-1].mean(axis=0)


def krum(updates: np.ndarray) -> np.ndarray:
    """With one Byzantine client: the sum over the n - f - 2 closest."""
    apart = np.linalg.norm(updates[:, None] - updates, axis=2) ** 2
    nearest = [np.sort(np.delete(row, i))[: len(updates) - 1 - 2] for i, row in enumerate(apart)]
    return updates[np.argmin([row.sum() for row in nearest])]


def geometric_median(updates: np.ndarray) -> np.ndarray:
    z = updates.mean(axis=0)
    for _ in range(20):
        weights = 1 / np.linalg.norm(updates - z, axis=1)
        z = weights @ updates / weights.sum()
    return z


# ---------------------------------------------------------------- transforms


class EightBits(Transform):
    """Whole numbers of 8 bits, rounded at random, with error feedback (Karimireddy et al. 2019, arXiv 1901.09847)."""

    keeps = ("residual",)

    def on_client(self, updates: Tensor, context: TransformContext) -> Tensor:
        wanted = updates + context.tensors["residual"]
        step = wanted.abs().amax(dim=1, keepdim=True) / 127
        draws = np.stack([context.generator("rounding", client).random(updates.shape[1]) for client in context.clients])
        sent = (wanted / step + torch.from_numpy(draws)).floor() * step
        context.tensors["residual"] = wanted - sent
        context.bytes_up[:] = updates.shape[1] + 8  # and the step
        return sent


class Noise(Transform):
    """Adds normal noise to the aggregate, and counts in how many rounds it has done so."""

    keeps_on_server = ("rounds",)

    def shape(self, name: str, layout: Layout) -> tuple[int, ...]:
        return ()

    def on_server(self, total: Tensor, context: TransformContext) -> Tensor:
        context.tensors["rounds"] = context.tensors["rounds"] + 1
        scale = 0.01 * float(context.tensors["rounds"]) * len(context.clients)
        return total + scale * torch.from_numpy(context.generator("noise").normal(size=len(total)))


class Halve(Transform):
    """Halves the aggregate."""

    def on_server(self, total: Tensor, context: TransformContext) -> Tensor:
        return total / 2


def quantized(groups: Sequence[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """FedAvg with uniform weights of what EightBits, Noise and Halve, in this order, make of the updates."""
    x, residuals = START, {i: np.zeros(SIZE) for group in groups for i in group}
    for round_, group in enumerate(groups, 1):
        sent = []
        for i in group:
            wanted = x - sgd(i, x, STEPS[i]) + residuals[i]
            step = np.abs(wanted).max() / 127
            draws = generator(seed, "transforms.0.rounding", round_, i).random(SIZE)
            sent.append(np.floor(wanted / step + draws) * step)
            residuals[i] = wanted - sent[-1]
        total = np.mean(sent, axis=0) / 2
        noise = generator(seed, "transforms.1.noise", round_).normal(size=SIZE)
        x = x - (total + 0.01 * round_ * len(group) * noise)
        yield x


# ---------------------------------------------------------------- runs


class Died(Exception):  # noqa: N818  not an error of the program
    """The server ended in the middle of a round, when clients had written what they keep."""


Change = Callable[[Averaging], None]


def dying(change: Change) -> Change:
    """The same run, which ends in its fourth round."""

    def changed(approach: Averaging) -> None:
        change(approach)
        step = approach.step

        def stop(state: Any, plan: Any, combined: Any) -> float:
            if plan.round == 4:
                raise Died
            return step(state, plan, combined)

        approach.step = stop  # type: ignore[method-assign]

    return changed


def in_every_way(folder: Path, change: Change, **sections: Any) -> list[np.ndarray]:
    """theta after every round, found to be the same on 3 ranks and in a run that was resumed."""
    sections = {"server": {"weighting": "uniform"}, "runtime": {"block_size": 2}, **sections}
    alone = thetas(federated(folder / "1", 1, change, **sections))
    several = thetas(federated(folder / "3", 3, change, **sections))
    with pytest.raises(Died):
        federated(folder / "resumed", 1, dying(change), **sections)
    resumed = thetas(federated(folder / "resumed", 3, change, **sections))
    assert len(resumed) == ROUNDS - 2  # from the third, after which it died
    for one, other in zip([*alone, *alone[2:]], [*several, *resumed], strict=True):
        assert one.tobytes() == other.tobytes()
    return alone


@pytest.mark.parametrize(
    ("aggregator", "options", "rule"),
    [
        (TrimmedMean, {"trim": 0.25}, trimmed_mean),
        (Krum, {"byzantine": 1}, krum),
        (GeometricMedian, {"iterations": 20}, geometric_median),
    ],
)
def test_an_aggregator(
    tmp_path: Path, aggregator: type[Aggregator], options: dict[str, Any], rule: Callable[[np.ndarray], np.ndarray]
) -> None:
    def change(approach: Averaging) -> None:
        approach.aggregation.aggregator = aggregator(SimpleNamespace(**options))

    found, x, wanted = in_every_way(tmp_path, change), START, []
    for group in cohorts(tmp_path / "1"):
        x = x - rule(np.array([x - sgd(i, x, STEPS[i]) for i in sorted(group)]))
        wanted.append(x)
    agree(found, wanted, START)


def test_transforms_with_memory_draws_bytes_and_server_halves(tmp_path: Path) -> None:
    def change(approach: Averaging) -> None:
        transforms = [EightBits(None), Noise(None), Halve(None)]
        approach.sending.pipeline = Pipeline(transforms, approach.config.run.seed, approach.split.shared, torch.float64)

    found = in_every_way(tmp_path, change)
    agree(found, list(quantized(cohorts(tmp_path / "1"), 0)), START)
    for way in ("1", "3", "resumed"):
        rounds = table(tmp_path / way, "rounds")
        assert (rounds["bytes_up"][1:] == COHORT * (SIZE + 8)).all()
        assert (rounds["bytes_down"][1:] == COHORT * SIZE * 8).all()


def test_a_rejected_client_keeps_what_it_had(tmp_path: Path) -> None:
    """Its update is not finite in round 2, so its residual stays that of round 1."""

    class Once(EightBits):
        def on_client(self, updates: Tensor, context: TransformContext) -> Tensor:
            sent = super().on_client(updates, context)
            return sent if context.round != 2 else sent / 0

    def change(approach: Averaging) -> None:
        approach.sending.pipeline = Pipeline(
            [Once(None)], approach.config.run.seed, approach.split.shared, torch.float64
        )

    everybody = {"federation": {"rounds": 3, "cohort_size": 6}, "server": {"weighting": "uniform"}}
    found = thetas(federated(tmp_path, 2, change, **everybody))
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])
    assert (table(tmp_path, "rounds")["rejected"] == [0, 0, 6, 0]).all()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda updates, context: updates[:1], "changed the shape of the updates"),
        (lambda updates, context: context.tensors.update(other=updates) or updates, "kept other tensors than it says"),
    ],
)
def test_a_transform_that_breaks_its_word_is_an_error(broken: Callable[..., Tensor], said: str) -> None:
    transform = EightBits(None)
    transform.on_client = broken  # type: ignore[method-assign]
    pipeline = Pipeline([transform], 0, Layout({"x": (3,)}), torch.float32)
    kept = {name: torch.zeros(2, 3) for name in pipeline.keeps}
    with pytest.raises(ValueError, match=f"EightBits {said}"):
        pipeline.on_clients(torch.ones(2, 3), 1, [4, 5], kept, np.zeros(2, np.int64))
