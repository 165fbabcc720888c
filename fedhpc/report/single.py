"""Reports on one run: its results, costs, events and generated texts as tables, CSV files and plots."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedhpc.report.clients import clients_grids, clients_of
from fedhpc.report.page import TITLES, Page, sections
from fedhpc.report.plots import (
    Plot,
    client_loss,
    clients_and_causes,
    drawn,
    evaluated_when,
    learning_curve,
    metric_curves,
    seconds_of_rounds,
    split,
    traffic,
)
from fedhpc.report.runs import LoadedRun, SeedGroup, mark_of
from fedhpc.report.text import (
    NONE,
    Grid,
    Number,
    as_bytes,
    as_count,
    as_csv,
    as_interval,
    as_number,
    as_range,
    in_order,
    title_of,
    write_text,
)
from fedhpc.results.progress import duration

_TEXT_ROUNDS = 8  # of which texts stand side by side
_LONGEST = 1000  # rounds of which a table is made
_TABLE_ROWS, _TABLE_COLUMNS = 12, 12  # largest size at which a table of /tables is shown, not just written as CSV


def report_run(run: LoadedRun, out: Path, console: Console, page: Page | None = None) -> list[Path]:
    """Show the tables on the terminal and write report.md, CSV files and plots into `out`, and the page.

    Returns the paths written.
    """
    grids = _grids(run)
    in_order_of_sections = [grid for part in sections(grids, {}) for grid in part.grids]
    for grid in in_order_of_sections:
        if not grid.long:
            console.print(grid.rich())
    # Only now: the tables above are shown even where matplotlib is not installed.
    plots = _plots(run)
    written = [plot.save(out) for title in TITLES for plot in plots.get(title, ())]
    images = "\n".join(f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in written)
    text = "\n".join([f"# {run.name}\n", *(grid.markdown() for grid in in_order_of_sections), images])
    written.append(write_text(out / "report.md", text))
    written.append(write_text(out / "rounds.csv", as_csv(run.rounds)))
    if len(run.results.clients["round"]):
        written.append(write_text(out / "clients.csv", as_csv(run.results.clients)))
    for name, columns in tables_of(run).items():
        written.append(write_text(out / f"{name}.csv", as_csv(columns)))
    if page is not None:
        written.append(page.write(run.name + mark_of(run), sections(grids, plots)))
    return written


def _grids(run: LoadedRun) -> dict[str, list[Grid]]:
    """The tables of each section."""
    alone, clients = SeedGroup(run.name, [run]), clients_of(run)
    return {
        "Results": [_facts(run), _outcome(run), _evaluations(run)],
        "Clients": [client_summary_grid([alone]), *(clients_grids(clients) if clients is not None else [])],
        "Bytes and time": [_costs(run)],
        "Texts": [_samples(run), _texts_by_round(run)],
        "Rounds and events": [_rounds(run), _events(run)],
        "Tables of the approach": [_table(name, table) for name, table in tables_of(run).items() if _short(table)],
        "Runs": [runs_grid([run])],
    }


def _plots(run: LoadedRun) -> dict[str, list[Plot]]:
    """The plots of each section."""
    when = f"at the marks: {evaluated_when(run)}, and after the last"
    return {
        "Results": drawn(
            (
                "learning_curve",
                f"Loss by round, in nats per token. Training: mean over the supervised tokens of local training. "
                f"Validation: {when}.",
                learning_curve(run),
            ),
            ("metrics", f"Metrics of the validation split by round, {when}.{_SCALES}", metric_curves(run)),
        ),
        "Clients": drawn(
            (
                "client_loss",
                "Loss of the clients' last local steps by round, in nats per token: its median, middle half and range "
                "over the clients of the round that completed.",
                client_loss(run),
            ),
            clients_plot(run),
        ),
        "Split of the data": drawn(split_plot(run)),
        "Bytes and time": drawn(
            (
                "traffic",
                "Bytes exchanged since the start, of all clients: payloads each way, and what the transport counted.",
                traffic(run),
            ),
            (
                "time",
                "Wall time of each round by phase, in seconds; local training is the slowest worker's.",
                seconds_of_rounds(run),
            ),
        ),
    }


def clients_plot(run: LoadedRun) -> tuple[str, str, Any]:
    """The plot of a run's clients, as `drawn` takes it."""
    clients = clients_of(run)
    loss_of = clients.loss_of if clients is not None else ""
    caption = (
        f"The clients' losses {loss_of}, in nats per token, from the worst to the best, and by properties of the "
        "client; the three worst are named. Label skew is the total variation distance between a client's shares of "
        "labels and those of all clients. Bars: 95 % interval over the client's items, where it is known."
    )
    return "clients", caption, clients_and_causes(run.name, clients)


