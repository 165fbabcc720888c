"""Reads finished and unfinished runs, groups those that differ only in their seed, and lines them up along a key."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.config import parse_yaml
from fedhpc.errors import UserError, nearest
from fedhpc.report.text import NONE, in_order
from fedhpc.results.record import Sampling
from fedhpc.results.results_file import Results
from fedhpc.results.resume import by_key
from fedhpc.results.status import read_status
from fedhpc.results.unfinished import read_results


@dataclass(frozen=True)
class LoadedRun:
    """One run on disk: its directory, what results.h5 holds, and its configuration as a plain tree."""

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
        """ "complete", or how far an unfinished run got, like "unfinished: preempted, round 7 of 20"."""
        if self.results.complete:
            return "complete"
        status = read_status(self.directory)
        why = f"{status.state}, " if status is not None and status.state != "complete" else ""
        return f"unfinished: {why}round {self.results.num_rounds} of {self.planned}"

    @property
    def planned(self) -> str:
        """How many rounds the run has, as text; of older files what the configuration asks for, "?" without that."""
        asked = self.config.get("federation", {}).get("rounds", "?")
        return str(self.results.attributes.get("rounds", asked))

    def metrics(self, group: str) -> dict[str, float]:
        """The metrics of /test or /base. A metric with a value for each client becomes their mean."""
        return {name: float(np.mean(value)) for name, value in self.results.groups[group].items()}

    def sampling(self, group: str, metric: str) -> Sampling | None:
        """What a metric of /test or /base was measured on, and its interval; None in files that do not say."""
        return self.results.sampling(f"{group}/{metric}")

    @property
    def test_set(self) -> str:
        """What the run was tested on, in a few words: results on different ones do not compare."""
        data, evaluation = self.config.get("data", {}), self.config.get("evaluation", {})
        chosen = {key: data[key] for key in ("subset", "where", "where_not", "join", "target") if data.get(key)}
        details = [f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items()]
        measured = [one for name in self.metrics("test") if (one := self.sampling("test", name)) is not None]
        # The prompts of texts follow from the examples, and a run may have no metric of texts.
        items = {one.items for one in measured if one.unit == "examples"} or {one.items for one in measured}
        limit = evaluation.get("test_max_examples") or evaluation.get("max_examples", "all")
        return ", ".join(
            [
                f"{data.get('source', NONE)}: {data.get('test', 'test')}",
                *details,
                *(sorted(items) or [f"at most {limit} items"]),
            ]
        )

    @property
    def void_rounds(self) -> list[int]:
        """Rounds in which too few clients completed, so that nothing moved."""
        events = self.results.events
        return [int(t) for t, kind in zip(events["round"], events["kind"], strict=True) if kind == "void"]

    @property
    def client_summary(self) -> dict[str, float]:
        """Statistics over the clients' results on their held-out data: "loss/mean", "loss/worst_10_percent", ..."""
        return {name: float(value) for name, value in self.results.groups["client_summary"].items()}

    @property
    def parameters(self) -> float:
        """How many parameters are trained; NaN where the run has not stored it yet."""
        attributes = self.results.attributes
        stored = attributes.get("trainable_parameters", attributes.get("payload_parameters"))
        final = self.results.groups["final"]
        return float(stored if stored is not None else sum(t.size for t in final.values()) if final else math.nan)

    @property
    def bytes_per_client(self) -> float:
        """Protocol bytes per sampled client and round, both ways; NaN where nothing is sent."""
        clients = self.rounds["cohort_size"].sum()
        if self.mode != "federated" or not clients:
            return math.nan
        return float((self.rounds["bytes_down"].sum() + self.rounds["bytes_up"].sum()) / clients)

    @property
    def bytes_per_round(self) -> float:
        """Protocol bytes of a round, both ways, averaged over the rounds."""
        return float(
            (self.rounds["bytes_down"].sum() + self.rounds["bytes_up"].sum()) / max(self.results.num_rounds, 1)
        )

    @property
    def last_loss(self) -> float:
        """The last validation loss; NaN without any."""
        measured = self.rounds["eval_loss"][~np.isnan(self.rounds["eval_loss"])]
        return float(measured[-1]) if len(measured) else math.nan

    @property
    def seconds(self) -> float:
        """Wall time of the whole run."""
        return float(self.results.attributes.get("wall_seconds", np.nansum(self.rounds["seconds"])))


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one configuration that differ only in their seed."""

    label: str
    runs: list[LoadedRun] = field(default_factory=list)

    def test(self, metric: str) -> np.ndarray:
        """The test metric of each run; NaN where a run lacks it."""
        return np.array([run.metrics("test").get(metric, math.nan) for run in self.runs])

    def over_items(self, metric: str) -> tuple[float, float]:
        """The ends of the 95 % interval over the test's items, their means over the runs; NaN: not known."""
        known = [run.sampling("test", metric) for run in self.runs]
        ends = np.array([(one.low, one.high) if one is not None else (math.nan, math.nan) for one in known])
        return float(ends[:, 0].mean()), float(ends[:, 1].mean())

    @property
    def test_set(self) -> str:
        """What the runs were tested on."""
        return self.runs[0].test_set

    def client_summary(self, name: str) -> np.ndarray:
        """One statistic over the clients ("loss/mean") of each run; NaN where a run lacks it."""
        return np.array([run.client_summary.get(name, math.nan) for run in self.runs])


