"""Compares several runs: tables, CSV files and plots of their test results and costs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedhpc.report import costs
from fedhpc.report.clients import clients_of
from fedhpc.report.page import TITLES, Page, sections
from fedhpc.report.plots import (
    PHASES,
    Plot,
    compared_clients,
    compared_costs,
    compared_loss,
    compared_loss_by_time,
    compared_test,
    drawn,
    evaluated_when,
    plotted_axes,
    robustness_curves,
)
from fedhpc.report.robustness import attack_curves, curves_grid, privacy_curves
from fedhpc.report.runs import (
    AxisLine,
    LoadedRun,
    SeedGroup,
    axis_metrics,
    group_by_seed,
    lines_along,
    paired_differences,
    shares_of_gain,
    test_sets,
    untouched_bases,
    varied_keys,
)
from fedhpc.report.single import client_summary_grid, runs_grid, split_plot
from fedhpc.report.text import (
    NONE,
    SEEDS,
    Grid,
    as_bytes,
    as_count,
    as_csv,
    as_interval,
    as_number,
    as_range,
    in_order,
    limits_of,
    mean_and_half_width,
    title_of,
    write_text,
)


def compare(
    runs: Sequence[LoadedRun],
    out: Path,
    console: Console,
    baseline: str | None = None,
    target: float | None = None,
    axes: Sequence[str] = (),
    page: Page | None = None,
    notes: Sequence[str] = (),
) -> list[Path]:
    """Show the comparison on the terminal, write comparison.md, CSV files and plots into `out`, and the page.

    `baseline` is the label of the group that the others are compared with, by default the first one. `target` is a
    validation loss, and `axes` are keys of the configuration. `notes` go below the tables, after those on
    the runs. Returns the paths written. UserError where there is no such group or no such axis.
    """
    groups = group_by_seed(runs)
    lines = [line for key in axes for line in lines_along(runs, key)]
    reference, differing = paired_differences(groups, baseline)
    paired = baseline is not None or any(len(values) > 1 for _, _, values in differing)
    grids = {
        "Results": [
            comparison(groups, "Test results: mean ± " + SEEDS),
            _intervals(groups),
            *([_differences(reference, differing)] if paired else []),
            *([_shares_of_gain(gains)] if (gains := shares_of_gain(groups)) else []),
            *(_changes(key, [line for line in lines if line.key == key]) for key in axes),
        ],
        "Robustness": [
            curves_grid("Test results by the share of attackers", "share of attackers", attack_curves(runs)),
            curves_grid("Test results by epsilon", "epsilon", privacy_curves(runs)),
        ],
        "Clients": [client_summary_grid(groups)],
        "Bytes and time": [
            _costs(groups),
            *([] if target is None else [_efficiency(groups, target), _projection(groups, target)]),
        ],
        "Texts": [_texts(groups)],
        "Runs": [runs_grid(runs)],
    }
    notes = [*_notes(groups), *notes]
    in_order_of_sections = [grid for part in sections(grids, {}) for grid in part.grids]
    for grid in in_order_of_sections:
        if not grid.long:
            console.print(grid.rich())
    for note in notes:
        console.print(note, markup=False)
    plots = _plots(groups, axes, lines)
    written = [plot.save(out) for title in TITLES for plot in plots.get(title, ())]
    images = "\n".join(f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in written)
    sources = "\n".join(f"- {group.label}: {', '.join(str(r.directory) for r in group.runs)}" for group in groups)
    tables = "\n".join(grid.markdown() for grid in in_order_of_sections if not grid.long)
    below = "\n".join(f"{note}\n" for note in notes)
    written.append(write_text(out / "comparison.md", f"{tables}\n{below}\n{images}\nRuns:\n\n{sources}\n"))
    written.append(write_text(out / "comparison.csv", _comparison_csv(groups)))
    if paired:
        written.append(write_text(out / "differences.csv", _differences_csv(reference, differing)))
    if target is not None:
        written.append(write_text(out / "efficiency.csv", _efficiency_csv(groups, target)))
    if lines:
        written.append(write_text(out / "axes.csv", _axes_csv(lines)))
    if page is not None:
        title = f"{len(runs)} runs: {', '.join(group.label for group in groups[:4])}{', ...' if groups[4:] else ''}"
        written.append(page.write(title, sections(grids, plots, {"Results": notes})))
    return written


def _plots(groups: Sequence[SeedGroup], axes: Sequence[str], lines: Sequence[AxisLine]) -> dict[str, list[Plot]]:
    """The plots of each section."""
    runs = [run for g in groups for run in g.runs]
    when = dict.fromkeys(map(evaluated_when, runs))
    seeds = "a band or a black bar: 95 % interval of the mean over seeds (Student's t)"
    return {
        "Results": drawn(
            (
                "eval_loss",
                f"Validation loss by round, in nats per token, at the marks: {' or '.join(when)}; {seeds}.",
                compared_loss(groups),
            ),
            (
                "eval_loss_by_time",
                "Validation loss in nats per token by virtual time, a line for each seed.",
                compared_loss_by_time(groups),
            ),
            (
                "test",
                f"Results on the test split: losses in nats per token, BLEU and chrF of 100, shares of 1; {seeds}, "
                "grey bars: 95 % interval over the test's items.",
                compared_test(groups),
            ),
            (
                "axes",
                "Results on the test split along keys of the configuration: losses in nats per token, BLEU and chrF of "
                "100, shares of 1; mean and 95 % interval over seeds.",
                plotted_axes(axes, lines),
            ),
        ),
        "Robustness": drawn(
            (
                "attacks",
                "Results on the test split by the share of attackers among the clients, a panel for each attack: "
                "losses in nats per token, BLEU and chrF of 100, shares of 1; mean and 95 % interval over seeds.",
                robustness_curves(attack_curves(runs), "share of attackers"),
            ),
            (
                "privacy",
                "Results on the test split by epsilon (the smaller, the more private; none: without privacy): losses "
                "in nats per token, BLEU and chrF of 100, shares of 1; mean and 95 % interval over seeds.",
                robustness_curves(privacy_curves(runs), "epsilon"),
            ),
        ),
        "Clients": drawn(
            (
                "clients",
                "Spread of the clients' losses, in nats per token, all seeds together; n: clients. The loss is that of "
                "the final state on the clients' held-out examples where a run has any, else that of the last local "
                "step in a client's last round, so compare only runs of one sort.",
                compared_clients(groups, [_client_losses(g) for g in groups]),
            ),
        ),
        "Split of the data": drawn(split_plot(groups[0].runs[0])),
        "Bytes and time": drawn(
            (
                "costs",
                "Wall time of a round by phase, in seconds, and its bytes down and up, of all clients together; means "
                "over rounds and seeds.",
                compared_costs(groups),
            ),
        ),
    }


def _client_losses(group: SeedGroup) -> np.ndarray:
    """The losses of the clients of all seeds."""
    of_runs = [clients.loss for run in group.runs if (clients := clients_of(run)) is not None]
    return np.concatenate([*of_runs, np.zeros(0)])


def _costs(groups: Sequence[SeedGroup]) -> Grid:
    """The table of the time and the bytes of a round, means over rounds and seeds."""
    names = ["seconds", *(f"seconds_{phase}" for phase in PHASES), "bytes_down", "bytes_up", "wire_bytes"]
    rows = [
        [
            g.label,
            *(
                (as_bytes if "bytes" in name else as_number)(
                    float(np.mean([run.rounds[name][1:].mean() for run in g.runs]))
                )
                for name in names
            ),
        ]
        for g in groups
        if all(run.results.num_rounds for run in g.runs)
    ]
    titles = [
        "seconds, all phases",
        *(f"of it {phase}" for phase in PHASES),
        "bytes down",
        "bytes up",
        "bytes on the wire",
    ]
    return Grid("A round: its time and the bytes of all clients", ["run", *titles], rows, long=True)


def _texts(groups: Sequence[SeedGroup]) -> Grid:
    """The table of texts for the prompts that all groups answered: what the first run of each wrote."""
    written = [
        {
            str(p): (str(r), str(t))
            for p, r, t in zip(*(samples[k] for k in ("prompt", "references", "text")), strict=True)
        }
        for g in groups
        if len((samples := g.runs[0].results.groups["samples"]).get("prompt", ()))
    ]
    common = [prompt for prompt in written[0] if all(prompt in texts for texts in written)] if written else []
    rows = [
        [prompt, " / ".join(json.loads(written[0][prompt][0])), *(texts[prompt][1] for texts in written)]
        for prompt in common
    ]
    names = [f"{g.label}, seed {g.runs[0].results.attributes.get('seed', NONE)}" for g in groups
             if len(g.runs[0].results.groups["samples"].get("prompt", ()))]  # fmt: skip
    return Grid("Generated texts", ["prompt", "references", *names], rows, text=True, long=True)


def _notes(groups: Sequence[SeedGroup]) -> list[str]:
    """What a reader of the tables must know."""
    notes = [
        f"Groups of runs that differ only in the seed; n is in the column seeds. ± is {SEEDS}: how well the runs stand "
        "for other runs. The 95 % interval over test items, the mean of the runs', is how well these stand for others."
    ]
    if sets := test_sets(groups):
        named = "; ".join(f"{letter}: {tested_on}" for tested_on, letter in sets.items())
        notes.append(
            f"The runs were tested on different data, so do not compare the numbers of different sets: {named}."
        )
    void = [f"{run.name} {len(run.void_rounds)} of {run.results.num_rounds}" for g in groups for run in g.runs
            if run.void_rounds]  # fmt: skip
    if void:
        notes.append(f"Void rounds, in which too few clients completed and nothing moved: {', '.join(void)}.")
    return notes


def _intervals(groups: Sequence[SeedGroup]) -> Grid:
    """The table of both errors of every test result: of the seeds and of the test's items."""
    rows = []
    for g in groups:
        for name in in_order(*(run.metrics("test") for run in g.runs)):
            measured = [one for run in g.runs if (one := run.sampling("test", name)) is not None]
            if not measured:
                continue
            mean, half = mean_and_half_width(g.test(name))
            ends = np.clip((mean - half, mean + half), *limits_of(name))
            over_seeds = NONE if math.isnan(half) else f"{as_range(*ends)} (n = {len(g.runs)})"
            items = ", ".join(dict.fromkeys(one.items for one in measured))
            rows.append([g.label, title_of(name), as_number(mean), over_seeds, as_range(*g.over_items(name)), items])
    header = ["run", "metric", "mean", "95 % over seeds", "95 % over test items", "items"]
    return Grid("Errors of the test results", header, rows)


