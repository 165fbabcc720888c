"""What becomes a class, in which order, and what a model's own head makes of it: against transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf

from fedhpc import registry
from fedhpc.approaches.prepare import prepare
from fedhpc.config import Model
from fedhpc.data import Data, load_data
from fedhpc.data.labels import class_order, in_head
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.methods import adapter as bottleneck
from fedhpc.methods import with_head
from fedhpc.methods.base import Method
from fedhpc.models import load as models
from fedhpc.models.base import Base
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.encoder import Classifier
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from tests import federations, oracle
from tests.federations import federate, table, tree, write_texts
from tests.test_data import settings, words, write_jsonl

NLI = ["entailment", "neutral", "contradiction"]
CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "lora": {"rank": 2},
    "ia3": {},
    "adapter": {"bottleneck": 4},
    "full": {},
}

# ---------------------------------------------------------------- order


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([str(i) for i in range(12)], [str(i) for i in range(12)]),
        (["10", "9", "-1", "0.5", "1e1", "02"], ["-1", "0.5", "02", "9", "10", "1e1"]),
        (["10", "2", ""], ["", "2", "10"]),
        (["10", "2", "b"], ["10", "2", "b"]),
        (["10", "2", "nan"], ["10", "2", "nan"]),
        (["b", "a", "b", ""], ["", "a", "b"]),
    ],
)
def test_numbers_are_in_their_order_and_other_classes_in_that_of_texts(names: list[str], wanted: list[str]) -> None:
    assert class_order(names) == class_order(reversed(names)) == wanted


@pytest.mark.parametrize(
    ("classes", "head", "wanted"),
    [
        (NLI, NLI[::-1], (NLI[::-1], True)),
        (["neg", "pos"], ["NEG", "Pos"], (["neg", "pos"], False)),
        (["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"], (["0", "1", "2"], False)),
        (["0", "1", "2"], NLI, (["0", "1", "2"], False)),
        (["LABEL_0", "LABEL_1"], ["neg", "pos"], (["LABEL_0", "LABEL_1"], False)),
        (["0", "1"], ["1", "0"], (["1", "0"], True)),  # its names are numbers, and not those of its rows
        (["0", "1", "2"], ["1", "2", "3"], None),
        (["1", "2", "3"], NLI, None),
        (["neg", "pos"], ["LABEL_0", "LABEL_1"], None),
        (["neg", "pos"], ["neg", "neg"], None),
        (["A", "a"], ["a", "B"], None),
        (["a", "b"], ["a", "b", "c"], None),
        (["a", "b"], [], None),
    ],
)
def test_classes_are_those_of_a_head_by_name_or_by_index(
    classes: list[str], head: list[str], wanted: tuple[list[str], bool] | None
) -> None:
    found = in_head(classes, head)
    assert (None if found is None else tuple(found)) == wanted
    assert class_order(classes, head) == (wanted[0] if wanted else classes if set(classes) - set(head) else head)


# ---------------------------------------------------------------- labels that are not there


def read(folder: Path, model: Any = Classifier, **data: Any) -> Data:
    return load_data(settings(folder, label="k", **data), words(), model)


def write(folder: Path, **labels: Sequence[Any]) -> Path:
    """Splits whose rows have these labels in the column k."""
    for split, values in labels.items():
        rows = [{"q": f"{split}{i}", "a": "b", "k": value} for i, value in enumerate(values)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.mark.parametrize("hidden", [-1, "-1", None, ""])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_of_hidden_labels_is_as_one_that_is_not_there(tmp_path: Path, split: str, hidden: Any) -> None:
    labels: dict[str, list[Any]] = {"train": [0, 1] * 20, "validation": [1, 0], "test": [1, 0]}
    write(tmp_path, **{**labels, split: [hidden] * 6})
    for data in (read(tmp_path), read(tmp_path, CausalLM, target=" {k}")):
        held_out: Examples = getattr(data, split)
        assert data.train.label_names == ["0", "1"]
        assert (len(data.train), len(held_out)) == (38, 2)
        assert held_out.prompts is not None and all(prompt.startswith("train") for prompt in held_out.prompts)
        value = "empty" if hidden in (None, "") else "-1"
        way_out = "data.test=validation tests on that" if split == "test" else "data.validation can name another split"
        assert data.messages == [
            f"data: '{tmp_path}' has no labels in its {split} split ('k' is {value} in all 6 rows; {way_out}); 2 rows "
            "are held out of the training data for it, 38 are left"
        ]
    with pytest.raises(UserError, match=rf"data\.{split}: 'k' is {value} in all 6 rows; name a split that has labels"):
        read(tmp_path, **{split: f"{split}.jsonl"})
    if hidden is None:  # nor need there be a column
        write_jsonl(tmp_path / f"{split}.jsonl", [{"q": f"{split}{i}", "a": "b"} for i in range(6)])
        assert read(tmp_path).messages == data.messages
    # Where the labels only divide the training rows, those of a test split are of no use.
    data = read(tmp_path, CausalLM)
    assert data.train.label_names == ["0", "1"] and data.messages == []
    assert (len(data.train), len(getattr(data, split)), getattr(data, split).labels) == (40, 6, None)


def test_labels_that_training_does_not_have_are_said(tmp_path: Path) -> None:
    write(tmp_path, train=["no", "yes"] * 10, validation=["no", "yes"], test=["yes", "unknown", "maybe", "unknown"])
    data = read(tmp_path)
    assert data.train.label_names == ["maybe", "no", "unknown", "yes"]
    assert data.messages == ["data.label: 3 of 4 rows of test have a label that no training row has, like 'unknown'"]


def test_minus_one_is_a_class_among_numbers(tmp_path: Path) -> None:
    data = read(write(tmp_path, train=[1, -1, 0, 1], validation=[0], test=[-1, -1]))
    assert data.train.label_names == ["-1", "0", "1"]
    assert data.test.labels is not None and list(data.test.labels) == [0, 0]
    assert data.messages == [
        "data.label: -1 is a class, in 1 of 4 training rows; data.where_not: {k: [-1]} leaves it out"
    ]
    assert read(tmp_path, where_not={"k": [-1]}, test="validation").train.label_names == ["0", "1"]


@pytest.mark.parametrize(
    ("labels", "where"),
    [
        ({"train": ["no", "yes", -1, -1], "test": ["no"]}, r"train\.jsonl:3 and 1 more of 4 rows have -1"),
        ({"train": ["no", "yes"], "test": ["no", -1]}, r"test\.jsonl:2 has -1"),
        ({"train": [0, 1], "test": [1, -1, 0]}, r"test\.jsonl:2 has -1"),
        ({"train": [-1, -1], "test": [1, 0]}, r"train\.jsonl:1 and 1 more of 2 rows have -1"),
    ],
)
def test_minus_one_that_is_no_class_is_named(tmp_path: Path, labels: dict[str, Any], where: str) -> None:
    write(tmp_path, **labels, validation=labels["test"][:1])
    with pytest.raises(UserError, match=rf"{where} in the column 'k', .* data\.where_not: \{{k: \[-1\]\}}"):
        read(tmp_path)


def test_hidden_labels_of_the_hub_are_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    text, kind = datasets.Value("string"), datasets.ClassLabel(names=["no", "yes"])

    def split(*labels: int) -> Any:
        rows = {"q": [f"q{i}" for i in range(len(labels))], "a": ["a"] * len(labels), "k": labels}
        return datasets.Dataset.from_dict(rows, datasets.Features({"q": text, "a": text, "k": kind}))

    splits = {"train": split(*[1, 0] * 10), "validation": split(0, 1, 1), "test": split(-1, -1)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, streaming: datasets.DatasetDict(splits))
    data = read(Path("some/set"))
    assert data.train.label_names == ["no", "yes"] and len(data.test) == 1
    assert "'k' is -1 in all 2 rows" in data.messages[0]
    assert len(read(Path("some/set"), test="validation").test) == 3


def test_amounts_are_said_to_be_classes(tmp_path: Path) -> None:
    data = read(write(tmp_path, train=[0.5, 3, 1.0], validation=[3], test=[1]))
    assert data.train.label_names == ["0.5", "1", "3"]
    assert data.messages == [
        "data.label: each of 3 values is a class of its own, also numbers like 0.5; amounts are not predicted here"
    ]


def test_labels_that_are_the_same_tokens_are_refused(texts: Path, tmp_path: Path) -> None:
    """A tokenizer of words knows neither; the likelihoods would be the same, and the first one always right."""
    federations.save_random_t5(tmp_path / "t5")
    write(tmp_path, train=["wrong", "right"], validation=["right"], test=["right"])
    raw = tree(
        texts,
        model={"name": str(tmp_path / "t5")},
        data={"source": str(tmp_path), "prompt": "{q}", "target": "{k}", "label": "k", "client": None},
        partition={"num_clients": 1},
        federation={"cohort_size": 1},
        evaluation={"metrics": ["accuracy"]},
    )
    with pytest.raises(RefusedError, match=r"data\.label: .* has the same tokens for 'right' and 'wrong', so accuracy"):
        prepare(federations.settings(tmp_path / "run", raw), LoopbackTransport(), Launch(), write_cache=False)


# ---------------------------------------------------------------- a head that a model brings


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    federations.save_random_bert(folder / "bert")
    return folder


def with_classes(texts: Path, folder: Path, names: Sequence[str], by_name: dict[str, int] | None = None) -> Path:
    """A classifier in `folder` whose random head has these classes, row by row."""
    torch.manual_seed(len(names))
    model = tf.AutoModelForSequenceClassification.from_pretrained(texts / "bert", id2label=dict(enumerate(names)))
    model.config.label2id = {name: i for i, name in enumerate(names)} if by_name is None else by_name
    with torch.no_grad():
        model.classifier.weight.mul_(20.0)
        model.classifier.bias.copy_(torch.linspace(-1, 1, len(names)))
    model.save_pretrained(folder)
    tf.AutoTokenizer.from_pretrained(texts / "bert").save_pretrained(folder)
    return folder


def load(folder: Path, labels: Sequence[str], seed: int = 0) -> Base:
    return models.load_base(Model(name=str(folder), dtype="float64"), CPU, labels, seed)


@pytest.mark.parametrize(
    "labels", [NLI, NLI[::-1], sorted(NLI), ["1", "0", "2"], ["NEUTRAL", "Entailment", "contradiction"]]
)
def test_the_rows_of_a_head_go_with_their_names(texts: Path, tmp_path: Path, labels: list[str]) -> None:
    base = load(with_classes(texts, tmp_path, NLI), labels)
    theirs = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.arange(4, 24).reshape(2, 10)
    wanted = theirs(input_ids=ids).logits
    for column, label in enumerate(labels):
        row = int(label) if label.isdigit() else NLI.index(label.lower())
        torch.testing.assert_close(base.model(input_ids=ids).logits[:, column], wanted[:, row])
    assert base.model.config.id2label == dict(enumerate(labels))
    assert base.model.config.problem_type == "single_label_classification"
    said = (
        [] if set(labels) == set(NLI) else [f"model: '{tmp_path}' has a head for {', '.join(NLI)}, which are taken for"]
    )
    assert len(base.messages) == len(said) and all(m.startswith(s) for m, s in zip(base.messages, said, strict=True))


@pytest.mark.parametrize("family", ["roberta", "distilbert", "xlm", "deberta-v2"])
def test_the_output_layer_is_what_depends_on_the_number_of_classes(family: str, tmp_path: Path) -> None:
    """Whatever it is called, and whatever layers stand between it and the encoder."""
    case = oracle.Case("classification", family)
    torch.manual_seed(0)
    stored = tf.AutoModelForSequenceClassification.from_config(case.config())
    with torch.no_grad():
        for p in stored.parameters():
            p.add_(0.05 * torch.randn_like(p))
    stored.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((models.BUILTIN / file).read_bytes())
    names = list(stored.config.id2label.values())
    others, turned = ["x", "y", "z"], names[1:] + names[:1]
    bases = [load(tmp_path, labels) for labels in (others, [*others, "w"], turned)]
    anew, larger, rows = (dict(base.model.named_parameters()) for base in bases)
    depends = {n for n, p in stored.named_parameters() if larger[n].shape != p.shape}
    assert depends and depends == {n for n, p in stored.named_parameters() if not torch.equal(anew[n], p.double())}
    for n, p in stored.named_parameters():
        assert torch.equal(rows[n], p.double()[[1, 2, 0]] if n in depends else p.double())
    assert bases[2].messages == ()


LEFT_OUT: dict[str, tuple[list[str], dict[str, int] | None, str]] = {
    "another size": (["a", "b", "c", "d", "e"], None, "has a head of size 5, which is left out: one for the 3 classes"),
    "regression": (["LABEL_0"], None, "has a head of size 1, which is left out"),
    "other names": (
        ["x", "y", "z"],
        None,
        "has a head for x, y, z and not neutral, entailment, contradiction, which is",
    ),
    "no names": (["LABEL_0", "LABEL_1", "LABEL_2"], None, "has a head for LABEL_0, LABEL_1, LABEL_2 and not neutral"),
    "contradiction": (NLI, {name: 2 - i for i, name in enumerate(NLI)}, "has a head without names for its rows"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_head_that_is_not_of_the_classes_is_drawn_anew_and_said(texts: Path, tmp_path: Path, case: str) -> None:
    names, by_name, said = LEFT_OUT[case]
    folder, labels = with_classes(texts, tmp_path, names, by_name), ["neutral", "entailment", "contradiction"]
    one, same, other = (load(folder, labels, seed) for seed in (5, 5, 6))
    stored = tf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).classifier.weight
    bare = load(texts / "bert", labels, 5)
    assert torch.equal(one.model.classifier.weight, same.model.classifier.weight)
    assert torch.equal(one.model.classifier.weight, bare.model.classifier.weight)  # as one of an encoder without any
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)
    assert one.model.classifier.weight.shape != stored.shape or not torch.equal(one.model.classifier.weight, stored)
    assert len(one.messages) == 1 and said in one.messages[0] and "drawn by run.seed" in one.messages[0]
    assert "has no head of a classifier" in bare.messages[0]
    assert one.fingerprint == other.fingerprint


def test_names_that_label2id_alone_has_are_used(texts: Path, tmp_path: Path) -> None:
    unnamed = [f"LABEL_{i}" for i in range(3)]
    folder = with_classes(texts, tmp_path, unnamed, {name: i for i, name in enumerate(NLI)})
    assert models.stored_classes(Model(name=str(folder))) == NLI


# ---------------------------------------------------------------- exports


def tuned(base: Base, name: str) -> tuple[Method, dict[str, torch.Tensor]]:
    """A method and a payload that shows."""
    method = with_head(registry.choice("methods", name)(registry.options("methods", name)(**OPTIONS[name]), base, 0))
    noise = torch.Generator().manual_seed(1)
    size = 0.02 if name == "full" else 0.2
    payload = {n: t + size * torch.randn(t.shape, generator=noise, dtype=t.dtype) for n, t in method.initial().items()}
    return method, payload


@pytest.mark.parametrize("classes", [6, 12])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_export_says_its_classes_to_peft_and_pipelines(texts: Path, tmp_path: Path, name: str, classes: int) -> None:
    """Of integer labels, on a bare encoder, whose configuration has two classes."""
    labels, folder = class_order(str(i) for i in range(classes)), tmp_path / "adapter"
    base = models.load_base(Model(name=str(texts / "bert")), CPU, labels)
    method, payload = tuned(base, name)
    method.export(payload, folder)
    config = tf.AutoConfig.from_pretrained(folder)
    assert config.id2label == {i: str(i) for i in range(classes)}
    assert config.label2id == {str(i): i for i in range(classes)}
    auto, names = tf.AutoModelForSequenceClassification, {"id2label": config.id2label, "label2id": config.label2id}
    if name == "full":
        loaded = auto.from_pretrained(folder)
    elif name == "adapter":
        loaded = bottleneck.load(auto.from_pretrained(texts / "bert", config=config), folder)
    else:
        loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, **names)
        if name == "prefix" and "past_key_values" not in signature(tf.BertModel.forward).parameters:
            pytest.skip("PEFT 0.21 puts no prefix in front of an encoder of transformers 5.24")
    pipe = tf.pipeline("text-classification", model=loaded, tokenizer=base.tokenizer, device="cpu", top_k=None)
    rows = [json.loads(line)["mr"] for line in (texts / "test.jsonl").read_text().splitlines()[:2]]
    views = {n: t.unsqueeze(0) for n, t in payload.items()}
    for row in rows:
        ids = base.tokenizer(row, return_tensors="pt")["input_ids"]
        with torch.no_grad(), method.attach(views, views, torch.zeros(1, dtype=torch.int64)) as attached:
            ours = base.class_logits(attached, ids, torch.ones_like(ids)).softmax(-1)[0]  # type: ignore[attr-defined]
        theirs = {answer["label"]: answer["score"] for answer in pipe([row])[0]}
        assert set(theirs) == set(labels)
        assert [theirs[label] for label in labels] == pytest.approx(ours.tolist(), abs=1e-5)


def test_base_accuracy_is_that_of_transformers_and_all_names_agree(texts: Path, tmp_path: Path) -> None:
    """A model with a trained head, in a run from end to end; its export loads with nothing said of its classes."""
    folder = with_classes(texts, tmp_path / "model", NLI)
    pipe = tf.pipeline("text-classification", model=str(folder), device="cpu")
    splits = {}
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (texts / f"{split}.jsonl").read_text().splitlines()]
        answers = [answer["label"] for answer in pipe([row["mr"] for row in rows])]
        # Wrong for every third row, so that accuracy says which class is which.
        labels = [NLI[NLI.index(a) - (i % 3 == 0)] for i, a in enumerate(answers)]
        splits[split] = [{"mr": row["mr"], "label": label} for row, label in zip(rows, labels, strict=True)]
        write_jsonl(tmp_path / f"{split}.jsonl", splits[split])
    raw = tree(
        texts,
        model={"name": str(folder)},
        data={"source": str(tmp_path), "prompt": "{mr}", "client": None, "max_length": 48},
        method={"name": "lora", "rank": 2},
        partition={"name": "iid", "num_clients": 4},
        federation={"cohort_size": 4},
        client={"lr": 0.1},
        evaluation={"metrics": ["loss", "accuracy"]},
    )
    del raw["method"]["num_virtual_tokens"], raw["partition"]["alpha"]
    federate(federations.settings(tmp_path / "run", raw))
    assert list(table(tmp_path / "run", "partition")["label_names"]) == NLI
    assert len(table(tmp_path / "run", "events")["message"]) == 0
    tuned_pipe = tf.pipeline(
        "text-classification",
        model=peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run" / "adapter"),
        tokenizer=tf.AutoTokenizer.from_pretrained(folder),
        device="cpu",
    )
    for group, theirs in (("base", pipe), ("test", tuned_pipe)):
        answers = [answer["label"] for answer in theirs([row["mr"] for row in splits["test"]])]
        wanted = np.mean([answer == row["label"] for answer, row in zip(answers, splits["test"], strict=True)])
        assert 0.5 < wanted < 0.8
        assert float(table(tmp_path / "run", group)["accuracy"]) == wanted
