"""Bad commands, configurations, data, models, run directories: exit code 2, one line that helps, nothing written."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedhpc.main import main
from fedhpc.models.load import BUILTIN
from fedhpc.results.checkpoint import CHECKPOINT
from fedhpc.results.lock import take_lock
from tests.ranks import Launcher, Result, run_ranks

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with data, and in no launch; runs/ would be made here."""
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "texts")


def write_data(folder: Path) -> None:
    folder.mkdir()
    for split, count in (("train", 24), ("validation", 4), ("test", 4)):
        rows = [
            {"mr": f"name = {i % 7}", "ref": f"It is {i % 7}.", "label": "ab"[i % 2], "client": f"c{i % 5}"}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def small(**changes: Any) -> dict[str, Any]:
    """A configuration that runs in a second; `changes` are merged into its sections."""
    raw: dict[str, Any] = {
        "run": {"dir": "run"},
        "data": {"source": "texts", "label": "label", "client": "client"},
        "partition": {"name": "iid", "num_clients": 4},
        "method": {"name": "prefix", "num_virtual_tokens": 2},
        "federation": {"rounds": 1, "cohort_size": 2},
        "client": {"steps": 1, "batch_size": 2},
        "evaluation": {"samples": 0, "max_new_tokens": 4},
    }
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value} if isinstance(value, dict) else value
    return raw