def comparison(groups: Sequence[SeedGroup], title: str) -> Grid:
    """The table of test results: a row for each group, and one for each base model before training."""
    bases, missing, sets = untouched_bases(groups), np.array([math.nan]), test_sets(groups)
    names = in_order(*(run.metrics("test") for g in groups for run in g.runs), *(m for _, m in bases))
    rows = []
    for g in groups:
        method = str(g.runs[0].results.attributes.get("method", NONE))
        rows.append(
            [
                g.label,
                g.runs[0].mode,
                method,
                str(len(g.runs)),
                *([sets.get(g.test_set, NONE)] if sets else []),
                *(as_interval(g.test(name)) for name in names),
                as_count(g.runs[0].parameters),
                as_bytes(float(np.mean([run.bytes_per_client for run in g.runs]))),
                as_interval(np.array([run.seconds for run in g.runs]), digits=1),
            ]
        )
    for label, metrics in bases:
        rows.append(
            [
                label,
                *[NONE] * (4 if sets else 3),
                *(as_interval(metrics.get(name, missing)) for name in names),
                "0",
                NONE,
                NONE,
            ]
        )
    cost_titles = ["trainable parameters", "bytes per client and round", "seconds"]
    header = ["run", "mode", "method", "seeds", *(["test set"] if sets else [])]
    return Grid(title, [*header, *map(title_of, names), *cost_titles], rows)