def load_run(path: Path) -> LoadedRun:
    """Read the run in a run directory or a results.h5. UserError where there is none."""
    if not path.exists():
        raise UserError(f"{path}: there is no such run; give a run directory or its results.h5")
    directory, file = (path.parent, path) if path.is_file() else (path, path / "results.h5")
    if not file.exists():
        raise UserError(
            f"{path}: holds no results.h5: it is no run directory and no folder of runs, or the run has not finished a "
            "round yet"
        )
    results = read_results(directory) if path != file else Results.read(file)
    text = results.attributes.get("config", "")
    config = parse_yaml(str(text), f"{file}: attribute config") or {}
    return LoadedRun(directory, results, config)


def load_runs(path: Path) -> list[LoadedRun]:
    """Read a run, or all runs of a folder such as a sweep's, by name. UserError where there is none."""
    if path.is_dir() and not (path / "results.h5").exists():
        folders = [file.parent for file in path.glob("*/results.h5")]
        if folders:
            return [load_run(folder) for folder in sorted(folders, key=_by_numbers)]
    return [load_run(path)]


def _by_numbers(folder: Path) -> list[tuple[bool, float, str]]:
    """A sort key of names by which s2 comes before s10."""
    return [order_of(float(part) if part.isdigit() else part) for part in re.split(r"(\d+)", folder.name)]


def varied_keys(runs: Sequence[LoadedRun]) -> dict[str, list[Any]]:
    """The keys of the configuration in which the runs differ, with the value of each run; None where it has none.

    Without names, seeds and what does not change what a run computes.
    """
    trees = [by_key({k: v for k, v in run.config.items() if k not in ("run", "runtime", "checkpoint", "trackers")})
             for run in runs]  # fmt: skip
    columns = {key: [tree.get(key) for tree in trees] for key in dict.fromkeys(key for tree in trees for key in tree)}
    return {key: values for key, values in columns.items() if any(value != values[0] for value in values)}


def group_by_seed(runs: Sequence[LoadedRun]) -> list[SeedGroup]:
    """Put runs together whose configurations differ only in seed, name, directory and runtime; in their first order.

    For example, demo-s0 and demo-s1 become the group "demo".
    """
    by_key: dict[str, SeedGroup] = {}
    for i, run in enumerate(runs):
        rest = {k: v for k, v in run.config.items() if k not in ("run", "runtime", "checkpoint")}
        comparable = bool(rest) and run.results.complete
        # A second copy of one seed would count twice: it is a group of its own, as unfinished runs are.
        key = json.dumps(rest, sort_keys=True, default=str) if comparable else f"alone {i}"
        if key in by_key and any(_seed(other) == _seed(run) for other in by_key[key].runs):
            key = f"alone {i}"
        label = re.sub(r"[-_]?(s|seed)[-_]?\d+$", "", run.name) or run.name
        by_key.setdefault(key, SeedGroup(label)).runs.append(run)
    groups = [
        SeedGroup((g.label if len(g.runs) > 1 else g.runs[0].name) + mark_of(g.runs[0]), g.runs)
        for g in by_key.values()
    ]
    labels = [group.label for group in groups]
    return [SeedGroup(f"{g.label} [{g.runs[0].directory}]", g.runs) if labels.count(g.label) > 1 else g for g in groups]


