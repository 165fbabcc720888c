"""The pages are right: their examples run, their links lead somewhere, a payload passes the files that they list."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import fedhpc
from fedhpc import registry
from fedhpc.config import resolve
from fedhpc.console import COMMANDS
from tests.federations import federate, final, settings, table, tree, write_texts
from tests.test_architecture import LAYERS

ROOT = Path(fedhpc.__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = {
    name: (line, code)
    for line, name, code in re.findall(
        r"^`([^`\n]*\./(\w+)\.py[^`\n]*)`[^`\n]*(?:`[^`\n]*`)?\n```python\n(.*?)```$",
        (ROOT / "docs/extending.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (_, code) in EXAMPLES.items():
        Path(f"{name}.py").write_text(code)


# ---------------------------------------------------------------- examples of docs/extending.md


def run(texts: Path, line: str, folder: str = "run", ranks: int = 1) -> dict[str, np.ndarray]:
    """The final payload of two rounds of a small federation with one more line of YAML."""
    small = {"federation": {"rounds": 2}, "evaluation": {"test_max_examples": 4, "max_examples": 4}}
    raw, changes = tree(texts, **small), yaml.safe_load(line)
    for section, value in changes.items():
        instead = isinstance(value, list) or section in ("method", "partition")  # with options of another choice
        raw[section] = value if instead else {**raw.get(section, {}), **value}
    federate(settings(Path(folder), raw), ranks)
    payload = final(Path(folder))
    assert payload and all(np.isfinite(tensor).all() for tensor in payload.values())
    return payload


def differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return any(not np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def plain(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return run(texts, "{}", str(tmp_path_factory.mktemp("plain") / "run"))


def test_every_section_has_an_example_of_few_lines() -> None:
    assert sorted(EXAMPLES) == sorted(
        ["trimmed", "krum", "rounded", "vectors", "short", "in_turn", "signs", "lines", "smoothed", "two_sites"]
    )
    for name, (_, code) in EXAMPLES.items():
        lines = [line for line in code.splitlines() if line and not line.startswith(("from ", "import "))]
        assert len(lines) <= 15, f"{name} has {len(lines)} lines beside its imports"
    assert EXAMPLES["trimmed"][1] in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["trimmed", "krum", "rounded"])
def test_what_changes_updates(name: str, texts: Path, plain: dict[str, np.ndarray]) -> None:
    """Also on three ranks, to the bit."""
    one, three = (run(texts, EXAMPLES[name][0], f"run{ranks}", ranks) for ranks in (1, 3))
    assert not differ(one, three) and differ(one, plain)
    if name == "rounded":
        parameters = sum(tensor.size for tensor in one.values())
        assert (table(Path("run1"), "rounds")["bytes_up"][1:] == 6 * parameters).all()
        assert (table(Path("run1"), "rounds")["update_norm"][1:] > 0).all()


@pytest.mark.parametrize("name", ["vectors", "signs", "in_turn"])
def test_what_changes_training(name: str, texts: Path, plain: dict[str, np.ndarray]) -> None:
    payload = run(texts, EXAMPLES[name][0])
    if name == "vectors":
        assert list(payload) == ["vectors"] and np.abs(payload["vectors"]).max() > 0
        assert Path("run/adapter/adapter_model.safetensors").exists()
    else:
        assert differ(payload, plain)
    if name == "in_turn":
        sizes = table(Path("run"), "partition")["num_examples"]
        assert len(sizes) == 8 and sizes.max() - sizes.min() <= 1


def test_what_is_told(texts: Path, plain: dict[str, np.ndarray]) -> None:
    """A metric and a tracker, which change nothing."""
    line = yaml.safe_dump({**yaml.safe_load(EXAMPLES["short"][0]), **yaml.safe_load(EXAMPLES["lines"][0])})
    assert not differ(run(texts, line), plain)
    assert np.isfinite(table(Path("run"), "rounds")["eval_short"]).all()
    assert [row.split(",")[0] for row in Path("losses.csv").read_text().split()] == ["0", "1", "2"]


def test_devices(texts: Path, plain: dict[str, np.ndarray]) -> None:
    assert not differ(run(texts, EXAMPLES["two_sites"][0]), plain)  # nobody is late
    assert (table(Path("run"), "clients")["virtual_seconds"] > 0).all()


def test_an_objective(texts: Path, plain: dict[str, np.ndarray]) -> None:
    assert differ(run(texts, EXAMPLES["smoothed"][0]), plain)


# ---------------------------------------------------------------- docs/architecture.md


def section(title: str) -> str:
    text = (ROOT / "docs/architecture.md").read_text()
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_layers_are_those_of_the_architecture_test() -> None:
    lines = section("Who imports whom").split("```")[1].split("\n")
    shown = [{name for name in line.split() if name} for line in lines if line]
    assert shown[::-1] == [layer - {""} for layer in LAYERS]


def test_the_round_is_quoted() -> None:
    code = (ROOT / "fedhpc/federation.py").read_text()
    for line in section("A round").split("```")[1].splitlines()[1:]:
        assert line.partition("...")[0].partition("  #")[0].strip() in code, line
    assert (
        section("FedAvg's sum").split("```")[1].splitlines()[1]
        in (ROOT / "fedhpc/server/aggregators/mean.py").read_text()
    )


SIZE, TOKENS, WIDTH = 192, 3, 64  # of a prefix of three tokens: nothing else in the run has this shape


def carries(value: Any, depth: int = 3) -> bool:
    """Whether a value is the payload, or has it a few levels down."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.shape[-1:] == (SIZE,) or value.shape[-2:] == (TOKENS, WIDTH)
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif dataclasses.is_dataclass(value):
        inner = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return depth > 0 and any(carries(one, depth - 1) for one in inner[:50])


