"""Federated optimisation on quadratic clients, through the whole round loop, against plain numpy from the papers.

Client i has F_i(x) = 1/2 (x - b_i)' H_i (x - b_i): curvatures, optima, numbers of examples and of local steps all
differ. Only the ends of the program stand in: an objective whose loss is F_i of the owner of each example, and a method
whose payload is the one vector x. All between them is what every run uses. The references know of it only which
clients were in a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedhpc import federation
from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.approaches.inputs import Inputs
from fedhpc.config import Config
from fedhpc.data import Data, Examples, Population
from fedhpc.data.partitioners.base import Assignment
from fedhpc.data.tokens import Tokens, examples_from
from fedhpc.methods.base import Method, PerClient, Tensors
from fedhpc.models.base import Attached, Base, Batch
from fedhpc.models.footprint import Footprint
from fedhpc.objectives.base import Objective
from fedhpc.ranks.placement import Placement
from fedhpc.ranks.topology import Topology
from fedhpc.ranks.transport.base import Transport
from fedhpc.results.checkpoint import load_checkpoint
from fedhpc.training.memory import Memory
from fedhpc.training.moments import Moments
from fedhpc.training.optimizers.adamw import AdamW
from fedhpc.updates.layout import Layout
from tests.federations import final, on_threads, settings, table
from tests.tiny import TinyTokenizer

SIZE = 5  # of x
COUNTS = np.array([1, 3, 4, 6, 9, 2])  # examples of each client
BATCH, EPOCHS, LR = 2, 2, 0.2
STEPS = EPOCHS * -(-COUNTS // BATCH)  # 2 to 10, and not in proportion to the examples
ROUNDS, COHORT = 6, 4


def _problem() -> tuple[np.ndarray, np.ndarray]:
    """H (N, P, P) with eigenvalues from 0.2 to 3, and b (N, P)."""
    rng = np.random.default_rng(0)
    curvatures = []
    for _ in COUNTS:
        axes = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
        curvatures.append(axes @ np.diag(rng.uniform(0.2, 3.0, SIZE)) @ axes.T)
    return np.array(curvatures), rng.normal(size=(len(COUNTS), SIZE)) * 3


H, B = _problem()
START = np.array([4.0, -3.0, 2.0, -1.0, 0.5])


# ---------------------------------------------------------------- what stands in for model, method and data


@dataclass(frozen=True)
class Owners(Batch):
    """A batch of examples of which only the owners count."""

    owner: Tensor  # int64 (B,)


class NoModel(Base):
    """Nothing is asked of it."""

    task = "causal_lm"

    def _none(self, *_: Any) -> Any:
        raise AssertionError("a quadratic has no such thing")

    fits = join = sizes = max_positions = activations = _none


class Quadratic(Objective):
    """One supervised token per example, whose loss is F of its owner."""

    def num_supervised(self, examples: Examples, indices: np.ndarray) -> np.ndarray:
        return np.ones(len(indices), np.int64)

    def batch(self, base: Any, examples: Examples, indices: np.ndarray, clients: Any = None) -> Owners:
        owners, count = torch.from_numpy(examples.owners[indices].astype(np.int64)), len(indices)
        return Owners(torch.arange(count), self.num_supervised(examples, indices), count, count, owners)

    def losses(self, base: Any, attached: Attached, batch: Owners) -> Tensor:
        # Without a method, as the untouched base is evaluated, x = 0.
        x = torch.zeros(1, SIZE).double() if attached.embeddings is None else attached.embeddings[:, 0]
        apart = x - torch.from_numpy(B)[batch.owner]
        return 0.5 * torch.einsum("bp,bpq,bq->b", apart, torch.from_numpy(H)[batch.owner], apart)


class OneVector(Method):
    """The payload is x."""

    payload = Layout({"x": (SIZE,)})

    def initial(self) -> dict[str, Tensor]:
        return {"x": torch.from_numpy(START.copy())}

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        yield Attached(embeddings=trained["x"].index_select(0, rows).unsqueeze(1))

    def export(self, values: Tensors, path: Path) -> None:
        assert values["x"].shape == (SIZE,)


BESIDE = ("control", "moments", "server_momentum")


def _examples(owners: np.ndarray) -> Examples:
    count = len(owners)
    tokens = Tokens(np.zeros(count, np.int32), np.arange(count + 1), np.ones(count, np.int32))
    return examples_from(tokens, owners=owners.astype(np.int32))


def federated(
    folder: Path, ranks: int = 1, change: Callable[[Averaging], None] = lambda approach: None, **sections: Any
) -> list[dict[str, np.ndarray]]:
    """What the server holds after every round, or those since it was resumed: theta and what goes down beside it.

    change: what is done to the approach of each rank before the run.
    """
    raw: dict[str, Any] = {
        "model": {"dtype": "float64"},
        "partition": {"name": "iid", "num_clients": len(COUNTS)},
        "federation": {"rounds": ROUNDS, "cohort_size": COHORT},
        "evaluation": {"samples": 0},
        "client": {"optimizer": "sgd", "lr": LR, "batch_size": BATCH, "epochs": EPOCHS},
        "runtime": {"block_size": 3},
    }
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values} if isinstance(values, Mapping) else values
    if "steps" in raw["client"]:
        del raw["client"]["epochs"]
    task = inputs(settings(folder, raw), ranks)
    states: dict[int, dict[str, np.ndarray]] = {}

    def on_round(round_: int) -> None:
        if round_:
            found = load_checkpoint(folder)
            assert found is not None and found[1]["round"] == round_
            states[round_] = {name: found[0][name] for name in ("theta", *BESIDE) if name in found[0]}

    def run(transport: Transport) -> None:
        approach = quadratic(task)
        change(approach)
        federation.run(approach, transport, False, on_round if transport.rank == 0 else lambda round_: None)

    on_threads(ranks, run)
    assert sorted(states) == list(range(min(states), task.rounds + 1))
    return [states[round_] for round_ in sorted(states)]


def quadratic(task: Inputs) -> Averaging:
    """The approach that averages x."""
    return Averaging(task, OneVector(task.config.method, task.base, task.config.run.seed))


def inputs(config: Config, ranks: int = 1) -> Inputs:
    """The quadratic clients as what an approach is given."""
    model = SimpleNamespace(dtype=torch.float64, parameters=lambda: [])
    base = NoModel(model, TinyTokenizer(), torch.device("cpu"), "quadratic", "quadratic", 0, 0, 0, 0)
    train, others = _examples(np.repeat(np.arange(len(COUNTS)), COUNTS)), _examples(np.arange(len(COUNTS)))
    assignment = Assignment(np.arange(len(train)), np.concatenate([[0], np.cumsum(COUNTS)]))
    population = Population(len(COUNTS), config.run.seed, 0.0, assignment)
    return Inputs(
        config=config,
        base=base,
        objective=Quadratic(),
        data=Data(train, others, others, population, [], "quadratic"),
        rounds=config.federation.rounds,
        topology=Topology.of(ranks),
        label_targets=None,
        placement=Placement(),
        weights=Footprint(0, 0, 0),
        program_bytes=0,
    )


def cohorts(folder: Path) -> list[np.ndarray]:
    """The clients of every round."""
    clients = table(folder, "clients")
    rounds = clients["round"]
    return [clients["client_id"][rounds == r] for r in range(1, rounds.max() + 1)]


def agree(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], start: np.ndarray) -> None:
    """Equal after every round, relative to how far the reference is from the start."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        moved = np.linalg.norm(other - start)
        assert moved > 0.1, "the reference did not move"
        assert np.linalg.norm(one - other) / moved < 1e-9


