"""Reports and progress from made-up results: numbers in the tables, files written, one line for bad input."""

from __future__ import annotations

import csv
import fcntl
import io
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from fedhpc.config import load as load_config
from fedhpc.ranks.round_progress import RoundProgress
from fedhpc.report import costs
from fedhpc.report.__main__ import main
from fedhpc.report.plots import compared_loss, compared_test, learning_curve, unit_of_time
from fedhpc.report.runs import LoadedRun, group_by_seed, lines_along, load_run
from fedhpc.report.text import mean_and_half_width, t_975
from fedhpc.results.progress import Progress, duration, line
from fedhpc.results.record import Event, FinalResults, RoundRecord, Sampling
from fedhpc.results.results_file import CLIENTS, ROUNDS, Results
from fedhpc.results.status import write_status


def make_run(
    directory: Path,
    name: str,
    seed: int = 0,
    rounds: int = 20,
    done: int | None = None,
    mode: str = "federated",
    lr: float = 0.05,
    base: bool = True,
    level: float = 1.0,
    more: Sequence[str] = (),
) -> Path:
    """A run directory with made-up but plausible results."""
    done = rounds if done is None else done
    overrides = [
        f"run.name={name}",
        f"run.seed={seed}",
        f"mode={mode}",
        f"client.lr={lr}",
        "evaluation.metrics=[]",
        *more,
    ]
    config = load_config(None, [*overrides, f"federation.rounds={rounds}"])
    rng = np.random.default_rng(seed)
    attributes = {
        "config": config.to_yaml(),
        "mode": mode,
        "method": "prefix",
        "model": "builtin",
        "seed": seed,
    }
    run = Results({**attributes, "payload_parameters": 24_576, "world_size": 4}, ["loss", "bleu", "rouge_l"])
    run.add_round({"round": 0, "eval_loss": 4.1, "eval_bleu": 2.0, "eval_rouge_l": 0.11, "seconds": 1.2})
    for t in range(1, done + 1):
        loss = level * (1.2 + 2.9 * math.exp(-t / 5)) + rng.normal(0, 0.05)
        row = {**dict.fromkeys(ROUNDS, 0), "round": t, "train_loss": loss, "cohort_size": 10, "completed": 9}
        row |= {"dropped": 1, "tokens": 5000, "padded_tokens": 400, "wire_bytes": 700_000, "seconds": 1.5}
        row |= {
            "bytes_down": 983_040,
            "bytes_up": 884_736,
            "seconds_local": 1.1,
            "seconds_eval": 0.3 * (t % 5 == 0),
        }
        row |= {"seconds_broadcast": 0.05, "seconds_reduce": 0.08, "seconds_server": 0.01, "update_norm": 1.0}
        row |= {"eval_loss": math.nan, "peak_memory_bytes": 600 << 20}
        if t % 5 == 0:
            row |= {
                "eval_loss": loss + 0.1,
                "eval_bleu": 30 - 20 * math.exp(-t / 8),
                "eval_rouge_l": 0.5 - 0.4 / t,
            }
        run.add_round(row)
        last = loss + rng.gamma(2, 0.1, 10) - 0.2
        clients = {**{k: np.zeros(10) for k in CLIENTS}, "round": np.full(10, t), "client_id": np.arange(10)}
        run.add_clients({**clients, "loss_last": last, "loss_first": last + 0.2, "status": np.arange(10) == 3})
        run.add_event(t, "dropped", "client 3 did not | report\nback")
    if base:
        run.set_base({"loss": 4.2, "bleu": 1.5, "rouge_l": 0.1})
    if done == rounds:
        run.set_test({"loss": level * 1.3 + 0.01 * seed, "bleu": 28.0 + seed, "rouge_l": 0.48})
        run.set_samples([{"prompt": "name[Aromi] :", "references": ["Aromi is a pub."], "text": "Aromi is a bar."}])
        run.set_tables({"rates": {"rate": np.array([0.5, 1.0]), "place": np.array(["a", "b"], dtype=object)}})
        run.attributes["wall_seconds"] = 31.5
    directory = directory / name
    directory.mkdir(parents=True)
    run.write(directory / "results.h5", complete=done == rounds)
    write_status(directory, "complete" if done == rounds else "preempted", done)
    return directory


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def cells(text: str, label: str) -> list[str]:
    (row,) = [text_line for text_line in text.splitlines() if text_line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_report_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "demo")
    assert main([str(run)]) == 0
    out = run / "report"
    plots = {"learning_curve.png", "metrics.png", "client_loss.png", "clients.png", "traffic.png", "time.png"}
    assert {p.name for p in out.iterdir()} == plots | {"report.md", "rounds.csv", "clients.csv", "rates.csv"}
    assert (out / "rates.csv").read_text() == "place,rate\na,0.5\nb,1.0\n"
    assert all(is_png(out / name) for name in plots)
    text = (out / "report.md").read_text()
    assert cells(text, "this run")[1:] == ["1.300", "28.00", "0.480"]
    assert cells(text, "untouched base")[1:] == ["4.200", "1.500", "0.100"]
    assert cells(text, "bytes per client, both ways")[1:] == ["", "182.4 KiB"]
    assert r"client 3 did not \| report back" in text and "Aromi is a bar." in text
    with open(out / "rounds.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21 and rows[5]["round"] == "5" and rows[1]["eval_bleu"] == "nan"
    printed = capsys.readouterr().out
    assert "complete" in printed and str(out / "report.md") in printed


def test_unfinished_run_and_run_without_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, "cut", done=7)
    assert main([str(run / "results.h5"), "--out", str(tmp_path / "x" / "y")]) == 0
    assert "unfinished: preempted, round 7 of 20" in capsys.readouterr().out
    assert (tmp_path / "x" / "y" / "report.md").exists()
    assert main([str(make_run(tmp_path, "none", done=0))]) == 0
    assert main([str(run), str(tmp_path / "none")]) == 0
    assert "| cut (unfinished, 7/20) |" in (tmp_path / "comparison" / "comparison.md").read_text()


