"""Draws the plots of a report. matplotlib is imported only when a plot is drawn."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedhpc.report.clients import Clients, Factor, rank_correlation
from fedhpc.report.robustness import Curve, metrics_of, shown_strength
from fedhpc.report.runs import AxisLine, LoadedRun, SeedGroup, axis_metrics, order_of, test_sets, untouched_bases
from fedhpc.report.text import as_number, direction_of, in_order, limits_of, mean_and_half_width, title_of, unit_of

if TYPE_CHECKING:
    import matplotlib
    from matplotlib import figure
else:
    from fedhpc.lazy import lazy

    matplotlib, figure = lazy("matplotlib", extra="report"), lazy("matplotlib.figure", extra="report")

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# The phases of a round whose time is measured: columns seconds_<phase> of /rounds.
PHASES = ("local", "eval", "broadcast", "reduce", "server")

_LONGEST_NAME = 24  # characters of a client's or a label's name


class Plot(NamedTuple):
    """A plot of a report: the stem of its file, what it shows with its units, and the matplotlib Figure."""

    name: str
    caption: str
    figure: Any

    def save(self, folder: Path) -> Path:
        """Write it as PNG; the path."""
        path = folder / f"{self.name}.png"
        with _letters_of_any_script():
            self.figure.savefig(path, dpi=150)
        return path

    def svg(self) -> str:
        """The <svg> element, to stand in a page beside others: texts stay texts, and its ids are its own."""
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedhpc"}), _letters_of_any_script():
            self.figure.savefig(file, format="svg", metadata=no_metadata)
        svg = file.getvalue()
        svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{self.name}-", svg[svg.index("<svg") :])
        title, description = (html.escape(text) for text in (self.name.replace("_", " "), self.caption))
        wide = 'class="wide" ' if self.figure.get_figwidth() > 7.5 else ""
        labels = f'{wide}role="img" aria-labelledby="{self.name}-title {self.name}-desc"'
        texts = f'<title id="{self.name}-title">{title}</title><desc id="{self.name}-desc">{description}</desc>'
        return re.sub("<svg([^>]*)>", lambda tag: f"<svg{tag[1]} {labels}>{texts}", svg, count=1)


@contextmanager
def _letters_of_any_script() -> Iterator[None]:
    """Letters that the font of matplotlib lacks, as in Chinese names, are boxes: the tables have them, no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font", category=UserWarning)
        yield


