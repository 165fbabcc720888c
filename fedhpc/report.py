"""Tables and plots of one run, or a comparison of several.

    python -m fedhpc.report RUN [RUN ...] [--out DIR] [--baseline NAME] [--target-loss X] [--axis KEY ...]

RUN is a run directory or a results.h5, finished or not. One run is reported into RUN/report, several into
./comparison: Markdown, CSV and PNG. Runs that differ only in their seed are one group, shown as mean ± half the width
of the 95 % confidence interval of the mean (Student's t). Groups with seeds in common are compared seed by seed as
well: what the seeds share, like the split of the data, drops out of the differences.

--target-loss adds what each group spent until its validation loss was at most X, and a projection of its bytes to
slower links (fedhpc/costs.py). --axis, which can be given several times, adds test results along a configuration key:
a line for each set of runs that differ in it alone, and the changes from the reference, the value that most runs have.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedhpc import costs
from fedhpc.config import parse_yaml
from fedhpc.errors import UserError, nearest
from fedhpc.progress import duration
from fedhpc.rundir import read_status
from fedhpc.store import Results

if TYPE_CHECKING:
    from matplotlib import figure
else:
    from fedhpc.lazy import lazy

    figure = lazy("matplotlib.figure", extra="report")

TITLES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
}
# 0.975 quantiles of Student's t with 1, 2, ... degrees of freedom.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NONE = "–"


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


@dataclass(frozen=True)
class Grid:
    """A table of strings, for terminal and Markdown. The first column is text, the others are numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text: bool = False  # all columns are text

    def rich(self) -> Table:
        table = Table(title=escape(self.title), title_justify="left", title_style="bold")
        table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)  # narrow: comparisons have many columns
        for i, name in enumerate(self.header):
            table.add_column(escape(name), justify="left" if self.text or i == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        rule = [":--" if self.text or i == 0 else "--:" for i in range(len(self.header))]
        lines = [self.header, rule, *([_cell(value) for value in row] for row in self.rows)]
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fedhpc.report", description="Tables and plots of one run, or a comparison of several."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory or its results.h5")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where Markdown, CSV and PNG files go")
    parser.add_argument("--baseline", metavar="NAME", help="row that the others are compared with; the first one")
    parser.add_argument("--target-loss", type=float, metavar="X", help="what was spent to get to this validation loss")
    parser.add_argument("--axis", action="append", default=[], metavar="KEY", help="results along a configuration key")
    options = parser.parse_args(arguments)
    screen = console()
    try:
        runs = [load(path) for path in options.runs]
        out = options.out or (runs[0].directory / "report" if len(runs) == 1 else Path("comparison"))
        try:
            out.mkdir(parents=True, exist_ok=True)
            if len(runs) == 1 and options.target_loss is None:
                written = report_run(runs[0], out, screen)
            else:
                written = compare(runs, out, screen, options.baseline, options.target_loss, options.axis)
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error.strerror}; choose another --out") from error
    except UserError as error:
        print(f"fedhpc.report: {error}", file=sys.stderr)
        return 2
    for path in written:
        screen.print(f"wrote {path}", markup=False, soft_wrap=True)
    return 0