def test_results_over_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path, f"fed-s{seed}", seed) for seed in range(2)]
    for seed, run in enumerate(runs):
        results = Results.read(run / "results.h5")
        summary = {"loss/mean": 1.0 + 0.1 * seed, "loss/worst_10_percent": 2.5, "loss/std": 0.25}
        summary |= {name.replace("loss", "loss_personal"): value / 2 for name, value in summary.items()}
        results.set_client_eval({"client_id": np.arange(2), "loss": np.ones(2)}, summary)
        results.write(run / "results.h5", complete=True)
    assert main([str(runs[0])]) == 0
    text = (runs[0] / "report" / "report.md").read_text()
    assert "| fed-s0 | loss | 1.000 | 2.500 | 0.250 |" in text
    assert "| fed-s0 | loss personal | 0.500 | 1.250 | 0.125 |" in text
    other = make_run(tmp_path, "other", lr=0.5)  # without per-client results
    out = tmp_path / "comparison"
    assert main([*map(str, runs), str(other), "--out", str(out)]) == 0
    # Seeds 0 and 1, t(1) = 12.706: 12.706 * (0.1 / sqrt(2)) / sqrt(2) = 0.635.
    assert "| fed | loss | 1.050 ± 0.635 | 2.500 ± 0.000 | 0.250 ± 0.000 |" in (out / "comparison.md").read_text()
    assert "worst 10 %" in capsys.readouterr().out
    with open(out / "comparison.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["clients_loss_personal_worst_10_percent"] for row in rows] == ["1.25", "1.25", "nan"]


def test_comparison_groups_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path, f"fed-s{seed}", seed) for seed in range(3)]
    runs.append(make_run(tmp_path, "fed-fast", lr=0.5, level=0.8))
    runs.append(make_run(tmp_path, "central", mode="centralized"))
    out = tmp_path / "comparison"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    plots = {"eval_loss.png", "test.png", "clients.png", "costs.png"}
    assert {p.name for p in out.iterdir()} == {"comparison.md", "comparison.csv", *plots}
    assert all(is_png(out / name) for name in plots)
    text, _ = (out / "comparison.md").read_text().split("## Gain kept")
    # Seeds 0, 1, 2: mean 29, standard deviation 1, t(2) = 4.303: 4.303 / sqrt(3) = 2.484.
    assert cells(text, "fed")[1:] == [
        *("federated", "prefix", "3", "1.310 ± 0.025", "29.00 ± 2.48", "0.480 ± 0.000"),
        *("24,576", "182.4 KiB", "31.5 ± 0.0"),
    ]
    assert cells(text, "fed-fast")[3] == "1"
    assert cells(text, "central")[-2] == "–"
    assert cells(text, "untouched base")[4:7] == ["4.200", "1.500", "0.100"]
    with open(out / "comparison.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["fed", "fed", "fed", "fed-fast", "central"]
    assert float(rows[2]["test_bleu"]) == 30 and rows[0]["base_loss"] == "4.2"
    assert "29.00 ± 2.48 " in capsys.readouterr().out


def measured(run: Path, sampling: dict[str, Sampling], **metrics: float) -> None:
    """Give a made-up run other results on the test."""
    results = Results.read(run / "results.h5")
    results.set_test(metrics, sampling)
    results.set_base({})
    results.write(run / "results.h5", complete=True)


def test_a_folder_of_runs_with_both_errors_of_the_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, accuracy in ((2, 0.45), (10, 0.58)):
        run = make_run(tmp_path / "sweep", f"fed-s{seed}", seed)
        at = Sampling(300, 500, "examples", accuracy - 0.05, accuracy + 0.06, "Wilson")
        measured(run, {"accuracy": at}, accuracy=accuracy, perplexity=3.5)
    other = make_run(tmp_path / "sweep", "wide-s2", 2, lr=0.5)
    measured(other, {"accuracy": at}, accuracy=0.2, perplexity=4.0)
    (tmp_path / "sweep" / "notes").mkdir()
    assert main([str(tmp_path / "sweep")]) == 0
    text, errors = (
        (tmp_path / "sweep" / "comparison" / "comparison.md").read_text().split("## Errors of the test results")
    )
    printed = capsys.readouterr().out
    # t(1) = 12.706: half is 0.826, which no accuracy can have on either side.
    assert "Student's t" in text.splitlines()[0] and cells(text, "fed")[4:6] == ["3.500 ± 0.000", "0.515 ± 0.826"]
    assert "| fed | accuracy | 0.515 | 0.000 to 1.000 (n = 2) | 0.465 to 0.575 | 300 of 500 examples |" in errors
    assert "| wide-s2 | accuracy | 0.200 | – | 0.530 to 0.640 | 300 of 500 examples |" in errors
    assert (
        "| fed | perplexity" not in errors and "0.000 to 1.000 (n = 2)" in printed and "different data" not in printed
    )
    with open(tmp_path / "sweep" / "comparison" / "comparison.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["fed-s2", "fed-s10", "wide-s2"]
    assert [row["client.lr"] for row in rows] == ["0.05", "0.05", "0.5"]
    assert not {"run.name", "run.seed", "client.epochs"} & set(rows[0])
    kept = {"test_accuracy": 0.45, "test_accuracy_low": 0.4, "test_accuracy_high": 0.51, "test_accuracy_n": 300}
    assert {name: float(rows[0][name]) for name in kept} == pytest.approx(kept)
    assert main([str(tmp_path / "sweep" / "notes")]) == 2
    assert "no folder of runs" in capsys.readouterr().err


def test_plots_name_their_bands_and_end_where_the_metric_does(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, f"fed-s{seed}", seed) for seed in (0, 1)]
    for run, accuracy in zip(runs, (0.45, 0.58), strict=True):
        at = Sampling(300, 300, "examples", accuracy - 0.05, accuracy + 0.05, "Wilson")
        measured(run, {"accuracy": at}, accuracy=accuracy, perplexity=1.0 + accuracy, mine=-2.0)
    groups = group_by_seed([load_run(run) for run in runs])
    canvas = compared_test(groups)
    assert [axis.get_xlabel() for axis in canvas.axes] == ["lower is better", "higher is better", ""]
    limits = [axis.get_xlim() for axis in canvas.axes]
    assert limits[0][0] == 1.0 and limits[1] == (0.0, 1.0) and limits[2][0] < -2.0
    for axis in canvas.axes:  # values stand beyond the axis, where no error bar goes
        assert all(text.xyann[0] > 1 for text in axis.texts)
    assert (
        "t-interval of the mean over seeds (n = 2); grey: 95 % interval over the test's items"
        in canvas._supxlabel.get_text()
    )
    (axis,) = compared_loss(groups).axes
    assert "band: 95 % t-interval of the mean" in axis.get_title(loc="left")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["fed (n = 2)"]
    assert axis.get_ylim()[0] >= 0
    alone = compared_loss(group_by_seed([load_run(runs[0])])).axes[0]
    assert "band" not in alone.get_title(loc="left")


def test_results_on_different_data_are_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path, f"fed-s{seed}", seed) for seed in (0, 1)]
    others = [make_run(tmp_path, f"few-s{seed}", seed, lr=0.1) for seed in (0, 1)]
    for run in (*runs, *others):
        n = 40 if run in others else 300
        measured(run, {"loss": Sampling(n, 300, "examples", 1.0, 2.0, "normal")}, loss=1.5)
    assert main([*map(str, [*runs, *others]), "--out", str(tmp_path / "out"), "--baseline", "fed"]) == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    results = text.split("## Errors of the test results")[0]
    assert cells(results, "fed")[4] == "A" and cells(results, "few")[4] == "B"
    note = 'do not compare the numbers of different sets: A: builtin:dining: test, target " {ref}", 300 examples; B: '
    assert note in text and "40 of 300 examples" in text and "different data" in capsys.readouterr().out
    assert cells(text.split("difference to fed")[1].split("## ")[0], "few")[1:3] == [
        "0",
        "–",
    ]  # no difference of unlike things
    assert [label.get_text() for label in compared_test(group_by_seed([load_run(r) for r in [*runs, *others]])).axes[0]
            .get_yticklabels()][:2] == ["fed, test set A", "few, test set B"]  # fmt: skip