def _short(name: object) -> str:
    """A name of the data's as it stands in a plot: one line of at most 24 characters, which moves nothing else."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(name))
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def drawn(*plots: tuple[str, str, Any]) -> list[Plot]:
    """The plots (name, caption, figure) for which there was something to draw."""
    return [Plot(*plot) for plot in plots if plot[2] is not None]


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


def _within(axis: Any, metric: str) -> None:
    """Cut the y axis to what the metric can be."""
    (low, high), (lowest, highest) = axis.get_ylim(), limits_of(metric)
    axis.set_ylim(max(low, lowest), min(high, highest))


def learning_curve(run: LoadedRun) -> Any:
    """Training and validation loss by round; a matplotlib Figure."""
    canvas, (axis,) = _axes()
    draw_losses(axis, run)
    return canvas


def draw_losses(axis: Any, run: LoadedRun) -> None:
    """Draw training and validation loss by round into matplotlib axes."""
    rounds = run.rounds
    for name, label, colour, marker in (
        ("train_loss", "training (clients' data)", COLOURS[1], None),
        ("eval_loss", f"validation (o: {evaluated_when(run)})", COLOURS[0], "o"),
    ):
        measured = ~np.isnan(rounds[name])
        marker = marker or ("." if measured.sum() == 1 else None)
        x, y = rounds["round"][measured], rounds[name][measured]
        axis.plot(x, y, color=colour, marker=marker, markersize=4, label=label, clip_on=False)
    void = run.void_rounds
    if void:
        at_the_bottom = axis.get_xaxis_transform()
        axis.plot(void, np.zeros(len(void)), "x", color="0.3", transform=at_the_bottom, clip_on=False,
                  label="void round: nothing moved")  # fmt: skip
    _by_round(axis, run.results.num_rounds)
    _within(axis, "loss")
    axis.set_ylabel("loss [nats per token]")
    axis.set_title(f"{run.name}: learning curve", loc="left")
    axis.legend(frameon=False)


def evaluated_when(run: LoadedRun) -> str:
    """In which rounds a run was evaluated, like "every 4 rounds"."""
    every = run.config.get("evaluation", {}).get("every", 1)
    return "every round" if every == 1 else f"every {every} rounds"


def metric_curves(run: LoadedRun) -> Any:
    """Validation metrics by round; None without any."""
    rounds = run.rounds
    names = [n for n in rounds if n.startswith("eval_") and n != "eval_loss" and not np.isnan(rounds[n]).all()]
    if not names:
        return None
    canvas, axes = _axes(1, len(names), width=max(7.0, 3.5 * len(names)), height=3.4)
    for i, (axis, name) in enumerate(zip(axes, names, strict=True)):
        x, y = rounds["round"], rounds[name]
        measured = ~np.isnan(y)
        axis.plot(x[measured], y[measured], "o-", ms=4, c=COLOURS[i % len(COLOURS)], clip_on=False)
        metric, measured_on = name.removeprefix("eval_"), run.results.sampling(f"rounds/{name}")
        notes = [direction_of(metric), measured_on.items if measured_on is not None else ""]
        _within(axis, metric)
        axis.set_title(title_of(metric), loc="left")
        axis.set_title(", ".join(filter(None, notes)), loc="right", fontsize=8)
        _by_round(axis, run.results.num_rounds)
    canvas.suptitle(f"{run.name}: metrics on the validation split", x=0.01, ha="left")
    return canvas


def client_loss(run: LoadedRun) -> Any:
    """Median and spread of the clients' last local losses by round; None without any."""
    clients = run.results.clients
    trained = (clients["status"] == 0) & ~np.isnan(clients["loss_last"])
    if not trained.any():
        return None
    numbers, losses = clients["round"][trained], clients["loss_last"][trained]
    x = np.unique(numbers)
    counts = [int((numbers == t).sum()) for t in x]
    low, first, middle, third, high = np.array([np.percentile(losses[numbers == t], (0, 25, 50, 75, 100)) for t in x]).T
    canvas, (axis,) = _axes()
    axis.fill_between(x, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label="smallest to largest")
    axis.fill_between(x, first, third, color=COLOURS[0], alpha=0.35, linewidth=0, label="middle half")
    axis.plot(x, middle, color=COLOURS[0], marker="." if len(x) == 1 else None, label="median")
    _by_round(axis, run.results.num_rounds)
    _within(axis, "loss")
    axis.set_ylabel("loss of the last local step")
    axis.set_title(f"{run.name}: spread over the clients of a cohort (n = {_span(counts)})", loc="left")
    axis.legend(frameon=False)
    return canvas