def write(raw: dict[str, Any] | str, name: str = "config.yaml") -> str:
    Path(name).write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return name


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which `arguments` are refused; nothing is written and no signal handler left behind."""
    before, handlers = (
        listing(Path.cwd()),
        [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)],
    )
    capfd.readouterr()
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("fedhpc: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert len(err) < 700, err
    assert listing(Path.cwd()) == before
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)] == handlers
    return err


def says(line: str, *words: str) -> None:
    for word in words:
        assert word in line, line


# ---------------------------------------------------------------- the command and the configuration


COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "missing config": (["absent.yaml"], ("absent.yaml: there is no such configuration file",)),
    "two configs": (["one.yaml", "two.yaml"], ("one.yaml: there is no such configuration file",)),
    "a folder": (["texts"], ("texts: is a folder",)),
    "override without =": (["client.lr"], ("client.lr", "section.key=value")),
    "override of nothing": (["=3"], ("'=3'", "section.key=value")),
    "empty step in a key": (["client..lr=3"], ("'client..lr'", "section.key")),
    "a round that is not there": (["--until", "3", "federation.rounds=2"], ("--until 3", "has rounds 1 to 2")),
    "a check until a round": (["--until", "2", "--check"], ("--until", "--check runs nothing")),
    "unknown option": (["--chekc"], ("--chekc", "--help")),
    "unknown section": (["clinet.lr=1"], ("unknown key 'clinet.lr'", "did you mean 'client'")),
    "unknown key": (["client.lrr=1"], ("unknown key 'client.lrr'", "did you mean 'lr'")),
    "key below a value": (["client.lr.x=1"], ("client.lr has no keys", "client.lr.x")),
    "a section as a value": (["client=3"], ("client must be a mapping", "got 3")),
    "fedkseed with adamw": (
        ["method.name=fedkseed", "client.optimizer=adamw"],
        ("moves one coordinate a step", "client.optimizer adamw", "use client.optimizer sgd"),
    ),
    "fedkseed with momentum": (
        ["method.name=fedkseed", "client.optimizer=sgd", "client.momentum=0.9"],
        ("moves one coordinate a step", "client.momentum"),
    ),
    "a quantised base in full": (
        ["method.name=full", "model.quantize=4bit"],
        ("method.name full trains the weights", "model.quantize 4bit", "use quantize none"),
    ),
    "a quantised base in float64": (
        ["model.quantize=8bit", "model.dtype=float64"],
        ("model.quantize 8bit", "model.dtype float64"),
    ),
    "a type of quantization without any": (
        ["model.quantization_type=fp4"],
        ("model.quantization_type is of 4 bits", "model.quantize is none", "set model.quantize to 4bit"),
    ),
    "double quantization of 8 bits": (
        ["model.quantize=8bit", "model.double_quantization=true"],
        ("model.double_quantization is of 4 bits", "model.quantize is 8bit", "take it out"),
    ),
    "4 bits of torchao": (
        ["model.quantize=4bit", "model.quantization_library=torchao"],
        ("model.quantization_library torchao is for model.quantize 8bit, not 4bit", "use bitsandbytes, or 8bit"),
    ),
    "a negative rate": (["client.lr=-1"], ("client.lr", "greater than or equal to 0", "got -1")),
    "a rate that is not a number": (["client.lr=.nan"], ("client.lr", "finite", "nan")),
    "an infinite rate": (["client.lr=.inf"], ("client.lr", "finite", "inf")),
    "a text for a number": (["client.lr=fast"], ("client.lr", "number", "'fast'")),
    "a list for a text": (["run.name=[3]"], ("run.name", "only letters, digits", "[3]")),
    "an empty value": (["client.lr="], ("client.lr", "number", "None")),
    "a broken value": (["data.where={name: [x"], ("command line: data.where", "not valid YAML")),
    "yes is not true": (["runtime.deterministic=yes"], ("runtime.deterministic", "true or false", "'yes'")),
    "half a round": (["federation.rounds=1.5"], ("federation.rounds", "integer", "1.5")),
    "no rounds": (["federation.rounds=0"], ("federation.rounds", "greater than or equal to 1", "got 0")),
    "an unknown choice": (["method.name=prefiks"], ("method.name", "'prefiks'", "did you mean 'prefix'")),
    "no choice": (["method.name="], ("method.name", "prefix")),
    "a choice that is a list": (["method.name=[prefix]"], ("method.name", "prefix")),
    "an option of another choice": (["partition.name=iid", "partition.alpha=1.0"], ("unknown key 'partition.alpha'",)),
    "an unknown mode": (["mode=fedrated"], ("mode", "'fedrated'", "did you mean 'federated'")),
    "an unknown metric": (["evaluation.metrics=[los]"], ("evaluation.metrics", "'los'", "did you mean 'loss'")),
    "metrics that are no list": (["evaluation.metrics=loss"], ("evaluation.metrics", "list", "'loss'")),
    "a metric twice": (["evaluation.metrics=[loss, loss]"], ("evaluation.metrics names a metric twice",)),
    "a test metric twice": (["evaluation.test_metrics=[bleu, bleu]"], ("test_metrics names a metric twice",)),
    "an unknown test metric": (["evaluation.test_metrics=[blue]"], ("evaluation.test_metrics", "did you mean 'bleu'")),
    "an unknown transport": (["runtime.transport=smoke"], ("runtime.transport", "'auto', 'torch' or 'mpi'", "'smoke'")),
    "a block of none": (
        ["runtime.block_size=0"],
        ("runtime.block_size", "greater than or equal to 1 or 'auto'", "got 0"),
    ),
    "blocks for nobody": (["runtime.workers=0"], ("runtime.workers", "greater than or equal to 1", "got 0")),
    "a block of a word": (["runtime.block_size=many"], ("runtime.block_size", "auto", "'many'")),
    "natural without owners": (["partition.name=natural", "data.client="], ("data.client",)),
    "dirichlet without labels": (["data.label="], ("data.label", "iid or quantity_skew")),
    "accuracy without labels": (
        ["data.label=", "partition.name=iid", "evaluation.metrics=[accuracy]"],
        ("evaluation.metrics", "data.label"),
    ),
    "label noise without labels": (
        ["data.label=", "partition.name=iid", "data.label_noise=0.2"],
        ("data.label_noise", "data.label"),
    ),
    "more label noise than labels": (["data.label_noise=1.5"], ("data.label_noise", "less than or equal to 1")),
    "fewest above most": (
        ["partition.min_examples=5", "partition.max_examples=4"],
        ("partition.min_examples 5", "partition.max_examples 4"),
    ),
    "epochs and steps": (["client.steps=2", "client.epochs=1"], ("client.epochs and client.steps exclude each other",)),
    "two sizes of a cohort": (
        ["federation.cohort_size=2", "federation.cohort_fraction=0.5"],
        ("federation.cohort_size and federation.cohort_fraction exclude each other",),
    ),
    "a transform without a name": (["transforms=[{norm: 1.0}]"], ("transforms[0].name", "clip")),
    "transforms that are no list": (["transforms=clip"], ("transforms must be a list", "'clip'")),
    "a transform that is a number": (["transforms=[1]"], ("transforms[0] must be", "1")),
    "a huge seed": (["run.seed=99999999999999999999"], ("run.seed",)),
    "a filter that is a word": (["data.where={name: x}"], ("data.where.name", "list", "'x'")),
    "a lone brace": (["data.prompt={mr"], ("data.prompt", "lone '{'", "'{mr'", "{{")),
    "another source, with the demo's skew": (["data.source=texts"], ("dirichlet skews labels and needs data.label",)),
    "fednova with adamw": (["server.aggregator=fednova"], ("server.aggregator fednova", "client.optimizer", "use sgd")),
    "scaffold and fedprox": (
        ["client.scaffold=true", "client.proximal=0.1"],
        ("client.scaffold and client.proximal", "give one"),
    ),
    "scaffold and a transform": (
        ["client.scaffold=true", "transforms=[{name: clip}]"],
        ("transforms", "client.scaffold", "give one"),
    ),
    "rates by layer and fednova": (
        ["client.optimizer=sgd", "client.layer_lr_decay=0.8", "server.aggregator=fednova"],
        ("client.layer_lr_decay", "server.aggregator fednova", "give one"),
    ),
    "a huge factor for each layer": (
        ["client.layer_lr_decay=1e300"],
        ("client.layer_lr_decay", "less than or equal to 10"),
    ),
    "a metric of no pull": (["client.proximal_metric=relative"], ("client.proximal_metric", "client.proximal is 0")),
    "a relative pull and fednova": (
        ["client.optimizer=sgd", "client.proximal=1", "client.proximal_metric=relative", "server.aggregator=fednova"],
        ("client.proximal_metric", "server.aggregator fednova", "use euclidean"),
    ),
    "moments of sgd": (["client.optimizer=sgd", "client.moments=both"], ("client.moments", "client.optimizer sgd")),
    "moments and a median": (["client.moments=both", "server.aggregator=median"], ("client.moments", "use mean")),
    "moments and buckets": (
        ["client.moments=second", "server.preaggregator.name=bucketing"],
        ("client.moments", "server.preaggregator bucketing", "use mean"),
    ),
    "moments and a transform": (
        ["client.moments=both", "transforms=[{name: clip}]"],
        ("transforms", "client.moments", "give one"),
    ),
    "the server's direction and fednova": (
        ["client.optimizer=sgd", "client.server_momentum=0.9", "server.aggregator=fednova"],
        ("client.server_momentum", "server.aggregator fednova", "use mean"),
    ),
    "the server's direction and scaffold": (
        ["client.server_momentum=0.9", "client.scaffold=true"],
        ("client.scaffold and client.server_momentum", "give one"),
    ),
    "moments that are masked": (
        ["client.moments=second", "secure.name=pairwise"],
        ("client.moments", "masks the updates"),
    ),
    "moments of factors that do not last": (
        ["client.moments=both", "method.name=lora", "method.aggregation=svd"],
        ("client.moments", "aggregation svd", "use average, ffa or sb"),
    ),
    "a student of integers": (
        ["method.name=distillation", "method.student.name=full", "model.quantize=8bit"],
        ("method.name full trains the weights", "model.quantize 8bit"),
    ),
    "a search that compares by nothing": (
        ["method.name=prompt_search", "evaluation.metrics=[]"],
        ("evaluation.metrics", "give one"),
    ),
    "a search with a server's rate": (
        ["method.name=prompt_search", "server.lr=0.5"],
        ("command line: server.lr: method.name prompt_search does not read it", "take it out"),
    ),
    "moments with a median": (
        ["method.name=fedbpt", "server.aggregator=median"],
        ("server.aggregator", "exchange moments"),
    ),
    "float64 and autocast": (
        ["model.dtype=float64", "runtime.precision=bfloat16"],
        ("runtime.precision", "model.dtype"),
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(capfd: pytest.CaptureFixture[str], case: str) -> None:
    arguments, words = COMMANDS[case]
    says(refused(capfd, arguments), *words)


FILES: dict[str, tuple[dict[str, Any] | str, tuple[str, ...]]] = {
    "unknown section": ({"clients": {"lr": 1.0}}, ("config.yaml:", ": unknown key 'clients'", "did you mean 'client'")),
    "unknown key": ({"data": {"sorce": "x"}}, ("config.yaml:", ": unknown key 'data.sorce'", "did you mean 'source'")),
    "unknown option": ({"method": {"name": "prefix", "rank": 8}}, ("config.yaml:", ": unknown key 'method.rank'")),
    "a key twice": ("client:\n  lr: 1.0\n  lr: 2.0\n", ("config.yaml:3", "the key 'lr' stands twice")),
    "broken YAML": ("client: {lr: 1.0\nserver: {}\n", ("config.yaml:2", "not valid YAML")),
    "a tab": ("client:\n\tlr: 1.0\n", ("config.yaml:2", "not valid YAML")),
    "an object": ("run: !!python/object/apply:os.getcwd []\n", ("config.yaml", "not valid YAML")),
    "a number for a text": ({"run": {"name": 3}}, ("config.yaml:", "run.name", "string", "3")),
    "a list": ("- mode: local\n", ("config.yaml: must be a mapping of sections", "list")),
    "a section as a list": ({"client": [1]}, ("client must be a mapping", "[1]")),
    "a key that is a number": ({3: {}}, ("unknown key '3'",)),
    "two documents": ("mode: local\n---\nmode: local\n", ("config.yaml:2", "not valid YAML")),
}


@pytest.mark.parametrize("case", FILES)
def test_configuration_files(capfd: pytest.CaptureFixture[str], case: str) -> None:
    content, words = FILES[case]
    says(refused(capfd, [write(content)]), *words)


def test_a_file_that_is_no_text(capfd: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_bytes(b"\xff\xfe\x00")
    says(refused(capfd, ["config.yaml"]), "config.yaml: cannot be read as a UTF-8 text file")


def test_a_folder_for_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    says(refused(capfd, ["folder"]), "folder: is a folder; give a YAML file")
    Path("folder/config.yaml").write_text("mode: federated")
    says(refused(capfd, ["folder"]), "give a YAML file, such as folder/config.yaml")


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "1"}, ("RANK is set but WORLD_SIZE is not",)),
        ({"RANK": "0", "WORLD_SIZE": "two"}, ("WORLD_SIZE='two'",)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ("MASTER_ADDR",)),
    ],
)
def test_a_half_set_environment(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], words: tuple[str, ...]
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    says(refused(capfd, [write(small())]), *words)


def test_configuration_errors_come_before_heavy_imports() -> None:
    code = (
        "import sys; from fedhpc.main import main; code = main(['client.lr=-1']); "
        "heavy = {'torch', 'transformers', 'h5py', 'mpi4py'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "[--ranks N | --ranks-per-node N] [--until N] [--check] [--where] [--fresh]" in capsys.readouterr().out


def test_where_names_the_run_directory_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["run.name=mine", "--where"]) == 0
    assert capsys.readouterr().out == "runs/mine\n"
    assert main(["run.nam=mine", "--where"]) == 2
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- data


def put(path: str, content: str | bytes) -> None:
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


ROW = '{"mr": "m", "ref": "r", "label": "a", "client": "c"}\n'
DATA: dict[str, tuple[Callable[[], None] | None, dict[str, Any], tuple[str, ...]]] = {
    "no such folder": (None, {"data": {"source": "./absent"}}, ("data.source", "no file or folder './absent'")),
    "no such file": (None, {"data": {"source": "absent.csv"}}, ("data.source", "no file or folder 'absent.csv'")),
    "no such task": (
        None,
        {"data": {"source": "builtin:dinning"}},
        ("no built-in task 'dinning'", "did you mean 'dining'"),
    ),
    "no such split": (
        None,
        {"data": {"validation": "vaildation"}},
        ("data.validation", "it has: test, train, validation"),
    ),
    "an empty folder": (
        lambda: Path("none").mkdir(),
        {"data": {"source": "./none"}},
        ("data.train", "it has: nothing"),
    ),
    "a malformed row": (lambda: put("texts/train.jsonl", ROW + '{"mr": \n'), {}, ("train.jsonl:2", "not valid JSON")),
    "a row that is a list": (lambda: put("texts/train.jsonl", ROW + "[]\n"), {}, ("train.jsonl:2", "JSON object")),
    "a row without a column": (
        lambda: put("texts/train.jsonl", ROW + '{"mr": "m", "label": "a", "client": "c"}\n'),
        {},
        ("train.jsonl:2", "data.target", "'ref'"),
    ),
    "an empty file": (lambda: put("texts/validation.jsonl", ""), {}, ("validation.jsonl", "no rows")),
    "a short line of CSV": (
        lambda: put("a.csv", "mr,ref,label,client\nm,r,a\n"),
        {"data": {"source": "a.csv"}},
        ("a.csv:2", "3 cells", "4 columns"),
    ),
    "no parquet": (
        lambda: put("a.parquet", "PAR1"),
        {"data": {"source": "a.parquet"}},
        ("a.parquet", "not a valid parquet file"),
    ),
    "no gzip": (
        lambda: put("a.jsonl.gz", "plain"),
        {"data": {"source": "a.jsonl.gz"}},
        ("a.jsonl.gz", "cannot be read"),
    ),
    "an optional key": (
        lambda: put("texts/train.jsonl", ROW + '{"ref": "r", "label": "a", "client": "c"}\n'),
        {},
        ("train.jsonl:2", "data.prompt", "'mr'", "write null"),
    ),
    "a list of questions": (
        lambda: put("texts/train.jsonl", ROW + ROW.replace('"m"', '["m", "n"]')),
        {},
        ("train.jsonl:2", "data.prompt", "a list of 2", "each its own row"),
    ),
    "a label that is missing": (
        lambda: put("texts/train.jsonl", ROW + ROW.replace('"a"', "null")),
        {"data": {"validation": "test"}},
        ("train.jsonl:2", "data.label", "no value", "data.where_not"),
    ),
    "half a data set": (
        lambda: (Path("half").mkdir(), put("half/train-00000-of-00002.jsonl", ROW))[1],
        {"data": {"source": "half"}},
        ("train-00001-of-00002.jsonl missing", "1 of 2 files"),
    ),
    "a template's column": (
        None,
        {"data": {"prompt": "{mrs}"}},
        ("train.jsonl:1", "data.prompt", "'mrs'", "did you mean 'mr'"),
    ),
    "the label's column": (None, {"data": {"label": "lable"}}, ("data.label", "'lable'", "did you mean 'label'")),
    "the owner's column": (None, {"data": {"client": "owner"}}, ("data.client", "'owner'")),
    "a filter's column": (None, {"data": {"where": {"nmae": ["x"]}}}, ("data.where", "'nmae'")),
    "a filter that leaves nothing": (
        None,
        {"data": {"where": {"label": ["z"]}}},
        ("none of 24 rows passes data.where",),
    ),
    "a long target": (
        lambda: put("texts/train.jsonl", ROW.replace('"r"', '"' + "word " * 99 + '"')),
        {"data": {"max_length": 32, "overlong": "error"}},
        ("train.jsonl:1", "the target has", "data.max_length 32", "data.overlong"),
    ),
    "long targets in all rows": (
        lambda: put("texts/train.jsonl", ROW.replace('"r"', '"' + "word " * 99 + '"')),
        {"data": {"max_length": 32}},
        ("train.jsonl:1", "does not fit in data.max_length 32", "no other row of train; 498 is enough"),
    ),
    "more clients than examples": (
        None,
        {"partition": {"num_clients": 25}},
        ("partition.num_clients", "25 clients", "24"),
    ),
    "an unattainable minimum": (None, {"partition": {"min_examples": 7}}, ("partition.min_examples", "28", "24")),
    "natural, and nobody is left": (
        None,
        {"partition": {"name": "natural", "num_clients": None, "min_examples": 9}},
        ("partition.min_examples", "9", "5"),
    ),
    "virtual clients that are too large": (
        None,
        {"partition": {"name": "virtual", "examples_per_client": 99}},
        ("partition.examples_per_client", "99", "24"),
    ),
    "a cohort larger than all": (
        None,
        {"federation": {"cohort_size": 9}},
        ("federation.cohort_size is 9", "4 clients"),
    ),
    "a minimum larger than the cohort": (
        None,
        {"federation": {"min_cohort": 3}},
        ("federation.min_cohort is 3", "only 2"),
    ),
    "accuracy of texts": (
        None,
        {"evaluation": {"metrics": ["accuracy"]}},
        ("evaluation.metrics", "data.target", "{label}"),
    ),
    "a hub id offline": (None, {"data": {"source": "nobody/nothing"}}, ("data.source", "'nobody/nothing'")),
}


def test_fewer_clients_than_the_default_cohort(capsys: pytest.CaptureFixture[str]) -> None:
    raw = small()
    del raw["federation"]["cohort_size"]
    assert main([write(raw), "--check"]) == 0
    assert "4 clients, 4 a round (all of them) in blocks" in capsys.readouterr().out
    assert main([write(small()), "--check"]) == 0
    assert "4 clients, 2 a round in blocks" in capsys.readouterr().out


@pytest.mark.parametrize("case", DATA)
def test_data(capfd: pytest.CaptureFixture[str], case: str) -> None:
    prepare, changes, words = DATA[case]
    if prepare is not None:
        prepare()
    raw = small(**changes)
    raw["partition"] = {k: v for k, v in raw["partition"].items() if v is not None}
    says(refused(capfd, [write(raw)]), *words)


# ---------------------------------------------------------------- models


def model_folder() -> Path:
    """A copy of the built-in base, to be spoilt."""
    folder = Path("model")
    folder.mkdir()
    for file in BUILTIN.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _drop(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    del tensors[next(name for name in tensors if "mlp" in name)]
    save_file(tensors, path, metadata={"format": "pt"})


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config.json": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ("cannot be loaded",)),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], ("tokenizer", "cannot be loaded")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("model.safetensors",)),
    "half the weights": (lambda f: _half(f / "model.safetensors"), ("cannot be loaded",)),
    "other weights": (lambda f: edit(f / "config.json", hidden_size=64, n_embd=64), ("do not fit", "of another shape")),
    "a tensor less": (lambda f: _drop(f / "model.safetensors"), ("1 tensors are missing",)),
    "an encoder": (
        lambda f: (f / "config.json").write_text('{"model_type": "vit"}'),
        ("vit", "none of what can be trained"),
    ),
    "an unknown kind": (lambda f: (f / "config.json").write_text('{"model_type": "nonesuch"}'), ("nonesuch",)),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(capfd: pytest.CaptureFixture[str], case: str) -> None:
    spoil, words = MODELS[case]
    spoil(model_folder())
    says(refused(capfd, [write(small(model={"name": "./model"}))]), "model.name", "./model", *words)


def test_a_tokenizer_larger_than_the_model(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(99)])
    tokenizer.save_pretrained(folder)
    raw = small(model={"name": "./model"})
    assert main([write(raw), "--check"]) == 0  # no text has one of the new tokens
    words = ("example 1 of train", "name = 0 new7 :", "the token 'new7'", "take it out")
    says(refused(capfd, [write({**raw, "data": {**raw["data"], "prompt": "{mr} new7 :"}})]), "model.name", *words)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    says(refused(capfd, [write(raw)]), "model.name", "'[PAD]'", "do not belong together")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./absent", ("model.name", "'./absent'", "config.json")),
        ("nobody/nothing", ("model.name", "'nobody/nothing'", "cannot be loaded", "give a folder that is there")),
        ("texts", ("model.name", "'texts'", "config.json")),
    ],
)
def test_models_that_do_not_exist(capfd: pytest.CaptureFixture[str], name: str, words: tuple[str, ...]) -> None:
    says(refused(capfd, [write(small(model={"name": name}))]), *words)


def test_more_tokens_than_positions(capfd: pytest.CaptureFixture[str]) -> None:
    says(
        refused(capfd, [write(small(data={"max_length": 99999}))]),
        "data.max_length",
        "99999",
        "lower data.max_length to",
    )


def test_cuda_without_a_gpu(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says(refused(capfd, [write(small(runtime={"device": "cuda"}))]), "runtime.device", "no GPU", "cpu or auto")


# ---------------------------------------------------------------- the run directory


@pytest.fixture
def finished(_away: None, capfd: pytest.CaptureFixture[str]) -> str:
    """The configuration of a run that is complete in run/."""
    name = write(small())
    assert main([name]) == 0
    assert capfd.readouterr().err == ""
    return name


def test_a_run_pauses_and_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    name = write(small(federation={"rounds": 2}))
    assert main([name, "--until", "1"]) == 0
    out, err = capfd.readouterr()
    assert out.endswith("paused after round 1 of 2: the same command without --until goes on\n") and err == ""
    assert main([name]) == 0
    out, err = capfd.readouterr()
    assert "resuming after round 1\n" in out and "complete: run/results.h5" in out and err == ""


def test_a_run_says_nothing_wrong_and_is_finished(finished: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([finished]) == 0
    out, err = capfd.readouterr()
    assert "this run is finished" in out and err == ""


def unfinished() -> None:
    status = Path("run/status.json")
    edit(status, state="failed")


RUNS: dict[str, tuple[Callable[[], object], list[str], tuple[str, ...]]] = {
    "another configuration": (
        lambda: None,
        ["client.lr=0.5"],
        ("run: holds a run of another configuration", "client.lr", "0.5", "--fresh"),
    ),
    "another mode": (lambda: None, ["mode=centralized"], ("another configuration", "mode federated -> centralized")),
    "fewer rounds": (lambda: None, ["federation.rounds=1", "client.steps=2"], ("client.steps 1 -> 2",)),
    "other data": (lambda: put("texts/test.jsonl", ROW), ["federation.rounds=2"], ("content of the data changed",)),
    "no checkpoint": (lambda: (unfinished(), Path("run", CHECKPOINT).unlink()), [], ("no checkpoint", "--fresh")),
    "half a checkpoint": (
        lambda: (unfinished(), _half(Path("run", CHECKPOINT))),
        [],
        ("state.safetensors: damaged", "--fresh"),
    ),
    "half the results": (lambda: (unfinished(), _half(Path("run/results.h5"))), [], ("results.h5", "--fresh")),
    "no config.yaml": (lambda: (unfinished(), Path("run/config.yaml").unlink()), [], ("config.yaml", "--fresh")),
}


@pytest.mark.parametrize("case", RUNS)
def test_run_directories(finished: str, capfd: pytest.CaptureFixture[str], case: str) -> None:
    spoil, overrides, words = RUNS[case]
    spoil()
    says(refused(capfd, [finished, *overrides]), *words)


def test_another_model(finished: str, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file, save_file

    folder = model_folder()
    name = write(small(model={"name": "./model"}, run={"dir": "other"}))
    assert main([name]) == 0
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    says(refused(capfd, [name, "federation.rounds=2"]), "content of the model changed")


def test_directories_that_cannot_be_used(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    put("file", "x")
    says(refused(capfd, [write(small(run={"dir": "file"}))]), "file: cannot be the run directory", "not a directory")
    says(refused(capfd, [write(small(run={"dir": "file/run"}))]), "file is not a directory")
    Path("mine").mkdir()
    put("mine/results.h5", "x")
    for extra in ([], ["--fresh"]):
        says(
            refused(capfd, [write(small(run={"dir": "mine"})), *extra]), "mine: holds no run of fedhpc, but results.h5"
        )
    says(refused(capfd, [write(small(run={"dir": "/proc/run"}))]), "/proc/run: cannot be")
    if os.geteuid() == 0:  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    Path("locked").mkdir(mode=0o555)
    says(refused(capfd, [write(small(run={"dir": "locked/run"}))]), "no permission to write in locked")


def test_a_directory_in_use(finished: str, capfd: pytest.CaptureFixture[str]) -> None:

    held = take_lock(Path("run"))
    try:
        for extra in ([], ["--fresh"], ["federation.rounds=2"]):
            says(refused(capfd, [finished, *extra]), "run: in use by a live run", str(os.getpid()), "another run.dir")
    finally:
        held.close()


# ---------------------------------------------------------------- under the launchers


def once(results: list[Result], launcher: Launcher, folder: Path) -> str:
    """The single line of all ranks; the launcher's own report apart."""
    codes = {result.code for result in results}
    assert codes == ({1} if launcher == "torchrun" else {2}), results
    lines = [line for result in results for line in result.err.splitlines() if "fedhpc: " in line]
    assert len(lines) == 1, results
    if launcher in ("env", "forked"):
        assert "".join(result.err for result in results).count("\n") == 1
    # torchrun's report has a traceback of its own.
    ours = r"/fedhpc/\w+\.py" if launcher == "torchrun" else "Traceback"
    assert not any(re.search(ours, result.err + result.out) for result in results)
    assert not (folder / "run").exists()
    return lines[0]