def test_a_metric_more_is_no_other_test_set(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "fed"), make_run(tmp_path, "texts", lr=0.1)]
    examples, prompts = Sampling(300, 300, "examples"), Sampling(120, 120, "prompts")
    measured(runs[0], {"loss": examples}, loss=1.5)
    measured(runs[1], {"loss": examples, "bleu": prompts}, loss=1.5, bleu=20.0)
    assert len({load_run(run).test_set for run in runs}) == 1


def test_void_rounds_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "demo")
    results = Results.read(run / "results.h5")
    for round_ in (5, 7):
        results.add_event(round_, "void", "0 of 3 needed clients completed")
    results.write(run / "results.h5", complete=True)
    assert main([str(run)]) == 0
    text = (run / "report" / "report.md").read_text()
    assert "| void rounds | 2, in which too few clients completed and nothing moved: 5, 7 |" in text
    assert "| void rounds | 2 |  |" in text and "| 5 (void) |" in text and "| 10 |" in text
    (axis,) = learning_curve(load_run(run)).axes
    marked = {text.get_text() for text in axis.get_legend().get_texts()}
    assert "void round: nothing moved" in marked and list(axis.lines[-1].get_xdata()) == [5, 7]
    capsys.readouterr()
    assert main([str(run), str(make_run(tmp_path, "other", lr=0.2)), "--out", str(tmp_path / "out")]) == 0
    assert "nothing moved: demo 2 of 20." in capsys.readouterr().out.replace("\n", " ")


