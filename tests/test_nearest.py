"""Hints for keys that there are not: what other programs call a key, and keys of another section."""

from __future__ import annotations

import pytest

from fedhpc import config
from fedhpc.config.nearest import SYNONYMS, _choices_with
from fedhpc.config.schema import SECTIONS
from fedhpc.errors import UserError

MEANT = {
    "client.learning_rate": "'client.lr'",
    "client.lrr": "'lr'",
    "client.num_train_epochs": "'client.epochs'",
    "client.num_epochs": "'client.epochs'",
    "client.per_device_train_batch_size": "'client.batch_size'",
    "client.rounds": "'federation.rounds'",
    "client.momentum": "'client.momentum' (with client.optimizer sgd)",
    "client.rank": "'method.rank' (with method.name lora)",
    "server.num_rounds": "'federation.rounds'",
    "server.cohort_size": "'federation.cohort_size'",
    "federation.num_clients": "'partition.num_clients' (with partition.name dirichlet",
    "federation.lr": "'client.lr' or 'server.lr'",
    "data.format": "'data.source'",
    "data.formt": "'data.source'",
    "data.batch_size": "'evaluation.batch_size' or 'client.batch_size'",
    "data.max_seq_length": "'data.max_length'",
    "evaluation.max_length": "'data.max_length'",
    "method.lora_r": "'method.rank' (with method.name lora)",
    "method.r": "'method.rank' (with method.name lora)",
    "method.rank": "'method.rank' (with method.name lora)",
    "model.load_in_4bit": "'model.quantize'",
    "run.output_dir": "'run.dir'",
    "training.learning_rate": "'client.lr'",
    "learning_rate": "'client.lr'",
    "lr": "'client.lr' or 'server.lr'",
    "clinet.lr": "'client'",
    "partition.alpah": "'alpha'",
}


@pytest.mark.parametrize("key", MEANT)
def test_what_is_meant(key: str) -> None:
    with pytest.raises(UserError) as error:
        config.load(None, [f"{key}=1"])
    assert f"unknown key '{key}'; did you mean {MEANT[key]}" in str(error.value)
    assert "valid: " in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("key", ["data.colour", "client.prmpt", "evaluation.zzz"])
def test_a_key_like_no_other_is_told_those_that_there_are(key: str) -> None:
    with pytest.raises(UserError, match=f"unknown key '{key}'; valid: "):
        config.load(None, [f"{key}=1"])


def test_an_unknown_section_of_a_file() -> None:
    with pytest.raises(UserError, match=r"unknown key 'training'; did you mean 'client\.batch_size'"):
        config.resolve({"training": {"train_batch_size": 3}})


def test_synonyms_are_of_keys_that_there_are() -> None:
    for key, words in SYNONYMS.items():
        section, name = key.split(".")
        assert name in SECTIONS[section].model_fields or _choices_with(section, name), key
        assert not set(words.split()) & set(SECTIONS[section].model_fields), key
