"""Tests without training: of a run what it reported itself, of an adapter what PEFT computes, of a base as it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhpc import evaluate
from fedhpc.builtin.world import rows
from fedhpc.ranks.transport.base import LoopbackTransport, Transport
from tests.federations import federate, on_threads, save_random_bert, settings, table, tree, write_texts
from tests.ranks import run_ranks
from tests.test_export import loss_of

METRICS = ["loss", "perplexity", "bleu"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LoRA with natural clients."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    raw = tree(
        texts,
        method={"name": "lora", "rank": 2},
        data={"client": "label"},
        federation={"cohort_size": 2},
        client={"optimizer": "adamw", "lr": 0.05},
        evaluation={"metrics": METRICS, "samples": 3, "client_fraction": 0.3},
    )
    raw["method"].pop("num_virtual_tokens")
    raw["partition"] = {"name": "natural"}
    federate(settings(folder, raw))
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Other data in one file, with rows of two owners, and the configuration that names it."""
    table_ = [{**row, "owner": "ab"[i % 2]} for i, row in enumerate(rows("dining", "train")[200:212])]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, table_)) + "\n")
    data = {"source": str(tmp_path / "other.jsonl"), "client": "owner", "prompt": "{mr} :", "target": " {ref}"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"data": data, "partition": {"name": "natural"}}))
    return tmp_path / "other.yaml"