def test_readmes_lines_read_a_file_that_another_program_has_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs", "mine")
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "h5py.File(" in block]
    monkeypatch.chdir(tmp_path)
    with open(run / "results.h5", "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            h5py.File(run / "results.h5", locking=True)
        exec(code, {})
        assert main([str(run)]) == 0
    assert "0 ok, 1 dropped, 2 rejected" in capsys.readouterr().out


def test_curves_of_many_groups_have_no_bands_and_their_names_outside(tmp_path: Path) -> None:
    runs = [
        load_run(make_run(tmp_path / f"{i}-s{seed}", f"{i}-s{seed}", seed, rounds=5, lr=0.01 * (i + 1)))
        for i in range(8)
        for seed in (0, 1)
    ]
    few, many = compared_loss(group_by_seed(runs[:14])), compared_loss(group_by_seed(runs))
    assert len(few.axes[0].collections) == len(few.axes[0].get_legend().get_texts()) == 7 and not few.legends
    assert len(many.axes[0].collections) == 0 and many.axes[0].get_legend() is None
    assert len(many.legends[0].get_texts()) == 8


def test_paired_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seed by seed to the baseline, over the seeds that both have; the interval is that of a paired t test."""
    runs = [make_run(tmp_path, f"prefix-s{seed}", seed) for seed in range(4)]
    runs += [make_run(tmp_path, f"lora-s{seed}", seed, lr=0.5, level=1 + 0.1 * seed**2) for seed in (3, 1, 2, 7)]
    runs += [make_run(tmp_path, "alone-s9", 9, lr=0.7), make_run(tmp_path, "cut-s1", 1, lr=0.9, done=5)]
    out = tmp_path / "comparison"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    assert "difference to prefix, seed by seed" in capsys.readouterr().out
    with open(out / "differences.csv") as file:
        rows = {(row["group"], row["metric"]): row for row in csv.DictReader(file)}
    row = rows["lora", "loss"]
    ours = np.array([1.3 * (1 + 0.1 * seed**2) + 0.01 * seed for seed in (1, 2, 3)])
    theirs = np.array([1.3 + 0.01 * seed for seed in (1, 2, 3)])
    half = 4.302653 * np.std(ours - theirs, ddof=1) / math.sqrt(3)  # t(2)
    assert (row["baseline"], row["seeds"]) == ("prefix", "3")
    mean = np.mean(ours - theirs)
    values = [float(row[key]) for key in ("mean", "low", "high")]
    assert values == pytest.approx([mean, mean - half, mean + half], rel=1e-3)
    assert rows["alone-s9", "loss"]["seeds"] == rows["cut-s1 (unfinished, 5/20)", "loss"]["seeds"] == "0"
    title, *_ = (out / "comparison.md").read_text().split("difference to prefix")[1:]
    assert cells(title, "lora")[1:3] == ["3", "0.607 ± 1.305"] and cells(title, "alone-s9")[1:3] == ["0", "–"]

    assert main([*map(str, runs), "--out", str(out), "--baseline", "lora"]) == 0
    with open(out / "differences.csv") as file:
        (row,) = [row for row in csv.DictReader(file) if (row["group"], row["metric"]) == ("prefix", "loss")]
    assert float(row["mean"]) == pytest.approx(-mean)
    assert main([*map(str, runs), "--out", str(out), "--baseline", "lroa"]) == 2
    assert "there is no row 'lroa'; did you mean 'lora'" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_infinite_metrics_of_runs_that_diverged(tmp_path: Path) -> None:
    """The perplexity of a loss beyond 709 is infinite: the table says so, and its plot has no bar."""
    runs = [make_run(tmp_path, f"ours-s{seed}", seed) for seed in (0, 1)]
    for run in runs:
        with h5py.File(run / "results.h5", "r+") as file:
            for key, value in {"test/perplexity": math.inf, "base/perplexity": 66.7}.items():
                file[key] = value
            file["test/perplexity"].attrs.update({"low": math.inf, "high": math.inf})
    runs.append(make_run(tmp_path, "other", lr=0.5))
    assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "inf" in cells(text, "ours") and is_png(tmp_path / "out" / "test.png")


def test_gain_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the way from the untouched base (4.2) to centralised training, seed by seed; none where either is not told."""
    runs = [make_run(tmp_path, f"ours-s{seed}", seed, level=1 + 0.1 * seed) for seed in (0, 1, 2)]
    runs += [make_run(tmp_path, f"central-s{seed}", seed, mode="centralized") for seed in (0, 1)]
    runs += [make_run(tmp_path, f"blind-s{seed}", seed, lr=0.3, base=False) for seed in (0, 1)]
    runs += [make_run(tmp_path, f"prompted-s{seed}", seed, more=["data.prompt={mr} as a text:"]) for seed in (0, 1)]
    assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    ours, central = np.array([1.3, 1.43 + 0.01]), np.array([1.3, 1.31])
    kept = 100 * (4.2 - ours) / (4.2 - central)
    half = 12.7062 * np.std(kept, ddof=1) / math.sqrt(2)  # t(1)
    _, table = (tmp_path / "out" / "comparison.md").read_text().split("## Gain kept")
    table = table.partition("Groups of runs")[0]
    assert cells(table, "ours")[1:4] == ["central", "2", f"{kept.mean():.1f} ± {half:.1f}"]
    assert not any(
        f"| {other} |" in table.replace("| ours | central |", "") for other in ("blind", "prompted", "central")
    )
    assert "Gain kept" in capsys.readouterr().out

    other = make_run(tmp_path, "central-fast-s0", 0, mode="centralized", lr=0.9)  # a row beside each of the two
    assert main([*map(str, [*runs, other]), "--out", str(tmp_path / "two")]) == 0
    _, table = (tmp_path / "two" / "comparison.md").read_text().split("## Gain kept")
    assert f"| ours | central | 2 | {kept.mean():.1f} ± {half:.1f} |" in table
    assert f"| ours | central-fast-s0 | 1 | {kept[0]:.1f} |" in table


def test_quantiles_of_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 10, 20, 21, 22, 30, 99, 1000):
        assert t_975(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=3e-4)


