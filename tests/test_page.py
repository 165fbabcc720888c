"""The report as one HTML page: what it says is in results.h5, it needs no network, and texts stay texts."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from fedhpc.lazy import lazy
from fedhpc.report import page as pages
from fedhpc.report.__main__ import main
from fedhpc.report.clients import Clients, Factor
from fedhpc.report.plots import Plot, clients_and_causes, robustness_curves, split
from fedhpc.report.robustness import attack_curves, curves_grid, privacy_curves
from fedhpc.report.runs import LoadedRun
from fedhpc.results.results_file import Results
from tests.test_report import make_run

VOID = {"meta", "link", "br", "img", "input"}
UNITS = re.compile(r"nats per token|\[s\]|in seconds|bytes|shares?|number of", re.IGNORECASE)
EVIL = "<script>alert(1)</script> & <b>bold"


class Page(HTMLParser):
    """A page taken apart: its tables, figures, ids and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}  # caption -> rows of (text, data-value)
        self.figures: list[dict[str, str]] = []
        self.rows: list[list[tuple[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags[tag] += 1
        self.ids += [given["id"] or ""] if "id" in given else []
        for name, value in attrs:
            if name in ("src", "srcset", "data", "action") or (
                name.endswith("href") and not str(value).startswith("#")
            ):
                self.loaded.append(str(value))
        if tag == "figure":
            self.figures.append({"title": "", "desc": "", "figcaption": "", "code": ""})
        elif tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            assert tag == "td" or given["scope"] in ("col", "row")
            self.rows[-1].append(("", given.get("data-value")))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "caption":
            self.tables[data] = self.rows
        elif {"td", "th"} & set(self.open[-2:]):
            text, value = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, value)
        elif "figure" in self.open and inside in self.figures[-1]:
            self.figures[-1][inside] += data

    def column(self, caption: str, name: str) -> list[float]:
        """The numbers behind a column of a table."""
        header, *rows = self.tables[caption]
        index = [text for text, _ in header].index(name)
        return [float(row[index][1] or "nan") for row in rows]


def written(runs: list[Path], *options: str) -> Page:
    file = runs[0].parent / "page.html"
    assert main([*map(str, runs), "--out", str(runs[0].parent / "out"), "--html", str(file), *options]) == 0
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert all(source.startswith("data:image/png;base64,") for source in page.loaded)
    assert not re.search(r"@import|url\((?!#|\"#)", text)
    assert page.tags["script"] == 1 and page.tags["style"] >= 1
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    for figure in page.figures:
        assert figure["title"] and figure["desc"] == figure["figcaption"], figure
        assert UNITS.search(figure["figcaption"]), figure
        assert figure["code"].startswith("fedhpc report ") and figure["code"].endswith(" ".join([str(file), *options]))
    return page


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose texts would be a danger as markup."""
    run = make_run(tmp_path_factory.mktemp("page"), "demo")
    results = Results.read(run / "results.h5")
    results.set_samples([{"prompt": EVIL, "references": ["Aromi & Co."], "text": EVIL}])
    results.add_event(3, "note", EVIL)
    texts = Results({}, (), [f"eval_samples/{name}" for name in ("round", "prompt", "references", "text")])
    for t in range(0, 20, 2):
        texts.add_eval_samples(t, [{"prompt": EVIL, "references": ["a", "b"], "text": f"{EVIL} {t}"}])
    results._tables["eval_samples"] = texts._tables["eval_samples"]
    counts = np.array([[9 - i, i] for i in range(10)])
    results.set_partition(counts.sum(axis=1) + np.arange(10), counts, [EVIL, "$label"])
    results.write(run / "results.h5", complete=True)
    return run


@pytest.fixture(scope="module")
def alone(run: Path) -> Page:
    return written([run])


def test_the_tables_of_a_run_have_the_numbers_of_its_file(run: Path, alone: Page) -> None:
    rounds = Results.read(run / "results.h5").rounds
    title = "Rounds (round 0: the untouched base)"
    header = [text for text, _ in alone.tables[title][0]]
    names = [re.sub(r" \[.*\]", "", text).replace(" ", "_") for text in header]
    assert sorted(names) == sorted(rounds)
    for name, text in zip(names[1:], header[1:], strict=True):
        np.testing.assert_array_equal(alone.column(title, text), rounds[name])
    assert [row[0][0] for row in alone.tables[title][1:]] == list(map(str, rounds["round"]))
    assert alone.column("Test", "loss")[0] == 1.3 and alone.column("Test", "BLEU")[:1] == [28.0]


def test_texts_stay_texts(alone: Page) -> None:
    header, row = alone.tables["Generated texts"]
    assert [text for text, _ in header] == ["prompt", "references", "text"]
    assert [text for text, _ in row] == [EVIL, "Aromi & Co.", EVIL]
    header, row = alone.tables["Generated texts over the rounds, of the validation split"]
    shown = [0, 2, 6, 8, 10, 12, 16, 18]  # eight of the ten, evenly spaced
    assert [text for text, _ in header] == ["prompt", "references", *(f"round {t}" for t in shown)]
    assert [text for text, _ in row] == [EVIL, "a / b", *(f"{EVIL} {t}" for t in shown)]
    assert any(EVIL in cell for row in alone.tables["Events (the last 20 of 21)"] for cell, _ in row)
    assert alone.tags["b"] == 0


def test_a_run_has_its_figures_with_the_rounds_that_were_evaluated(alone: Page) -> None:
    titles = [figure["title"] for figure in alone.figures]
    assert titles == ["learning curve", "metrics", "client loss", "clients", "split", "traffic", "time"]
    assert "at the marks: every 5 rounds" in alone.figures[0]["figcaption"]


def test_the_worst_clients_and_what_goes_with_their_loss(run: Path, alone: Page) -> None:
    results = Results.read(run / "results.h5")
    last = results.clients["loss_last"][-10:].copy()
    last[3] = np.nan  # was never used
    worst = [int(i) for i in np.argsort(-last)[:9]]
    title = "Clients by their loss of the last local step, the worst first"
    header, *rows = alone.tables[title]
    assert [row[0][0] for row in rows] == list(map(str, worst))
    np.testing.assert_array_equal(alone.column(title, "loss [nats per token]"), last[worst])
    counts = results.groups["partition"]["label_counts"]
    shares, of_all = counts / counts.sum(axis=1, keepdims=True), counts.sum(axis=0) / counts.sum()
    skew = [abs(shares[i] - of_all).sum() / 2 for i in worst]
    np.testing.assert_allclose(alone.column(title, "label skew [0 to 1]"), skew)
    assert alone.column(title, "training examples") == [9 + i for i in worst]
    goes_with = {
        row[0][0]: float(row[1][1] or "nan")
        for row in alone.tables[next(t for t in alone.tables if "What goes" in t)][1:]
    }
    assert goes_with["training examples"] == pytest.approx(spearmanr(worst, last[worst]).statistic)
    assert goes_with["label skew [0 to 1]"] == pytest.approx(spearmanr(skew, last[worst]).statistic)  # with ties
    # Every round was the same for all: neither the number of rounds nor the norms say anything.
    assert [text for text, _ in header][2:] == list(goes_with) == ["training examples", "label skew [0 to 1]"]


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, f"{name}-s{seed}", seed, lr=lr) for name, lr in (("a", 0.1), ("b", 0.2)) for seed in (0, 1)
    ]
    runs.append(make_run(tmp_path, "c", lr=0.3, done=7))
    page = written(runs)
    title = next(caption for caption in page.tables if caption.startswith("Test results: mean"))
    assert [row[0][0] for row in page.tables[title][1:]] == ["a", "b", "c (unfinished, 7/20)", "untouched base"]
    assert page.column(title, "loss")[:2] == pytest.approx([1.305, 1.305])
    assert [text for text, _ in page.tables["Generated texts"][0][2:]] == ["a, seed 0", "b, seed 0"]
    states = {row[0][0]: row[1][0] for row in page.tables["Runs"][1:]}
    assert states["a-s0"] == "complete" and states["c"] == "unfinished: preempted, round 7 of 20"
    assert [figure["title"] for figure in page.figures] == ["eval loss", "test", "clients", "costs"]


def a_run(seed: int, loss: float, **sections: object) -> LoadedRun:
    """A run in memory with a test loss; sections: of its configuration."""
    results = Results({"seed": seed, "method": "lora"}, ["loss"])
    results.set_test({"loss": loss, "accuracy": 0.5})
    results.complete = True
    return LoadedRun(
        Path("any"), results, {"run": {"name": "any", "seed": seed}, "method": {"name": "lora"}, **sections}
    )


def test_curves_by_the_share_of_attackers() -> None:
    def attacked(name: str, fraction: float, aggregator: str, level: float, seeds: tuple[int, ...] = (0, 1)) -> None:
        attack, server = {"name": name, "fraction": fraction}, {"aggregator": aggregator}
        runs.extend(a_run(seed, level + seed, attack=attack, server=server) for seed in seeds)

    runs: list[LoadedRun] = []
    attacked("none", 0.2, "mean", 1.0)  # the fraction of nobody says nothing
    attacked("none", 0.2, "krum", 2.0)
    attacked("ipm", 0.1, "mean", 1.5)
    attacked("ipm", 0.3, "mean", 30.0, seeds=(0,))
    attacked("alie", 0.1, "krum", 2.25)
    attacked("alie", 0.1, "median", 9.0)  # without a run to compare it with
    ipm, alie = attack_curves(runs)
    assert (ipm.panel, ipm.label, list(ipm.points)) == ("attack ipm", "mean", [0.0, 0.1, 0.3])
    assert (alie.panel, alie.label, list(alie.points)) == ("attack alie", "krum", [0.0, 0.1])
    assert ipm.values(0.1, "loss").tolist() == [1.5, 2.5] and ipm.changes(0.1, "loss").tolist() == [0.5, 0.5]
    assert ipm.changes(0.3, "loss").tolist() == [29.0] and alie.changes(0.1, "loss").tolist() == [0.25, 0.25]
    rows = curves_grid("any", "share", [ipm, alie]).rows
    assert rows[1] == [
        "attack ipm",
        "mean",
        "0.1",
        "2",
        "2.000 ± 6.353",
        "0.500 ± 0.000",
        "0.500 ± 0.000",
        "0.000 ± 0.000",
    ]
    figure = robustness_curves([ipm, alie], "share of attackers")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["attack ipm", "attack alie", "", ""]
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "linear", "linear", "linear"]
    assert len(figure.axes[0].containers[0].lines[0].get_xdata()) == 3
    assert privacy_curves(runs) == [] and robustness_curves([], "epsilon") is None


def test_curves_by_epsilon() -> None:
    clip = {"name": "clip", "norm": 0.1}
    runs = [a_run(0, 1.0, privacy={"name": "none"}, transforms=[clip])]
    runs += [a_run(0, 1 + 1 / e, privacy={"name": "client", "epsilon": e}, transforms=[]) for e in (8.0, 1.0)]
    other = [{"name": "topk"}]
    runs += [a_run(0, 5.0, privacy={"name": "client", "epsilon": e}, transforms=other) for e in (8.0, 1.0)]
    with_none, without = privacy_curves(runs)
    assert list(with_none.points) == [1.0, 8.0, math.inf] and list(without.points) == [1.0, 8.0]
    assert with_none.changes(1.0, "loss").tolist() == [1.0]
    assert [text.get_text() for text in robustness_curves([with_none], "epsilon").axes[0].get_xticklabels()] == [
        "1",
        "8",
        "none",
    ]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_a_browser_shows_it_without_errors_and_sorts(run: Path, alone: Page, tmp_path: Path) -> None:
    """Clicks on "train loss" twice, in a page that then writes down the order of its rows."""
    assert CHROMIUM is not None
    clicking = """<script>
        const tables = [...document.querySelectorAll("table")];
        const table = tables.find(one => one.caption.textContent.startsWith("Rounds ("));
        const button = [...table.querySelectorAll("button")].find(one => one.textContent.startsWith("train loss"));
        const order = () => [...table.tBodies[0].rows].map(row => row.cells[0].textContent).join(" ");
        const orders = [0, 1].map(() => { button.click(); return order(); });
        document.title = [...orders, button.parentElement.getAttribute("aria-sort")].join("|");
    </script></body>"""
    file = tmp_path / "clicked.html"
    file.write_text(
        (run.parent / "page.html").read_text(encoding="utf-8").replace("</body>", clicking), encoding="utf-8"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    shown = subprocess.run([CHROMIUM, *flags, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    title = re.search("<title>(.*?)</title>", shown.stdout)
    assert title is not None, shown.stderr
    loss = Results.read(run / "results.h5").rounds["train_loss"]
    up = [int(t) for t in np.argsort(loss[1:]) + 1]  # round 0 has none, and is last either way
    assert title[1].split("|") == [" ".join(map(str, [*order, 0])) for order in (up, up[::-1])] + ["descending"]


def test_names_of_any_script_and_length_stand_in_plots_without_a_warning(tmp_path: Path) -> None:
    names = ["x" * 300, "two\nlines\tand \x1b[31mred", "\u5e97", "$\\frac$"]
    shown = ["x" * 23 + "\u2026", "two lines and  [31mred", "\u5e97", "$\\frac$"]
    loss = np.arange(4.0, 0.0, -1.0)
    factors = [Factor("number of rounds", np.arange(4.0))]
    clients = Clients(names, loss, "of the last local step", loss - 1, loss + 1, np.zeros(4, bool), factors)
    partition = {"num_examples": np.arange(4), "label_counts": np.ones((4, 4)), "client_names": names}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (split("demo", {**partition, "label_names": names}), clients_and_causes("demo", clients)):
            plot = Plot("names", "names", figure)
            plot.save(tmp_path)
            svg = plot.svg()
            assert [name for name in shown[:3] if name not in svg] == []
            assert names[0] not in svg


@pytest.mark.parametrize("missing", ["folder", "jinja2"])
def test_bad_input_is_one_line(
    missing: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / "results.h5" if missing == "folder" else tmp_path  # a file is no folder
    if missing == "jinja2":
        monkeypatch.setattr(pages, "jinja2", lazy("jinja2", extra="report"))
        monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr("fedhpc.report.single._plots", lambda run: {})
    assert main([str(run), "--out", str(tmp_path / "out"), "--html", str(folder / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fedhpc report: error: ")
    assert main([str(run), "--out", str(tmp_path / "out"), "--html", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and f"{tmp_path}: cannot be written: Is a directory; choose another --html" in shown.err
    assert ("choose another --html" if missing == "folder" else "pip install 'fedhpc[report]'") in error
