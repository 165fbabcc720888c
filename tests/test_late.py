"""Late clients: device models, synchronous rounds that cut off stragglers, and buffered rounds, in virtual time.

The optimisation is that of the quadratic clients of test_quadratic.py, against plain numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhpc import config as configuration
from fedhpc.errors import UserError
from fedhpc.participation.schedules.synchronous import Synchronous
from fedhpc.report.__main__ import main as report
from tests import tiny
from tests.federations import table
from tests.test_participation import population, settings
from tests.test_quadratic import START, agree, fedavg, federated, thetas

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
        assert plan.late == set(reporting) - set(plan.training)
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
        (["devices.name=phones"], "unknown value 'phones'; did you mean 'none'.* valid: lognormal, none, trace"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration.load(None, overrides)


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
    target = float(rounds["eval_loss"][rounds["round"] == 5][0])
    assert report([*runs, "--out", str(tmp_path / "two"), "--target-loss", str(target)]) == 0
    assert "| virtual seconds to it |" in (tmp_path / "two" / "comparison.md").read_text()
    lines = (tmp_path / "two" / "efficiency.csv").read_text().splitlines()
    cells = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    reached = int(cells[1]["round_to_target"])
    assert float(cells[1]["virtual_seconds_to_target"]) == rounds["virtual_seconds"][: reached + 1].sum()
