"""Runs as a report sees them: read, grouped by what differs between them, and lined up along a key."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.config import parse_yaml
from fedhpc.errors import UserError, nearest
from fedhpc.report.text import NONE, in_order
from fedhpc.results.results_file import Results
from fedhpc.results.run_directory import read_status


@dataclass(frozen=True)
class Run:
    """One run as the report sees it."""

    directory: Path
    results: Results
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.config.get("run", {}).get("name") or self.directory.name)

    @property
    def mode(self) -> str:
        return str(self.results.attributes.get("mode", "federated"))

    @property
    def rounds(self) -> dict[str, np.ndarray]:
        return self.results.rounds

    @property
    def state(self) -> str:
        """ "complete", or what is known of an unfinished run."""
        if self.results.complete:
            return "complete"
        status = read_status(self.directory)
        why = f"{status.state}, " if status is not None and status.state != "complete" else ""
        return f"unfinished: {why}round {self.results.num_rounds} of {self.planned}"

    @property
    def planned(self) -> str:
        return str(self.config.get("federation", {}).get("rounds", "?"))

    def metrics(self, group: str) -> dict[str, float]:
        """Metrics of /test or /base; over clients their mean."""
        return {name: float(np.mean(value)) for name, value in self.results.groups[group].items()}

    @property
    def over_clients(self) -> dict[str, float]:
        """Results on the clients' held-out data, summed up: "loss/mean", "loss/worst_10_percent", "loss/std", ..."""
        return {name: float(value) for name, value in self.results.groups["client_summary"].items()}

    @property
    def parameters(self) -> float:
        attributes = self.results.attributes
        stored = attributes.get("trainable_parameters", attributes.get("payload_parameters"))
        final = self.results.groups["final"]
        return float(stored if stored is not None else sum(t.size for t in final.values()) if final else math.nan)

    @property
    def bytes_per_client(self) -> float:
        """Protocol bytes per sampled client and round, both ways; NaN where nothing has to travel."""
        clients = self.rounds["cohort_size"].sum()
        if self.mode != "federated" or not clients:
            return math.nan
        return float((self.rounds["bytes_down"].sum() + self.rounds["bytes_up"].sum()) / clients)

    @property
    def bytes_per_round(self) -> float:
        """Protocol bytes of a round, both ways."""
        return float(
            (self.rounds["bytes_down"].sum() + self.rounds["bytes_up"].sum()) / max(self.results.num_rounds, 1)
        )

    @property
    def last_loss(self) -> float:
        """The last validation loss; NaN without any."""
        known = self.rounds["eval_loss"][~np.isnan(self.rounds["eval_loss"])]
        return float(known[-1]) if len(known) else math.nan

    @property
    def seconds(self) -> float:
        return float(self.results.attributes.get("wall_seconds", np.nansum(self.rounds["seconds"])))


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    runs: list[Run] = field(default_factory=list)

    def test(self, metric: str) -> np.ndarray:
        return np.array([run.metrics("test").get(metric, math.nan) for run in self.runs])

    def over_clients(self, name: str) -> np.ndarray:
        return np.array([run.over_clients.get(name, math.nan) for run in self.runs])