def clients_and_causes(name: str, clients: Clients | None) -> Any:
    """The clients' losses from the worst to the best, and by each property that may explain them; None without any."""
    if clients is None:
        return None
    count = 1 + len(clients.factors)
    columns = min(count, 3)
    lines = -(-count // columns)
    canvas, axes = _axes(lines, columns, width=max(7.0, 3.3 * columns), height=0.6 + 2.9 * lines)
    n = len(clients.loss)
    order = Factor("clients, the worst first", np.arange(1, n + 1))
    known = np.isfinite(clients.low) & np.isfinite(clients.high)
    axes[0].vlines(order.values[known], clients.low[known], clients.high[known], color="0.6", linewidth=1, zorder=1)
    for axis, factor in zip(axes, [order, *clients.factors], strict=False):  # the last panels may be empty
        for who, colour, label in (
            (~clients.attackers, COLOURS[0], "honest"),
            (clients.attackers, COLOURS[1], "attacks"),
        ):
            axis.plot(
                factor.values[who], clients.loss[who], ".", color=colour, alpha=0.4 if n > 200 else 0.8, label=label
            )
        axis.set_xlabel(factor.title)
    for axis, factor in zip(axes[1:], clients.factors, strict=False):
        correlation = as_number(rank_correlation(factor.values, clients.loss), 2)
        axis.set_title(f"rank correlation {correlation}", loc="right", fontsize=8)
        for i in range(min(3, n)):
            axis.annotate(
                _short(clients.names[i]),
                (factor.values[i], clients.loss[i]),
                **{"xytext": (4, 0), "textcoords": "offset points", "fontsize": 7, "parse_math": False},
            )
    for axis in axes[::columns]:
        axis.set_ylabel("loss [nats per token]")
    for axis in axes[count:]:
        axis.set_visible(False)
    if clients.attackers.any():
        axes[0].legend(frameon=False)
    canvas.suptitle(f"{name}: clients", x=0.01, ha="left")
    return canvas


def compared_clients(groups: Sequence[SeedGroup], losses: Sequence[np.ndarray]) -> Any:
    """Spread of the clients' losses for every group; losses: those of each group's clients. None without any."""
    drawn_groups = [(g.label, values) for g, values in zip(groups, losses, strict=True) if len(values)]
    if not drawn_groups:
        return None
    canvas, (axis,) = _axes(width=7.5, height=1.4 + 0.32 * len(drawn_groups))
    rows = np.arange(len(drawn_groups))
    quantiles = np.array([np.percentile(values, (0, 25, 50, 75, 100)) for _, values in drawn_groups]).T
    low, first, middle, third, high = quantiles
    axis.hlines(rows, low, high, color=COLOURS[0], linewidth=1.5, alpha=0.6, label="smallest to largest")
    axis.hlines(rows, first, third, color=COLOURS[0], linewidth=7, alpha=0.5, label="middle half")
    axis.plot(middle, rows, "|", color="0.1", markersize=10, label="median")
    axis.set_yticks(rows, [f"{label} (n = {len(values)})" for label, values in drawn_groups])
    axis.set_ylim(len(drawn_groups) - 0.5, -0.5)
    axis.set_xlabel("a client's loss [nats per token]")
    axis.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    return canvas


def split(name: str, partition: Mapping[str, np.ndarray]) -> Any:
    """The split as a picture: examples of each client, and beside it their shares of labels; None where it is unknown.

    partition: /partition of results.h5.
    """
    sizes, counts = partition.get("num_examples"), partition.get("label_counts")
    if sizes is None:
        return None
    with_labels = counts is not None and counts.shape[1] > 1
    canvas, axes = _axes(
        1, 2 if with_labels else 1, width=8.5 if with_labels else 7.0, height=min(2.0 + 0.12 * len(sizes), 7.0)
    )
    rows = np.arange(len(sizes))
    if len(sizes) <= 100:
        axes[0].barh(rows, sizes, 0.8, color=COLOURS[0])
    else:
        axes[0].fill_betweenx(rows, sizes, step="mid", color=COLOURS[0], linewidth=0)
    axes[0].set_xlabel("training examples")
    axes[0].set_ylabel("client")
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylim(len(sizes) - 0.5, -0.5)
    axes[0].set_title(f"{name}: split of the data", loc="left")
    names = partition.get("client_names")
    if names is not None and len(names) <= 40:
        axes[0].set_yticks(rows, [_short(text) for text in names], parse_math=False, fontsize=7)
    if with_labels and counts is not None:
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        picture = axes[1].imshow(shares, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1)
        labels = [_short(text) for text in partition.get("label_names", np.arange(counts.shape[1]))]
        if len(labels) <= 30:
            longest = max(map(len, labels))
            turned = {"rotation": 90} if longest * len(labels) > 40 else {}
            axes[1].set_xticks(range(len(labels)), labels, parse_math=False, fontsize=7, **turned)
        axes[1].set_xlabel("label")
        axes[1].grid(False)
        axes[1].set_yticks([])
        canvas.colorbar(picture, ax=axes[1], label="share of the client's examples")
    return canvas


def compared_costs(groups: Sequence[SeedGroup]) -> Any:
    """Seconds of a round by phase, and bytes of a round each way, for every group; None without a round."""
    counted = [g for g in groups if all(run.results.num_rounds for run in g.runs)]
    if not counted:
        return None
    canvas, axes = _axes(1, 2, width=11.0, height=1.6 + 0.3 * len(counted))
    labels, rows = [g.label for g in counted], np.arange(len(counted))
    per_round = {
        name: np.array([np.mean([run.rounds[name][1:].mean() for run in g.runs]) for g in counted])
        for name in (*(f"seconds_{phase}" for phase in PHASES), "bytes_down", "bytes_up")
    }
    unit, unit_name = unit_of(max(per_round["bytes_down"].max(), per_round["bytes_up"].max()))
    for axis, names, scale in ((axes[0], [f"seconds_{phase}" for phase in PHASES], 1.0),
                               (axes[1], ["bytes_down", "bytes_up"], unit)):  # fmt: skip
        left = np.zeros(len(counted))
        for name, colour in zip(names, COLOURS, strict=False):
            label = name.removeprefix("seconds_").replace("bytes_", "")
            axis.barh(rows, per_round[name] / scale, 0.7, left, color=colour, label=label)
            left = left + per_round[name] / scale
        axis.set_yticks(rows, labels if axis is axes[0] else [])
        axis.set_ylim(len(counted) - 0.5, -0.5)
        axis.grid(False, axis="y")
        axis.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, handlelength=1)
    axes[0].set_xlabel("seconds of a round")
    axes[1].set_xlabel(f"{unit_name} of a round, all clients")
    return canvas


