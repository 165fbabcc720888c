"""Successive halving: after some rounds the best settings of a sweep go on, and the others stop.

Jamieson and Talwalkar 2016 (arXiv 1502.07943), with the numbers of Li et al. 2018 (Hyperband, arXiv 1603.06560,
algorithm 1): of the n settings that have come to a rung, the floor(n / factor) with the lowest validation loss go on.

Runs that differ in their seed alone are one setting, and its loss is their mean, so that seeds stay together. Nothing
is stored: a decision follows from the losses in the run directories, and is the same whenever it is made again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated

from pydantic import Field

from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.registry import Section
from fedhpc.results.unfinished import read_results


class EarlyStop(Section):
    factor: int = Field(3, ge=2, description="from a rung of n settings n / factor go on")
    after: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="the rungs: rounds after which some stop"
    )


@dataclass(frozen=True)
class Setting:
    """The runs of a sweep that differ in their seed alone."""

    name: str
    runs: tuple[int, ...]  # indices


@dataclass(frozen=True)
class Rung:
    """What was decided after a round."""

    round: int
    losses: Mapping[Setting, float]  # mean over the seeds, best first; without settings of which a run failed
    going: Sequence[Setting]  # in the order of the sweep
    stopped: Sequence[Setting]

    @property
    def line(self) -> str:
        """What to tell whoever watches."""
        lost = [setting.name for setting in self.stopped if setting not in self.losses]
        return (
            f"after round {self.round}: {len(self.going)} of {len(self.going) + len(self.stopped)} settings go on, by "
            f"validation loss: {self._listed(self.going)}"
            + (f"; not ranked, since a run failed: {', '.join(lost)}" if lost else "")
        )

    def note(self, early: Sequence[bool]) -> str:
        """What a comparison says of those that stopped; empty if there is nothing to say. early: the runs that did."""
        stopped = [setting for setting in self.stopped if any(early[run] for run in setting.runs)]
        if not stopped:
            return ""
        return f"Stopped after round {self.round} by their validation loss, and not compared: {self._listed(stopped)}."

    def _listed(self, settings: Sequence[Setting]) -> str:
        """Settings with their losses, the best first."""
        ranked = [f"{setting.name} ({loss:.4f})" for setting, loss in self.losses.items() if setting in settings]
        return ", ".join([*ranked, *(f"{one.name} (a run failed)" for one in settings if one not in self.losses)])


class Halving:
    """Which runs of a sweep go on after which round."""

    def __init__(self, options: EarlyStop, configs: Sequence[Config], where: str) -> None:
        """where: what the line of an error begins with. UserError where the runs cannot be ranked."""
        self.options, self.settings = options, _settings(configs)
        self._directories = [config.run_dir for config in configs]
        self._read: dict[tuple[int, int], float] = {}  # run and round -> loss; what is read once never changes
        key = f"{where}: sweep.early_stop"
        if options.after != sorted(set(options.after)):
            raise UserError(f"{key}.after: each round must come after the one before it, got {options.after}")
        if len(self.settings) == 1:
            raise UserError(f"{key}: the runs differ in their seeds alone, so there is nothing to choose; take it out")
        for config in configs:
            if problem := _problem(options, config, configs[0]):
                raise UserError(f"{key}: run {config.run.name}: {problem}")

    @property
    def plan(self) -> str:
        """How many settings go on from each rung."""
        going, parts = len(self.settings), []
        for after in self.options.after:
            parts.append(f"the best {self._share(going)} of {going} settings go on after round {after}")
            going = self._share(going)
        return f"early stop: {', '.join(parts)}"

    def reached(self, run: int, after: int) -> bool:
        """Whether a run has done `after` rounds, or has ended before."""
        return self._loss(run, after) is not None

    def decided(self, failed: Collection[int]) -> list[Rung]:
        """The rungs that all runs have come to which are to be ranked there, or have `failed` before it."""
        rungs: list[Rung] = []
        going: Sequence[Setting] = self.settings
        for after in self.options.after:
            losses = {}
            for setting in going:
                of_runs = {run: self._loss(run, after) for run in setting.runs}
                if any(loss is None and run not in failed for run, loss in of_runs.items()):
                    return rungs
                known = [loss for loss in of_runs.values() if loss is not None]
                if len(known) == len(of_runs):
                    losses[setting] = sum(known) / len(known)
            ranked = dict(sorted(losses.items(), key=lambda item: (math.isnan(item[1]), item[1])))
            best = list(ranked)[: self._share(len(going))]
            stopped = [setting for setting in going if setting not in best]
            going = [setting for setting in going if setting in best]
            rungs.append(Rung(after, ranked, going, stopped))
        return rungs

    def _share(self, count: int) -> int:
        return max(1, count // self.options.factor)

    def _loss(self, run: int, after: int) -> float | None:
        """The validation loss of a run after a round, or at its end if that came first; None before that."""
        directory = self._directories[run]
        if (run, after) not in self._read and (directory / "results.h5").exists():
            results = read_results(directory)
            if results.num_rounds >= after or results.complete:
                self._read[run, after] = float(results.rounds["eval_loss"][min(after, results.num_rounds)])
        return self._read.get((run, after))


def _problem(options: EarlyStop, config: Config, first: Config) -> str | None:
    """Why a run has no loss at a rung that could be compared with those of the `first` run; None where it has."""
    rounds, evaluation = config.federation.rounds, config.evaluation
    for after in options.after:
        if after >= rounds:
            return f"after round {after} there is none to go on with (federation.rounds {rounds})"
        if after % evaluation.every:
            return f"it is not evaluated after round {after} (evaluation.every {evaluation.every})"
    if "loss" not in evaluation.metrics:
        return f"settings are ranked by the validation loss, which is not in evaluation.metrics {evaluation.metrics}"
    for key in ("data", "objective", "evaluation.max_examples"):
        if attrgetter(key)(config) != attrgetter(key)(first):
            return f"its loss does not compare with that of {first.run.name}: they differ in {key}"
    return None


def _settings(configs: Sequence[Config]) -> list[Setting]:
    runs_of: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        rest = config.model_dump(mode="json", exclude={"run"})
        runs_of.setdefault(json.dumps(rest, sort_keys=True), []).append(i)
    return [
        Setting(configs[runs[0]].run.name.removesuffix(f"-s{configs[runs[0]].run.seed}"), tuple(runs))
        for runs in runs_of.values()
    ]