def split_plot(run: LoadedRun) -> tuple[str, str, Any]:
    """The plot of how the data of a run is divided, as `drawn` takes it."""
    caption = "Number of training examples of each client and, where there are labels, their shares among its examples."
    return "split", f"{run.name}: {caption[0].lower()}{caption[1:]}", split(run.name, run.results.groups["partition"])


_SCALES = " BLEU and chrF have 100 at most, shares have 1."


def runs_grid(runs: Sequence[LoadedRun]) -> Grid:
    """The table of runs: how far each is, where it lies, and the command that makes it."""
    rows = [
        [run.name, run.state, str(run.directory), shlex.join(["fedhpc", "run", str(run.directory / "config.yaml")])]
        for run in runs
    ]
    return Grid("Runs", ["run", "state", "directory", "command"], rows, text=True, long=True)


def _rounds(run: LoadedRun) -> Grid:
    """The table of /rounds; none where it is too long to be looked at."""
    rounds = run.rounds
    counts = {name: as_bytes if "bytes" in name else as_count for name in rounds if rounds[name].dtype.kind in "iu"}
    shown = [name for name in rounds if name != "round"]
    rows: list[list[str]] = [
        [Number(str(t), int(t)), *(counts.get(name, as_number)(rounds[name][i].item()) for name in shown)]
        for i, t in enumerate(rounds["round"])
    ]
    header = ["round", *(f"{name.replace('_', ' ')}{_unit(name)}" for name in shown)]
    return Grid("Rounds (round 0: the untouched base)", header, rows if len(rows) <= _LONGEST else [], long=True)


def _unit(column: str) -> str:
    """The unit of a column of /rounds, in brackets."""
    if column in ("train_loss", "eval_loss"):
        return " [nats per token]"
    return " [s]" if "seconds" in column else ""


def _events(run: LoadedRun) -> Grid:
    events = run.results.events
    shown = [[str(t), k, m] for t, k, m in zip(*(events[c][-20:] for c in ("round", "kind", "message")), strict=True)]
    title = "Events" if len(events["round"]) <= 20 else f"Events (the last 20 of {len(events['round'])})"
    return Grid(title, ["round", "kind", "message"], shown, text=True, long=True)


def _short(columns: dict[str, np.ndarray]) -> bool:
    """Whether a table is small enough to be shown; larger ones are only written as CSV."""
    return 0 < len(next(iter(columns.values()))) <= _TABLE_ROWS and len(columns) <= _TABLE_COLUMNS


def _table(name: str, columns: dict[str, np.ndarray]) -> Grid:
    texts = [key for key, values in columns.items() if values.dtype.kind == "O"]
    keys = [*texts, *(key for key in columns if key not in texts)]
    rows = [
        [str(columns[key][i]) if key in texts else as_number(float(columns[key][i])) for key in keys]
        for i in range(len(columns[keys[0]]))
    ]
    return Grid(title_of(name).capitalize(), [title_of(key) for key in keys], rows)


def tables_of(run: LoadedRun) -> dict[str, dict[str, np.ndarray]]:
    """The tables that the approach itself recorded (/tables in results.h5): table -> column -> values."""
    tables: dict[str, dict[str, np.ndarray]] = {}
    for path, values in run.results.groups["tables"].items():
        name, _, column = path.partition("/")
        tables.setdefault(name, {})[column] = values
    return tables


