"""A grid of runs as one command: methods, splits, seeds and anything else in the configuration.

    python -m fedhpc.sweep SWEEP.yaml [key=value ...] [--list] [--where] [--index I] [--dry-run]

Runs what is missing, continues what was interrupted, and ends with a comparison (fedhpc.report) in <dir>/comparison.
`--index $SLURM_ARRAY_TASK_ID` does one run of them, for an array job. `section.key=value` overrides `set` for all runs,
`sweep.key=value` a key of SWEEP.yaml.

Runs train together where they differ in no more than seeds, learning rates and schedules, steps, split, cohort, server,
transforms or privacy of clients: one process loads model and data once, and clients of all of them share its forwards.
Each has its plan, state, directory and results as if it were alone, but for the rounding of sums, which differs from
one grouping to another. With `together: 1` each is alone, to the bit what `fedhpc run` makes of its file. The keys of
SWEEP.yaml:

    name: approaches                     # dir: default runs/<name>; each run has <dir>/<labels>-s<seed>
    base: configs/skewed.yaml            # without it the embedded default
    set: {federation.rounds: 30}         # overrides for all runs
    grid:                                # the runs are all combinations; the first axis varies slowest
      - method:                          # a named axis: each label sets several keys at once
          prefix: {method.name: prefix, client.lr: 0.05}
          lora: {method.name: lora, method.rank: 4, client.lr: 0.01}
      - partition.alpha: [0.1, 1.0]      # a key and its values
      - run.seed: [0, 1, 2]
    launch: torchrun --standalone --nproc_per_node=3 -m fedhpc.main    # default python -m fedhpc.main
    together: 12                         # most runs in one process (16); where launch is another program each is alone
    early_stop: {factor: 3, after: [4, 8]}      # after round 4, and again after 8, the best third goes on

With `early_stop` all runs pause after these rounds (`fedhpc.main ... --until 4`). Runs that differ in their seed alone
are one setting, ranked by the mean of their validation losses (fedhpc.halving); the settings that go on are resumed,
and end as in a sweep without it. The others stay as they are, are listed as stopped early, and are in no comparison;
`sweep.early_stop=null` on the command line lets them go on, too.

Paths are relative to the current directory. Exit codes: 0 all is complete; 1 a run failed (the others went on);
2 bad command or configuration (nothing was written), or another process has a run; 75 preempted, run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import Field

from fedhpc import config as configuration
from fedhpc.config import Config
from fedhpc.config.together import shared_settings
from fedhpc.errors import UserError, nearest
from fedhpc.halving import EarlyStop, Halving, Rung
from fedhpc.ranks.launch import detect
from fedhpc.ranks.startup import DONE, FAILED, PREEMPTED, REFUSED, SIGNALS
from fedhpc.registry import Section
from fedhpc.report.compare import compare
from fedhpc.report.runs import load_run
from fedhpc.report.text import console
from fedhpc.results.files import atomic_write
from fedhpc.results.lock import InUseError
from fedhpc.results.progress import duration
from fedhpc.results.resume import decide
from fedhpc.results.status import BESIDE, PAUSED, Status, read_status

COMPLETE, REACHED, IN_USE, STOPPED = "complete", "reached", "in use", "preempted"
EARLY = "stopped early after round"  # and its number
Changes = Mapping[str, Any]  # section.key -> value


class Sweep(Section):
    """The keys of SWEEP.yaml."""

    name: str = Field(pattern=r"^\w[\w.+-]*$", description="name of the sweep")
    dir: str | None = Field(None, description="folder of the runs; default runs/<name>")
    base: str | None = Field(None, description="configuration that the runs start from; default the embedded one")
    set: dict[str, Any] = Field({}, description="overrides for all runs")
    grid: list[dict[str, Any]] = Field(description="axes; the runs are their combinations")
    launch: str = Field("python -m fedhpc.main", description="command that takes a configuration file")
    together: int = Field(16, ge=1, description="most runs that train together in one process; 1: each alone")
    early_stop: EarlyStop | None = Field(None, description="rounds after which only the best settings go on")


@dataclass(frozen=True)
class Cell:
    """One run of the grid: its resolved configuration, and the keys that its labels change."""

    config: Config
    changes: Changes

    @property
    def name(self) -> str:
        """The name of the run, like lora-alpha_0.1-s0."""
        return self.config.run.name

    @property
    def file(self) -> Path:
        """Where the resolved configuration is written: beside the run directory, into which only the run writes."""
        return self.config.run_dir.with_name(f"{self.name}.yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="fedhpc sweep", description="Run a grid of configurations.")
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs, or sweep.key=value")
    parser.add_argument("--list", action="store_true", help="print index, name and status of each run")
    parser.add_argument("--where", action="store_true", help="print the directory of each run")
    parser.add_argument("--index", type=int, metavar="I", help="only the run of this index, counted from 0")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run; write nothing")
    options = parser.parse_intermixed_args(arguments)
    on_error = REFUSED
    try:
        sweep, cells = load(options.sweep, options.overrides)
        halving = None
        if sweep.early_stop is not None:
            halving = Halving(sweep.early_stop, [cell.config for cell in cells], str(options.sweep))
        command = _command(sweep.launch)
        takes_several = _takes_several(command)
        together = sweep.together if takes_several else 1
        statuses, rungs = survey(cells, halving)
        chosen = list(range(len(cells)))
        if options.index is not None:
            if options.index not in chosen:
                raise UserError(f"command line: --index {options.index}: there are runs 0 to {len(cells) - 1}")
            chosen = [options.index]
        if options.where:
            print("\n".join(str(cells[i].config.run_dir) for i in chosen))
            return DONE
        if not (options.list or options.dry_run):
            if halving and options.index is not None:
                raise UserError(
                    "command line: --index does one run alone, and sweep.early_stop ranks all of them; leave it out, "
                    "or give sweep.early_stop=null"
                )
            on_error = FAILED
            if not takes_several and len(grouped(cells, chosen, sweep.together)) < len(chosen):
                print(f"sweep.launch: '{sweep.launch}' may not take several configurations: each run trains alone")
            return run(cells, chosen, command, halving, together)
    except UserError as error:
        print(f"fedhpc sweep: error: {error}", file=sys.stderr)
        return on_error
    until = next(iter(halving.options.after[len(rungs) :]), None) if halving else None
    missing = [
        i
        for i in chosen
        if not statuses[i].startswith(EARLY) and _standing(cells, i, until, halving) not in (COMPLETE, REACHED, IN_USE)
    ]
    started = {group[-1]: [cells[i] for i in group] for group in grouped(cells, missing, together)}
    for i in chosen:
        print(f"{i:4d}  {cells[i].name:{max(len(cell.name) for cell in cells)}}  {statuses[i]}")
        if options.dry_run and i in missing:
            print("      " + " ".join(f"{key}={json.dumps(value)}" for key, value in cells[i].changes.items()))
            if i in started:
                print(f"      {shlex.join(_started(command, started[i], until))}")
    if options.dry_run and halving:
        print(halving.plan)
    return DONE


# ---------------------------------------------------------------- the grid


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[Sweep, list[Cell]]:
    """Read a sweep and validate all its runs. A UserError names the run and the key that are wrong."""
    given = configuration.parse_overrides(overrides)
    sweep_keys = {
        key.removeprefix("sweep."): configuration.parse_yaml(value, f"command line: {key}")
        for key, value in given
        if key.startswith("sweep.")
    }
    common = [(key, value) for key, value in given if not key.startswith("sweep.")]
    sweep: Sweep = configuration.section(Sweep, {**configuration.read_yaml(path), **sweep_keys}, "sweep", str(path))
    if "=" in (sweep.dir or ""):
        raise UserError(f"{path}: sweep.dir: '{sweep.dir}' must not have a '=', which marks overrides")
    axes = [_axis(str(key), values, f"{path}: sweep.grid") for axis in sweep.grid for key, values in axis.items()]
    varied = {key for axis in axes for _, changes in axis for key in changes}
    for key in [*sweep.set, *varied, *dict(common)]:
        if key in ("run", "run.name", "run.dir"):
            raise UserError(f"{path}: {key} cannot be set here: labels and seed name a run and its folder")
        if key in varied and key in dict(common):
            raise UserError(f"command line: {key} is set by an axis of {path}; change it there")
    source = Path(sweep.base) if sweep.base else configuration.EMBEDDED
    raw = configuration.override(configuration.read_yaml(source), list(sweep.set.items()), f"{path}: sweep.set")
    raw = configuration.override(raw, common)
    cells: dict[str, Cell] = {}
    for choice in itertools.product(*axes):
        cell = _cell(sweep, raw, choice, str(path))
        if cells.setdefault(cell.name, cell) is not cell:
            raise UserError(f"{path}: two runs are called '{cell.name}'; give their values different labels")
    return sweep, list(cells.values())


def _cell(sweep: Sweep, raw: Mapping[str, Any], choice: Sequence[tuple[str, Changes]], path: str) -> Cell:
    labels = "-".join(label for label, _ in choice if label) or sweep.name
    where = f"{path}: run {labels}"
    changes: dict[str, Any] = {}
    for _, more in choice:
        for key in changes.keys() & more.keys():
            raise UserError(f"{where}: {key} is set by two axes")
        changes |= more
    # All axes at once: options that one axis sets may belong to the name that another one chooses.
    tree = configuration.override(raw, list(changes.items()), where)
    section = tree.get("run")
    name = f"{labels}-s{section.get('seed', 0) if isinstance(section, Mapping) else 0}"
    folder = Path(sweep.dir or f"runs/{sweep.name}")
    tree = configuration.override(tree, [("run.name", name), ("run.dir", str(folder / name))], where)
    where = f"{path}: run {name}"
    return Cell(configuration.resolve(tree, where, dict.fromkeys(changes, where)), changes)


def _axis(key: str, values: Any, where: str) -> list[tuple[str, Changes]]:
    """The (label, overrides) pairs of an axis: partition.alpha: [0.1, 1.0] has the labels alpha_0.1 and alpha_1.0.

    A seed has the empty label, since every run's name ends with its seed anyway.
    """
    if isinstance(values, list) and values:
        return [(_label(key, value, where), {key: value}) for value in values]
    if not isinstance(values, dict) or not values:
        raise UserError(f"{where}: {key} must be a list of values or {{label: {{section.key: value}}}}, got {values!r}")
    for label, changes in values.items():
        if not re.fullmatch(r"[\w.+-]+", str(label)):
            raise UserError(f"{where}: {key}: the label '{label}' names folders: letters, digits and . _ + - only")
        if not isinstance(changes, dict):
            raise UserError(f"{where}: {key}: {label} must be {{section.key: value}}, got {changes!r}")
    return [(str(label), {str(k): v for k, v in changes.items()}) for label, changes in values.items()]


def _label(key: str, value: Any, where: str) -> str:
    if key.split(".")[0] not in configuration.KEYS:
        raise UserError(f"{where}: unknown key '{key}'; {nearest(key, configuration.KEYS)}")
    if isinstance(value, (list, dict)):
        raise UserError(f"{where}: {key}: {value!r} needs a label, as {{label: {{{key}: ...}}}}")
    if key == "run.seed":
        return ""
    text = value if isinstance(value, str) else f"{key.split('.')[-1]}_{json.dumps(value)}"
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def grouped(cells: Sequence[Cell], chosen: Sequence[int], together: int) -> list[list[int]]:
    """The chosen runs in groups that train together in one process, of at most `together`."""
    groups: list[list[int]] = []
    filling: dict[str, list[int]] = {}  # by what runs must have alike: the group that has room left
    for i in chosen:
        shared = shared_settings(cells[i].config) if together > 1 else None
        last = filling.get(shared) if shared is not None else None
        if last is not None and len(last) < together:
            last.append(i)
            continue
        groups.append([i])
        if shared is not None:
            filling[shared] = groups[-1]
    return groups


# ---------------------------------------------------------------- running


@dataclass
class _Runner:
    """Starts one process after the other, and ends the one in progress when a signal comes."""

    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    signals: list[int] = field(default_factory=list)
    handlers: dict[signal.Signals, Any] = field(default_factory=dict)

    def __enter__(self) -> _Runner:
        self.handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        self._end()

    def _end(self) -> None:
        # SIGTERM for any signal: torchrun and mpiexec pass SIGTERM on to their ranks, but die of SIGUSR2.
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def __call__(self, cells: Sequence[Cell], until: int | None) -> list[str]:
        """Run some cells in one process, to their ends or `until` a round; returns COMPLETE, REACHED, IN_USE, STOPPED,
        or the reason why it failed, of each."""
        for cell in cells:
            cell.file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(cell.file, cell.config.to_yaml().encode())
        before = [read_status(cell.config.run_dir) for cell in cells]
        if self.signals:
            return [STOPPED] * len(cells)
        # In a session of its own, so that Ctrl-C on a terminal reaches it once, through us.
        command = _started(self.command, cells, until)
        self.process = subprocess.Popen(command, start_new_session=True, env=_environment())
        if self.signals:
            self._end()
        code = self.process.wait()
        return [self._outcome(cell, code, status, until) for cell, status in zip(cells, before, strict=True)]

    def _outcome(self, cell: Cell, code: int, status_before: Status | None, until: int | None) -> str:
        status = read_status(cell.config.run_dir)
        # torchrun turns every exit code into 1, so the status that the run wrote decides.
        reported = status if status != status_before else None
        preempted = reported and reported.state == "preempted" and not reported.reason.startswith((PAUSED, BESIDE))
        if self.signals or code == PREEMPTED or (code and preempted):
            return STOPPED
        status_now = status_of(cell)
        if status_now in (COMPLETE, IN_USE):
            return status_now
        if until and status and status.round >= until and (code == DONE or status.reason.startswith(PAUSED)):
            return REACHED
        is_told = reported and (reported.state == "failed" or reported.reason.startswith(BESIDE))
        return reported.reason if reported and is_told else f"exit code {code}, its message is above"


def status_of(cell: Cell) -> str:
    """The status of a run: complete, in use, preempted, paused after a round, failed, interrupted (killed), extended
    or waiting.

    UserError where its directory holds another run.
    """
    try:
        decision = decide(cell.config, cell.config.run_dir, fresh=False, wait_s=0.0)
        status = read_status(cell.config.run_dir)
    except InUseError:
        return IN_USE
    except UserError as error:
        raise UserError(f"{error} (for a sweep: remove that folder, or give another sweep.dir)") from None
    if status is None or decision == "finished":
        return "waiting" if status is None else COMPLETE
    if status.reason.startswith(PAUSED):
        return status.reason
    return {"running": "interrupted", "complete": "extended"}.get(status.state, status.state)


def survey(
    cells: Sequence[Cell], halving: Halving | None, failed: Collection[int] = ()
) -> tuple[list[str], list[Rung]]:
    """The status of each run, EARLY and a round where it did not go on, and the rungs that are decided.

    failed: runs that may have left nothing behind. UserError as `status_of`.
    """
    statuses = [status_of(cell) for cell in cells]
    failed = {*failed, *(i for i, status in enumerate(statuses) if status == "failed")}
    rungs = halving.decided(failed) if halving else []
    for rung in rungs:
        for i in {i for setting in rung.stopped for i in setting.runs} - failed:
            if statuses[i] not in (COMPLETE, IN_USE):
                statuses[i] = f"{EARLY} {rung.round}"
    return statuses, rungs


def run(
    cells: Sequence[Cell], chosen: Sequence[int], command: Sequence[str], halving: Halving | None, together: int = 1
) -> int:
    """Run those of the `chosen` cells that are not complete, then compare all; returns the exit code.

    halving: at each of its rungs all pause, and the best go on. together: most of them in one process.
    """
    outcomes: dict[int, str] = {}
    going = chosen
    with _Runner(command) as runner:
        for number, until in enumerate([*(halving.options.after if halving else []), None]):
            outcomes |= _run_until(until, cells, going, runner, halving, together)
            if STOPPED in outcomes.values():
                print("fedhpc sweep: preempted; the same command goes on from there", file=sys.stderr)
                return PREEMPTED
            if halving and until:
                rungs = halving.decided([i for i in outcomes if _is_failure(outcomes[i])])
                if len(rungs) == number:  # another process has runs that are not there yet
                    break
                print(rungs[number].line, flush=True)
                going = [i for setting in rungs[number].going for i in setting.runs]
        return _close(cells, chosen, outcomes, halving)


def _standing(cells: Sequence[Cell], i: int, until: int | None, halving: Halving | None) -> str:
    """REACHED for a run that has come to the rung `until`, else its `status_of`."""
    return REACHED if halving and until and halving.reached(i, until) else status_of(cells[i])


def _run_until(
    until: int | None,
    cells: Sequence[Cell],
    going: Sequence[int],
    runner: _Runner,
    halving: Halving | None,
    together: int,
) -> dict[int, str]:
    """Run cells to the rung `until`, or to their end; the outcome of each, as of a `_Runner`, in order.

    Where a group ends before all of its cells are done, these go on in smaller groups (`_once_more`).
    """
    outcomes: dict[int, str] = {}
    well, seconds, todo = 0, 0.0, len(going)
    missing = [i for i in going if _standing(cells, i, until, halving) not in (COMPLETE, REACHED, IN_USE)]
    # In the order of the sweep; what is done, or another process has, takes nobody's room.
    queue = deque(sorted([*grouped(cells, missing, together), *([i] for i in going if i not in missing)]))
    while queue:
        group, missing = queue.popleft(), []
        for i in group:
            outcome = _standing(cells, i, until, halving)
            if outcome in (COMPLETE, REACHED, IN_USE):
                if outcome == IN_USE and i not in outcomes:  # at the end again: another process may have run it by then
                    queue.append([i])
                outcomes[i] = outcome
            else:
                missing.append(i)
                print(f"{_title(cells, i)}: {outcome}, starting", flush=True)
        began = time.monotonic()
        ended = dict(zip(missing, runner([cells[i] for i in missing], until) if missing else [], strict=True))
        seconds += time.monotonic() - began
        if STOPPED in ended.values():
            return dict.fromkeys(missing, STOPPED)
        smaller = _once_more(cells, ended)
        queue.extendleft(reversed(smaller))
        again = [i for part in smaller for i in part]
        if again:
            sizes = " and ".join(str(len(part)) for part in smaller)
            print(f"{len(again)} runs ended too early ({ended[again[0]]}): they go on, {sizes} together", flush=True)
        outcomes |= {i: outcome for i, outcome in ended.items() if i not in again}
        well += sum(not _is_failure(outcome) for outcome in ended.values())
        for i in group:
            if i in again:
                continue
            todo -= outcomes[i] != IN_USE
            left = seconds / max(well, 1) * todo
            line = f"{_title(cells, i)}: {outcomes[i]}" + (f" round {until}" if outcomes[i] == REACHED else "")
            target = f" to round {until}" if until else ""
            print(line + (f"; at most {duration(left)} left{target}" if left else ""), flush=True)
    return outcomes


def _once_more(cells: Sequence[Cell], ended: Mapping[int, str]) -> list[list[int]]:
    """The groups in which those of a group go on that ended too early: without the runs that the others name or that
    another process has, else in halves, since nobody knows which run was to blame. A run that was alone does not.

    ended: the outcome of each run of the group.
    """
    early = [i for i, outcome in ended.items() if _is_failure(outcome)]
    if len(ended) == 1 or not early:
        return []
    named = [i for i in early if any(ended[j].startswith(f"{BESIDE} {cells[i].name}:") for j in early)]
    if named or IN_USE in ended.values():
        return [[i for i in early if i not in named]]
    half = len(early) // 2
    return [part for part in (early[:half], early[half:]) if part]


def _title(cells: Sequence[Cell], i: int) -> str:
    return f"[{i + 1}/{len(cells)}] {cells[i].name}"


def _is_failure(outcome: str) -> bool:
    return outcome not in (COMPLETE, REACHED, IN_USE)


def _close(cells: Sequence[Cell], chosen: Sequence[int], outcomes: Mapping[int, str], halving: Halving | None) -> int:
    """Compare the complete runs, name those that failed or are in use elsewhere, and return the exit code."""
    failed = [i for i in sorted(outcomes) if _is_failure(outcomes[i])]
    statuses, rungs = survey(cells, halving, failed)
    complete = [cell.config.run_dir for cell, status in zip(cells, statuses, strict=True) if status == COMPLETE]
    if complete and (len(complete) == len(cells) or len(chosen) == len(cells)):
        out = complete[0].with_name("comparison")
        out.mkdir(exist_ok=True)
        early = [status.startswith(EARLY) for status in statuses]
        notes = [note for rung in rungs if (note := rung.note(early))]
        compare([load_run(path) for path in complete], out, console(), notes=notes)
        stopped = f", {sum(early)} stopped early" if any(early) else ""
        print(f"wrote {out}: {len(complete)} of {len(cells)} runs compared{stopped}")
    for i in failed:
        print(f"fedhpc sweep: error: {cells[i].name} failed: {outcomes[i]}", file=sys.stderr)
    busy = [cells[i].name for i, outcome in outcomes.items() if outcome == IN_USE and statuses[i] != COMPLETE]
    if busy:
        print(f"fedhpc sweep: error: in use by another process: {', '.join(busy)}; run again later", file=sys.stderr)
    return FAILED if failed else REFUSED if busy else DONE


def _started(command: Sequence[str], cells: Sequence[Cell], until: int | None) -> list[str]:
    """The command that runs some cells, to their ends or `until` a round."""
    return [*command, *(str(cell.file) for cell in cells), *(["--until", str(until)] if until else [])]


def _takes_several(command: Sequence[str]) -> bool:
    """Whether a command is known to take several configurations: it is fedhpc.main or `fedhpc run`, whatever starts it,
    with nothing but options behind."""
    for i, (program, word) in enumerate(itertools.pairwise(command), 2):
        if (program, word) == ("-m", "fedhpc.main") or (Path(program).name, word) == ("fedhpc", "run"):
            return all(behind.startswith("-") or behind.isdecimal() for behind in command[i:])
    return False


def _command(launch: str) -> list[str]:
    if detect(os.environ).world_size > 1:
        raise UserError("a sweep is one process that launches others: give torchrun, mpiexec or srun as sweep.launch")
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise UserError(f"sweep.launch: '{launch}': {error}") from None
    if not words or shutil.which(words[0], path=_environment()["PATH"]) is None:
        raise UserError(f"sweep.launch: '{launch}': there is no such command")
    return words


def _environment() -> dict[str, str]:
    """The environment of the runs: `python` and `torchrun` are those of this interpreter, activated or not."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


if __name__ == "__main__":
    sys.exit(main())