def test_same_names_and_same_seeds_stay_apart(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a", "demo")
    two = make_run(tmp_path / "b", "demo")
    groups = group_by_seed([load_run(one), load_run(two)])
    assert [g.label for g in groups] == [f"demo [{one}]", f"demo [{two}]"]


def test_mean_and_half_width() -> None:
    assert mean_and_half_width(np.array([2.0]))[0] == 2.0
    assert math.isnan(mean_and_half_width(np.array([2.0]))[1])
    # Two values: half width is t(1) * |a - b| / 2.
    assert mean_and_half_width(np.array([1.0, 3.0])) == pytest.approx((2.0, 12.706))


@pytest.mark.parametrize("kind", ["missing", "empty", "damaged"])
def test_bad_input_is_one_line_and_exit_2(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    if kind != "missing":
        path.mkdir()
    if kind == "damaged":
        (path / "results.h5").write_bytes(b"x")
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"fedhpc report: error: {path}")


def test_progress_in_a_log_is_one_line_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    record = RoundRecord(3, train_loss=2.3141, cohort_size=10, dropped=1, seconds=1.84, metrics={"loss": 2.551})
    display = Progress(20, start_round=2)
    display.message("resumed [after] round 2")
    display.round(record)
    display.round(replace(record, round=4, metrics={}, dropped=0, rejected=2))
    display.close()
    assert capsys.readouterr().out.splitlines() == [
        "resumed [after] round 2",
        "round 3/20  train_loss 2.314  eval_loss 2.551  cohort 10 (1 dropped)  1.8 s",
        "round 4/20  train_loss 2.314  cohort 10 (2 rejected)  1.8 s",
    ]
    assert line(RoundRecord(0, metrics={"loss": 4.0}), 5) == "round 0/5  eval_loss 4.000"
    void = RoundRecord(2, cohort_size=4, dropped=4, events=[Event("void", "0 of 3 needed clients completed")])
    assert line(void, 5) == "round 2/5  void: 0 of 3 needed clients completed  cohort 4 (4 dropped)"
    sampling = {"loss": Sampling(500, 500, "examples", 2.4, 2.6, "normal"), "bleu": Sampling(50, 60, "prompts")}
    results = FinalResults({"loss": 2.5, "bleu": 30.0, "mine": -1e-9}, {"loss": 4.0}, {}, test_sampling=sampling)
    display.finish(results)
    assert capsys.readouterr().out.splitlines() == [
        "test loss 2.5000 (untouched base 4.0000; 95 % interval 2.4000 to 2.6000 over 500 examples)",
        "test bleu 30.0000 (over 50 of 60 prompts)",
        "test mine 0.0000",
    ]
    assert [duration(s) for s in (1.84, 125.0, 12_000.0)] == ["1.8 s", "2 min 05 s", "3 h 20 min"]


# ---------------------------------------------------------------- costs and axes


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_round_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", screen := _Terminal())
    progress = RoundProgress()
    display = Progress(3, 0, progress)

    def drawn() -> str:
        screen.truncate(0)
        assert display._live is not None
        display._live.refresh()
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())

    try:
        progress.activity = "evaluation"
        assert "evaluation ..." in drawn() and "clients of" not in drawn()
        progress.begin(1, 5)
        assert re.search(r"clients of round 1 .* 0/5", drawn()) and "evaluation" not in drawn()
        progress.add(1.5)
        progress.hear(1, [1, 2.0])
        progress.hear(2, [0, 4.0])  # of the round before
        assert re.search(r"clients of round 1 .* 3/5", drawn())  # 3.5 of them
        assert re.search(r"rounds .* 0/3", drawn())
        progress.finish(2)
        progress.hear(2, [1, 1.0])
        assert re.search(r"clients of round 1 .* 5/5", drawn())
    finally:
        screen.truncate(0)
        display.close()
    assert "clients of" not in screen.getvalue()