SPAWNED: dict[str, tuple[dict[str, Any], str]] = {
    "configuration": ({"client": {"lr": -1.0}}, "client.lr"),
    "data": ({"data": {"label": "lable"}}, "data.label"),
    "model": ({"model": {"name": "./absent"}}, "model.name"),
    "directory": ({"run": {"dir": "texts/train.jsonl"}}, "cannot be the run directory"),
}


@pytest.mark.parametrize(
    ("case", "launcher"),
    [
        ("data", "forked"),
        pytest.param(
            "configuration", "env", marks=pytest.mark.slow
        ),  # before anything is imported; the others after it
        pytest.param("configuration", "torchrun", marks=pytest.mark.slow),
        pytest.param("configuration", "mpiexec", marks=pytest.mark.slow),
        pytest.param("data", "torchrun", marks=pytest.mark.slow),
        pytest.param("model", "mpiexec", marks=pytest.mark.slow),
        pytest.param("directory", "forked", marks=pytest.mark.slow),
    ],
)
def test_every_rank_leaves_with_2_and_one_speaks(tmp_path: Path, case: str, launcher: Launcher) -> None:
    changes, word = SPAWNED[case]
    write(small(**changes))
    ranks = 2 if launcher in ("env", "forked") else 3
    results = run_ranks(ranks, ["-m", "fedhpc.main", "config.yaml"], launcher, cwd=tmp_path)
    assert word in once(results, launcher, tmp_path)