def _facts(run: LoadedRun) -> Grid:
    a = run.results.attributes
    rows = [["state", run.state]]
    if run.void_rounds:
        shown = ", ".join(map(str, run.void_rounds[:12])) + (", ..." if len(run.void_rounds) > 12 else "")
        rows += [
            ["void rounds", f"{len(run.void_rounds)}, in which too few clients completed and nothing moved: {shown}"]
        ]
    rows += [[key.replace("_", " "), str(a[key])] for key in ("mode", "method", "model", "seed") if key in a]
    rows += [["trainable parameters", as_count(run.parameters)]]
    if "epsilon" in run.rounds:
        delta, relation = a.get("delta", NONE), a.get("neighbouring_relation", NONE)
        spent = f"epsilon {run.rounds['epsilon'][-1]:.4g} after {run.rounds['round'][-1]} rounds"
        rows += [["differential privacy", f"{spent}, delta {delta}, {relation}"]]
    for key in ("best_round", "world_size", "transport", "device", "block_size", "created_utc", "fedhpc_version"):
        if key in a:
            rows.append([key.replace("_", " "), str(a[key])])
    return Grid(f"Run {run.name}", ["", "value"], rows, text=True)


def _outcome(run: LoadedRun) -> Grid:
    names = in_order(run.metrics("test"), run.metrics("base"))
    rows = []
    for label, group in (("this run", "test"), ("untouched base", "base")):
        metrics, sampling = run.metrics(group), [run.sampling(group, name) for name in names]
        if metrics:
            rows.append([label, *(as_number(metrics.get(name)) for name in names)])
        if any(sampling):
            ends = [as_range(one.low, one.high) if one is not None else NONE for one in sampling]
            rows.append([f"{label}: 95 % over items", *ends])
    sampling = [run.sampling("test", name) for name in names]
    if any(sampling):
        rows.append(["items of the test", *(one.items if one is not None else NONE for one in sampling)])
    return Grid("Test", ["", *map(title_of, names)], rows)


def client_summary_grid(groups: Sequence[SeedGroup]) -> Grid:
    """The table of per-client results: a row for each group and metric, in which every client counts once."""
    rows = []
    for g in groups:
        for metric in dict.fromkeys(name.partition("/")[0] for run in g.runs for name in run.client_summary):
            values = [as_interval(g.client_summary(f"{metric}/{key}")) for key in ("mean", "worst_10_percent", "std")]
            rows.append([g.label, title_of(metric), *values])
    header = ["run", "metric", "mean", "worst 10 %", "standard deviation"]
    return Grid("Over clients, each on its own held-out data", header, rows)


def _evaluations(run: LoadedRun) -> Grid:
    rounds, void = run.rounds, set(run.void_rounds)
    metrics = [name for name in rounds if name.startswith("eval_") and not np.isnan(rounds[name]).all()]
    evaluated = np.flatnonzero(
        np.any([np.zeros(len(rounds["round"])), *(~np.isnan(rounds[m]) for m in metrics)], axis=0)
    )
    if len(evaluated) > 12:
        evaluated = evaluated[np.linspace(0, len(evaluated) - 1, 12).round().astype(int)]
    rows = [
        [
            f"{rounds['round'][i]}{' (void)' if rounds['round'][i] in void else ''}",
            as_number(rounds["train_loss"][i]),
            *(as_number(rounds[m][i]) for m in metrics),
        ]
        for i in evaluated
    ]
    header = ["round", "train loss", *(f"eval {title_of(name.removeprefix('eval_'))}" for name in metrics)]
    items = [one.items for name in metrics if (one := run.results.sampling(f"rounds/{name}")) is not None]
    return Grid("Evaluations" + (f" (on {', '.join(dict.fromkeys(items))})" if items else ""), header, rows)