def load_run(path: Path) -> Run:
    """The run in a directory or results.h5. UserError where there is none."""
    if not path.exists():
        raise UserError(f"{path}: there is no such run; give a run directory or its results.h5")
    directory, file = (path.parent, path) if path.is_file() else (path, path / "results.h5")
    if not file.exists():
        raise UserError(f"{path}: holds no results.h5, so it is not a run or has not done its first round")
    results = Results.read(file)
    text = results.attributes.get("config", "")
    config = parse_yaml(str(text), f"{file}: attribute config") or {}
    return Run(directory, results, config)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs of one configuration but for the seed (and name, directory, runtime) together, in order."""
    by_key: dict[str, Group] = {}
    for i, run in enumerate(runs):
        rest = {k: v for k, v in run.config.items() if k not in ("run", "runtime", "checkpoint")}
        known = bool(rest) and run.results.complete
        # A second copy of one seed would count twice: it stands alone, as unfinished runs do.
        key = json.dumps(rest, sort_keys=True, default=str) if known else f"alone {i}"
        if key in by_key and any(_seed(other) == _seed(run) for other in by_key[key].runs):
            key = f"alone {i}"
        label = re.sub(r"[-_]?(s|seed)[-_]?\d+$", "", run.name) or run.name
        by_key.setdefault(key, Group(label)).runs.append(run)
    groups = [
        Group((g.label if len(g.runs) > 1 else g.runs[0].name) + mark_of(g.runs[0]), g.runs) for g in by_key.values()
    ]
    labels = [group.label for group in groups]
    return [Group(f"{g.label} [{g.runs[0].directory}]", g.runs) if labels.count(g.label) > 1 else g for g in groups]


def paired_differences(
    groups: Sequence[Group], baseline: str | None = None
) -> tuple[Group, list[tuple[Group, str, np.ndarray]]]:
    """The baseline, and for each other group and metric the differences to it, one for each seed in common.

    UserError where no group is called `baseline`.
    """
    labels = [group.label for group in groups]
    if baseline is not None and baseline not in labels:
        raise UserError(f"command line: --baseline: there is no row '{baseline}'; {nearest(baseline, labels)}")
    reference = groups[labels.index(baseline) if baseline is not None else 0]
    names = in_order(*(run.metrics("test") for g in groups for run in g.runs))
    by_seed = {_seed(run): run.metrics("test") for run in reference.runs}
    found = []
    for group in groups:
        for name in names if group is not reference else []:
            pairs = [(run.metrics("test"), by_seed.get(_seed(run), {})) for run in group.runs]
            there = [mine[name] - theirs[name] for mine, theirs in pairs if name in mine and name in theirs]
            found.append((group, name, np.array(there)))
    return reference, found


@dataclass(frozen=True)
class Line:
    """Runs that agree in all but one key of the configuration (and the seed)."""

    key: str
    label: str
    reference: Any  # the value that most of all runs have
    runs: dict[Any, dict[Any, Run]]  # value -> seed -> run; numbers ascending, then others

    def changes(self, value: Any, metric: str) -> dict[Any, float]:
        """seed -> the test metric at `value` less that at the reference."""
        at, base = self.runs[value], self.runs.get(self.reference, {})
        return {seed: at[seed].metrics("test").get(metric, math.nan) - base[seed].metrics("test").get(metric, math.nan)
                for seed in at if seed in base}  # fmt: skip


def along(runs: Sequence[Run], key: str) -> list[Line]:
    """The lines of an axis, those with a single value left out. UserError where there is none.

    Where a choice has no such option (partition iid has no alpha) its name stands for the value.
    """
    section, _, option = key.partition(".")
    found: dict[str, dict[Any, dict[Any, Run]]] = {}
    values: list[Any] = []
    for run in runs:
        given = run.config.get(section)
        if not isinstance(given, Mapping) or (option not in given and "name" not in given):
            raise UserError(f"command line: --axis {key}: the configuration of {run.directory} has no such key")
        value = given.get(option, given.get("name"))
        value = value if isinstance(value, (int, float, str)) else json.dumps(value)
        rest = {k: v for k, v in run.config.items() if k not in ("run", "runtime", "checkpoint")}
        rest[section] = {k: v for k, v in given.items() if k not in (option, "name")}
        same = found.setdefault(json.dumps(rest, sort_keys=True, default=str), {})
        same.setdefault(value, {})[_seed(run)] = run
        values.append(value)
    reference = max(values, key=values.count)
    several = [by_value for by_value in found.values() if len(by_value) > 1]
    if not several:
        raise UserError(f"command line: --axis {key}: no runs differ in this key alone")
    first = [next(iter(next(iter(by_value.values())).values())) for by_value in several]
    methods = [str(run.results.attributes.get("method", NONE)) for run in first]
    labels = methods if len(set(methods)) == len(methods) else [grouped([run])[0].label for run in first]
    return [
        Line(key, label, reference, dict(sorted(by_value.items(), key=lambda item: order_of(item[0]))))
        for label, by_value in zip(labels, several, strict=True)
    ]


def order_of(value: Any) -> tuple[bool, float, str]:
    """Sorts numbers before texts."""
    number = isinstance(value, (int, float))
    return (not number, float(value) if number else 0.0, str(value))


def axis_metrics(lines: Sequence[Line]) -> list[str]:
    """The test metrics of the runs of these lines, in order."""
    return in_order(*(run.metrics("test") for line in lines for of in line.runs.values() for run in of.values()))


def untouched_bases(groups: Sequence[Group]) -> list[tuple[str, dict[str, np.ndarray]]]:
    """The untouched bases, each once, with one value of a metric for each seed; named after their runs where there
    are several. Groups share a base where they measured the same in a seed."""
    found: list[tuple[str, dict[Any, dict[str, float]]]] = []
    for g in groups:
        mine = {_seed(run): metrics for run in g.runs if (metrics := run.metrics("base"))}
        same = next((known for _, known in found if any(known.get(seed) == m for seed, m in mine.items())), None)
        if same is not None:
            same.update(mine)
        elif mine:
            found.append((g.label, mine))
    bases = []
    for label, known in found:
        values = {name: np.array([m.get(name, math.nan) for m in known.values()]) for name in in_order(*known.values())}
        # The whole test split gives every seed the same: then there is no interval.
        values = {name: v[:1] if (v == v[0]).all() else v for name, v in values.items()}
        bases.append(("untouched base" if len(found) == 1 else f"untouched base of {label}", values))
    return bases


def _seed(run: Run) -> Any:
    return run.results.attributes.get("seed")


def mark_of(run: Run) -> str:
    """What stands behind the name of a run that is not complete."""
    return "" if run.results.complete else f" (unfinished, {run.results.num_rounds}/{run.planned})"