def console() -> Console:
    """The standard output, wide enough for tables where it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def load(path: Path) -> Run:
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


# ---------------------------------------------------------------- one run


def report_run(run: Run, out: Path, console: Console) -> list[Path]:
    """Tables on the terminal; report.md, CSV files and plots in `out`. The paths written."""
    rounds = run.rounds
    grids = [_facts(run), _outcome(run), _over_clients([Group(run.name, [run])]), _evaluations(run), _costs(run)]
    for grid in grids:
        if grid.rows:
            console.print(grid.rich())
    # After the tables, which need no matplotlib.
    plots = [
        ("learning_curve.png", _learning_curve(run)),
        ("metrics.png", _metric_curves(run)),
        ("client_loss.png", _client_loss(run)),
        ("traffic.png", _traffic(run)),
        ("time.png", _time(run)),
    ]
    events = run.results.events
    shown = [[str(t), k, m] for t, k, m in zip(*(events[c][-20:] for c in ("round", "kind", "message")), strict=True)]
    title = "Events" if len(events["round"]) <= 20 else f"Events (the last 20 of {len(events['round'])})"
    grids += [Grid(title, ["round", "kind", "message"], shown, text=True), _samples(run)]

    written = []
    for name, plot in plots:
        if plot is not None:
            plot.savefig(out / name, dpi=150)
            written.append(out / name)
    images = "\n".join(f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in written)
    text = "\n".join([f"# {run.name}\n", *(grid.markdown() for grid in grids if grid.rows), images])
    written.append(_write(out / "report.md", text))
    written.append(_write(out / "rounds.csv", _csv(rounds)))
    if len(run.results.clients["round"]):
        written.append(_write(out / "clients.csv", _csv(run.results.clients)))
    return written


def _facts(run: Run) -> Grid:
    a = run.results.attributes
    rows = [["state", run.state]]
    rows += [[key.replace("_", " "), str(a[key])] for key in ("mode", "method", "model", "seed") if key in a]
    rows += [["trainable parameters", _count(run.parameters)]]
    for key in ("world_size", "transport", "device", "block_size", "created_utc", "fedhpc_version"):
        if key in a:
            rows.append([key.replace("_", " "), str(a[key])])
    return Grid(f"Run {run.name}", ["", "value"], rows, text=True)


def _outcome(run: Run) -> Grid:
    test, base = run.metrics("test"), run.metrics("base")
    rows = [[label, *(_number(m.get(name)) for name in _ordered(test, base))] for label, m in
            (("this run", test), ("untouched base", base)) if m]  # fmt: skip
    return Grid("Test", ["", *map(_title, _ordered(test, base))], rows)


def _over_clients(groups: Sequence[Group]) -> Grid:
    """Per-client results, a row for each group and metric; every client counts once."""
    rows = []
    for g in groups:
        for metric in dict.fromkeys(name.partition("/")[0] for run in g.runs for name in run.over_clients):
            values = [_interval(g.over_clients(f"{metric}/{key}")) for key in ("mean", "worst_10_percent", "std")]
            rows.append([g.label, _title(metric), *values])
    header = ["run", "metric", "mean", "worst 10 %", "standard deviation"]
    return Grid("Over clients, each on its own held-out data", header, rows)


def _evaluations(run: Run) -> Grid:
    rounds = run.rounds
    metrics = [name for name in rounds if name.startswith("eval_") and not np.isnan(rounds[name]).all()]
    evaluated = np.flatnonzero(~np.isnan(rounds["eval_loss"]))
    if len(evaluated) > 12:
        evaluated = evaluated[np.linspace(0, len(evaluated) - 1, 12).round().astype(int)]
    rows = [
        [str(rounds["round"][i]), _number(rounds["train_loss"][i]), *(_number(rounds[m][i]) for m in metrics)]
        for i in evaluated
    ]
    header = ["round", "train loss", *(f"eval {_title(name.removeprefix('eval_'))}" for name in metrics)]
    return Grid("Evaluations", header, rows)


def _costs(run: Run) -> Grid:
    r = {name: column[1:] for name, column in run.rounds.items()}
    if not len(r["round"]):
        return Grid("Costs", [], [])
    tokens, padding = int(r["tokens"].sum()), int(r["padded_tokens"].sum())
    rows = [["wall time", duration(run.seconds), ""]]
    for part in ("broadcast", "local", "reduce", "server", "eval"):
        seconds = r[f"seconds_{part}"]
        rows.append(
            [f"of it {part}", duration(float(run.rounds[f"seconds_{part}"].sum())), f"{np.mean(seconds):.3f} s"]
        )
    rows += [
        ["bytes down", _bytes(r["bytes_down"].sum()), _bytes(r["bytes_down"].mean())],
        ["bytes up", _bytes(r["bytes_up"].sum()), _bytes(r["bytes_up"].mean())],
        ["bytes on the wire", _bytes(r["wire_bytes"].sum()), _bytes(r["wire_bytes"].mean())],
        ["bytes per client, both ways", "", _bytes(run.bytes_per_client)],
        ["supervised tokens", _count(tokens), _count(tokens / len(r["round"]))],
        ["padding tokens", _count(padding), _count(padding / len(r["round"]))],
        ["clients sampled", _count(r["cohort_size"].sum()), f"{r['cohort_size'].mean():.1f}"],
        *([f"clients {k}", _count(r[k].sum()), f"{r[k].mean():.1f}"] for k in ("completed", "dropped", "rejected")),
        ["peak memory of a rank", _bytes(r["peak_memory_bytes"].max()), ""],
    ]
    return Grid("Costs", ["", "run", "per round"], rows)


def _samples(run: Run) -> Grid:
    samples = run.results.groups["samples"]
    rows = [
        [str(prompt), " / ".join(json.loads(references)), str(text)]
        for prompt, references, text in zip(
            *(samples.get(k, []) for k in ("prompt", "references", "text")), strict=True
        )
    ]
    return Grid("Generated texts", ["prompt", "references", "text"], rows, text=True)


# ---------------------------------------------------------------- several runs


def compare(
    runs: Sequence[Run],
    out: Path,
    console: Console,
    baseline: str | None = None,
    target: float | None = None,
    axes: Sequence[str] = (),
) -> list[Path]:
    """The comparison on the terminal; comparison.md, CSV files and plots in `out`. The paths written.

    `baseline` is the label of the group that the others are compared with, the first one by default; `target` a
    validation loss; `axes` keys of the configuration. UserError where there is no such group or no such axis.
    """
    groups = grouped(runs)
    lines = [line for key in axes for line in along(runs, key)]
    grids = [comparison(groups, "Test results")]
    reference, differing = paired_differences(groups, baseline)
    paired = baseline is not None or any(len(values) > 1 for _, _, values in differing)
    if paired:
        grids.append(_differences(reference, differing))
    if target is not None:
        grids += [_efficiency(groups, target), _projection(groups, target)]
    held_out = _over_clients(groups)
    if held_out.rows:
        grids.append(held_out)
    grids += [_changes(key, [line for line in lines if line.key == key]) for key in axes]
    for grid in grids:
        console.print(grid.rich())
    written = []
    plots = [
        ("eval_loss.png", _compared_loss(groups)),
        ("test.png", _compared_test(groups)),
        ("axes.png", _plotted_axes(axes, lines)),
    ]
    for name, plot in plots:
        if plot is not None:
            plot.savefig(out / name, dpi=150)
            written.append(out / name)
    images = "\n".join(f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in written)
    sources = "\n".join(f"- {group.label}: {', '.join(str(r.directory) for r in group.runs)}" for group in groups)
    note = "Groups of runs that differ only in the seed: mean ± half the 95 % confidence interval of the mean.\n"
    tables = "\n".join(grid.markdown() for grid in grids)
    written.append(_write(out / "comparison.md", f"{tables}\n{note}\n{images}\nRuns:\n\n{sources}\n"))
    written.append(_write(out / "comparison.csv", _comparison_csv(groups)))
    if paired:
        written.append(_write(out / "differences.csv", _differences_csv(reference, differing)))
    if target is not None:
        written.append(_write(out / "efficiency.csv", _efficiency_csv(groups, target)))
    if lines:
        written.append(_write(out / "axes.csv", _axes_csv(lines)))
    return written


def closing_table(paths: Sequence[Path]) -> Table:
    """Federated, centralised and untouched base side by side, a row for each run, as a table of `rich`."""
    names = {"centralized": "centralised", "local": "each client alone"}
    runs = [load(path) for path in paths]
    groups = [Group(names.get(run.mode, run.mode) + _mark(run), [run]) for run in runs]
    return comparison(groups, "Test results", brief=True).rich()


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
        Group((g.label if len(g.runs) > 1 else g.runs[0].name) + _mark(g.runs[0]), g.runs) for g in by_key.values()
    ]
    labels = [group.label for group in groups]
    return [Group(f"{g.label} [{g.runs[0].directory}]", g.runs) if labels.count(g.label) > 1 else g for g in groups]


def comparison(groups: Sequence[Group], title: str, brief: bool = False) -> Grid:
    """A row for each group, and for the untouched base; `brief` leaves out what the labels say."""
    bases, missing = _bases(groups), np.array([math.nan])
    names = _ordered(*(run.metrics("test") for g in groups for run in g.runs), *(m for _, m in bases))
    rows = []
    for g in groups:
        a = g.runs[0].results.attributes
        about = [] if brief else [g.runs[0].mode, str(a.get("method", NONE)), str(len(g.runs))]
        rows.append(
            [
                g.label,
                *about,
                *(_interval(g.test(name)) for name in names),
                _count(g.runs[0].parameters),
                _bytes(float(np.mean([run.bytes_per_client for run in g.runs]))),
                _interval(np.array([run.seconds for run in g.runs]), digits=1),
            ]
        )
    for label, metrics in bases:
        about = [] if brief else [NONE, NONE, NONE]
        rows.append([label, *about, *(_interval(metrics.get(name, missing)) for name in names), "0", NONE, NONE])
    about = [] if brief else ["mode", "method", "seeds"]
    costs = ["trainable parameters", "bytes per client and round", "seconds"]
    return Grid(title, ["run", *about, *map(_title, names), *costs], rows)


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
    names = _ordered(*(run.metrics("test") for g in groups for run in g.runs))
    by_seed = {_seed(run): run.metrics("test") for run in reference.runs}
    found = []
    for group in groups:
        for name in names if group is not reference else []:
            pairs = [(run.metrics("test"), by_seed.get(_seed(run), {})) for run in group.runs]
            there = [mine[name] - theirs[name] for mine, theirs in pairs if name in mine and name in theirs]
            found.append((group, name, np.array(there)))
    return reference, found


def _differences(reference: Group, differing: Sequence[tuple[Group, str, np.ndarray]]) -> Grid:
    names = list(dict.fromkeys(name for _, name, _ in differing))
    rows: dict[str, list[str]] = {}
    for group, _, values in differing:
        row = rows.setdefault(group.label, [group.label, ""])
        row[1] = str(max(int(row[1] or 0), len(values)))
        row.append(_interval(values))
    title = f"Test results: difference to {reference.label}, seed by seed"
    return Grid(title, ["run", "seeds in common", *map(_title, names)], list(rows.values()))


def _differences_csv(reference: Group, differing: Sequence[tuple[Group, str, np.ndarray]]) -> str:
    """One line for each group and metric, full precision."""
    columns: dict[str, list[Any]] = {}
    for group, name, values in differing:
        mean, half = mean_and_half_width(values)
        row = {"group": group.label, "baseline": reference.label, "metric": name, "seeds": len(values)}
        for key, value in {**row, "mean": mean, "low": mean - half, "high": mean + half}.items():
            columns.setdefault(key, []).append(value)
    return _csv(columns)


# ---------------------------------------------------------------- efficiency


def _efficiency(groups: Sequence[Group], target: float) -> Grid:
    """Costs of a group; those to the target only where every seed got there."""
    rows = []
    for g in groups:
        spent = [costs.until(run.rounds, target) for run in g.runs]
        reached = [s for s in spent if s is not None]
        there = reached if len(reached) == len(spent) else []
        federated = g.runs[0].mode == "federated"
        rows.append(
            [
                g.label,
                _count(g.runs[0].parameters),
                *(_bytes(_each_way(g, name) if federated else math.nan) for name in ("bytes_down", "bytes_up")),
                _interval(np.array([run.last_loss for run in g.runs])),
                f"{len(reached)} of {len(spent)}",
                _interval(np.array([s.round for s in there]), digits=1),
                _interval(np.array([s.tokens for s in there]), digits=0),
                _bytes(float(np.mean([s.num_bytes for s in there])) if there and federated else math.nan),
                _interval(np.array([s.seconds for s in there]), digits=1),
                _bytes(float(np.mean([run.rounds["peak_memory_bytes"].max() for run in g.runs]))),
            ]
        )
    costly = ["rounds", "tokens", "bytes", "training seconds"]
    header = ["run", "trainable parameters", "down per client and round", "up", "last validation loss", "reached"]
    title = f"What it takes to a validation loss of {target:g}"
    return Grid(title, [*header, *(f"{name} to it" for name in costly), "peak memory"], rows)


def _projection(groups: Sequence[Group], target: float) -> Grid:
    """Seconds on the wire of other links, a round and until the target."""
    rows = []
    for g in groups:
        if g.runs[0].mode != "federated":
            continue
        spent = [costs.until(run.rounds, target) for run in g.runs]
        there = [s.num_bytes for s in spent if s is not None] if None not in spent else []
        a_round = float(np.mean([run.bytes_per_round for run in g.runs]))
        total = float(np.mean(there)) if there else math.nan
        seconds = [costs.wire_seconds(n, rate) for rate in costs.LINKS.values() for n in (a_round, total)]
        rows.append([g.label, _bytes(a_round), *(NONE if math.isnan(s) else f"{s:.3g}" for s in seconds)])
    links = [f"{link}: {what}" for link in costs.LINKS for what in ("a round", "to the target")]
    title = "Projected seconds on the wire: 8 x bytes / rate, the cohort's payloads through one link of the server"
    return Grid(title, ["run", "bytes per round", *links], rows)


def _each_way(group: Group, column: str) -> float:
    """Bytes per sampled client and round in one direction, the mean over the runs."""
    return float(np.mean([run.rounds[column].sum() / max(run.rounds["cohort_size"].sum(), 1) for run in group.runs]))


def _efficiency_csv(groups: Sequence[Group], target: float) -> str:
    """One line for each run, full precision; NaN where the target was not reached."""
    columns: dict[str, list[Any]] = {}
    for g in groups:
        for run in g.runs:
            spent = costs.until(run.rounds, target) or costs.Spent(*[math.nan] * 4)  # type: ignore[arg-type]
            row = {
                **{"group": g.label, "run": run.name, "target_loss": target, "trainable_parameters": run.parameters},
                **{f"{name}_per_client_and_round": _each_way(Group("", [run]), name) for name in
                   ("bytes_down", "bytes_up")},
                "last_validation_loss": run.last_loss,
                **{f"{name}_to_target": value for name, value in spent._asdict().items()},
                "peak_memory_bytes": run.rounds["peak_memory_bytes"].max(),
            }  # fmt: skip
            for link, rate in costs.LINKS.items():
                row[f"seconds_per_round_{link}"] = costs.wire_seconds(run.bytes_per_round, rate)
                row[f"seconds_to_target_{link}"] = costs.wire_seconds(spent.num_bytes, rate)
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    return _csv(columns)


# ---------------------------------------------------------------- along a key of the configuration


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
        Line(key, label, reference, dict(sorted(by_value.items(), key=lambda item: _order(item[0]))))
        for label, by_value in zip(labels, several, strict=True)
    ]


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, (int, float))
    return (not number, float(value) if number else 0.0, str(value))


def _axis_metrics(lines: Sequence[Line]) -> list[str]:
    return _ordered(*(run.metrics("test") for line in lines for of in line.runs.values() for run in of.values()))


def _changes(key: str, lines: Sequence[Line]) -> Grid:
    """Test results along an axis, what changed from the reference, and how much more than for the first line."""
    names, rows = _axis_metrics(lines), []
    for line in lines:
        for value, by_seed in line.runs.items():
            row = [line.label, str(value), str(len(by_seed))]
            for name in names:
                row.append(_interval(np.array([run.metrics("test").get(name, math.nan) for run in by_seed.values()])))
                mine, other = line.changes(value, name), lines[0].changes(value, name) if value in lines[0].runs else {}
                less = [mine[seed] - other[seed] for seed in mine if seed in other]
                changed = value != line.reference
                row.append(_interval(np.array(list(mine.values()))) if changed else NONE)
                row.append(_interval(np.array(less)) if changed and line is not lines[0] else NONE)
            rows.append(row)
    change = f"change from {lines[0].reference}"
    header = [f"{_title(name)}{more}" for name in names for more in ("", f": {change}", f": less {lines[0].label}'s")]
    return Grid(f"Along {key}", ["run", key, "seeds", *header], rows)


def _axes_csv(lines: Sequence[Line]) -> str:
    """One line for each run and axis, full precision."""
    columns: dict[str, list[Any]] = {}
    for line in lines:
        for value, by_seed in line.runs.items():
            for seed, run in by_seed.items():
                row = {"axis": line.key, "value": value, "line": line.label, "seed": seed, "run": run.name}
                row |= {f"test_{name}": run.metrics("test").get(name, math.nan) for name in _axis_metrics(lines)}
                for name, cell in row.items():
                    columns.setdefault(name, []).append(cell)
    return _csv(columns)


def _comparison_csv(groups: Sequence[Group]) -> str:
    """One line for each run, full precision."""
    names = _ordered(*(run.metrics("test") for g in groups for run in g.runs), *(m for _, m in _bases(groups)))
    over = dict.fromkeys(name for g in groups for run in g.runs for name in run.over_clients)
    columns: dict[str, list[Any]] = {}
    for g in groups:
        for run in g.runs:
            row = {
                "group": g.label,
                "run": run.name,
                "directory": run.directory,
                "complete": run.results.complete,
                "rounds": run.results.num_rounds,
                **{key: run.results.attributes.get(key, "") for key in ("mode", "method", "model", "seed")},
                **{f"test_{name}": run.metrics("test").get(name, math.nan) for name in names},
                **{f"base_{name}": run.metrics("base").get(name, math.nan) for name in names},
                **{f"clients_{name.replace('/', '_')}": run.over_clients.get(name, math.nan) for name in over},
                "trainable_parameters": run.parameters,
                "bytes_per_client_and_round": run.bytes_per_client,
                "seconds": run.seconds,
            }
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    return _csv(columns)


def _bases(groups: Sequence[Group]) -> list[tuple[str, dict[str, np.ndarray]]]:
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
        values = {name: np.array([m.get(name, math.nan) for m in known.values()]) for name in _ordered(*known.values())}
        # The whole test split gives every seed the same: then there is no interval.
        values = {name: v[:1] if (v == v[0]).all() else v for name, v in values.items()}
        bases.append(("untouched base" if len(found) == 1 else f"untouched base of {label}", values))
    return bases


# ---------------------------------------------------------------- plots


def _axes(rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    canvas = figure.Figure(figsize=(width, height), layout="constrained")
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    return canvas, axes


def _by_round(axis: Any, last: int) -> None:
    axis.set_xlabel("round")
    axis.set_xlim(0, max(last, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)


def _learning_curve(run: Run) -> Any:
    canvas, (axis,) = _axes()
    rounds = run.rounds
    for name, label, colour, marker in (
        ("train_loss", "training (clients' data)", COLOURS[1], None),
        ("eval_loss", "validation", COLOURS[0], "o"),
    ):
        there = ~np.isnan(rounds[name])
        marker = marker or ("." if there.sum() == 1 else None)
        x, y = rounds["round"][there], rounds[name][there]
        axis.plot(x, y, color=colour, marker=marker, markersize=4, label=label, clip_on=False)
    _by_round(axis, run.results.num_rounds)
    axis.set_ylabel("loss [nats per token]")
    axis.set_title(f"{run.name}: learning curve", loc="left")
    axis.legend(frameon=False)
    return canvas


def _metric_curves(run: Run) -> Any:
    rounds = run.rounds
    names = [n for n in rounds if n.startswith("eval_") and n != "eval_loss" and not np.isnan(rounds[n]).all()]
    if not names:
        return None
    canvas, axes = _axes(1, len(names), width=max(7.0, 3.5 * len(names)), height=3.4)
    for i, (axis, name) in enumerate(zip(axes, names, strict=True)):
        there = ~np.isnan(rounds[name])
        axis.plot(rounds["round"][there], rounds[name][there], "o-", ms=4, c=COLOURS[i % len(COLOURS)], clip_on=False)
        axis.set_title(_title(name.removeprefix("eval_")), loc="left")
        _by_round(axis, run.results.num_rounds)
    canvas.suptitle(f"{run.name}: metrics on the validation subset", x=0.01, ha="left")
    return canvas


def _client_loss(run: Run) -> Any:
    clients = run.results.clients
    used = (clients["status"] == 0) & ~np.isnan(clients["loss_last"])
    if not used.any():
        return None
    numbers, losses = clients["round"][used], clients["loss_last"][used]
    x = np.unique(numbers)
    low, first, middle, third, high = np.array([np.percentile(losses[numbers == t], (0, 25, 50, 75, 100)) for t in x]).T
    canvas, (axis,) = _axes()
    axis.fill_between(x, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label="smallest to largest")
    axis.fill_between(x, first, third, color=COLOURS[0], alpha=0.35, linewidth=0, label="middle half")
    axis.plot(x, middle, color=COLOURS[0], marker="." if len(x) == 1 else None, label="median")
    _by_round(axis, run.results.num_rounds)
    axis.set_ylabel("loss of the last local step")
    axis.set_title(f"{run.name}: spread over the clients of a cohort", loc="left")
    axis.legend(frameon=False)
    return canvas


def _traffic(run: Run) -> Any:
    rounds = run.rounds
    total = max(float(rounds[name].sum()) for name in ("bytes_down", "bytes_up", "wire_bytes"))
    if total == 0:
        return None
    unit, name = _unit(total)
    canvas, (axis,) = _axes()
    for column, label, colour, style in (
        ("bytes_down", "server to clients (payload × clients)", COLOURS[0], "-"),
        ("bytes_up", "clients to server (payload × clients)", COLOURS[1], "--"),
        ("wire_bytes", "counted by the transport", COLOURS[2], "-"),
    ):
        axis.plot(rounds["round"], rounds[column].cumsum() / unit, style, color=colour, label=label)
    _by_round(axis, run.results.num_rounds)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"{name} since the start")
    axis.set_title(f"{run.name}: bytes exchanged", loc="left")
    axis.legend(frameon=False)
    return canvas


def _time(run: Run) -> Any:
    rounds = run.rounds
    parts = [(p, rounds[f"seconds_{p}"]) for p in ("local", "eval", "broadcast", "reduce", "server")]
    if not any(values.any() for _, values in parts):
        return None
    canvas, (axis,) = _axes()
    bottom = np.zeros(len(rounds["round"]))
    for (part, values), colour in zip(parts, COLOURS, strict=False):
        axis.bar(rounds["round"], values, 0.9, bottom, color=colour, label=part)
        bottom = bottom + values
    axis.set_xlabel("round")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("seconds")
    axis.set_title(f"{run.name}: time of a round", loc="left")
    axis.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return canvas


def _compared_loss(groups: Sequence[Group]) -> Any:
    canvas, (axis,) = _axes(width=7.5, height=4.2)
    for i, g in enumerate(groups):
        tables = [run.rounds for run in g.runs]
        common = sorted(set.intersection(*(set(t["round"][~np.isnan(t["eval_loss"])].tolist()) for t in tables)))
        values = np.array([[t["eval_loss"][t["round"] == x][0] for x in common] for t in tables])
        means, halves = np.array([mean_and_half_width(values[:, j]) for j in range(len(common))]).reshape(-1, 2).T
        colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        axis.plot(common, means, style, color=colour, marker="o", markersize=4, label=g.label, clip_on=False)
        if len(g.runs) > 1:
            axis.fill_between(common, means - halves, means + halves, color=colour, alpha=0.2, linewidth=0)
    _by_round(axis, max(run.results.num_rounds for g in groups for run in g.runs))
    axis.set_ylabel("validation loss [nats per token]")
    axis.set_title("Validation loss by round", loc="left")
    axis.legend(frameon=False)
    return canvas


def _compared_test(groups: Sequence[Group]) -> Any:
    names = _ordered(*(run.metrics("test") for g in groups for run in g.runs))
    if not names:
        return None
    bases = _bases(groups)
    labels = [g.label for g in groups] + [label for label, _ in bases]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(groups))] + ["0.6"] * len(bases)
    canvas, axes = _axes(1, len(names), width=2.5 + 2.6 * len(names), height=1.2 + 0.45 * len(labels))
    for axis, name in zip(axes, names, strict=True):
        bars = [mean_and_half_width(g.test(name)) for g in groups]
        bars += [mean_and_half_width(metrics.get(name, np.array([math.nan]))) for _, metrics in bases]
        means, halves = np.array(bars).T
        axis.barh(labels, np.nan_to_num(means), color=colours, height=0.7)
        known = np.isfinite(halves)
        axis.errorbar(means[known], np.flatnonzero(known), xerr=halves[known], fmt="none", color="0.2", capsize=3)
        reach = np.nan_to_num(means) + np.nan_to_num(halves)
        for y, (mean, end) in enumerate(zip(means, reach, strict=True)):
            axis.annotate(_number(mean), (end, y), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axis.set_xlim(min(0.0, float(np.nanmin(means))), (max(reach.max(), 0.0) or 1.0) * 1.3)
        axis.set_title(f"test {_title(name)}", loc="left")
        axis.grid(False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        if axis is not axes[0]:
            axis.set_yticklabels([])
    return canvas


def _plotted_axes(keys: Sequence[str], lines: Sequence[Line]) -> Any:
    names = _axis_metrics(lines)
    if not names:
        return None
    canvas, axes = _axes(len(names), len(keys), width=max(4.5, 2.9 * len(keys)), height=0.5 + 2.6 * len(names))
    labels = list(dict.fromkeys(line.label for line in lines))
    for i, (name, key) in enumerate((name, key) for name in names for key in keys):
        axis, mine = axes[i], [line for line in lines if line.key == key]
        values = sorted({value for line in mine for value in line.runs}, key=_order)
        for line in mine:
            x = np.array([values.index(value) for value in line.runs])
            results = [[run.metrics("test").get(name, math.nan) for run in of.values()] for of in line.runs.values()]
            means, halves = np.array([mean_and_half_width(np.array(of)) for of in results]).T
            j = labels.index(line.label)
            shift = 0.08 * (j - (len(labels) - 1) / 2)  # so that intervals do not hide each other
            axis.errorbar(
                *(x + shift, means),
                yerr=np.nan_to_num(halves),
                color=COLOURS[j % len(COLOURS)],
                **{"marker": "o", "markersize": 4, "capsize": 3, "label": line.label},
            )
        axis.set_xticks(range(len(values)), [str(value) for value in values])
        axis.set_xlim(-0.4, len(values) - 0.6)
        if i >= len(axes) - len(keys):
            axis.set_xlabel(key)
        if i % len(keys) == 0:
            axis.set_ylabel(f"test {_title(name)}")
    axes[0].legend(frameon=False)
    return canvas


# ---------------------------------------------------------------- numbers and files


def mean_and_half_width(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (NaN for a single value)."""
    n = len(values)
    if n < 2:
        return (float(values[0]) if n else math.nan), math.nan
    return float(np.mean(values)), float(_t_975(n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def _t_975(degrees: int) -> float:
    """The 0.975 quantile of Student's t; beyond the table by Cornish and Fisher's expansion around the normal one."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _interval(values: np.ndarray, digits: int | None = None) -> str:
    mean, half = mean_and_half_width(values)
    if math.isnan(half):
        return _number(mean, digits)
    return f"{_number(mean, digits)} ± {half:,.{_digits(mean) if digits is None else digits}f}"


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None or math.isnan(value):
        return NONE
    return f"{value:,.{_digits(value) if digits is None else digits}f}"


def _digits(value: float) -> int:
    return 3 if abs(value) < 10 else 2 if abs(value) < 1000 else 0


def _count(value: float) -> str:
    return NONE if math.isnan(value) else f"{round(value):,}"


def _unit(value: float) -> tuple[float, str]:
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return 1024.0**power, name
    return 1.0, "B"


def _bytes(value: float) -> str:
    if math.isnan(value):
        return NONE
    unit, name = _unit(value)
    return f"{value / unit:.1f} {name}" if unit > 1 else f"{value:.0f} B"


def _title(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " "))


def _ordered(*metrics: Mapping[str, Any]) -> list[str]:
    """All metric names, the known ones in the order of TITLES."""
    names = {name for m in metrics for name in m}
    return [name for name in TITLES if name in names] + sorted(names - set(TITLES))


def _seed(run: Run) -> Any:
    return run.results.attributes.get("seed")


def _mark(run: Run) -> str:
    return "" if run.results.complete else f" (unfinished, {run.results.num_rounds}/{run.planned})"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def _csv(columns: Mapping[str, Any]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return file.getvalue()


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