def test_a_payload_passes_the_files_that_are_listed(texts: Path) -> None:
    way, beside = section("One payload, from the YAML to /final").split("These files only pass it on")
    lines = re.findall(r"^\d+\. `([\w/]+\.py)`(.*)", way, re.MULTILINE)
    listed = {file: re.findall(r"`(\w+)`", re.split(r"`[\w/]+\.py`|:", rest)[0]) for file, rest in lines}
    others = set(re.findall(r"`([\w/]+\.py)`", beside.partition("Inside the forward pass")[0]))
    config = settings(Path("run"), tree(texts, method={"num_virtual_tokens": TOKENS}))
    names: dict[str, set[str]] = {}

    def follow(frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        if event in ("call", "return") and code.co_filename.startswith(f"{ROOT}/fedhpc/"):
            arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            values = [result] if event == "return" else [frame.f_locals.get(name) for name in arguments]
            if any(carries(value) for value in values):
                names.setdefault(code.co_filename.removeprefix(f"{ROOT}/fedhpc/"), set()).add(code.co_name)

    sys.setprofile(follow)
    try:
        federate(config)
    finally:
        sys.setprofile(None)
    assert final(Path("run"))["prompt_embeddings"].shape == (TOKENS, WIDTH)
    passed, before = set(names), {"config/choices.py", "registry.py"}
    assert set(listed) - before <= passed, "these files are listed, but the payload does not pass them"
    assert passed - set(listed) == others, "the files that only pass the payload on are not those that are listed"
    for file, functions in listed.items():
        text = (ROOT / "fedhpc" / file).read_text()
        assert not [name for name in functions if not re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE)], file


# ---------------------------------------------------------------- links and commands


def test_links_lead_somewhere() -> None:
    others = [page for folder in ("configs", "slurm") for page in (ROOT / folder).rglob("*.md")]
    for page in [*PAGES, *others]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_and_files_that_are_named_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for module in re.findall(r"python -m (fedhpc[\w.]*)", text):
            file = ROOT / module.rstrip(".").replace(".", "/")
            assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), f"{page.name}: {module}"
        for command in re.findall(r"(?:^|`)fedhpc (\w+) ", text, re.MULTILINE):
            assert command in COMMANDS, f"{page.name}: fedhpc {command}"
        for file in re.findall(r"`?\b((?:launch|configs|tests|fedhpc|slurm)/[\w/]+\.(?:py|sh|yaml|md))", text):
            assert (ROOT / file).exists() or not file.startswith("fedhpc"), f"{page.name}: {file}"
            assert (ROOT / file).exists(), f"{page.name}: {file}"


def test_configurations_of_the_readme_are_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [resolve(yaml.safe_load(block)).run.name for block in blocks] == ["mine"]


def test_families_of_the_table_are_those_of_the_registry() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = {path for path in re.findall(r"`([\w/]+)/`", text) if (ROOT / "fedhpc" / path).is_dir()}
    families = {pattern.split("/*")[0] for patterns in registry.FAMILIES.values() for pattern in patterns}
    assert families - {"approaches/prompt_search/proposers"} <= folders
