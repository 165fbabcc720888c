"""Late clients: device models, synchronous rounds that cut off stragglers, and buffered rounds, in virtual time.

The optimisation is that of the quadratic clients of test_quadratic.py, against plain numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.data import Population
from fedhpc.errors import UserError
from fedhpc.participation.plan import Plan
from fedhpc.participation.schedules.buffered import Buffered
from fedhpc.participation.schedules.synchronous import Synchronous
from fedhpc.ranks.verdict import RefusedError
from fedhpc.report.__main__ import main as report
from fedhpc.rng import generator
from fedhpc.updates.pipeline import Pipeline
from fedhpc.updates.transforms.base import Transform, TransformContext
from tests import tiny
from tests.federations import federate, final, table, tree, write_texts
from tests.federations import settings as settings_of
from tests.test_participation import population, settings
from tests.test_quadratic import (
    BATCH,
    COHORT,
    COUNTS,
    LR,
    ROUNDS,
    SIZE,
    START,
    STEPS,
    agree,
    by_steps,
    cohorts,
    fedavg,
    federated,
    gradient,
    sgd,
    thetas,
)
from tests.test_seams import EightBits, in_every_way

SIZES = [1, 9, 4, 0, 7, 2, 12, 5, 3, 6, 8, 3]
DATA = tiny.examples(sum(SIZES))
EQUAL = {"name": "lognormal", "speed_sigma": 0.0, "link_sigma": 0.0}


def synchronous(clients: Any = None, **sections: Any) -> Synchronous:
    sections.setdefault("devices", {"name": "lognormal", "tokens_per_s": 10.0, "down_bytes_per_s": 4.0})
    return Synchronous(settings(**sections), clients or population(SIZES), DATA, [0], 2, lambda client: (40, 60))


def write_trace(
    path: Path, rows: list[str], header: str = "client,tokens_per_s,down_bytes_per_s,up_bytes_per_s"
) -> str:
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


# ---------------------------------------------------------------- devices


def test_seconds_are_those_of_queue_links_and_speed(tmp_path: Path) -> None:
    file = write_trace(tmp_path / "devices.csv", [f"{c},{10 + c},{2 + c},{3 + c}" for c in range(12)])
    schedule = synchronous(devices={"name": "trace", "file": file}, client={"steps": 2, "batch_size": 3})
    for client in (0, 1, 6):
        mean = np.mean(DATA.lengths_of(population(SIZES).indices(client)))
        seconds = 40 / (2 + client) + mean * 2 * 3 / (10 + client) + 60 / (3 + client)
        assert schedule.seconds(client, 7) == pytest.approx(seconds, rel=1e-12)
    assert schedule.seconds(3, 0) == 40 / 5 + 60 / 6  # it has no examples


@pytest.mark.parametrize(("queue", "sigma"), [("exponential", 1.0), ("lognormal", 0.5)])
def test_the_queue_delay_has_its_mean_and_is_drawn_for_each_client_and_version(queue: str, sigma: float) -> None:
    device = {**EQUAL, "tokens_per_s": 1e12, "down_bytes_per_s": 1e12, "up_bytes_per_s": 1e12}
    waiting = {"queue": queue, "queue_s": 20.0, "queue_sigma": sigma}
    schedule = synchronous(devices={**device, **waiting})
    delays = np.array([schedule.seconds(c, v) for c in range(12) for v in range(200)])
    spread = 1.0 if queue == "exponential" else np.sqrt(np.expm1(sigma**2))
    assert delays.mean() == pytest.approx(20.0, abs=4 * 20 * spread / np.sqrt(len(delays)))
    assert delays.std() == pytest.approx(20.0 * spread, rel=0.15)
    assert len(set(delays)) == len(delays)
    assert delays[7] == synchronous(devices={**device, **waiting}).seconds(0, 7)


def test_lognormal_devices_have_their_median_and_spread() -> None:
    config = settings(partition={"name": "virtual", "num_clients": 10**6}, devices={"name": "lognormal"})
    devices = Synchronous(config, population(SIZES), DATA, [0], 2).devices
    some = np.log([devices.of(c)[:3] for c in range(2000)])
    assert np.allclose(np.exp(np.median(some, axis=0)), [1000, 2.5e6, 6e5], rtol=0.06)
    assert np.allclose(some.std(axis=0), 0.5, rtol=0.06)
    assert np.allclose(some[:, 1] - some[:, 2], np.log(2.5e6 / 6e5))  # the links of a client go together
    assert abs(np.corrcoef(some[:, 0], some[:, 1])[0, 1]) < 0.1


def test_a_trace_without_clients_gives_each_a_row(tmp_path: Path) -> None:
    header = "tokens_per_s,down_bytes_per_s,up_bytes_per_s,availability"
    file = write_trace(tmp_path / "devices.csv", ["1,1,1,0.5", "2,2,2,1"], header)
    devices = synchronous(devices={"name": "trace", "file": file}).devices
    assert {devices.of(c).tokens_per_s for c in range(12)} == {1.0, 2.0} and devices.lowest_availability == 0.5
    lines = '{"tokens_per_s": 1, "down_bytes_per_s": 1, "up_bytes_per_s": 1}\n'
    (tmp_path / "devices.jsonl").write_text(lines)
    other = synchronous(devices={"name": "trace", "file": str(tmp_path / "devices.jsonl")}).devices
    assert other.of(3) == (1.0, 1.0, 1.0, 1.0) and other.fingerprint != devices.fingerprint


def test_a_trace_names_the_owners_of_a_natural_partition(tmp_path: Path) -> None:
    clients = replace(population([2, 3]), names=["north", "south"])
    options = {"name": "trace", "file": write_trace(tmp_path / "devices.csv", ["south,2,1,1", "north,1,1,1"])}
    devices = synchronous(clients, devices=options, federation={"cohort_size": 2}).devices
    assert [devices.of(c).tokens_per_s for c in range(2)] == [1.0, 2.0]
    named = replace(clients, names=["north", "east"])
    with pytest.raises(UserError, match=r"has no row for client 1 \(east\)"):
        synchronous(named, devices=options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        (["0,1,1,1"], r"has no row for client 1; add one, or take the column client out"),
        (["0,1,1,1", "0,1,1,1"], r"devices\.csv:3: client 0 has two rows"),
        (["0,fast,1,1"], r"devices\.csv:2: tokens_per_s must be a number, got 'fast'"),
        (["0,1,0,1"], r"devices\.csv:2: down_bytes_per_s must be above 0, got 0"),
    ],
)
def test_a_trace_that_is_wrong_is_refused(tmp_path: Path, rows: list[str], message: str) -> None:
    file = write_trace(tmp_path / "devices.csv", rows)
    with pytest.raises(UserError, match=message) as e:
        synchronous(devices={"name": "trace", "file": file})
    assert e.value.key == "devices.file"


def test_clients_that_are_not_available_are_passed_over() -> None:
    asked = np.zeros(12)
    for round_ in range(1, 200):
        plan = synchronous(federation={"cohort_size": 3}, devices={"name": "lognormal", "availability": 0.3}).plan(
            round_
        )
        assert len(set(plan.cohort)) == len(plan.cohort) <= 3
        asked[list(plan.cohort)] += 1
    assert asked.min() > 25  # 12 * 0.3 are there on average: now and then not three
    assert asked.sum() < 3 * 199


# ---------------------------------------------------------------- synchronous rounds


def test_without_devices_nothing_changes(tmp_path: Path) -> None:
    """Neither does it with devices where nobody is cut off, but for the columns of time."""
    plain = thetas(federated(tmp_path / "plain"))
    timed = thetas(federated(tmp_path / "timed", devices={"name": "lognormal"}))
    assert all(one.tobytes() == other.tobytes() for one, other in zip(plain, timed, strict=True))
    columns = {"late", "virtual_seconds", "staleness"}
    assert set(table(tmp_path / "timed", "rounds")) - set(table(tmp_path / "plain", "rounds")) == columns
    rounds, clients = (table(tmp_path / "timed", name) for name in ("rounds", "clients"))
    slowest = [clients["virtual_seconds"][clients["round"] == r].max() for r in range(1, 7)]
    assert np.array_equal(rounds["virtual_seconds"][1:], slowest) and (rounds["late"] == 0).all()


def test_the_first_to_arrive_are_taken() -> None:
    federation = {"cohort_size": 5, "schedule": {"name": "synchronous", "over_selection": 1.6}}
    some_late = 0
    for round_ in range(1, 20):
        plan = synchronous(federation=federation).plan(round_)
        assert plan.times is not None and len(plan.cohort) == 8
        seconds = dict(zip(plan.cohort, plan.times.clients, strict=True))
        reporting = [c for c in plan.cohort if c != 3]
        assert set(plan.training) == set(sorted(reporting, key=lambda c: seconds[c])[:5])
        assert plan.late == set(reporting) - set(plan.training) and list(plan.sending) == reporting
        assert plan.times.round == max(seconds[c] for c in plan.training)
        assert sorted(c for block in plan.blocks for c in block.clients) == sorted(plan.training)
        some_late += len(plan.late)
    assert some_late > 40


def test_a_deadline_cuts_off_exactly_who_arrives_after_it(tmp_path: Path) -> None:
    """The others' mean is FedAvg's; who is late has a status, and a round says how many."""
    schedule = {"name": "synchronous", "deadline_s": 0.02, "over_selection": 1.5}
    devices = {"name": "lognormal", "tokens_per_s": 1000.0, "speed_sigma": 1.0}
    found = thetas(federated(tmp_path, federation={"schedule": schedule}, devices=devices))
    rounds, clients, events = (table(tmp_path, name) for name in ("rounds", "clients", "events"))
    arrived = clients["virtual_seconds"] <= 0.02
    for r in range(1, 7):
        rows = np.flatnonzero(clients["round"] == r)
        first = rows[np.argsort(clients["virtual_seconds"][rows], kind="stable")][:4]
        taken = [row for row in first if arrived[row]]
        assert sorted(taken) == [row for row in rows if clients["status"][row] == 0]
        wanted = clients["virtual_seconds"][taken].max() if len(taken) == 4 else 0.02
        assert rounds["virtual_seconds"][r] == wanted and rounds["late"][r] == 6 - len(taken)
    assert set(clients["status"]) == {0, 3} and 0 < arrived.mean() < 0.8
    assert (clients["steps"][clients["status"] == 3] == 0).all()
    late = events["round"][events["kind"] == "late"]
    assert np.array_equal(late, np.flatnonzero(rounds["late"]))
    taken_of = [clients["client_id"][(clients["round"] == r) & (clients["status"] == 0)] for r in range(1, 7)]
    agree(found, list(fedavg(START, taken_of)), START)
    three = federated(tmp_path / "3", 3, federation={"schedule": schedule}, devices=devices)
    assert all(one.tobytes() == other.tobytes() for one, other in zip(found, thetas(three), strict=True))


def test_a_deadline_before_anybody_arrives_voids_the_round(tmp_path: Path) -> None:
    federation = {"rounds": 2, "schedule": {"name": "synchronous", "deadline_s": 1e-9}}
    found = thetas(federated(tmp_path, federation=federation, devices={"name": "lognormal"}))
    assert all(np.array_equal(theta, START) for theta in found)
    events = table(tmp_path, "events")
    assert list(events["message"][events["kind"] == "void"]) == ["0 of 1 needed clients completed"] * 2
    assert (
        list(events["message"][events["kind"] == "late"]) == ["4 of 4 clients cut off after 1e-09 virtual seconds"] * 2
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["federation.schedule.deadline_s=5"], r"federation\.schedule\.deadline_s is of clients that are late"),
        (["federation.schedule.over_selection=1.3"], r"over_selection is of clients that are late"),
        (["federation.schedule.over_selection=0.5"], "greater than or equal to 1"),
        (["devices.name=lognormal", "mode=centralized"], r"mode centralized has none: give devices\.name none"),
        (["devices.name=lognormal", "method.name=rag"], "method.name rag does not read it; take it out"),
        (["devices.name=lognormal", "devices.queue=long"], "devices.queue: must be 'none', 'exponential' or"),
        (["devices.name=lognormal", "devices.queue_s=9"], "devices.queue none has no queue_s: choose exponential or"),
        (
            ["devices={name: lognormal, queue: exponential, queue_sigma: 2}"],
            "devices.queue exponential has no queue_sigma: choose lognormal, or take it out",
        ),
        (["devices.name=phones"], "unknown value 'phones'; did you mean 'none'.* valid: lognormal, none, trace"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration.load(None, overrides)


# ---------------------------------------------------------------- buffered rounds


def buffered(concurrency: int, size: int, **options: Any) -> dict[str, Any]:
    schedule = {"name": "buffered", "concurrency": concurrency, "buffer_size": size, **options}
    return {"cohort_size": None, "schedule": schedule}


# Speeds that are no multiples of each other, so that no two clients end at once.
SPEEDS = [3.1, 1.7, 8.9, 2.3, 40.0, 5.3]


def seconds_of(client: int) -> float:
    """Of the trace below: the payload both ways, and the rows of all its steps of one token each."""
    return 8 * SIZE * 2 / (50 + client) + STEPS[client] * BATCH / SPEEDS[client]


def unequal(folder: Path) -> dict[str, Any]:
    rows = [f"{c},{speed},{50 + c},{50 + c}" for c, speed in enumerate(SPEEDS)]
    return {"name": "trace", "file": write_trace(folder / "devices.csv", rows)}


def everybody_at_work(size: int, step: Callable[..., np.ndarray], train: Callable[..., np.ndarray]) -> list[Any]:
    """FedBuff's loop with all six clients at work, event by event: (time, theta, (client, staleness) of the buffer).

    A client that has sent its update starts again after the step that uses it.
    """
    x, now, buffer, steps = START, 0.0, list[Any](), list[Any]()
    ends = {c: (seconds_of(c), 0, x) for c in range(6)}
    while len(steps) < ROUNDS:
        client = min(ends, key=lambda c: ends[c][0])
        now, version, start = ends.pop(client)
        buffer.append((client, len(steps) - version, start, train(client, start, version)))
        if len(buffer) == size:
            x = step(x, buffer)
            steps.append((now, x, {(c, s) for c, s, *_ in buffer}))
            ends |= {c: (now + seconds_of(c), len(steps), x) for c, *_ in buffer}
            buffer = []
    return steps


def replayed(folder: Path, sent: Callable[[int, int, np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """theta after every round with the clients and staleness that a run had: FedBuff's mean of two updates.

    sent: what arrives in a round of a client that started from a state.
    """
    clients, thetas_of = table(folder, "clients"), [START]
    for r in range(1, ROUNDS + 1):
        total = np.zeros(SIZE)
        for row in np.flatnonzero((clients["round"] == r) & (clients["status"] == 0)):
            client, staleness = int(clients["client_id"][row]), int(clients["staleness"][row])
            total += sent(r, client, thetas_of[r - 1 - staleness]) / np.sqrt(1 + staleness) / 2
        thetas_of.append(thetas_of[-1] - total)
    return thetas_of[1:]


def trained(client: int, start: np.ndarray) -> np.ndarray:
    return start - sgd(client, start, STEPS[client])


def test_fedbuff_is_the_paper_s(tmp_path: Path) -> None:
    """Nguyen et al. 2022, algorithm 1: w <- w - eta_g / K sum_i s(tau_i) Delta_i, also with falling rates."""

    def train(client: int, x: np.ndarray, version: int) -> np.ndarray:
        for _ in range(STEPS[client]):
            x = x - LR * (1 - version / ROUNDS) * gradient(client, x)
        return x

    def step(x: np.ndarray, buffer: Sequence[Any]) -> np.ndarray:
        return x - 0.7 / len(buffer) * sum((start - end) / np.sqrt(1 + s) for _, s, start, end in buffer)

    found = thetas(
        federated(
            tmp_path,
            devices=unequal(tmp_path),
            federation=buffered(6, 2),
            client={"schedule": "linear", "schedule_per": "round"},
            server={"weighting": "uniform", "lr": 0.7},
        )
    )
    wanted = everybody_at_work(2, step, train)
    agree(found, [x for _, x, _ in wanted], START)
    rounds, clients = (table(tmp_path, name) for name in ("rounds", "clients"))
    assert np.allclose(np.cumsum(rounds["virtual_seconds"])[1:], [now for now, *_ in wanted], rtol=1e-12)
    for r, (_, _, buffer) in enumerate(wanted, 1):
        of_round = clients["round"] == r
        assert set(zip(clients["client_id"][of_round], clients["staleness"][of_round], strict=True)) == buffer
        assert rounds["staleness"][r] == np.mean([s for _, s in buffer])
    assert clients["staleness"].max() >= 2
    assert (rounds["bytes_down"][1:] == 2 * SIZE * 8).all() and (rounds["completed"][1:] == 2).all()


def test_fedasync_is_the_paper_s(tmp_path: Path) -> None:
    """Xie et al. 2019, algorithm 1: x <- (1 - alpha_t) x + alpha_t x_new with alpha_t = alpha (1 + t - tau)^-a."""

    def train(client: int, x: np.ndarray, version: int) -> np.ndarray:
        return by_steps(client, x, 0.8)

    def step(x: np.ndarray, buffer: Sequence[Any]) -> np.ndarray:
        ((_, staleness, _, new),) = buffer
        alpha = 0.6 * (1 + staleness) ** -0.3
        return (1 - alpha) * x + alpha * new

    found = thetas(
        federated(
            tmp_path,
            devices=unequal(tmp_path),
            federation=buffered(6, 1, contribution="model", staleness_exponent=0.3),
            client={"proximal": 0.8},
            server={"lr": 0.6},
        )
    )
    agree(found, [x for _, x, _ in everybody_at_work(1, step, train)], START)


def test_a_buffer_of_equal_clients_is_a_synchronous_round(tmp_path: Path) -> None:
    """To the bit, and with the same clients, where the buffer is all that are at work."""
    equal = {"devices": EQUAL, "client": {"steps": 3}}
    one = federated(tmp_path / "synchronous", **equal)
    other = federated(tmp_path / "buffered", **equal, federation=buffered(COHORT, COHORT))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(thetas(one), thetas(other), strict=True))
    for r, group in enumerate(cohorts(tmp_path / "synchronous")):
        assert np.array_equal(group, cohorts(tmp_path / "buffered")[r])
    assert (table(tmp_path / "buffered", "clients")["staleness"] == 0).all()


def test_a_void_round_keeps_the_versions_that_clients_have_started_from(tmp_path: Path) -> None:
    class Broken(Transform):
        def on_client(self, updates: torch.Tensor, context: TransformContext) -> torch.Tensor:
            return updates / 0 if context.round == 2 else updates

    def change(approach: Averaging) -> None:
        seed, layout = approach.config.run.seed, approach.split.shared
        approach.sending.pipeline = Pipeline([Broken(None)], seed, layout, torch.float64)

    sections = {"devices": unequal(tmp_path), "federation": buffered(6, 2), "server": {"weighting": "uniform"}}
    found = thetas(federated(tmp_path / "run", 2, change, **sections))
    assert np.array_equal(found[0], found[1])
    agree(found, replayed(tmp_path / "run", lambda r, client, start: trained(client, start)), START)


def test_packed_updates_arrive_earlier(tmp_path: Path) -> None:
    slow = {"name": "lognormal", "up_bytes_per_s": 1.0, "down_bytes_per_s": 1e9, "tokens_per_s": 1e9, "link_sigma": 0.0}
    seconds = {}
    for transforms in ([], [{"name": "topk", "fraction": 0.2}]):
        folder = tmp_path / str(len(transforms))
        federated(folder, devices=slow, transforms=transforms, federation={**buffered(3, 2), "rounds": 2})
        seconds[len(transforms)] = table(folder, "clients")["virtual_seconds"]
        sent = table(folder, "rounds")["bytes_up"][1:].sum() / len(seconds[len(transforms)])
        assert seconds[len(transforms)] == pytest.approx(sent, rel=1e-6)
    assert seconds[1].max() < seconds[0].min()


def test_buffered_rounds_on_any_number_of_ranks_and_after_a_resume(tmp_path: Path) -> None:
    """With what clients keep for a transform, with dropout, and with more clients than are at work."""

    def change(approach: Averaging) -> None:
        seed, layout = approach.config.run.seed, approach.split.shared
        approach.sending.pipeline = Pipeline([EightBits(None)], seed, layout, torch.float64)

    federation = {**buffered(4, 2), "dropout": 0.2}
    found = in_every_way(tmp_path, change, devices={"name": "lognormal", "speed_sigma": 1.0}, federation=federation)
    clients = table(tmp_path / "1", "clients")
    assert set(clients["status"]) == {0, 1} and set(clients["staleness"]) > {0, 1}
    residuals = {i: np.zeros(SIZE) for i in range(len(COUNTS))}

    def sent(r: int, client: int, start: np.ndarray) -> np.ndarray:
        wanted = trained(client, start) + residuals[client]
        unit = np.abs(wanted).max() / 127
        rounded = np.floor(wanted / unit + generator(0, "transforms.0.rounding", r, client).random(SIZE)) * unit
        residuals[client] = wanted - rounded
        return np.asarray(rounded)

    agree(found, replayed(tmp_path / "1", sent), START)


def test_a_stale_attacker_counts_as_little_as_others(tmp_path: Path) -> None:
    """What it sends in place of its update has the weight of the update."""
    sections = {"devices": unequal(tmp_path), "federation": buffered(6, 2), "server": {"weighting": "uniform"}}
    found = thetas(federated(tmp_path / "run", attack={"name": "sign_flip", "fraction": 0.34}, **sections))
    clients = table(tmp_path / "run", "clients")
    marked = set(clients["client_id"][clients["attacker"] == 1].tolist())

    def sent(r: int, client: int, start: np.ndarray) -> np.ndarray:
        return -trained(client, start) if client in marked else trained(client, start)

    agree(found, replayed(tmp_path / "run", sent), START)
    assert clients["staleness"][clients["attacker"] == 1].max() > 0


def test_prefixes_with_parts_of_their_own_on_any_number_of_ranks(tmp_path: Path) -> None:
    """A real model: blocks whose clients start from several versions, each with the part that stays with it."""
    changes: dict[str, Any] = {
        "method": {"name": "lora", "rank": 2},
        "federation": {**buffered(4, 3), "rounds": 4},
        "devices": {"name": "lognormal", "speed_sigma": 1.0},
        "personalization": {"parts": ["*lora_B*"]},
        "evaluation": {"every": 4, "client_fraction": 0.2, "samples": 0, "max_examples": 4, "test_max_examples": 4},
        "runtime": {"block_size": 3},
        "client": {"lr": 0.5, "steps": 1},
    }
    raw = tree(write_texts(tmp_path), **changes)
    raw["method"] = changes["method"]
    for ranks in (1, 3):
        federate(settings_of(tmp_path / f"run{ranks}", raw), ranks)
    one, three = (final(tmp_path / f"run{ranks}") for ranks in (1, 3))
    assert all(one[name].tobytes() == three[name].tobytes() for name in one)
    clients, evaluated = table(tmp_path / "run1", "clients"), table(tmp_path / "run1", "client_eval")
    assert clients["staleness"].max() > 0 and (clients["status"] == 0).all()
    assert np.array_equal(evaluated["loss_personal"], table(tmp_path / "run3", "client_eval")["loss_personal"])
    mixed = [clients["staleness"][(clients["round"] == r) & (clients["block"] == 0)] for r in range(1, 5)]
    assert any(len(set(staleness)) > 1 for staleness in mixed)


def test_rounds_say_how_full_their_blocks_were(tmp_path: Path) -> None:
    """Synchronous and buffered alike, on any number of ranks; in rounds of an older version it is not known."""
    raw = tree(
        write_texts(tmp_path),
        devices={"name": "lognormal", "speed_sigma": 1.0},
        client={"epochs": 1, "steps": None, "batch_size": 4},
        evaluation={"every": 4, "samples": 0, "max_examples": 4, "test_max_examples": 4},
        runtime={"block_size": 3},
    )
    del raw["client"]["steps"]

    def occupancy(name: str, ranks: int, federation: dict[str, Any]) -> list[float]:
        raw["federation"] = federation
        federate(settings_of(tmp_path / name, raw), ranks)
        return [float(one) for one in table(tmp_path / name, "rounds")["block_occupancy"]]

    late = {**buffered(5, 4), "rounds": 3}
    together = {"rounds": 3, "cohort_size": 5, "dropout": 0.3}
    for name, federation in (("buffered", late), ("synchronous", together)):
        found = occupancy(name, 1, federation)
        np.testing.assert_array_equal(occupancy(f"{name}-3", 3, federation), found)
        clients = table(tmp_path / name, "clients")
        for r in range(1, 4):
            of_round = [clients["steps"][(clients["round"] == r) & (clients["block"] == b)] for b in range(5)]
            blocks = [steps for steps in of_round if len(steps)]
            filled, room = sum(steps.sum() for steps in blocks), sum(3 * steps.max() for steps in blocks)
            assert found[r] == pytest.approx(filled / room, rel=1e-15) and found[r] < 1
        assert np.isnan(found[0]) and len(set(found)) > 2
    with h5py.File(tmp_path / "synchronous" / "results.h5", "a") as file:
        del file["rounds/block_occupancy"]
    resumed = occupancy("synchronous", 1, {**together, "rounds": 4})
    assert np.isnan(resumed[:4]).all() and 0 < resumed[4] <= 1


def plans(rounds: int, clients: Any = None, block_size: int = 2, **sections: Any) -> list[Plan]:
    """The plans of buffered rounds; asked for again in another order they are the same."""

    def schedule() -> Buffered:
        return Buffered(settings(**sections), clients or population(SIZES), DATA, [0], block_size)

    one, other = schedule(), schedule()
    in_order = [one.plan(r) for r in range(1, rounds + 1)]
    assert [other.plan(rounds), other.plan(1), other.plan(1)] == [in_order[-1], in_order[0], in_order[0]]
    return in_order


def test_a_buffered_plan_has_every_client_once_and_keeps_the_versions_that_are_needed() -> None:
    sections = {"devices": {"name": "lognormal"}, "federation": {**buffered(7, 3), "dropout": 0.2}}
    at_work: dict[int, int] = {}
    made = plans(60, **sections)
    for plan in made:
        assert len(set(plan.cohort)) == len(plan.cohort) and len(plan.training) == 3
        assert plan.empty <= {3} and not plan.late
        assert all(0 <= version < plan.round for version in plan.versions)
        needed = {v for later in made[plan.round :] for v in later.versions if v < plan.round}
        if plan.round < 50:  # by then all that are at work have ended
            assert set(plan.needed_later) == needed
        for client, version in zip(plan.cohort, plan.versions, strict=True):
            assert at_work.get(client, -1) < version  # it ended before it started again
            at_work[client] = plan.round - 1
    assert set(at_work) == set(range(12))


def test_blocks_of_buffered_rounds_are_as_full_as_synchronous_ones() -> None:
    def occupancy(made: Sequence[Plan]) -> float:
        blocks = [len(block.clients) for plan in made for block in plan.blocks]
        return float(np.mean(blocks)) / 4

    clients = population(np.random.default_rng(0).integers(3, 9, 60).tolist())
    data, sections = tiny.examples(600), {"devices": {"name": "lognormal", "speed_sigma": 1.0}}
    rounds = range(1, 41)
    late = Buffered(settings(**sections, federation=buffered(32, 16)), clients, data, [0], 4)
    plain = Synchronous(settings(**sections, federation={"cohort_size": 16}), clients, data, [0], 4)
    assert occupancy([late.plan(r) for r in rounds]) >= 0.9 * occupancy([plain.plan(r) for r in rounds])


def test_a_buffered_round_of_a_million_clients_touches_only_those_at_work() -> None:
    config = settings(
        partition={"name": "virtual", "num_clients": 10**6, "examples_per_client": 5},
        devices={"name": "lognormal", "availability": 0.8, "queue": "lognormal"},
        federation=buffered(20, 10),
    )
    drawn: set[int] = set()

    def draw(client: int) -> np.ndarray:
        drawn.add(client)
        return np.arange(5)

    schedule = Buffered(config, Population(10**6, 0, 0.0, draw=draw, drawn=5), DATA, [0], 2)
    ended = {client for r in range(1, 31) for client in schedule.plan(r).cohort}
    assert ended < drawn and len(drawn) <= len(ended) + 20


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["devices.name=none"], r"buffered needs devices, which say who arrives when: give devices\.name"),
        (["federation.schedule.buffer_size=21"], r"buffer_size 21 is more than federation\.schedule\.concurrency 20"),
        (["federation.cohort_size=5"], r"take federation\.cohort_size out"),
        (["federation.cohort_fraction=0.5"], r"take federation\.cohort_fraction out"),
        (["client.optimizer=sgd", "client.scaffold=true"], "buffered ones start from several: give one of the two"),
        (["client.server_momentum=0.5"], r"client\.server_momentum is of the one state"),
        (["client.moments=both"], r"client\.moments is of the one state"),
        (["devices.name=none", "method.name=fedbpt"], "buffered needs devices"),
        (["federation.schedule.deadline_s=5"], r"unknown key 'federation\.schedule\.deadline_s'"),
        (["federation.schedule.contribution=half"], "must be 'update' or 'model', got 'half'"),
    ],
)
def test_what_does_not_go_with_buffered_is_refused(overrides: list[str], message: str) -> None:
    given = ["federation.cohort_size=null", "federation.schedule.name=buffered", "devices.name=lognormal"]
    with pytest.raises(UserError, match=message):
        configuration.load(None, [*given, *overrides])


def test_a_run_whose_trace_has_changed_does_not_resume(tmp_path: Path) -> None:
    federation = {**buffered(6, 2), "rounds": 2}
    federated(tmp_path, devices=unequal(tmp_path), federation=federation)
    with (tmp_path / "devices.csv").open("a") as file:
        file.write("6,1,1,1\n")
    changed = {"name": "trace", "file": str(tmp_path / "devices.csv")}
    with pytest.raises(RefusedError, match="the content of the data changed since the run began"):
        federated(tmp_path, devices=changed, federation={**federation, "rounds": 3})


def test_more_clients_at_work_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="concurrency is 7, and the population has 6 clients; lower it"):
        federated(tmp_path, devices=EQUAL, federation=buffered(7, 2))


# ---------------------------------------------------------------- reports


def test_reports_tell_virtual_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = {"name": "synchronous", "over_selection": 1.5}
    runs = [str(tmp_path / name) for name in ("equal", "unequal")]
    federated(tmp_path / "equal", devices={**EQUAL, "tokens_per_s": 4.0}, run={"name": "equal"})
    federated(
        tmp_path / "unequal", devices={"name": "lognormal"}, federation={"schedule": schedule}, run={"name": "unequal"}
    )
    assert report([runs[1], "--out", str(tmp_path / "one")]) == 0
    out = capsys.readouterr().out
    rounds = table(tmp_path / "unequal", "rounds")
    assert "12" in next(line for line in out.splitlines() if "clients late" in line).split()  # 2 of 6, in 6 rounds
    assert "virtual time" in out and "staleness of an update" in out and "clients in a block" in out
    (full,) = (line for line in out.splitlines() if "block occupancy" in line)
    assert float(full.split()[-1]) == pytest.approx(rounds["block_occupancy"][1:].mean(), abs=5e-4)
    target = float(rounds["eval_loss"][rounds["round"] == 5][0])
    assert report([*runs, "--out", str(tmp_path / "two"), "--target-loss", str(target)]) == 0
    assert "| virtual seconds to it |" in (tmp_path / "two" / "comparison.md").read_text()
    assert (tmp_path / "two" / "eval_loss_by_time.png").stat().st_size > 10_000
    lines = (tmp_path / "two" / "efficiency.csv").read_text().splitlines()
    cells = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    reached = int(cells[1]["round_to_target"])
    assert float(cells[1]["virtual_seconds_to_target"]) == rounds["virtual_seconds"][: reached + 1].sum()
