"""Curves of robustness: test results by the share of attackers, and by epsilon, where runs differ in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedhpc.report.runs import LoadedRun, varied_keys
from fedhpc.report.text import NONE, Grid, Number, as_interval, in_order, title_of

NO_PRIVACY = math.inf  # the epsilon of a run without privacy


@dataclass(frozen=True)
class Curve:
    """Runs that differ in the strength of one condition alone, and in the seed."""

    panel: str  # curves of one panel share it, like "attack ipm"
    label: str
    points: Mapping[float, Mapping[Any, LoadedRun]]  # share of attackers, or epsilon -> seed -> run
    reference: float  # the point without the condition

    def values(self, strength: float, metric: str) -> np.ndarray:
        """The test metric of every seed at one point; NaN where a run lacks it."""
        return np.array([run.metrics("test").get(metric, math.nan) for run in self.points[strength].values()])

    def changes(self, strength: float, metric: str) -> np.ndarray:
        """The test metric at a point less that without the condition, of each seed that has both."""
        without = self.points.get(self.reference, {})
        pairs = [(run, without[seed]) for seed, run in self.points[strength].items() if seed in without]
        ends = np.array([[run.metrics("test").get(metric, math.nan) for run in pair] for pair in pairs]).reshape(-1, 2)
        return ends[:, 0] - ends[:, 1]


def attack_curves(runs: Sequence[LoadedRun]) -> list[Curve]:
    """A curve for each attack on each set of runs that are else alike; those without attackers are part of each."""

    def share(run: LoadedRun) -> float:
        attack = run.config.get("attack", {})
        return 0.0 if attack.get("name", "none") == "none" else float(attack["fraction"])

    def attack_of(run: LoadedRun) -> dict[str, Any]:
        return {key: value for key, value in run.config.get("attack", {}).items() if key != "fraction"}

    return _curves(runs, share, 0.0, attack_of, ("attack",))


def privacy_curves(runs: Sequence[LoadedRun]) -> list[Curve]:
    """A curve for each set of runs that are alike but for epsilon; those without privacy are part of it.

    A clip among the transforms makes no difference: it is what privacy does as well.
    """

    def epsilon(run: LoadedRun) -> float:
        if run.config.get("privacy", {}).get("name", "none") == "none":
            return NO_PRIVACY
        return float(run.config["privacy"].get("epsilon") or run.results.attributes.get("epsilon", math.nan))

    def privacy_of(run: LoadedRun) -> dict[str, Any]:
        strength = ("epsilon", "noise_multiplier")
        return {key: value for key, value in run.config.get("privacy", {}).items() if key not in strength}

    return _curves(runs, epsilon, NO_PRIVACY, privacy_of, ("privacy", "transforms"))


def _curves(
    runs: Sequence[LoadedRun], strength: Any, reference: float, condition: Any, apart: Sequence[str]
) -> list[Curve]:
    """Sort runs that have a test into curves.

    strength, condition: of a run, how strong the condition is and which one. apart: sections of the configuration that
    belong to the condition.
    """
    without: dict[str, dict[Any, LoadedRun]] = {}
    points_of: dict[tuple[str, str], dict[float, dict[Any, LoadedRun]]] = {}
    for run in runs:
        if not run.metrics("test") or math.isnan(strength(run)):
            continue
        rest = {k: v for k, v in run.config.items() if k not in ("run", "runtime", "checkpoint", "trackers", *apart)}
        if "transforms" in apart:
            rest["transforms"] = [t for t in run.config.get("transforms", []) if t.get("name") != "clip"]
        key, seed = json.dumps(rest, sort_keys=True, default=str), run.results.attributes.get("seed")
        if strength(run) == reference:
            without.setdefault(key, {})[seed] = run
        else:
            points = points_of.setdefault((json.dumps(condition(run), sort_keys=True, default=str), key), {})
            points.setdefault(strength(run), {})[seed] = run
    curves = []
    for (_, key), points in points_of.items():
        joined = {**({reference: without[key]} if key in without else {}), **points}
        if len(joined) > 1:
            curves.append(dict(sorted(joined.items())))
    firsts = [
        next(run for at, by_seed in points.items() if at != reference for run in by_seed.values()) for points in curves
    ]
    labels = distinguishing(firsts, apart)
    return [
        Curve(f"{apart[0]} {run.config[apart[0]]['name']}", label, points, reference)
        for run, label, points in zip(firsts, labels, curves, strict=True)
    ]


def distinguishing(runs: Sequence[LoadedRun], apart: Sequence[str]) -> list[str]:
    """A short label for each run: the values of as few keys as tell them apart, choices by name before options.

    apart: sections of the configuration that do not count.
    """
    varied = {
        key: list(map(str, values)) for key, values in varied_keys(runs).items() if key.split(".")[0] not in apart
    }
    keys: list[str] = []
    for key in sorted(varied, key=lambda key: (key != "method.name", not key.endswith((".name", ".aggregator")))):
        if len(_told_apart(varied, [*keys, key])) > len(_told_apart(varied, keys)):
            keys.append(key)
    texts = [", ".join(varied[key][i] for key in keys if varied[key][i] != "none") for i in range(len(runs))]
    return [text or str(run.results.attributes.get("method", NONE)) for text, run in zip(texts, runs, strict=True)]


def _told_apart(varied: Mapping[str, list[str]], keys: Sequence[str]) -> set[tuple[str, ...]]:
    return set(zip(*(varied[key] for key in keys), strict=True)) if keys else {()}


def shown_strength(strength: float) -> str:
    """Like "0.2", or "none" without privacy."""
    return "none" if strength == NO_PRIVACY else f"{strength:g}"


def metrics_of(curves: Sequence[Curve]) -> list[str]:
    """The names of the test metrics of these curves, in order."""
    return in_order(
        *(run.metrics("test") for curve in curves for by_seed in curve.points.values() for run in by_seed.values())
    )


def curves_grid(title: str, name: str, curves: Sequence[Curve]) -> Grid:
    """The table of the curves: test results at each point, and their change from the point without the condition.

    name: of the strength, like "epsilon".
    """
    names = metrics_of(curves)
    rows = [
        [
            curve.panel,
            curve.label,
            Number(shown_strength(strength), strength),
            Number(str(len(by_seed)), len(by_seed)),
            *(
                cell
                for metric in names
                for cell in (
                    as_interval(curve.values(strength, metric)),
                    NONE if strength == curve.reference else as_interval(curve.changes(strength, metric)),
                )
            ),
        ]
        for curve in curves
        for strength, by_seed in curve.points.items()
    ]
    header = [text for metric in names for text in (title_of(metric), f"{title_of(metric)}: change, seed by seed")]
    return Grid(title, ["condition", "runs", name, "seeds", *header], rows, long=True)