def test_what_was_spent_until_a_loss() -> None:
    rounds = {
        "round": np.arange(5),
        "eval_loss": np.array([3.0, math.nan, 2.0, math.nan, 1.0]),
        "tokens": np.array([0, 10, 20, 30, 40]),
        "bytes_down": np.array([0, 100, 100, 100, 100]),
        "bytes_up": np.array([0, 80, 100, 100, 100]),
        "seconds": np.array([5.0, 1.0, 4.0, 1.0, 4.0]),
        "seconds_eval": np.array([5.0, 0.0, 3.0, 0.0, 3.0]),
        "virtual_seconds": np.array([0.0, 30.0, 40.0, 50.0, 40.0]),
    }
    assert costs.cost_to_reach(rounds, 2.0) == costs.cost_to_reach(rounds, 2.9) == (2, 30, 380, 2.0, 70.0)
    assert costs.cost_to_reach(rounds, 1.9) == (4, 100, 780, 4.0, 160.0)
    assert costs.cost_to_reach(rounds, 3.0) == (0, 0, 0, 0.0, 0.0)
    assert costs.cost_to_reach(rounds, 0.9) is None
    assert costs.wire_seconds(12.5e6, costs.LINKS["100 Mbit/s"]) == 1.0
    assert costs.wire_seconds(12.5e6, costs.LINKS["10 GbE"]) == 0.01