def test_sets(groups: Sequence[SeedGroup]) -> dict[str, str]:
    """What the groups were tested on, if they were -> a letter for it; empty where all were tested on the same."""
    sets = list(dict.fromkeys(g.test_set for g in groups if any(run.metrics("test") for run in g.runs)))
    return {tested_on: chr(ord("A") + i % 26) * (1 + i // 26) for i, tested_on in enumerate(sets)} if sets[1:] else {}


def paired_differences(
    groups: Sequence[SeedGroup], baseline: str | None = None
) -> tuple[SeedGroup, list[tuple[SeedGroup, str, np.ndarray]]]:
    """Subtract the baseline's test metrics from those of every other group, seed by seed.

    Returns the baseline and, for each other group and metric, one difference for each seed that both have: none where
    they were tested on different data.

    UserError where no group is called `baseline`.
    """
    labels = [group.label for group in groups]
    if baseline is not None and baseline not in labels:
        raise UserError(f"command line: --baseline: there is no row '{baseline}'; {nearest(baseline, labels)}")
    reference = groups[labels.index(baseline) if baseline is not None else 0]
    names = in_order(*(run.metrics("test") for g in groups for run in g.runs))
    by_seed = {_seed(run): run.metrics("test") for run in reference.runs}
    differences = []
    for group in groups:
        for name in names if group is not reference else []:
            same_data = group.test_set == reference.test_set
            pairs = [(run.metrics("test"), by_seed.get(_seed(run), {})) for run in group.runs if same_data]
            values = [ours[name] - theirs[name] for ours, theirs in pairs if name in ours and name in theirs]
            differences.append((group, name, np.array(values)))
    return reference, differences


def shares_of_gain(groups: Sequence[SeedGroup]) -> list[tuple[SeedGroup, SeedGroup, np.ndarray]]:
    """How much of what centralised training gains the other groups keep, by their test losses:

    (base - run) / (base - centralised), one value for each seed that both have, of the same untouched base.

    Returns each group with each centralised one that has its method, model, data, objective and test.
    """
    gains = []
    for group, goal in product(groups, groups):
        if group.runs[0].mode == "centralized" or goal.runs[0].mode != "centralized" or not _same_task(group, goal):
            continue
        of_goal = {_seed(run): run.metrics("test").get("loss", math.nan) for run in goal.runs}
        losses = [
            (run.metrics("base").get("loss", math.nan), run.metrics("test").get("loss", math.nan), of_goal[_seed(run)])
            for run in group.runs
            if _seed(run) in of_goal
        ]
        base, ours, central = np.array(losses).reshape(-1, 3).T
        known = base > central  # false for NaN; and where centralised training gains nothing, nothing can be kept
        if known.any():
            gains.append((group, goal, ((base - ours) / (base - central))[known]))
    return gains


def _same_task(group: SeedGroup, other: SeedGroup) -> bool:
    one, two, same = group.runs[0].config, other.runs[0].config, ("method", "model", "data", "objective")
    return group.test_set == other.test_set and all(one.get(section) == two.get(section) for section in same)


@dataclass(frozen=True)
class AxisLine:
    """Runs that agree in everything but one configuration key (and the seed): a line in the plot of that key."""

    key: str
    label: str
    reference: Any  # the value of the key that most of all the runs have
    runs: dict[Any, dict[Any, LoadedRun]]  # value -> seed -> run; numbers ascending, then others

    def changes(self, value: Any, metric: str) -> dict[Any, float]:
        """seed -> the test metric at `value` minus the one at the reference value."""
        at, base = self.runs[value], self.runs.get(self.reference, {})
        return {seed: at[seed].metrics("test").get(metric, math.nan) - base[seed].metrics("test").get(metric, math.nan)
                for seed in at if seed in base}  # fmt: skip


def lines_along(runs: Sequence[LoadedRun], key: str) -> list[AxisLine]:
    """Sort runs into lines along a configuration key, without lines of a single value. UserError where none is left.

    Where a choice has no such option (partition iid has no alpha), its name takes the place of the value: along
    partition.alpha a line may have the values 0.1, 1.0 and "iid".
    """
    section, _, option = key.partition(".")
    runs_of_line: dict[str, dict[Any, dict[Any, LoadedRun]]] = {}
    values: list[Any] = []
    for run in runs:
        given = run.config.get(section)
        if not isinstance(given, Mapping) or (option not in given and "name" not in given):
            raise UserError(f"command line: --axis {key}: the configuration of {run.directory} has no such key")
        value = given.get(option, given.get("name"))
        value = value if isinstance(value, (int, float, str)) else json.dumps(value)
        rest = {k: v for k, v in run.config.items() if k not in ("run", "runtime", "checkpoint")}
        rest[section] = {k: v for k, v in given.items() if k not in (option, "name")}
        by_value = runs_of_line.setdefault(json.dumps(rest, sort_keys=True, default=str), {})
        by_value.setdefault(value, {})[_seed(run)] = run
        values.append(value)
    reference = max(values, key=values.count)
    several = [by_value for by_value in runs_of_line.values() if len(by_value) > 1]
    if not several:
        raise UserError(f"command line: --axis {key}: no runs differ in this key alone")
    first = [next(iter(next(iter(by_value.values())).values())) for by_value in several]
    methods = [str(run.results.attributes.get("method", NONE)) for run in first]
    labels = methods if len(set(methods)) == len(methods) else [group_by_seed([run])[0].label for run in first]
    return [
        AxisLine(key, label, reference, dict(sorted(by_value.items(), key=lambda item: order_of(item[0]))))
        for label, by_value in zip(labels, several, strict=True)
    ]


def order_of(value: Any) -> tuple[bool, float, str]:
    """A sort key that puts numbers before texts."""
    number = isinstance(value, (int, float))
    return (not number, float(value) if number else 0.0, str(value))


def axis_metrics(lines: Sequence[AxisLine]) -> list[str]:
    """The names of the test metrics of the runs of these lines, in order."""
    return in_order(
        *(run.metrics("test") for line in lines for by_seed in line.runs.values() for run in by_seed.values())
    )


def untouched_bases(groups: Sequence[SeedGroup]) -> list[tuple[str, dict[str, np.ndarray]]]:
    """The results of the base models before any training, each base once: label -> metric -> one value for each seed.

    Groups share a base where they measured the same results with the same seed. Several bases are named after their
    groups.
    """
    measured: list[tuple[str, dict[Any, dict[str, float]]]] = []
    for g in groups:
        by_seed = {_seed(run): metrics for run in g.runs if (metrics := run.metrics("base"))}
        same = next((base for _, base in measured if any(base.get(seed) == m for seed, m in by_seed.items())), None)
        if same is not None:
            same.update(by_seed)
        elif by_seed:
            measured.append((g.label, by_seed))
    bases = []
    for label, base in measured:
        values = {name: np.array([m.get(name, math.nan) for m in base.values()]) for name in in_order(*base.values())}
        # Where the whole test split is used, every seed gives the same value: then there is no interval.
        values = {name: v[:1] if (v == v[0]).all() else v for name, v in values.items()}
        bases.append(("untouched base" if len(measured) == 1 else f"untouched base of {label}", values))
    return bases


def _seed(run: LoadedRun) -> Any:
    return run.results.attributes.get("seed")


def mark_of(run: LoadedRun) -> str:
    """What is added to the name of an unfinished run, like " (unfinished, 7/20)"; nothing for a complete one."""
    return "" if run.results.complete else f" (unfinished, {run.results.num_rounds}/{run.planned})"