def traffic(run: LoadedRun) -> Any:
    """Protocol and wire bytes, added up over the rounds; None where nothing was sent."""
    rounds = run.rounds
    total = max(float(rounds[name].sum()) for name in ("bytes_down", "bytes_up", "wire_bytes"))
    if total == 0:
        return None
    unit, name = unit_of(total)
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


def seconds_of_rounds(run: LoadedRun) -> Any:
    """Where the time of each round went; None where it was not measured."""
    rounds = run.rounds
    parts = [(p, rounds[f"seconds_{p}"]) for p in PHASES]
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


def compared_loss(groups: Sequence[SeedGroup]) -> Any:
    """Validation loss by round of every group; the means alone where there are more groups than colours."""
    crowded, bands, labels = len(groups) > len(COLOURS), False, _labels(groups)
    canvas, (axis,) = _axes(width=9.5 if crowded else 7.5, height=4.2)
    for i, g in enumerate(groups):
        tables = [run.rounds for run in g.runs]
        common = sorted(set.intersection(*(set(t["round"][~np.isnan(t["eval_loss"])].tolist()) for t in tables)))
        values = np.array([[t["eval_loss"][t["round"] == x][0] for x in common] for t in tables])
        means, halves = np.array([mean_and_half_width(values[:, j]) for j in range(len(common))]).reshape(-1, 2).T
        colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
        label = f"{labels[i]} (n = {len(g.runs)})"
        axis.plot(common, means, style, color=colour, marker="o", markersize=4, label=label, clip_on=False)
        if len(g.runs) > 1 and not crowded:
            low, high = np.clip((means - halves, means + halves), *limits_of("loss"))
            axis.fill_between(common, low, high, color=colour, alpha=0.2, linewidth=0)
            bands = True
    _by_round(axis, max(run.results.num_rounds for g in groups for run in g.runs))
    _within(axis, "loss")
    axis.set_ylabel("validation loss [nats per token]")
    several = any(len(g.runs) > 1 for g in groups)
    what = ("; mean of n seeds" if several else "") + (", band: 95 % t-interval of the mean" if bands else "")
    axis.set_title(f"Validation loss by round{what}", loc="left")
    if crowded:
        canvas.legend(frameon=False, fontsize=8, handlelength=3.5, loc="outside right upper")
    else:
        axis.legend(frameon=False)
    return canvas


def compared_loss_by_time(groups: Sequence[SeedGroup]) -> Any:
    """Validation loss by virtual time, a line for each run; None where no run has virtual time."""
    timed = [g for g in groups if all("virtual_seconds" in run.rounds for run in g.runs)]
    if not timed:
        return None
    unit, length = unit_of_time(max(run.rounds["virtual_seconds"].sum() for g in timed for run in g.runs))
    canvas, (axis,) = _axes(width=7.5, height=4.2)
    for i, (g, label) in enumerate(zip(timed, _labels(timed), strict=True)):
        for run in g.runs:
            rounds, measured = run.rounds, ~np.isnan(run.rounds["eval_loss"])
            times = np.cumsum(rounds["virtual_seconds"])[measured] / length
            style = {"color": COLOURS[i % len(COLOURS)], "label": label if run is g.runs[0] else None}
            axis.plot(times, rounds["eval_loss"][measured], linewidth=1.2, **style)
    axis.set_xlim(left=0)
    axis.set_xlabel(f"virtual {unit}")
    _within(axis, "loss")
    axis.set_ylabel("validation loss [nats per token]")
    axis.set_title("Validation loss by virtual time, a line for each seed", loc="left")
    axis.legend(frameon=False)
    return canvas