def test_efficiency_and_projection(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, f"fed-s{seed}", seed) for seed in (0, 1)]
    runs += [make_run(tmp_path, "slow-s0", lr=0.1, level=2.0), make_run(tmp_path, "central-s0", mode="centralized")]
    assert main([*map(str, runs), "--out", str(tmp_path / "out"), "--target-loss", "2.0"]) == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    taken, projected = text.split("## What it takes")[1].split("## Projected")
    # Round 10 is the first evaluated one with a loss below 2: 10 x 5000 tokens, 10 rounds of 1.8 MiB and 1.5 s.
    row = cells(taken, "fed")
    assert row[1:4] == ["24,576", "96.0 KiB", "86.4 KiB"]
    assert row[5:9] == ["2 of 2", "10.0 ± 0.0", "50,000 ± 0", "17.8 MiB"]
    assert row[9:] == ["15.6 ± 0.0", "600.0 MiB"]  # 1.2 s for the initial state, evaluations taken off
    assert cells(taken, "slow-s0")[5:10] == ["0 of 1", "–", "–", "–", "–"]
    assert cells(taken, "central-s0")[2:4] == ["–", "–"]
    # 8 x 1,867,776 bytes a round, ten times that to the target.
    assert cells(projected, "fed")[1:] == ["1.8 MiB", "0.00149", "0.0149", "0.0149", "0.149", "0.149", "1.49"]
    assert cells(projected, "slow-s0")[2:4] == ["0.00149", "–"] and "central-s0 |" not in projected
    with open(tmp_path / "out" / "efficiency.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["run"] for r in rows] == ["fed-s0", "fed-s1", "slow-s0", "central-s0"]
    assert float(rows[0]["seconds_to_target_1 GbE"]) == 8 * 18_677_760 / 1e9 and rows[2]["round_to_target"] == "nan"


def test_results_along_an_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per mode; made-up test losses are level x 1.3 + 0.01 x seed, the reference rate is 0.05."""
    runs = [make_run(tmp_path, f"other-s{seed}", seed, rounds=15) for seed in (0, 1)]
    for mode, worse in (("federated", 1.5), ("centralized", 1.1)):
        for lr, level in ((0.5, worse), (0.05, 1.0)):
            runs += [make_run(tmp_path, f"{mode}-{lr}-s{s}", s, mode=mode, lr=lr, level=level) for s in (0, 1, 2)]
    out = tmp_path / "out"
    assert main([*map(str, runs), "--out", str(out), "--axis", "client.lr"]) == 0
    along = (out / "comparison.md").read_text().split("## Along client.lr")[1].split("Groups of runs")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in along.splitlines() if line.startswith("| fed")]
    assert [row[1:6] for row in rows] == [
        ["0.05", "3", "1.310 ± 0.025", "–", "–"],
        ["0.5", "3", "1.960 ± 0.025", "0.650 ± 0.000", "–"],
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in along.splitlines() if line.startswith("| cen")]
    assert rows[1][1:6] == ["0.5", "3", "1.440 ± 0.025", "0.130 ± 0.000", "-0.520 ± 0.000"]
    assert is_png(out / "axes.png")
    with open(out / "axes.csv") as file:
        assert len(list(csv.DictReader(file))) == 12  # the runs of 15 rounds are on no line
    assert main([*map(str, runs), "--out", str(out), "--axis", "client.rate"]) == 2
    assert "client.rate" in capsys.readouterr().err
    assert main([*map(str, runs), "--out", str(out), "--axis", "client.batch_size"]) == 2
    assert "no runs differ" in capsys.readouterr().err


def test_a_choice_without_the_option_is_on_the_axis_by_its_name() -> None:
    def run(**partition: object) -> LoadedRun:
        given = {"run": {"name": "any"}, "partition": partition, "method": {"name": "prefix"}}
        return LoadedRun(Path("any"), Results({"seed": 0, "method": "prefix"}, ["loss"]), given)

    runs = [run(name="iid", num_clients=4), run(name="dirichlet", alpha=10, num_clients=4)]
    runs += [run(name="dirichlet", alpha=0.1, num_clients=4), run(name="dirichlet", alpha=0.1, num_clients=9)]
    (line,) = lines_along(runs, "partition.alpha")
    assert list(line.runs) == [0.1, 10, "iid"] and (line.key, line.reference) == ("partition.alpha", 0.1)


@pytest.mark.parametrize(
    ("longest", "unit"), [(90.0, ("seconds", 1)), (7200.0, ("minutes", 60)), (90_000.0, ("hours", 3600))]
)
def test_virtual_time_is_shown_in_a_unit_that_fits(longest: float, unit: tuple[str, int]) -> None:
    assert unit_of_time(longest) == unit