def results(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What `fedhpc evaluate` writes."""
    assert evaluate.main([*arguments, "--out", str(tmp_path / "out" / "results.json")]) == 0
    tree_: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    return tree_


def test_of_a_run_it_is_what_the_run_reported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    found = results(tmp_path, str(run), "--per-client")
    reported, clients = table(run, "test"), table(run, "client_eval")
    for name in METRICS:
        assert found["test"][name]["value"] == pytest.approx(float(reported[name]), abs=1e-9)
    assert [one["text"] for one in found["samples"]] == table(run, "samples")["text"].tolist()
    assert found["clients"]["name"] == clients["client_name"].tolist()
    for name in ("client_id", "num_examples", "tokens"):
        assert found["clients"][name] == clients[name].tolist()
    for name in METRICS:
        expected = [None if np.isnan(value) else pytest.approx(value, abs=1e-9) for value in clients[name]]
        assert found["clients"][name] == expected
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"test loss {float(reported['loss']):.4f} (95 % interval") for line in lines)
    assert any(line.startswith("clients' loss: mean ") for line in lines)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_of_an_adapter_it_is_what_peft_computes_on_all_rows_of_another_file(
    run: Path, texts: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is held out of the one file; the clients' losses weigh up to that of all."""
    all_rows = [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()]
    found = results(tmp_path, str(run / "adapter"), str(other), "--per-client")
    assert (
        "other.jsonl' has no test split of its own: all of its rows are tested, also those" in capsys.readouterr().out
    )
    model = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(texts / "model")
    expected = loss_of(model, tokenizer, all_rows)
    assert found["test"]["loss"]["value"] == pytest.approx(expected, abs=1e-5)
    assert (found["test"]["loss"]["n"], found["test"]["loss"]["of"]) == (12, 12)
    assert found["clients"]["name"] == ["a", "b"] and found["clients"]["num_examples"] == [6, 6]
    for owner, loss in zip("ab", found["clients"]["loss"], strict=True):
        rows_ = [row for row in all_rows if row["owner"] == owner]
        assert loss == pytest.approx(loss_of(model, tokenizer, rows_), abs=1e-5)


def test_of_a_base_it_is_the_base_as_it_is(run: Path, texts: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text((tmp_path / "other.jsonl").read_text())
    base = str(texts / "model")
    alone = results(tmp_path, base, str(other), f"data.source={tmp_path}/data", "data.client=null")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    all_rows = [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()]
    expected = loss_of(model, AutoTokenizer.from_pretrained(base), all_rows)
    assert alone["test"]["loss"]["value"] == pytest.approx(expected, abs=1e-5)
    assert "clients" not in alone
    untouched = results(tmp_path, base, str(run / "config.yaml"))
    for name in METRICS:
        assert untouched["test"][name]["value"] == pytest.approx(float(table(run, "base")[name]), abs=1e-9)


def test_data_that_nobody_named_are_said(run: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["evaluation.metrics=[loss]", "evaluation.test_max_examples=4", "evaluation.samples=0"]
    line = "data: no CONFIG was given, so the test is of the demo's data, builtin:"
    assert evaluate.main([str(run / "adapter"), *few]) == 0
    assert line in capsys.readouterr().out
    assert evaluate.main([str(run), *few]) == 0
    assert line not in capsys.readouterr().out


def test_what_model_settles_is_no_key(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, key in ((str(run), "model.dtype"), (str(run / "adapter"), "model.name"), ("builtin", "model.revision")):
        assert evaluate.main([model, f"{key}=float64"]) == 2
        assert f"command line: {key} is that of MODEL, which is tested; take it out" in capsys.readouterr().err
    evaluate.refuse_unread(["model.dtype=float64"], evaluate.subject_of("builtin"), per_client=False)


def test_three_ranks_have_the_bits_of_one(run: Path, other: Path) -> None:
    subject = evaluate.subject_of(str(run))
    options = evaluate.parse([str(run), str(other), "--per-client"])
    config = evaluate.with_model_of(evaluate.configuration.load(options.config, []), subject)

    # One after the other, since transformers does not load models in two threads at once.
    loaded = [
        evaluate.load(config, subject, per_client=True, transport=LoopbackTransport(), device=torch.device("cpu"))
        for _ in range(3)
    ]

    def measure(transport: Transport) -> evaluate.Measured | None:
        mine = loaded[transport.rank]
        mine = replace(mine, evaluator=replace(mine.evaluator, transport=transport))
        return evaluate.measure(config, mine, per_client=True)

    one, three = on_threads(1, measure)[0], on_threads(3, measure)
    assert three[1] is None and three[2] is None
    assert three[0].outcome.metrics == one.outcome.metrics
    assert all(np.array_equal(three[0].clients[name], one.clients[name], equal_nan=True) for name in one.clients)


@pytest.mark.slow
def test_ranks_that_hold_the_base_between_them_measure_the_same(run: Path, tmp_path: Path) -> None:
    alone, together = results(tmp_path, str(run), "--per-client"), tmp_path / "together.json"
    words = [str(run), "--per-client", "runtime.worker_ranks=2", "--out", str(together)]
    ranks = run_ranks(3, ["-m", "fedhpc.evaluate", *words], timeout=300)
    assert [result.code for result in ranks] == [0, 0, 0], ranks
    assert json.loads(together.read_text()) == alone


def test_a_classifier_keeps_the_order_of_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the other data have one of them alone; a class that it does not know is refused."""
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts")
    save_random_bert(tmp_path / "bert")
    raw = tree(
        tmp_path / "texts",
        model={"name": str(tmp_path / "bert"), "task": "classification"},
        data={"prompt": "{mr}", "max_length": 48},
        client={"lr": 0.5},
        evaluation={"metrics": ["loss", "accuracy"]},
    )
    federate(settings(tmp_path / "run", raw))
    assert results(tmp_path, str(tmp_path / "run"))["test"]["accuracy"]["value"] == pytest.approx(
        float(table(tmp_path / "run", "test")["accuracy"]), abs=1e-9
    )
    lines = (tmp_path / "texts" / "test.jsonl").read_text().splitlines()
    by_label: dict[str, list[str]] = {}
    for line in lines:
        by_label.setdefault(json.loads(line)["label"], []).append(line)
    right = 0.0
    for label, of_label in by_label.items():
        (tmp_path / f"{label}.jsonl").write_text("\n".join(of_label) + "\n")
        source = [f"data.source={tmp_path}/{label}.jsonl", "data.test=test", "data.train=train"]
        right += len(of_label) * results(tmp_path, str(tmp_path / "run"), *source)["test"]["accuracy"]["value"]
    assert right / len(lines) == pytest.approx(float(table(tmp_path / "run", "test")["accuracy"]), abs=1e-9)
    (tmp_path / "strange.jsonl").write_text(json.dumps({**json.loads(lines[0]), "label": "strange"}) + "\n")
    assert evaluate.main([str(tmp_path / "run"), f"data.source={tmp_path}/strange.jsonl"]) == 2
    assert "has not the class 'strange' of the data, but " in capsys.readouterr().err


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "the following arguments are required: MODEL"),
    "two files": (["builtin", "a.yaml", "b.yaml"], "more than one configuration file: a.yaml, b.yaml"),
    "no file": (["builtin", "a.yaml"], "a.yaml: there is no such configuration file"),
    "unfinished": (["unfinished"], "'unfinished' has no adapter/, which a run writes at its end"),
    "a base with a base": (["builtin", "--base", "builtin"], "--base is for an adapter, which 'builtin' is not"),
    "no such model": (["./none", "data.source=builtin:dining"], "./none"),
    "no such test": (["builtin", "data.test=tset"], "data.test: 'builtin:dining' has no split or file 'tset'"),
    "rankings": (["builtin", "evaluation.metrics=[mrr]"], "mrr is of rankings, which 'builtin' does not give"),
    "a key of training": (["builtin", "client.lr=1"], "client.lr is read by training alone; take it out"),
    "a mode": (["builtin", "mode=local"], "mode is read by training alone"),
    "nobody's clients": (["builtin", "partition.name=iid"], "partition.name is read with --per-client alone"),
    "a key of none": (["builtin", "clinet.lr=1"], "unknown key 'clinet.lr'; did you mean 'client'"),
    "clients of nobody": (["builtin", "partition.name=natural", "data.client=", "--per-client"], "data.client"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "status.json").write_text("{}")
    arguments, message = REFUSED[name]
    assert evaluate.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("fedhpc: error: ") and err.count("\n") == 1
    assert message in err


@pytest.mark.slow
def test_the_command(run: Path, other: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedhpc", "evaluate", str(run), str(other)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "test loss " in done.stdout and "over 12 examples" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("lm_eval") is None, reason="lm_eval is not installed")
def test_the_harness_says_of_the_adapter_what_the_run_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files and the command of docs/evaluation.md: log-likelihoods to 1e-4, and the very texts."""
    page = (Path(evaluate.__file__).parents[1] / "docs" / "evaluation.md").read_text()
    monkeypatch.chdir(tmp_path)
    for folder in ("my_data", "tasks"):
        Path(folder).mkdir()
    for file, text in re.findall(r"^`(tasks/\w+\.yaml)`\n```yaml\n(.*?)```$", page, re.MULTILINE | re.DOTALL):
        Path(file).write_text(text)
    for split, count in (("train", 120), ("validation", 5), ("test", 12)):
        lines = [json.dumps({"question": row["mr"], "answer": row["ref"]}) for row in rows("dining", split)[:count]]
        Path(f"my_data/{split}.jsonl").write_text("\n".join(lines) + "\n")
    raw = {
        "data": {"source": "my_data", "prompt": "{question} :", "target": " {answer}"},
        "partition": {"name": "iid", "num_clients": 2},
        "method": {"name": "lora", "rank": 4},
        "federation": {"rounds": 1, "cohort_size": 2},
        "client": {"lr": 0.01, "steps": 10},
        "evaluation": {"metrics": ["loss", "bleu"], "samples": 2},
    }
    run_dir = Path("runs/mine")
    federate(settings(run_dir, raw))
    (command,) = re.findall(r"^```\n(BASE=.*?)```$", page, re.MULTILINE | re.DOTALL)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(["bash", "-ec", command], check=True, capture_output=True, env=environment)
    of_rows, of_texts = (
        [json.loads(line) for line in next(Path("lm_eval").rglob(f"samples_{task}_2*.jsonl")).read_text().splitlines()]
        for task in ("mine", "mine_texts")
    )
    measured = results(tmp_path, str(run_dir), "--per-client", "data.train=test")
    tokens = sum(measured["clients"]["tokens"])
    assert -sum(row["perplexity"] for row in of_rows) == pytest.approx(
        float(table(run_dir, "test")["loss"]) * tokens, abs=1e-4 * tokens
    )
    written = {row["arguments"]["gen_args_0"]["arg_0"]: row["resps"][0][0].strip() for row in of_texts}
    samples = table(run_dir, "samples")
    assert [written[f"<bos>{prompt}"] for prompt in samples["prompt"]] == samples["text"].tolist()
