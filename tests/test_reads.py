"""Keys that nobody reads are refused, by what each approach says it reads; and what it says is what it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.approaches.scoring.conflict import ACCEPTED
from fedhpc.config.schema import SECTIONS, Config
from fedhpc.errors import UserError
from fedhpc.registry import Section
from tests.federations import federate, settings, tree, write_texts

LORA = {"name": "lora", "rank": 2}
TEXTS = {
    "evaluation": {"metrics": ["loss", "exact_match"], "max_new_tokens": 2},
    "client": {"steps": None, "epochs": 1},
}
LABELS = {"target": " {label}", "max_length": 128}

#: approach -> runs that between them read all that it reads: changes to the sections of `tree`.
RUNS: dict[str, list[dict[str, Any]]] = {
    "rag": [
        {"method": {"name": "rag", "passage": "{ref}", "k": 2, "context_tokens": 40}, **TEXTS},
    ],
    "distillation": [
        {"method": {"name": "distillation", "student": LORA, "public": {"max_examples": 6}, "top_k": 5}, **TEXTS},
    ],
    "prompt_search": [
        {
            "method": {
                "name": "prompt_search", "instructions": ["Say what it is."], "population": 4, "survivors": 1,
                "examples": 2, "max_prompt_tokens": 256, "objective": "label_loss",
            },
            "data": LABELS,
            **TEXTS,
        },
    ],
    "fedbpt": [
        {
            "method": {"name": "fedbpt", "num_virtual_tokens": 2, "dimension": 4, "popsize": 4, "exchange": exchange},
            **TEXTS,
        }
        for exchange in ("moments", "scores")
    ],
}  # fmt: skip


#: The population asks how much of a client's data is held out, whoever evaluates clients; without the key nothing is.
#: The objective asks for columns of preferences, which it refuses where it is of targets.
#: The schedule asks for devices, which are of clients that train parameters; who renders classes asks for attackers.
ASKED_OF_ALL = {
    *("evaluation.client_fraction", "data.chosen", "data.rejected", "data.desirable"),
    *("devices.name", "attack.name"),
}
#: The splits are loaded in one place, which asks whether rows are chats; without the key they are prompts and targets.
ASKED_OF_SPLITS = {"data.messages", "data.chat_template", "data.tools"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@contextmanager
def recorded() -> Iterator[set[str]]:
    """The keys, as section.key, that are read within, by attribute, of any configuration."""
    read: set[str] = set()
    plain = Section.__getattribute__

    def watching(self: Section, name: str) -> Any:
        if name in type(self).model_fields:
            if isinstance(self, Config) and name in ("mode", "transforms"):
                read.add(name)
            read.update(f"{section}.{name}" for section, model in SECTIONS.items() if isinstance(self, model))
        return plain(self, name)

    Section.__getattribute__ = watching  # type: ignore[method-assign]
    try:
        yield read
    finally:
        Section.__getattribute__ = plain  # type: ignore[method-assign]


def raw_of(texts: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    raw = tree(texts, federation={"rounds": 2, "cohort_size": 3}, evaluation={"every": 1, "max_examples": 4})
    for section, value in changes.items():
        raw[section] = value if section == "method" else {**raw.get(section, {}), **value}
    return raw


@pytest.mark.parametrize("name", RUNS)
def test_an_approach_reads_what_it_says(name: str, texts: Path, tmp_path: Path) -> None:
    read: set[str] = set()
    for i, changes in enumerate(RUNS[name]):
        config = settings(tmp_path / str(i), raw_of(texts, changes))
        with recorded() as keys:
            federate(config)
        read |= keys
    reads = registry.options("methods", name).reads
    assert reads is not None
    # The options of a choice are read with the key that names it.
    keys_of_sections = {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}
    within = {key for key in read if key in reads or key.partition(".")[0] in reads}
    assert (read & keys_of_sections) - within == ASKED_OF_ALL | (set() if name == "rag" else ASKED_OF_SPLITS)
    promised = reads - ACCEPTED if name in ("fedbpt", "prompt_search") else reads
    assert {one for one in promised if not any(key == one or key.startswith(f"{one}.") for key in read)} == set()


UNREAD = {
    "rag": ["client.lr=0.5", "server.lr=0.5", "data.label_noise=0.1", "transforms=[{name: clip}]"],
    "distillation": [
        "server.optimizer=adam", "client.scaffold=true", "client.moments=both", "evaluation.client_fraction=0.5",
    ],
    "prompt_search": ["client.warmup=0.1", "personalization.finetune_steps=2", "server.lr=2.0"],
    "fedbpt": ["server.optimizer=adam", "client.server_momentum=0.5", "client.clip_norm=1.0", "local.max_clients=3"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "change"), [(name, change) for name, changes in UNREAD.items() for change in changes])
def test_a_key_that_nobody_reads_is_refused(name: str, change: str) -> None:
    key = change.partition("=")[0]
    words = rf"^command line: {key}: method\.name {name} does not read it; take it out"
    with pytest.raises(UserError, match=words) as e:
        configuration.load(None, [f"method.name={name}", change])
    assert (e.value.key, e.value.place, e.value.remedy) == (key, "command line", "take it out")


def test_of_a_section_that_nobody_reads_its_choice_is_refused() -> None:
    private = "privacy={clip_norm: 1.0, epsilon: 8, delta: 1.0e-4, name: client}"
    with pytest.raises(UserError, match=r"privacy\.name: method\.name prompt_search does not read it; take it out"):
        configuration.load(None, ["method.name=prompt_search", private])


def test_a_key_of_the_file_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {label: label}\nmethod: {name: fedbpt}\nclient:\n  steps: 1\n  warmup: 0.2\n")
    with pytest.raises(UserError, match=r"run\.yaml:5: client\.warmup: method\.name fedbpt does not read it"):
        configuration.load(str(file), [])


@pytest.mark.parametrize("name", UNREAD)
def test_defaults_and_what_the_embedded_file_says_are_not_given(name: str, tmp_path: Path) -> None:
    config = configuration.load(None, [f"method.name={name}", "server.lr=1.0"])
    assert config.client.lr == (0.01 if name == "rag" else 0.1)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert configuration.load(str(file), []) == config
    assert not any(key.startswith(("method", "data.source")) for key in configuration.unread(config))