def _differences(reference: SeedGroup, differing: Sequence[tuple[SeedGroup, str, np.ndarray]]) -> Grid:
    names = list(dict.fromkeys(name for _, name, _ in differing))
    rows: dict[str, list[str]] = {}
    for group, _, values in differing:
        row = rows.setdefault(group.label, [group.label, ""])
        row[1] = str(max(int(row[1] or 0), len(values)))
        row.append(as_interval(values))
    title = f"Test results: difference to {reference.label}, seed by seed (mean ± {SEEDS})"
    return Grid(title, ["run", "seeds in common", *map(title_of, names)], list(rows.values()))


def _shares_of_gain(gains: Sequence[tuple[SeedGroup, SeedGroup, np.ndarray]]) -> Grid:
    rows = [
        [group.label, goal.label, str(len(shares)), as_interval(100 * shares, digits=1)]
        for group, goal, shares in gains
    ]
    title = f"Gain kept: (base - run) / (base - centralised), of test losses, seed by seed (mean ± {SEEDS})"
    return Grid(title, ["run", "centralised", "seeds in common", "gain kept, %"], rows)


def _differences_csv(reference: SeedGroup, differing: Sequence[tuple[SeedGroup, str, np.ndarray]]) -> str:
    """CSV with one line for each group and metric, in full precision."""
    columns: dict[str, list[Any]] = {}
    for group, name, values in differing:
        mean, half = mean_and_half_width(values)
        row = {"group": group.label, "baseline": reference.label, "metric": name, "seeds": len(values)}
        for key, value in {**row, "mean": mean, "low": mean - half, "high": mean + half}.items():
            columns.setdefault(key, []).append(value)
    return as_csv(columns)