def _costs(run: LoadedRun) -> Grid:
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
        ["bytes down", as_bytes(r["bytes_down"].sum()), as_bytes(r["bytes_down"].mean())],
        ["bytes up", as_bytes(r["bytes_up"].sum()), as_bytes(r["bytes_up"].mean())],
        ["bytes on the wire", as_bytes(r["wire_bytes"].sum()), as_bytes(r["wire_bytes"].mean())],
        ["bytes per client, both ways", "", as_bytes(run.bytes_per_client)],
        ["supervised tokens", as_count(tokens), as_count(tokens / len(r["round"]))],
        ["padding tokens", as_count(padding), as_count(padding / len(r["round"]))],
        ["clients sampled", as_count(r["cohort_size"].sum()), f"{r['cohort_size'].mean():.1f}"],
        *([["void rounds", as_count(len(run.void_rounds)), ""]] if run.void_rounds else []),
        *([f"clients {k}", as_count(r[k].sum()), f"{r[k].mean():.1f}"] for k in ("completed", "dropped", "rejected")),
        *_occupancy(r),
        *_virtual(run, r),
        ["peak memory of a rank", as_bytes(r["peak_memory_bytes"].max()), ""],
    ]
    return Grid("Costs", ["", "run", "per round"], rows)


def _occupancy(rounds: dict[str, np.ndarray]) -> list[list[str]]:
    """How full blocks were, in a row of the costs; rounds: the columns of /rounds from round 1 on."""
    occupancy = rounds.get("block_occupancy", np.empty(0))
    occupancy = occupancy[~np.isnan(occupancy)]
    return [["block occupancy", "", as_number(float(occupancy.mean()))]] if len(occupancy) else []


def _virtual(run: LoadedRun, rounds: dict[str, np.ndarray]) -> list[list[str]]:
    """Rows of the costs of a run whose clients take virtual time; rounds: the columns of /rounds from round 1 on."""
    if "virtual_seconds" not in rounds:
        return []
    clients = run.results.clients
    in_blocks = clients["block"] >= 0
    blocks = len(np.unique(np.stack([clients["round"], clients["block"]])[:, in_blocks], axis=1).T)
    staleness = rounds["staleness"][~np.isnan(rounds["staleness"])]
    return [
        ["clients late", as_count(rounds["late"].sum()), f"{rounds['late'].mean():.1f}"],
        ["virtual time", duration(float(rounds["virtual_seconds"].sum())), f"{rounds['virtual_seconds'].mean():.3f} s"],
        ["staleness of an update", as_number(float(staleness.mean())) if len(staleness) else NONE, ""],
        ["clients in a block", as_number(in_blocks.sum() / blocks) if blocks else NONE, ""],
    ]


def _samples(run: LoadedRun) -> Grid:
    samples = run.results.groups["samples"]
    rows = [
        [str(prompt), " / ".join(json.loads(references)), str(text)]
        for prompt, references, text in zip(
            *(samples.get(k, []) for k in ("prompt", "references", "text")), strict=True
        )
    ]
    return Grid("Generated texts", ["prompt", "references", "text"], rows, text=True, long=True)


def _texts_by_round(run: LoadedRun) -> Grid:
    """The table of what the model wrote for the same prompts over the rounds, side by side."""
    samples = run.results.eval_samples
    rounds = np.unique(samples.get("round", np.zeros(0, np.int64)))
    if len(rounds) > _TEXT_ROUNDS:
        rounds = rounds[np.linspace(0, len(rounds) - 1, _TEXT_ROUNDS).round().astype(int)]
    of_prompt: dict[tuple[str, str], dict[int, str]] = {}
    for t, prompt, references, text in zip(*samples.values(), strict=True):
        of_prompt.setdefault((str(prompt), str(references)), {})[int(t)] = str(text)
    rows = [
        [prompt, " / ".join(json.loads(references)), *(texts.get(int(t), "") for t in rounds)]
        for (prompt, references), texts in of_prompt.items()
    ]
    header = ["prompt", "references", *(f"round {t}" for t in rounds)]
    return Grid("Generated texts over the rounds, of the validation split", header, rows, text=True, long=True)