def unit_of_time(longest: float) -> tuple[str, int]:
    """The unit in which times of up to `longest` seconds are easy to read, and how many seconds it has."""
    if longest <= 600:
        return "seconds", 1
    return ("minutes", 60) if longest <= 4 * 3600 else ("hours", 3600)


def compared_test(groups: Sequence[SeedGroup]) -> Any:
    """Test metrics of every group and of the base models before training; None without any.

    Values stand at the right of each panel, so that no bar of an error crosses them.
    """
    names = in_order(*(run.metrics("test") for g in groups for run in g.runs))
    if not names:
        return None
    bases = untouched_bases(groups)
    labels = _labels(groups) + [label for label, _ in bases]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(groups))] + ["0.6"] * len(bases)
    canvas, axes = _axes(1, len(names), width=2.5 + 3.0 * len(names), height=1.6 + 0.45 * len(labels))
    has_items = False
    for axis, name in zip(axes, names, strict=True):
        bars = [mean_and_half_width(g.test(name)) for g in groups]
        bars += [mean_and_half_width(metrics.get(name, np.array([math.nan]))) for _, metrics in bases]
        lowest, highest = limits_of(name)
        means, halves = np.array(bars).T
        over_seeds = np.clip((means - halves, means + halves), lowest, highest)
        over_items = np.array([g.over_items(name) for g in groups] + [(math.nan, math.nan)] * len(bases)).T
        start = lowest if math.isfinite(lowest) else 0.0
        axis.barh(labels, np.where(np.isfinite(means), means - start, 0.0), left=start, color=colours, height=0.7)
        for (low, high), shift, style in (
            (over_items, 0.2, {"color": "0.5", "linewidth": 3}),
            (over_seeds, 0.0, {"color": "0.1", "capsize": 3}),
        ):
            known = np.isfinite(low) & np.isfinite(high)
            low, high = low[known], high[known]
            axis.errorbar((low + high) / 2, np.flatnonzero(known) + shift, xerr=(high - low) / 2, fmt="none", **style)
        has_items = has_items or bool(np.isfinite(over_items).any())
        for y, mean in enumerate(means):
            axis.annotate(as_number(mean), (1.02, y), xycoords=axis.get_yaxis_transform(), va="center", fontsize=9)
        ends = np.concatenate([[start], means, *over_seeds, *over_items])
        ends = ends[np.isfinite(ends)]
        room = 0.05 * float(np.ptp(ends))
        left = start if ends.min() >= start else float(ends.min()) - room
        axis.set_xlim(left, min(float(ends.max()) + (room or 1.0), highest))
        axis.set_title(f"test {title_of(name)}", loc="left")
        axis.set_xlabel(direction_of(name), fontsize=8)
        axis.grid(False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        if axis is not axes[0]:
            axis.set_yticklabels([])
    seeds = [len(g.runs) for g in groups if len(g.runs) > 1]
    notes = [f"black: 95 % t-interval of the mean over seeds (n = {_span(seeds)})"] if seeds else []
    notes += ["grey: 95 % interval over the test's items"] if has_items else []
    canvas.supxlabel("; ".join(notes), fontsize=8, x=0.01, ha="left")
    return canvas


def _labels(groups: Sequence[SeedGroup]) -> list[str]:
    """The names of the groups, with the letter of their test set where these differ."""
    sets = test_sets(groups)
    return [f"{g.label}, test set {sets[g.test_set]}" if g.test_set in sets else g.label for g in groups]


def _span(counts: Sequence[int]) -> str:
    """The range of some counts, like "3" or "2 to 5"."""
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def plotted_axes(keys: Sequence[str], lines: Sequence[AxisLine]) -> Any:
    """Test metrics along the axes; None without any."""
    names = axis_metrics(lines)
    if not names:
        return None
    canvas, axes = _axes(len(names), len(keys), width=max(4.5, 2.9 * len(keys)), height=0.5 + 2.6 * len(names))
    labels = list(dict.fromkeys(line.label for line in lines))
    for i, (name, key) in enumerate((name, key) for name in names for key in keys):
        axis, lines_of_key = axes[i], [line for line in lines if line.key == key]
        values = sorted({value for line in lines_of_key for value in line.runs}, key=order_of)
        for line in lines_of_key:
            x = np.array([values.index(value) for value in line.runs])
            results = [
                [run.metrics("test").get(name, math.nan) for run in by_seed.values()] for by_seed in line.runs.values()
            ]
            means, halves = np.array([mean_and_half_width(np.array(of_value)) for of_value in results]).T
            low, high = np.clip((means - halves, means + halves), *limits_of(name))
            j = labels.index(line.label)
            shift = 0.08 * (j - (len(labels) - 1) / 2)  # so that intervals do not hide each other
            axis.errorbar(
                *(x + shift, means),
                yerr=np.nan_to_num((means - low, high - means)),
                color=COLOURS[j % len(COLOURS)],
                **{"marker": "o", "markersize": 4, "capsize": 3, "label": line.label},
            )
        axis.set_xticks(range(len(values)), [str(value) for value in values])
        axis.set_xlim(-0.4, len(values) - 0.6)
        _within(axis, name)
        if i >= len(axes) - len(keys):
            axis.set_xlabel(key)
        if i % len(keys) == 0:
            axis.set_ylabel(f"test {title_of(name)}")
    axes[0].legend(frameon=False)
    seeds = [len(by_seed) for line in lines for by_seed in line.runs.values()]
    if max(seeds) > 1:
        canvas.supxlabel(f"mean and 95 % t-interval over seeds (n = {_span(seeds)})", fontsize=8, x=0.01, ha="left")
    return canvas


def robustness_curves(curves: Sequence[Curve], strength: str) -> Any:
    """Test metrics by the strength of a condition, a panel for each metric and attack; None without a curve.

    strength: the title of the x axis.
    """
    if not curves:
        return None
    names, panels = metrics_of(curves), list(dict.fromkeys(curve.panel for curve in curves))
    canvas, axes = _axes(
        len(names), len(panels), width=max(7.0, 2.6 + 2.9 * len(panels)), height=0.6 + 2.7 * len(names)
    )
    labels = list(dict.fromkeys(curve.label for curve in curves))
    strengths = sorted({at for curve in curves for at in curve.points})
    # An unbounded epsilon has no number on an axis: its points stand side by side.
    x_of = {at: float(i) if math.isinf(strengths[-1]) else at for i, at in enumerate(strengths)}
    apart = 0.012 * (x_of[strengths[-1]] - x_of[strengths[0]])  # so that intervals do not hide each other
    for i, (metric, panel) in enumerate((metric, panel) for metric in names for panel in panels):
        axis, values = axes[i], []
        for curve in (curve for curve in curves if curve.panel == panel):
            at = list(curve.points)
            means, halves = np.array([mean_and_half_width(curve.values(x, metric)) for x in at]).T
            low, high = np.clip((means - halves, means + halves), *limits_of(metric))
            j = labels.index(curve.label)
            axis.errorbar(
                np.array([x_of[x] for x in at]) + apart * (j - (len(labels) - 1) / 2),
                means,
                yerr=np.nan_to_num((means - low, high - means)),
                color=COLOURS[j % len(COLOURS)],
                linestyle=("-", "--", ":", "-.")[j // len(COLOURS) % 4],
                **{"marker": "o", "markersize": 4, "capsize": 3, "label": curve.label},
            )
            values += [float(mean) for mean in means]
        if metric == "loss" and min(values) > 0 and max(values) > 10 * min(values):
            axis.set_yscale("log")
        else:
            _within(axis, metric)
        axis.set_xticks(list(x_of.values()), [shown_strength(at) for at in strengths])
        if i >= len(axes) - len(panels):
            axis.set_xlabel(strength)
        if i % len(panels) == 0:
            axis.set_ylabel(f"test {title_of(metric)}" + (" [nats per token]" if metric == "loss" else ""))
        if i < len(panels):
            axis.set_title(panel, loc="left")
    lines: dict[str, Any] = {}
    for axis in axes:
        lines |= {text: line for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    canvas.legend(list(lines.values()), list(lines), frameon=False, fontsize=8, loc="outside right upper")
    return canvas