def _efficiency(groups: Sequence[SeedGroup], target: float) -> Grid:
    """The table of costs: overall, and up to the target where every seed of the group reached it."""
    rows, virtual = [], any("virtual_seconds" in run.rounds for g in groups for run in g.runs)
    for g in groups:
        to_target = [costs.cost_to_reach(run.rounds, target) for run in g.runs]
        reached = [cost for cost in to_target if cost is not None]
        shown = reached if len(reached) == len(to_target) else []
        federated = g.runs[0].mode == "federated"
        rows.append(
            [
                g.label,
                as_count(g.runs[0].parameters),
                *(as_bytes(_each_way(g, name) if federated else math.nan) for name in ("bytes_down", "bytes_up")),
                as_interval(np.array([run.last_loss for run in g.runs])),
                f"{len(reached)} of {len(to_target)}",
                as_interval(np.array([cost.round for cost in shown]), digits=1),
                as_interval(np.array([cost.tokens for cost in shown]), digits=0),
                as_bytes(float(np.mean([cost.num_bytes for cost in shown])) if shown and federated else math.nan),
                as_interval(np.array([cost.seconds for cost in shown]), digits=1),
                *([as_interval(np.array([cost.virtual_seconds for cost in shown]), digits=1)] if virtual else []),
                as_bytes(float(np.mean([run.rounds["peak_memory_bytes"].max() for run in g.runs]))),
            ]
        )
    costly = ["rounds", "tokens", "bytes", "training seconds", *(["virtual seconds"] if virtual else [])]
    header = ["run", "trainable parameters", "down per client and round", "up", "last validation loss", "reached"]
    title = f"What it takes to a validation loss of {target:g}"
    return Grid(title, [*header, *(f"{name} to it" for name in costly), "peak memory"], rows)


def _projection(groups: Sequence[SeedGroup], target: float) -> Grid:
    """The table of projected seconds on slower links: for a round, and up to the target."""
    rows = []
    for g in groups:
        if g.runs[0].mode != "federated":
            continue
        to_target = [costs.cost_to_reach(run.rounds, target) for run in g.runs]
        num_bytes = [cost.num_bytes for cost in to_target if cost is not None] if None not in to_target else []
        a_round = float(np.mean([run.bytes_per_round for run in g.runs]))
        total = float(np.mean(num_bytes)) if num_bytes else math.nan
        seconds = [costs.wire_seconds(n, rate) for rate in costs.LINKS.values() for n in (a_round, total)]
        rows.append([g.label, as_bytes(a_round), *(NONE if math.isnan(s) else f"{s:.3g}" for s in seconds)])
    links = [f"{link}: {span}" for link in costs.LINKS for span in ("a round", "to the target")]
    title = "Projected seconds on the wire: 8 x bytes / rate, the cohort's payloads through one link of the server"
    return Grid(title, ["run", "bytes per round", *links], rows)


def _each_way(group: SeedGroup, column: str) -> float:
    """Bytes per sampled client and round in one direction ("bytes_down" or "bytes_up"), averaged over the runs."""
    return float(np.mean([run.rounds[column].sum() / max(run.rounds["cohort_size"].sum(), 1) for run in group.runs]))


