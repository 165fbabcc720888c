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
from fedhpc.data import Data, Examples, Population
from fedhpc.data.partitioners.base import Assignment
from fedhpc.data.tokens import Tokens, examples_from
from fedhpc.methods.base import Method, PerClient, Tensors
from fedhpc.models.base import Attached, Base, Batch
from fedhpc.objectives.base import Objective
from fedhpc.ranks.placement import Placement
from fedhpc.ranks.topology import Topology
from fedhpc.ranks.transport.base import Transport
from fedhpc.results.checkpoint import load_checkpoint
from fedhpc.updates.layout import Layout
from tests.federations import on_threads, settings, table
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


def _examples(owners: np.ndarray) -> Examples:
    count = len(owners)
    tokens = Tokens(np.zeros(count, np.int32), np.arange(count + 1), np.ones(count, np.int32))
    return examples_from(tokens, owners=owners.astype(np.int32))


def federated(
    folder: Path, ranks: int = 1, change: Callable[[Averaging], None] = lambda approach: None, **sections: Any
) -> list[dict[str, np.ndarray]]:
    """What the server holds after every round, or those since it was resumed: theta and, with client.scaffold, control.

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
    config = settings(folder, raw)
    model = SimpleNamespace(dtype=torch.float64, parameters=lambda: [])
    base = NoModel(model, TinyTokenizer(), torch.device("cpu"), "quadratic", "quadratic", 0, 0, 0, 0)
    train, others = _examples(np.repeat(np.arange(len(COUNTS)), COUNTS)), _examples(np.arange(len(COUNTS)))
    assignment = Assignment(np.arange(len(train)), np.concatenate([[0], np.cumsum(COUNTS)]))
    population = Population(len(COUNTS), config.run.seed, 0.0, assignment)
    task = Inputs(
        config=config,
        base=base,
        objective=Quadratic(),
        data=Data(train, others, others, population, [], "quadratic"),
        rounds=config.federation.rounds,
        topology=Topology.of(ranks),
        label_targets=None,
        placement=Placement(),
    )
    states: dict[int, dict[str, np.ndarray]] = {}

    def on_round(round_: int) -> None:
        if round_:
            found = load_checkpoint(folder)
            assert found is not None and found[1]["round"] == round_
            states[round_] = {name: found[0][name] for name in ("theta", "control") if name in found[0]}

    def run(transport: Transport) -> None:
        approach = Averaging(task, OneVector(config.method, base, config.run.seed))
        change(approach)
        federation.run(approach, transport, False, on_round if transport.rank == 0 else lambda round_: None)

    on_threads(ranks, run)
    assert sorted(states) == list(range(min(states), task.rounds + 1))
    return [states[round_] for round_ in sorted(states)]


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


def fedavgm(x: np.ndarray, groups: Sequence[np.ndarray], beta: float) -> Iterator[np.ndarray]:
    """Hsu et al. 2019, section 4.2: dw = sum_k n_k / n dw_k; v <- beta v + dw; w <- w - v."""
    v = np.zeros(SIZE)
    for group in groups:
        n = COUNTS[group].sum()
        v = beta * v + np.sum([COUNTS[i] / n * (x - sgd(i, x, STEPS[i])) for i in group], axis=0)
        x = x - v
        yield x


def fedopt(
    rule: str, x: np.ndarray, groups: Sequence[np.ndarray], eta: float, beta1: float, beta2: float, tau: float
) -> Iterator[np.ndarray]:
    """Reddi et al. 2021, algorithm 2."""
    m, v = np.zeros(SIZE), np.full(SIZE, tau**2)
    for group in groups:
        delta = sum(sgd(i, x, STEPS[i]) - x for i in group) / len(group)
        m = beta1 * m + (1 - beta1) * delta
        if rule == "adagrad":
            v = v + delta**2
        elif rule == "yogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + eta * m / (np.sqrt(v) + tau)
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


# ---------------------------------------------------------------- equal to them


def thetas(states: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    return [state["theta"] for state in states]


def test_fedavg(tmp_path: Path) -> None:
    found = thetas(federated(tmp_path))
    agree(found, list(fedavg(START, cohorts(tmp_path))), START)


def test_fedavgm(tmp_path: Path) -> None:
    found = thetas(federated(tmp_path, server={"optimizer": "sgd", "momentum": 0.7}))
    agree(found, list(fedavgm(START, cohorts(tmp_path), 0.7)), START)


@pytest.mark.parametrize("rule", ["adam", "yogi", "adagrad"])
def test_fedopt(tmp_path: Path, rule: str) -> None:
    options = {"beta1": 0.6, "tau": 0.05} | ({} if rule == "adagrad" else {"beta2": 0.9})
    found = thetas(federated(tmp_path, server={"optimizer": rule, "lr": 0.5, "weighting": "uniform", **options}))
    agree(found, list(fedopt(rule, START, cohorts(tmp_path), 0.5, 0.6, 0.9, 0.05)), START)


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
