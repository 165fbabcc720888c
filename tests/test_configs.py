"""The committed configurations resolve, and those on built-in data pass --check."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedhpc import config as configuration
from fedhpc.config.schema import COLUMNS
from fedhpc.main import main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweeps")  # those: test_sweep.py


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_resolves(path: Path) -> None:
    config = configuration.load(str(path), [])
    assert config.run.name != "demo", "a committed configuration has a run name of its own"


@pytest.mark.parametrize("name", ["chats", "classification", "late", "skewed", "reparametrised", "million"])
def test_check_passes_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(CONFIGS / f"{name}.yaml"), "--check"]) == 0
    out = capsys.readouterr().out
    assert "payload:" in out and f"at the end all {161 if name == 'chats' else 300} test examples" in out
    assert ("0% of the clients late, staleness 1." in out) == (name == "late")
    assert (":>>>News from the kitchens. The Blue Barrel" in out) == (name == "chats")
    assert not list(tmp_path.iterdir())


def test_a_new_choice_within_a_choice_drops_the_options_of_the_old_one() -> None:
    raw = {"method": {"name": "distillation", "student": {"name": "lora", "rank": 2}}}
    for change, found in (("prefix", {"name": "prefix"}), ("lora", {"name": "lora", "rank": 2})):
        changed = configuration.override(raw, [("method.student.name", change)])
        assert changed["method"]["student"] == found
    assert raw["method"]["student"] == {"name": "lora", "rank": 2}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("data.prompt={mr} :", "{mr} :"),
        ("data.prompt={mr}", "{mr}"),
        ("data.target= {ref}", " {ref}"),
        ('data.target=" {ref} "', " {ref} "),
        (r'data.prompt="{mr}\n"', "{mr}\n"),
        ("data.prompt='{mr}' or '{ref}'", "'{mr}' or '{ref}'"),
        ("data.prompt=Q: {mr} # A: ", "Q: {mr} # A: "),
        ("data.prompt=", ""),
        ("data.prompt=null", "null"),
        ("data.label=true", "true"),
        ("data.label=", None),
        ("data.label=null", None),
        ("data.label='null'", "null"),
        ("run.name=2024", "2024"),
        ("run.name=1e3", "1e3"),
        ("model.revision=1.10", "1.10"),
        ("method.init_text=[a] {b}: c", "[a] {b}: c"),  # an option of the demo's method
        ("client.lr=1e-3", 1e-3),
        ("client.optimizer=sgd", "sgd"),
        ("evaluation.metrics=[loss]", ["loss"]),
        ("runtime.block_size=auto", "auto"),
        ("runtime.block_size=3", 3),
    ],
)
def test_a_text_on_the_command_line_is_the_text_as_it_stands(written: str, value: object) -> None:
    more = [] if "label" not in written else ["partition.name=iid", "data.label_noise=0.0"]
    section, key = written.partition("=")[0].split(".")
    assert getattr(getattr(configuration.load(None, [written, *more]), section), key) == value


def test_texts_of_options_follow_the_choices_that_are_made_with_them() -> None:
    overrides = ["method.name=distillation", "method.student.name=prefix", "method.student.init_text={a}: 1"]
    config = configuration.load(None, overrides)
    assert config.method.student.init_text == "{a}: 1"
    join = configuration.load(None, ["data.join.file={x}", "data.join.column=1", "data.join.key=2"])
    assert join.data.join == configuration.Join(file="{x}", column="1", key="2")


def test_every_key_of_the_data_names_columns_or_does_not() -> None:
    others = [
        "source",
        "subset",
        "streaming",
        "train",
        "validation",
        "test",
        "chat_template",
        "train_on",
        "label_noise",
        "client_from",
        "missing",
    ]
    assert set(COLUMNS) == set(configuration.Data.model_fields) - {*others, "max_length", "overlong"}


def test_another_source_drops_the_columns_of_a_built_in_task(tmp_path: Path) -> None:
    data = configuration.load(None, ["partition.name=iid", "data.source=x.jsonl", "data.target= {a}"]).data
    default = configuration.Data()
    assert (data.label, data.client, data.prompt, data.target) == (None, None, default.prompt, " {a}")
    overrides = {"partition.name": "iid", "data.client": "owner", "data.source": "x.jsonl"}
    tree = configuration.override(configuration.read_yaml(configuration.EMBEDDED), list(overrides.items()))
    assert tree["data"] == {"source": "x.jsonl", "client": "owner"}
    assert configuration.load(None, ["data.source=builtin:dining"]) == configuration.load(None, [])
    file = tmp_path / "mine.yaml"
    for source, label in (("builtin:topics", None), ("topics.csv", "k")):
        file.write_text(
            f"data: {{source: '{source}', prompt: '{{q}}', label: k, max_length: 9}}\npartition: {{name: iid}}"
        )
        data = configuration.load(str(file), ["data.source=elsewhere"]).data
        assert (data.label, data.max_length) == (label, 9)
        assert data.prompt == ("{q}" if label else default.prompt)