# ---------------------------------------------------------------- the papers


def gradient(i: int, x: np.ndarray) -> np.ndarray:
    """Of F_i."""
    return H[i] @ (x - B[i])


def sgd(i: int, x: np.ndarray, steps: int) -> np.ndarray:
    """ClientUpdate of McMahan et al. 2017, algorithm 1."""
    for _ in range(steps):
        x = x - LR * gradient(i, x)
    return x


def fedavg(x: np.ndarray, groups: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """McMahan et al. 2017, algorithm 1: w <- sum_k n_k / m w_k, with m the examples of the round's clients."""
    for group in groups:
        m = COUNTS[group].sum()
        x = np.sum([COUNTS[i] / m * sgd(i, x, STEPS[i]) for i in group], axis=0)
        yield x


def mean_update(x: np.ndarray, group: np.ndarray) -> np.ndarray:
    """sum_k n_k / n (x - w_k) over the clients of a round."""
    n = COUNTS[group].sum()
    return np.sum([COUNTS[i] / n * (x - sgd(i, x, STEPS[i])) for i in group], axis=0)


def fedavgm(x: np.ndarray, groups: Sequence[np.ndarray], beta: float) -> Iterator[np.ndarray]:
    """Hsu et al. 2019, section 4.2: dw = sum_k n_k / n dw_k; v <- beta v + dw; w <- w - v."""
    v = np.zeros(SIZE)
    for group in groups:
        v = beta * v + mean_update(x, group)
        x = x - v
        yield x


def fedexp(x: np.ndarray, groups: Sequence[np.ndarray], eta: float, epsilon: float) -> Iterator[np.ndarray]:
    """Jhunjhunwala et al. 2023, algorithm 1, with clients weighted by their examples."""
    extrapolations = []
    for group in groups:
        p = COUNTS[group] / COUNTS[group].sum()
        deltas = np.array([sgd(i, x, STEPS[i]) - x for i in group])
        mean = p @ deltas
        extrapolations.append(max(1.0, p @ (deltas**2).sum(axis=1) / (2 * (mean @ mean + epsilon))))
        x = x + eta * extrapolations[-1] * mean
        yield x
    assert min(extrapolations) == 1 < max(extrapolations)


def diloco(x: np.ndarray, groups: Sequence[np.ndarray], eta: float, beta: float) -> Iterator[np.ndarray]:
    """Douillard et al. 2023, algorithm 1, with Nesterov's outer steps as in Sutskever et al. 2013, equations 3 and 4:
    y is where the clients start, p the point without the look ahead; p' = y - eta d(y), y' = p' + beta (p' - p).
    """
    p = x
    for group in groups:
        after = x - eta * mean_update(x, group)
        p, x = after, after + beta * (after - p)
        yield x


def fedopt(
    rule: str, x: np.ndarray, groups: Sequence[np.ndarray], eta: float, beta1: float, beta2: float, tau: float,
    corrected: bool,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Reddi et al. 2021, algorithm 2; corrected: with m and v as in Kingma and Ba 2015, algorithm 1, v from 0 on."""
    m, v = np.zeros(SIZE), np.full(SIZE, 0.0 if corrected else tau**2)
    for t, group in enumerate(groups, 1):
        delta = sum(sgd(i, x, STEPS[i]) - x for i in group) / len(group)
        m = beta1 * m + (1 - beta1) * delta
        if rule == "adagrad":
            v = v + delta**2
        elif rule == "yogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t)) if corrected else (m, v)
        x = x + eta * m_hat / (np.sqrt(v_hat) + tau)
        yield x


def fedprox(
    x: np.ndarray, groups: Sequence[np.ndarray], mu: float, solve: Callable[[int, np.ndarray, float], np.ndarray]
) -> Iterator[np.ndarray]:
    """Li et al. 2020, algorithm 2: w <- 1/K sum_k w_k, w_k the (inexact) minimiser of F_k(w) + mu/2 |w - w_t|^2."""
    for group in groups:
        x = sum(solve(i, x, mu) for i in group) / len(group)
        yield x


def by_steps(i: int, x: np.ndarray, mu: float) -> np.ndarray:
    """The proximal objective by the client's gradient steps."""
    w = x
    for _ in range(STEPS[i]):
        w = w - LR * (gradient(i, w) + mu * (w - x))
    return w


def exactly(i: int, x: np.ndarray, mu: float) -> np.ndarray:
    """The minimiser of the proximal objective."""
    return np.linalg.solve(H[i] + mu * np.eye(SIZE), H[i] @ B[i] + mu * x)


def fednova(x: np.ndarray, groups: Sequence[np.ndarray], rho: float, mu: float) -> Iterator[np.ndarray]:
    """Wang et al. 2020, equation 7 with d_i = G_i a_i / |a_i|_1 and tau_eff = sum_i p_i |a_i|_1.

    a_i as in section 3.1: local momentum rho, or the proximal term with alpha = eta mu.
    """
    for group in groups:
        p = COUNTS[group] / COUNTS[group].sum()
        directions, lengths = [], []
        for i in group:
            y, buffer, gradients = x, np.zeros(SIZE), []
            for _ in range(STEPS[i]):
                gradients.append(gradient(i, y))
                buffer = rho * buffer + gradients[-1]
                y = y - LR * (buffer + mu * (y - x))
            left = np.arange(STEPS[i])[::-1]  # steps after this one
            a = (1 - LR * mu) ** left if mu else (1 - rho ** (left + 1)) / (1 - rho)
            directions.append(np.array(gradients).T @ a / a.sum())
            lengths.append(a.sum())
        tau_eff = p @ lengths
        x = x - tau_eff * LR * (p @ directions)
        yield x


def scaffold(
    x: np.ndarray, groups: Sequence[np.ndarray], steps: Sequence[int], eta_g: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Karimireddy et al. 2020, algorithm 1 with option II: x and c after every round."""
    c, own = np.zeros(SIZE), np.zeros((len(COUNTS), SIZE))
    for group in groups:
        dx, dc = np.zeros(SIZE), np.zeros(SIZE)
        for i in group:
            y = x
            for _ in range(steps[i]):
                y = y - LR * (gradient(i, y) - own[i] + c)
            new = own[i] - c + (x - y) / (steps[i] * LR)
            dx, dc = dx + (y - x) / len(group), dc + (new - own[i]) / len(group)
            own[i] = new
        x, c = x + eta_g * dx, c + len(group) / len(COUNTS) * dc
        yield x, c


ADAMW = {"optimizer": "adamw", "weight_decay": 0.1, "beta1": 0.7, "beta2": 0.9, "eps": 1e-3}


def corrected(
    x: np.ndarray,
    groups: Sequence[np.ndarray],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    rate: Callable[[float], float],
    clip: float,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """SCAFFOLD for any optimizer of torch, which is given g - c_i + c: x and c after every round.

    c_i is the mean by learning rates of the client's clipped gradients g of its last round.
    """
    c, own = np.zeros(SIZE), np.zeros((len(COUNTS), SIZE))
    for t, group in enumerate(groups):
        ends, before = [], own.copy()
        for i in group:
            y = torch.from_numpy(x.copy()).requires_grad_()
            stepper, gradients = optimizer([y]), []
            rates = [rate((t + s / STEPS[i]) / len(groups)) for s in range(STEPS[i])]
            for eta in rates:
                g = gradient(i, y.detach().numpy())
                gradients.append(g * min(1.0, clip / (np.linalg.norm(g) + 1e-6)))
                y.grad = torch.from_numpy(gradients[-1] - before[i] + c)
                stepper.param_groups[0]["lr"] = eta
                stepper.step()
            own[i] = np.average(gradients, axis=0, weights=rates)
            ends.append(y.detach().numpy())
        x, c = np.average(ends, axis=0, weights=COUNTS[group]), c + (own - before).sum(axis=0) / len(COUNTS)
        yield x, c


def fedadamw(
    x: np.ndarray, groups: Sequence[np.ndarray], moments: str, beta: float, scaffold: bool = False
) -> Iterator[tuple[np.ndarray, list[np.ndarray], float]]:
    """AdamW whose moments are averaged: x, the exchanged moments and the steps in them, after every round.

    Every client continues from means m and v of x whose weights add up to 1, in which t steps are; the decays b. Of
    each of its steps the share beta is the direction of the last round. scaffold: x is the gradient - c_i + c.
    """
    both, b1, b2 = moments == "both", ADAMW["beta1"], ADAMW["beta2"]
    mean, square, t, delta = np.zeros(SIZE), np.zeros(SIZE), 0.0, np.zeros(SIZE)
    c, own = np.zeros(SIZE), np.zeros((len(COUNTS), SIZE))
    for group in groups:
        p = COUNTS[group] / COUNTS[group].sum()
        after: list[tuple[np.ndarray, ...]] = []
        before_round = own.copy()
        for i in group:
            begun, total = t if both else 0.0, np.zeros(SIZE)
            y, m, v = x, mean * (1 - b1**begun), square * (1 - b2**t)
            for k in range(1, STEPS[i] + 1):
                g = gradient(i, y) + (c - before_round[i])
                total += gradient(i, y)
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
                root = np.sqrt(v / (1 - b2 ** (t + k)))
                d = m / (1 - b1 ** (begun + k)) / (root + ADAMW["eps"]) + ADAMW["weight_decay"] * y
                y = y - LR * ((1 - beta) * d + beta * delta)
            v = v / (1 - b2 ** (t + STEPS[i]))
            own[i] = total / STEPS[i] if scaffold else 0.0
            after.append((y, m / (1 - b1 ** (begun + STEPS[i])), np.full(SIZE, v.mean()) if "block" in moments else v))
        before = x
        x, mean, square = (p @ np.array(rows) for rows in zip(*after, strict=True))
        delta = (before - x) / (LR * (p @ STEPS[group]))
        t = t + p @ STEPS[group]
        c = c + (own - before_round).sum(axis=0) / len(COUNTS)
        mean = mean if both else np.zeros(SIZE)
        yield x, [mean, square] if both else [square], t


def warmed_cosine(share: float) -> float:
    """The learning rate when a share of the run is done: a third of it from 0 up to LR, then down to LR / 10."""
    if share < 1 / 3:
        return LR * share * 3
    return LR / 10 + (LR - LR / 10) * (1 + np.cos(np.pi * (share - 1 / 3) * 1.5)) / 2


def fedcm(
    x: np.ndarray, groups: Sequence[np.ndarray], beta: float, rate: Callable[[float], float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Xu et al. 2021, algorithm 2 with alpha = 1 - beta and eta_g = K eta_l: x and Delta after every round.

    rate: of the share of the run that is done. Where sums of rates, K eta_l, differ, their mean is taken.
    """
    delta = np.zeros(SIZE)
    for t, group in enumerate(groups):
        p, ends, sums = COUNTS[group] / COUNTS[group].sum(), [], []
        for i in group:
            y, rates = x, [rate((t + s / STEPS[i]) / len(groups)) for s in range(STEPS[i])]
            for eta in rates:
                y = y - eta * ((1 - beta) * gradient(i, y) + beta * delta)
            ends.append(y)
            sums.append(sum(rates))
        delta = (x - p @ np.array(ends)) / (p @ sums)
        x = x - (p @ sums) * delta
        yield x, delta


def fedacg(x: np.ndarray, groups: Sequence[np.ndarray], momentum: float, mu: float) -> Iterator[np.ndarray]:
    """Kim et al. 2022 (arXiv 2201.03172), algorithm 1: the point x + lambda m at which clients of the next round begin.

    The clients' proximal term is around it.
    """
    m = np.zeros(SIZE)
    for group in groups:
        start = x + momentum * m
        m = momentum * m + sum(by_steps(i, start, mu) - start for i in group) / len(group)
        x = x + m
        yield x + momentum * m


def adamw_of_torch(x: np.ndarray, groups: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """One optimizer that never begins afresh, over the steps of one client after the other."""
    y = torch.from_numpy(x.copy()).requires_grad_()
    betas = (ADAMW["beta1"], ADAMW["beta2"])
    optimizer = torch.optim.AdamW([y], LR, betas, ADAMW["eps"], ADAMW["weight_decay"])
    for (i,) in groups:
        for _ in range(STEPS[i]):
            y.grad = torch.from_numpy(gradient(i, y.detach().numpy()))
            optimizer.step()
        yield y.detach().numpy().copy()


# ---------------------------------------------------------------- equal to them


def thetas(states: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    return [state["theta"] for state in states]


def test_fedavg(tmp_path: Path) -> None:
    found = thetas(federated(tmp_path))
    agree(found, list(fedavg(START, cohorts(tmp_path))), START)


def test_fedavgm(tmp_path: Path) -> None:
    found = thetas(federated(tmp_path, server={"optimizer": "sgd", "momentum": 0.7}))
    agree(found, list(fedavgm(START, cohorts(tmp_path), 0.7)), START)


def test_fedexp_on_any_number_of_ranks(tmp_path: Path) -> None:
    server = {"aggregator": "fedexp", "epsilon": 0.05, "lr": 0.9}
    alone, *others = (thetas(federated(tmp_path / str(ranks), ranks, server=server)) for ranks in (1, 2, 3))
    agree(alone, list(fedexp(START, cohorts(tmp_path / "1"), 0.9, 0.05)), START)
    for other in others:
        np.testing.assert_array_equal(other, alone)


AVERAGES: dict[str, tuple[dict[str, float], Callable[[int], np.ndarray]]] = {
    "ema": ({"ema": 0.7}, lambda t: 0.7 ** np.arange(t)[::-1]),
    "lawa": ({"lawa": 3}, lambda t: (np.arange(t)[::-1] < 3).astype(float)),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_the_states_is_what_is_evaluated_and_kept(tmp_path: Path, name: str) -> None:
    """Clients go on from the states themselves. A mean over rounds 1 to t is by the weights of each."""
    options, weights = AVERAGES[name]
    for ranks in (1, 2, 3):
        found = thetas(federated(tmp_path / str(ranks), ranks, evaluation={**options, "every": 1}))
        states = list(fedavg(START, cohorts(tmp_path / str(ranks))))
        agree(found, states, START)
        averages = [np.average(states[:t], axis=0, weights=weights(t)) for t in range(1, ROUNDS + 1)]
        losses = [np.mean([0.5 * (x - b) @ h @ (x - b) for h, b in zip(H, B, strict=True)]) for x in [START, *averages]]
        np.testing.assert_allclose(table(tmp_path / str(ranks), "rounds")["eval_loss"], losses, rtol=1e-9)
        agree([final(tmp_path / str(ranks))["x"]], averages[-1:], START)
        for one in ("x", "loss"):
            tables = [final(tmp_path / str(r)) if one == "x" else table(tmp_path / str(r), "test") for r in (1, ranks)]
            np.testing.assert_array_equal(tables[0][one], tables[1][one])


@pytest.mark.parametrize(
    ("server", "evaluation"),
    [
        ({"optimizer": "adam", "lr": 0.5, "bias_correction": True, "aggregator": "fedexp"}, {"ema": 0.7}),
        ({"momentum": 0.7, "nesterov": True}, {"lawa": 3}),
    ],
)
def test_a_server_that_was_resumed_goes_on_to_the_bit(tmp_path: Path, server: Any, evaluation: Any) -> None:
    whole = thetas(federated(tmp_path / "whole", 2, server=server, evaluation=evaluation))
    federated(tmp_path / "stopped", 1, server=server, evaluation=evaluation, federation={"rounds": 2})
    after = thetas(federated(tmp_path / "stopped", 3, server=server, evaluation=evaluation))
    np.testing.assert_array_equal(after[1:], whole[2:])  # without round 2, at which it goes on
    np.testing.assert_array_equal(final(tmp_path / "stopped")["x"], final(tmp_path / "whole")["x"])


def test_diloco(tmp_path: Path) -> None:
    found = thetas(federated(tmp_path, server={"optimizer": "sgd", "lr": 0.6, "momentum": 0.7, "nesterov": True}))
    agree(found, list(diloco(START, cohorts(tmp_path), 0.6, 0.7)), START)


@pytest.mark.parametrize(
    ("rule", "corrected"), [("adam", False), ("adam", True), ("yogi", False), ("yogi", True), ("adagrad", False)]
)
def test_fedopt(tmp_path: Path, rule: str, corrected: bool) -> None:
    decays = {} if rule == "adagrad" else {"beta2": 0.9, "bias_correction": corrected}
    options = {"beta1": 0.6, "tau": 0.05, **decays}
    found = thetas(federated(tmp_path, server={"optimizer": rule, "lr": 0.5, "weighting": "uniform", **options}))
    agree(found, list(fedopt(rule, START, cohorts(tmp_path), 0.5, 0.6, 0.9, 0.05, corrected)), START)


def test_fedprox_by_gradient_steps(tmp_path: Path) -> None:
    found = thetas(federated(tmp_path, client={"proximal": 0.8}, server={"weighting": "uniform"}))
    agree(found, list(fedprox(START, cohorts(tmp_path), 0.8, by_steps)), START)


def test_fedprox_solved_to_the_end(tmp_path: Path) -> None:
    """Steps without end reach the minimiser of the proximal objective, here in closed form."""
    client = {"proximal": 3.0, "steps": 30}  # each leaves at most 1 - LR (3 + 0.2) of the error
    found = thetas(federated(tmp_path, client=client, server={"weighting": "uniform"}))
    agree(found, list(fedprox(START, cohorts(tmp_path), 3.0, exactly)), START)


@pytest.mark.parametrize(("rho", "mu"), [(0.0, 0.0), (0.6, 0.0), (0.0, 0.8)])
def test_fednova(tmp_path: Path, rho: float, mu: float) -> None:
    client = {"momentum": rho, "proximal": mu}
    found = thetas(federated(tmp_path, client=client, server={"aggregator": "fednova"}))
    agree(found, list(fednova(START, cohorts(tmp_path), rho, mu)), START)


def test_scaffold(tmp_path: Path) -> None:
    found = federated(tmp_path, client={"scaffold": True}, server={"lr": 0.8, "weighting": "uniform"})
    wanted = list(scaffold(START, cohorts(tmp_path), STEPS, 0.8))
    agree(thetas(found), [x for x, _ in wanted], START)
    agree([state["control"] for state in found], [c for _, c in wanted], np.zeros(SIZE))


CORRECTED: dict[str, tuple[dict[str, Any], Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "sgd": ({"optimizer": "sgd"}, lambda y: torch.optim.SGD(y)),
    "nesterov": (
        {"optimizer": "sgd", "momentum": 0.6, "nesterov": True},
        lambda y: torch.optim.SGD(y, momentum=0.6, nesterov=True),
    ),
    "adamw": (ADAMW, lambda y: torch.optim.AdamW(y, LR, (0.7, 0.9), 1e-3, 0.1)),
}


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("optimizer", CORRECTED)
def test_scaffold_with_any_optimizer(tmp_path: Path, optimizer: str, scheduled: bool) -> None:
    """Also on three ranks and resumed on two; with a schedule the gradients are clipped, too."""
    options, of_torch = CORRECTED[optimizer]
    schedule = {"schedule": "cosine", "warmup": 1 / 3, "lr_min": LR / 10, "clip_norm": 2.0} if scheduled else {}
    client = {**options, "scaffold": True, **schedule}
    found = federated(tmp_path / "one", client=client)
    rate, clip = (warmed_cosine, 2.0) if scheduled else (lambda share: LR, np.inf)
    wanted = list(corrected(START, cohorts(tmp_path / "one"), of_torch, rate, clip))
    agree(thetas(found), [x for x, _ in wanted], START)
    agree([state["control"] for state in found], [c for _, c in wanted], np.zeros(SIZE))
    if not scheduled:  # a run with a schedule is not extended
        same_bits_elsewhere(tmp_path, found, client)
    rounds = table(tmp_path / "one", "rounds")
    for way in ("bytes_down", "bytes_up"):
        assert (rounds[way][1:] == 2 * 8 * SIZE * COHORT).all()


def test_scaffold_with_moments(tmp_path: Path) -> None:
    client = ADAMW | {"moments": "both", "scaffold": True}
    found = federated(tmp_path / "one", client=client)
    wanted = list(fedadamw(START, cohorts(tmp_path / "one"), "both", 0.0, scaffold=True))
    agree(thetas(found), [x for x, _, _ in wanted], START)
    for state, (_, values, t) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(state["moments"], [*np.concatenate(values), t], rtol=1e-9)
    same_bits_elsewhere(tmp_path, found, client)
    rounds = table(tmp_path / "one", "rounds")
    for way in ("bytes_down", "bytes_up"):
        assert (rounds[way][1:] == 8 * COHORT * (4 * SIZE + 1)).all()


def test_fedcm(tmp_path: Path) -> None:
    """On one rank, and on three and resumed on two."""
    client = {"server_momentum": 0.9}
    found = federated(tmp_path / "one", client=client)
    wanted = list(fedcm(START, cohorts(tmp_path / "one"), 0.9, lambda share: LR))
    agree(thetas(found), [x for x, _ in wanted], START)
    agree([state["server_momentum"] for state in found], [delta for _, delta in wanted], np.zeros(SIZE))
    same_bits_elsewhere(tmp_path, found, client)
    rounds = table(tmp_path / "one", "rounds")
    assert (rounds["bytes_down"][1:] == 2 * 8 * SIZE * COHORT).all()
    assert (rounds["bytes_up"][1:] == 8 * SIZE * COHORT).all()


def test_a_schedule_over_all_rounds_with_warm_up(tmp_path: Path) -> None:
    client = {"server_momentum": 0.3, "schedule": "cosine", "warmup": 1 / 3, "lr_min": LR / 10}
    found = thetas(federated(tmp_path, client=client))
    agree(found, [x for x, _ in fedcm(START, cohorts(tmp_path), 0.3, warmed_cosine)], START)


def test_fedacg_is_nesterov_of_the_server_with_fedprox(tmp_path: Path) -> None:
    server = {"momentum": 0.6, "nesterov": True, "weighting": "uniform"}
    found = thetas(federated(tmp_path, server=server, client={"proximal": 0.8}))
    agree(found, list(fedacg(START, cohorts(tmp_path), 0.6, 0.8)), START)


def same_bits_elsewhere(folder: Path, found: Sequence[Mapping[str, np.ndarray]], client: Mapping[str, Any]) -> None:
    """The run on three ranks, interrupted after three rounds, and resumed on two has the states `found`."""
    begun = federated(folder / "three", ranks=3, client=client, federation={"rounds": 3})
    resumed = federated(folder / "three", ranks=2, client=client)[1:]  # without the round at which it goes on
    for one, other in zip(found, [*begun, *resumed], strict=True):
        assert set(one) == set(other) > {"theta"}
        assert all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.mark.parametrize(("moments", "beta"), [("second", 0.0), ("second_by_block", 0.4), ("both", 0.4)])
def test_moments_from_round_to_round(tmp_path: Path, moments: str, beta: float) -> None:
    """On one rank, on three, and resumed on two; every moment by its formula."""
    client = ADAMW | {"moments": moments, "server_momentum": beta}
    found = federated(tmp_path / "one", client=client)
    wanted = list(fedadamw(START, cohorts(tmp_path / "one"), moments, beta))
    agree(thetas(found), [x for x, _, _ in wanted], START)
    for state, (_, values, t) in zip(found, wanted, strict=True):
        flat = [value[:1] if "block" in moments else value for value in values]
        np.testing.assert_allclose(state["moments"], [*np.concatenate(flat), t], rtol=1e-9)
    same_bits_elsewhere(tmp_path, found, client)
    rounds, numbers = table(tmp_path / "one", "rounds"), {"second": SIZE, "second_by_block": 1, "both": 2 * SIZE}
    sent = SIZE + numbers[moments] + 1  # the steps, too
    assert (rounds["bytes_up"][1:] == 8 * COHORT * sent).all()
    assert (rounds["bytes_down"][1:] == 8 * COHORT * (sent + (SIZE if beta else 0))).all()


def test_both_moments_of_one_client_a_round_are_one_adamw(tmp_path: Path) -> None:
    found = thetas(federated(tmp_path, client=ADAMW | {"moments": "both"}, federation={"cohort_size": 1}))
    agree(found, list(adamw_of_torch(START, cohorts(tmp_path))), START)


def test_blocks_of_moments() -> None:
    """The last axis of a tensor falls into blocks, of each of which one mean is sent."""
    optimizer = AdamW(AdamW.Options(beta2=0.5))
    layout = Layout({"w": (2, 4), "s": ()})
    moments = Moments(optimizer, "second_by_block", layout, {"w": 2, "s": 1}, torch.float64)
    square = torch.tensor([[1.0, 3.0, 5.0, 5.0, 5.0, 7.0, 1.0, 1.0, 6.0]], dtype=torch.float64)
    sent = moments.sent(moments.initial_vector(), Memory({"square": square}, torch.tensor([1])))
    assert sent.tolist() == [[8.0, 6.0, 12.0, 1.0]]  # corrected by 1 - 0.5
    after, memory = moments.memory(sent[0], 3)
    assert after.earlier == {"square": 1.0} and optimizer.earlier == {}
    assert memory.buffers["square"].tolist() == [[4.0, 4.0, 3.0, 3.0, 4.0, 4.0, 3.0, 3.0, 6.0]] * 3
    assert not memory.buffers["mean"].any() and not memory.count.any()


# ---------------------------------------------------------------- and where they end


def test_scaffold_reaches_the_optimum_that_fedavg_misses(tmp_path: Path) -> None:
    """FedAvg ends at a fixed point of its own, SCAFFOLD at the minimum of the mean of F_i, sampled or not."""
    steps, everybody = 8, len(COUNTS)
    optimum = np.linalg.solve(H.sum(axis=0), np.einsum("npq,nq->p", H, B))
    # A round of FedAvg leaves M_i = (1 - LR H_i)^steps of x - b_i, so it rests where sum_i (1 - M_i) (x - b_i) = 0.
    pulls = np.eye(SIZE) - np.array([np.linalg.matrix_power(np.eye(SIZE) - LR * h, steps) for h in H])
    fixed = np.linalg.solve(pulls.sum(axis=0), np.einsum("npq,nq->p", pulls, B))

    def end(name: str, rounds: int, cohort: int, scaffold: bool) -> np.ndarray:
        return federated(
            tmp_path / name,
            client={"steps": steps, "scaffold": scaffold},
            server={"weighting": "uniform"},
            federation={"rounds": rounds, "cohort_size": cohort},
            runtime={"block_size": everybody},
        )[-1]["theta"]

    def apart(x: np.ndarray, y: np.ndarray) -> float:
        """As a share of the way from the start to the optimum."""
        return float(np.linalg.norm(x - y) / np.linalg.norm(START - optimum))

    plain = end("fedavg", 15, everybody, scaffold=False)
    assert apart(plain, fixed) < 1e-6
    assert apart(plain, optimum) > 0.1
    assert apart(end("scaffold", 30, everybody, scaffold=True), optimum) < 1e-4
    assert apart(end("sampled", 30, COHORT, scaffold=True), optimum) < 0.01


def test_scaffold_leads_adamw_to_the_optimum(tmp_path: Path) -> None:
    """With rates that go down to 0: clients that take AdamW steps alone pull the mean elsewhere, with all the time."""
    optimum = np.linalg.solve(H.sum(axis=0), np.einsum("npq,nq->p", H, B))

    def apart(scaffold: bool) -> float:
        """As a share of the way from the start to the optimum."""
        end = federated(
            tmp_path / str(scaffold),
            client={"optimizer": "adamw", "steps": 8, "schedule": "linear", "scaffold": scaffold},
            server={"weighting": "uniform"},
            federation={"rounds": 40},
        )[-1]["theta"]
        return float(np.linalg.norm(end - optimum) / np.linalg.norm(START - optimum))

    assert apart(scaffold=False) > 0.3
    assert apart(scaffold=True) < 0.01