def _efficiency_csv(groups: Sequence[SeedGroup], target: float) -> str:
    """CSV with one line for each run, in full precision; NaN where the target was not reached."""
    columns: dict[str, list[Any]] = {}
    for g in groups:
        for run in g.runs:
            cost = costs.cost_to_reach(run.rounds, target)
            to_target = dict.fromkeys(costs.Cost._fields, math.nan) if cost is None else cost._asdict()
            row = {
                **{"group": g.label, "run": run.name, "target_loss": target, "trainable_parameters": run.parameters},
                **{f"{name}_per_client_and_round": _each_way(SeedGroup("", [run]), name) for name in
                   ("bytes_down", "bytes_up")},
                "last_validation_loss": run.last_loss,
                **{f"{name}_to_target": value for name, value in to_target.items()},
                "peak_memory_bytes": run.rounds["peak_memory_bytes"].max(),
            }  # fmt: skip
            for link, rate in costs.LINKS.items():
                row[f"seconds_per_round_{link}"] = costs.wire_seconds(run.bytes_per_round, rate)
                row[f"seconds_to_target_{link}"] = costs.wire_seconds(to_target["num_bytes"], rate)
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    return as_csv(columns)


def _changes(key: str, lines: Sequence[AxisLine]) -> Grid:
    """The table of test results along a key: at each value, minus the reference, and that minus the first line's."""
    names, rows = axis_metrics(lines), []
    for line in lines:
        for value, by_seed in line.runs.items():
            row = [line.label, str(value), str(len(by_seed))]
            for name in names:
                row.append(as_interval(np.array([run.metrics("test").get(name, math.nan) for run in by_seed.values()])))
                ours = line.changes(value, name)
                firsts = lines[0].changes(value, name) if value in lines[0].runs else {}
                beyond_first = [ours[seed] - firsts[seed] for seed in ours if seed in firsts]
                changed = value != line.reference
                row.append(as_interval(np.array(list(ours.values()))) if changed else NONE)
                row.append(as_interval(np.array(beyond_first)) if changed and line is not lines[0] else NONE)
            rows.append(row)
    change = f"change from {lines[0].reference}"
    header = [f"{title_of(name)}{more}" for name in names for more in ("", f": {change}", f": less {lines[0].label}'s")]
    return Grid(f"Along {key}", ["run", key, "seeds", *header], rows)


def _axes_csv(lines: Sequence[AxisLine]) -> str:
    """CSV with one line for each run and axis, in full precision."""
    columns: dict[str, list[Any]] = {}
    for line in lines:
        for value, by_seed in line.runs.items():
            for seed, run in by_seed.items():
                row = {"axis": line.key, "value": value, "line": line.label, "seed": seed, "run": run.name}
                row |= {f"test_{name}": run.metrics("test").get(name, math.nan) for name in axis_metrics(lines)}
                for name, cell in row.items():
                    columns.setdefault(name, []).append(cell)
    return as_csv(columns)


def _tested(run: LoadedRun, metric: str) -> dict[str, Any]:
    """A metric of the test with its interval over the items, and how many these are."""
    one = run.sampling("test", metric)
    low, high, n = (one.low, one.high, one.n) if one is not None else (math.nan, math.nan, "")
    value = run.metrics("test").get(metric, math.nan)
    return {f"test_{metric}": value, f"test_{metric}_low": low, f"test_{metric}_high": high, f"test_{metric}_n": n}


def _comparison_csv(groups: Sequence[SeedGroup]) -> str:
    """CSV with one line for each run, in full precision."""
    names = in_order(*(run.metrics("test") for g in groups for run in g.runs), *(m for _, m in untouched_bases(groups)))
    statistics = dict.fromkeys(name for g in groups for run in g.runs for name in run.client_summary)
    runs = [run for g in groups for run in g.runs]
    varied = varied_keys(runs)
    values_of = {id(run): {key: values[i] for key, values in varied.items()} for i, run in enumerate(runs)}
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
                **values_of[id(run)],
                "tested_on": run.test_set,
                "void_rounds": len(run.void_rounds),
                **{column: cell for name in names for column, cell in _tested(run, name).items()},
                **{f"base_{name}": run.metrics("base").get(name, math.nan) for name in names},
                **{f"clients_{name.replace('/', '_')}": run.client_summary.get(name, math.nan) for name in statistics},
                "trainable_parameters": run.parameters,
                "bytes_per_client_and_round": run.bytes_per_client,
                "seconds": run.seconds,
            }
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    return as_csv(columns)
