"""Data: sources, templates, tokens and their cache, the population."""

from __future__ import annotations

import gzip
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedhpc import config
from fedhpc.data import describe, group_references, load_data
from fedhpc.data.encoding import marked
from fedhpc.data.templates import parse
from fedhpc.data.tokens import cache_dir, cached_tokens, save_tokens, tokenize
from fedhpc.errors import UserError
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.encoder import Classifier

COLUMNS = {"prompt": "{q} :", "target": " {a}"}


def words(bos="<s>", eos="</s>"):
    """A tokenizer with one token per lower-case letter, digit or colon; ids 1 and 2 start and end a text."""
    characters = ["<pad>", "<s>", "</s>", "[UNK]", *"abcdefghijklmnopqrstuvwxyz0123456789:"]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="[UNK]", pad_token="<pad>"
    )


def settings(source, seed=0, mode="federated", partition=None, evaluation=None, **data):
    return config.resolve(
        {
            "mode": mode,
            "run": {"seed": seed},
            "data": {"source": str(source), **COLUMNS, **data},
            "partition": partition or {"name": "iid", "num_clients": 2},
            "evaluation": {"metrics": [], **(evaluation or {})},
        }
    )


def load(source, tokenizer=None, **options):
    return load_data(settings(source, **options), tokenizer or words(), CausalLM)


def write_jsonl(path: Path, rows) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def rows(count, offset=0):
    return [{"q": f"q{i}", "a": f"a{i}", "k": "xyz"[i % 3]} for i in range(offset, offset + count)]


@pytest.fixture
def folder(tmp_path):
    """train, validation (called dev) and test, in three formats."""
    write_jsonl(tmp_path / "train.jsonl.gz", rows(30))
    (tmp_path / "dev.csv").write_text("q,a,k\n" + "".join(f"q{i},a{i},x\n" for i in range(100, 106)))
    write_jsonl(tmp_path / "test.jsonl", rows(7, 200))
    (tmp_path / "README.md").write_text("no data")
    return tmp_path


# Sources


def test_a_folder_gives_its_splits_in_any_format(folder):
    data = load(folder)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 6, 7)
    assert data.validation.prompts[0] == "q100 :"
    assert data.validation.targets[0] == " a100"
    assert data.train.prompts is None
    assert data.messages == []


def test_formats_agree(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = rows(9)
    write_jsonl(tmp_path / "a.jsonl", table)
    write_jsonl(tmp_path / "b.jsonl.gz", table)
    text = "q,a,k\r\n" + "".join('"{q}",{a},{k}\r\n'.format(**row) for row in table)
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(text.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "e.parquet")
    (tmp_path / "f.parquet.gz").write_bytes(gzip.compress((tmp_path / "e.parquet").read_bytes()))
    prints = {load(tmp_path / name).fingerprint for name in os.listdir(tmp_path)}
    assert len(prints) == 1


def test_splits_can_be_files(folder, tmp_path):
    write_jsonl(tmp_path / "more.jsonl", rows(4, 300))
    assert len(load(folder, validation="more.jsonl").validation) == 4
    assert len(load(folder, validation=str(tmp_path / "more.jsonl")).validation) == 4
    assert len(load(folder, validation="more").validation) == 4
    assert len(load(folder / "train.jsonl.gz", test="test.jsonl").test) == 7
    assert len(load("builtin:dining", tokenizer=words(), prompt="{mr}", target="{ref}", max_length=512).train) > 100


def test_a_lone_file_is_never_both_training_and_evaluation_data(folder):
    data = load(folder / "test.jsonl")
    assert (len(data.train), len(data.validation), len(data.test)) == (5, 1, 1)


def test_the_training_split_is_not_its_own_default_validation_split(folder):
    data = load(folder, train="dev")
    assert (len(data.train), len(data.validation), len(data.test)) == (5, 1, 7)
    assert len(load(folder, train="dev", validation="dev").validation) == 6


def test_missing_default_splits_are_held_out_of_the_training_data(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(100))
    data = load(tmp_path)
    assert (len(data.train), len(data.validation), len(data.test)) == (91, 5, 4)
    assert len(data.messages) == 2
    held_out = set(data.validation.prompts) | set(data.test.prompts)
    assert len(held_out) == 9
    assert load(tmp_path).validation.prompts == data.validation.prompts
    assert load(tmp_path, seed=1).validation.prompts == data.validation.prompts, "every seed is evaluated on the same"
    write_jsonl(tmp_path / "train.jsonl", rows(21_000))
    assert len(load(tmp_path).validation) == 1000


def test_label_noise_changes_the_targets_of_training_rows_alone(folder):
    columns = {"target": " {k}", "label": "k"}
    clean = load(folder, **columns)

    def noisy(noise, seed=1):
        data = load(folder, **columns, label_noise=noise, seed=seed)
        for split in ("validation", "test"):
            assert getattr(data, split).fingerprint == getattr(clean, split).fingerprint
        for client in range(2):
            assert list(data.population.indices(client)) == list(load(folder, seed=seed).population.indices(client))
        targets = [data.train.tokens(i)[-2] for i in range(30)]
        assert [words().convert_ids_to_tokens(int(t)) for t in targets] == ["xyz"[c] for c in data.train.labels]
        return data.train.labels

    few, many = noisy(0.4), noisy(0.8)
    wrong = few != clean.train.labels
    assert 3 <= wrong.sum() <= 20 and (many != clean.train.labels).sum() > wrong.sum()
    assert (many[wrong] == few[wrong]).all() and (noisy(0.4) == few).all()
    assert (noisy(0.4, seed=2) != few).any() and (noisy(1.0) != clean.train.labels).all()


def test_label_noise_draws_evenly_among_the_other_classes(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"q": "q", "k": "vwxyz"[i % 5]} for i in range(20_000)])
    data = load(tmp_path, target=" {k}", label="k", label_noise=0.4)
    clean = load(tmp_path, target=" {k}", label="k").train.labels
    assert abs(np.mean(data.train.labels != clean) - 0.4) < 0.02
    shift = (data.train.labels - clean)[data.train.labels != clean] % 5
    assert np.abs(np.bincount(shift, minlength=5)[1:] / len(shift) - 0.25).max() < 0.02


def test_label_noise_changes_the_classes_of_a_classifier(folder):
    """It has no target, so the label alone counts."""
    clean, noisy = (
        load_data(settings(folder, seed=1, label="k", label_noise=noise), words(), Classifier) for noise in (0.0, 0.5)
    )
    assert 5 < (clean.train.labels != noisy.train.labels).sum() < 25
    assert noisy.test.fingerprint == clean.test.fingerprint
    assert all(np.array_equal(noisy.train.tokens(i), clean.train.tokens(i)) for i in range(30))


def test_a_column_of_minus_ones_that_only_divides_the_clients_is_one_class(tmp_path):
    for split, offset in (("train", 0), ("validation", 40), ("test", 60)):
        write_jsonl(tmp_path / f"{split}.jsonl", [{**row, "k": -1} for row in rows(12, offset)])
    train = load(tmp_path, label="k").train
    assert train.label_names == ["-1"] and train.labels.tolist() == [0] * 12


def test_a_skewed_split_is_that_of_the_true_labels(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"q": "q", "k": "vwxyz"[i % 5]} for i in range(500)])
    options = {"target": " {k}", "label": "k", "partition": {"name": "dirichlet", "num_clients": 4, "alpha": 0.1}}
    clean, noisy = load(tmp_path, **options), load(tmp_path, **options, label_noise=0.5)
    assert all(np.array_equal(clean.population.indices(c), noisy.population.indices(c)) for c in range(4))


@pytest.mark.parametrize("name", ["iid", "natural"])
def test_clients_of_limited_size(folder, name):
    partition = {"iid": {"name": "iid", "num_clients": 2}, "natural": {"name": "natural"}}[name]
    options = {"client": "k"} if name == "natural" else {}
    everything = load(folder, partition=partition, **options).population
    few = load(folder, partition={**partition, "max_examples": 4}, **options).population
    assert few.num_clients == everything.num_clients and few.names == everything.names
    assert few.sizes().tolist() == [4] * few.num_clients
    assert all(set(few.indices(c)) < set(everything.indices(c)) for c in range(few.num_clients))


@pytest.mark.parametrize(
    ("rows_", "options", "message"),
    [
        (rows(9), {"target": " {a}", "label": "k"}, r"data\.label_noise: data\.target must have \{k\}"),
        (
            [{**row, "k": "x"} for row in rows(9)],
            {"target": " {k}", "label": "k"},
            r"data\.label_noise: there is no other class",
        ),
    ],
)
def test_label_noise_without_effect_is_refused(tmp_path, rows_, options, message):
    write_jsonl(tmp_path / "train.jsonl", rows_)
    with pytest.raises(UserError, match=message):
        load(tmp_path, **options, label_noise=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"validation": "valdation"},
            r"data\.validation: .* no split or file 'valdation'; it has: dev, test, train",
        ),
        ({"train": "training"}, r"data\.train: .* no split or file 'training'"),
        ({"test": "other.jsonl"}, r"data\.test: .* no split or file 'other\.jsonl'"),
        ({"prompt": "{question}"}, r"train\.jsonl\.gz:1: data\.prompt names the column 'question'.* q, a, k"),
        ({"label": "kind"}, r"train\.jsonl\.gz:1: data\.label names the column 'kind'"),
        ({"where": {"l": ["x"]}}, r"data\.where names the column 'l'"),
        ({"where": {"k": ["w"]}}, r"none of 30 rows passes data\.where .* there: k: 'x'"),
        ({"subset": "en"}, r"data\.subset"),
        ({"prompt": "{q"}, r"data\.prompt: lone '\{' at position 0"),
    ],
)
def test_what_is_wrong_with_the_data_section_is_named(folder, options, message):
    with pytest.raises(UserError, match=message) as error:
        load(folder, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b'{"q": "x", "a": "y"}\n{"q": "x",\n', r"train\.jsonl:2: not valid JSON"),
        ("train.jsonl", b'{"q": "x", "a": "y"}\n\n[1]\n', r"train\.jsonl:3: must be a JSON object .* list"),
        (
            "train.jsonl",
            b'{"q": "x", "a": "y"}\n{"q": "x"}\n',
            r"train\.jsonl:2: data\.target names the column 'a'",
        ),
        ("train.jsonl", b'{"q": "\xff", "a": "y"}\n', r"train\.jsonl:1: not valid JSON"),
        ("train.jsonl", b'{"q": "\\ud800", "a": "y"}\n', r"train\.jsonl:1: data\.prompt: .* surrogate"),
        ("train.jsonl", b'{"q": "\\ufdd02\\ufdd1", "a": "y"}\n', r"train\.jsonl:1: data\.prompt: .* 'q' holds U\+FDD0"),
        ("train.jsonl", b'{"q": ["x", "z"], "a": "y"}\n', r"train\.jsonl:1: data\.prompt: .* a list of 2"),
        ("train.jsonl", b"\n", r"train\.jsonl: the split has no rows"),
        ("train.jsonl", b'{"q": "x", "a": null}\n' * 3, r"train\.jsonl:\d: data\.target is empty"),
        ("train.jsonl", b'{"q": "x", "a": "y"}\n', r"train\.jsonl: too few rows"),
        ("train.jsonl.gz", b"plain text", r"train\.jsonl\.gz: cannot be read"),
        ("train.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:-9], r"train\.jsonl\.gz: cannot be read"),
        ("train.csv", b'q,a\n"x\ny",b\nx\n', r"train\.csv:4: 1 cells, but 2 columns"),
        ("train.csv", b'q,a\nx,"b\n', r"train\.csv:2: not valid CSV"),
        ("train.csv", b"q,a\nx,b\n\xe9,b\n", r"train\.csv:3: not UTF-8"),
        ("train.csv", b"q,q\nx,b\n", r"train\.csv:1: a column name stands twice"),
        ("train.csv", b"", r"train\.csv: the split has no rows"),
        ("train.parquet", b"PAR1 or not", r"train\.parquet: not a valid parquet file"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, target="{a}")
    assert "\n" not in str(error.value)


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no file or folder"):
        load("rows.csv")
    with pytest.raises(UserError, match="it has: nothing"):
        load(tmp_path)
    with pytest.raises(UserError, match="no built-in task 'dinning'; did you mean 'dining'"):
        load("builtin:dinning")
    (tmp_path / "train.csv").write_text("q,a\n")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"several files for the split 'train': train\.csv, train\.jsonl"):
        load(tmp_path)


def test_a_hub_id_offline_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing' is neither a file or folder here nor a data set") as error:
        load("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_hub_data_set_gives_rows_and_class_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"q": datasets.Value("string"), "a": datasets.Value("string"), "k": datasets.ClassLabel(names=["no", "yes"])}
    )
    split = datasets.Dataset.from_dict({"q": ["x"] * 3, "a": ["y"] * 3, "k": [1, 0, -1]}, features)
    asked = []

    def given(*names, streaming):
        asked.append((*names, streaming))
        return datasets.DatasetDict({"train": split, "validation": split, "test": split})

    monkeypatch.setattr(datasets, "load_dataset", given)
    data = load("someone/something", label="k", subset="en")
    assert asked == [("someone/something", "en", False)]
    assert data.train.label_names == ["-1", "no", "yes"]
    assert list(data.train.labels) == [2, 1, 0]
    with pytest.raises(UserError, match=r"data\.test: .* no split or file 'tests'; it has: train, validation, test"):
        load("someone/something", test="tests")


def test_a_hub_data_set_is_streamed(tmp_path, monkeypatch):
    """The same rows as those of the copy; where the stream ends early, the row is named."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"q": datasets.Value("string"), "a": datasets.Value("string"), "k": datasets.ClassLabel(names=["no", "yes"])}
    )
    table = {"q": [f"q{i}" for i in range(2500)], "a": ["y"] * 2500, "k": [1, 0] * 1250}
    whole = datasets.Dataset.from_dict(table, features)
    splits = {"train": whole, "validation": whole.select(range(9)), "test": whole.select(range(5))}

    def given(*_, streaming):
        if not streaming:
            return datasets.DatasetDict(splits)
        return datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", given)
    streamed = load("someone/something", label="k", streaming=True)
    assert len(streamed.train) == 2500
    assert streamed.fingerprint == load("someone/something", label="k").fingerprint

    def cut():
        yield from ({"q": "q", "a": "y", "k": 0} for _ in range(1200))
        raise ConnectionError("reset by peer")

    splits["train"] = SimpleNamespace(
        to_iterable_dataset=lambda: datasets.IterableDataset.from_generator(cut, features=features)
    )
    with pytest.raises(UserError, match=r"train: the stream breaks behind row 1024: .*reset by peer"):
        load("someone/something", label="k", streaming=True)
    write_jsonl(tmp_path / "train.jsonl", rows(20))
    with pytest.raises(UserError, match=r"remove data\.streaming"):
        load(tmp_path, streaming=True)


def test_where_compares_values_as_texts(tmp_path):
    table = [{"q": f"q{i}", "a": "b", "n": i % 3, "flag": i % 2 == 0, "x": None} for i in range(60)]
    write_jsonl(tmp_path / "train.jsonl", table)
    for split in ("validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", table)
    assert len(load(tmp_path, where={"n": [1]}).train) == 20
    assert len(load(tmp_path, where={"n": ["1", 2]}).train) == 40
    assert len(load(tmp_path, where={"n": [1], "flag": [True]}).train) == 10
    assert len(load(tmp_path, where_not={"n": [1], "flag": ["false"]}).train) == 20
    assert len(load(tmp_path, where={"x": [""]}).validation) == 60


# Templates


def test_templates_take_columns_and_nothing_else():
    row = {"mr": "x[{y}]", "a b": "B", "c.d": "C", "e!r": "E"}
    assert parse("{mr} :", "k").render(row) == "x[{y}] :"
    assert parse("{{{mr}}} {a b}{c.d}{e!r}", "k").render(row) == "{x[{y}]} BCE"
    assert parse("", "k").render(row) == ""
    assert parse("{mr}{mr}", "k").columns == ("mr", "mr")
    for wrong in ("{", "}", "{}", "{mr", "mr}", "{mr}}", "{{mr}"):
        with pytest.raises(UserError, match=r"data\.prompt: lone"):
            parse(wrong, "data.prompt")


# Tokens


def test_layout_of_an_example(folder):
    tokenizer = words()
    train = load(folder).train
    assert tokenizer.decode(train.tokens(3)).split() == ["<s>", "q", "3", ":", "a", "3", "</s>"]
    assert train.prompt_lengths[3] == 4
    assert (train.ids.dtype, train.offsets.dtype, train.prompt_lengths.dtype) == (
        np.int32,
        np.int64,
        np.int32,
    )
    assert train.offsets[-1] == len(train.ids)
    assert train.lengths[3] == 7


def one(prompt, target, max_length, tokenizer=None):
    tokens = tokenize([prompt], [target], ["file:1"], tokenizer or words(), max_length, CausalLM)
    return (tokenizer or words()).decode(tokens.ids).replace(" ", ""), int(tokens.prompt_lengths[0])


def test_long_examples_lose_the_front_of_the_prompt():
    assert one("abcdef", "xyz", 11) == ("<s>abcdefxyz</s>", 7)
    assert one("abcdef", "xyz", 8) == ("<s>defxyz</s>", 4)
    assert one("abcdef", "xyz", 5) == ("<s>xyz</s>", 1)
    assert one("", "xyz", 5) == ("<s>xyz</s>", 1)
    with pytest.raises(UserError, match=r"file:1: the target has 3 tokens .* data\.max_length 4; use at least 5"):
        one("abcdef", "xyz", 4)
    with pytest.raises(UserError, match=r"file:1: data\.target is empty"):
        one("abcdef", " ", 8)
    tokenizer = words()
    with pytest.raises(UserError, match=r"file:1: data\.target is empty"):
        one("abcdef", marked(tokenizer.eos_token, tokenizer), 8, tokenizer)  # "{ref}</s>" where ref is empty


def test_targets_that_do_not_fit_lose_their_end():
    """By the rule: half of what the bos leaves is for the end of the prompt, all others are for the target."""
    target = "uvwxyz0123"
    for bos, prompt, max_length in [
        ("<s>", "abcdef", 9), ("<s>", "abcdef", 8), ("<s>", "ab", 8), ("<s>", "", 4), ("<s>", "abc", 11),
        (None, "abcdef", 6), (None, "abcdef", 11),
    ]:  # fmt: skip
        tokenizer, start = words(bos=bos), [bos] * bool(bos)
        texts = [[prompt], [target], ["f:1"]]
        tokens = tokenize(*texts, tokenizer, max_length, CausalLM, overlong="truncate")
        front = list(prompt)[-min(len(prompt), (max_length - len(start)) // 2) :] if prompt else []
        left = list(target)[: max_length - len(start) - len(front)]
        assert tokenizer.convert_ids_to_tokens(tokens.ids.tolist()) == [*start, *front, *left]
        assert (tokens.lost.item(), tokens.cut.item()) == (len(prompt) - len(front), len(target) + 1 - len(left))
        assert len(tokenize(*texts, tokenizer, max_length, CausalLM, overlong="drop").prompt_lengths) == 0
    fits = [["abcdef"], [target], ["f:1"], words(), 12, CausalLM]
    plain, *others = (tokenize(*fits, overlong=overlong) for overlong in ("error", "drop", "truncate"))
    assert all(np.array_equal(a, b) for other in others for a, b in zip(plain, other, strict=True))
    with pytest.raises(
        UserError, match=r"f:1: the target has 10 tokens .* use at least 12, or set data\.overlong to drop$"
    ):
        tokenize(*texts, words(), 11, CausalLM, room=2, overlong="truncate")


def test_tokenizers_without_a_start_or_end():
    no_bos = words(bos=None)
    assert one("abcdef", "xyz", 6, no_bos) == ("efxyz</s>", 2)
    with pytest.raises(UserError, match="use at least 5"):
        one("abcdef", "xyz", 4, no_bos)
    with pytest.raises(UserError, match=r"file:1: the prompt is empty .* no start token"):
        one("", "xyz", 9, no_bos)
    with pytest.raises(UserError, match=r"model\.name: .* no end-of-text token"):
        one("abc", "xyz", 9, words(eos=None))


def test_labels_are_numbered_over_all_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"q": "a", "a": "b", "k": k} for k in ("z", "", "m", 5)])
    write_jsonl(tmp_path / "dev.jsonl", [{"q": "a", "a": "b", "k": k} for k in ("m", "c")])
    write_jsonl(tmp_path / "test.jsonl", [{"q": "a", "a": "b", "k": None}])
    data = load(tmp_path, label="k")
    assert data.train.label_names == data.test.label_names == ["", "5", "c", "m", "z"]
    assert list(data.train.labels) == [4, 0, 3, 1]
    assert list(data.validation.labels) == [3, 2]
    assert data.test.labels is None  # no row of it has one


def test_references_of_one_prompt_are_one_item(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(5))
    write_jsonl(tmp_path / "test.jsonl", [{"q": q, "a": a} for q, a in ("ax", "by", "az", "cw", "bv")])
    write_jsonl(tmp_path / "val.jsonl", rows(3))
    data = load(tmp_path)
    assert group_references(data.test) == [(0, [" x", " z"]), (1, [" y", " v"]), (3, [" w"])]
    with pytest.raises(ValueError, match="no texts"):
        group_references(data.train)


def test_the_cache_gives_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path / "cache"))
    texts = [["abc :", "d :"], [" x", " yz"], ["f:1", "f:2"]]
    plain = tokenize(*texts, words(), 16, CausalLM)
    unwritten, message = cached_tokens(*texts, words(), 16, CausalLM, write=False)
    assert not cache_dir().exists()
    made, message = cached_tokens(*texts, words(), 16, CausalLM)
    found, _ = cached_tokens(*texts, words(), 16, CausalLM)
    assert message is None
    for tokens in (unwritten, made, found):
        assert all(np.array_equal(a, b) for a, b in zip(plain, tokens, strict=True))
    assert isinstance(found.ids, np.memmap)
    (entry,) = cache_dir().iterdir()
    (entry / "ids.npy").write_bytes(b"\x93NUMPY damaged")
    mended, _ = cached_tokens(*texts, words(), 16, CausalLM)
    assert np.array_equal(mended.ids, plain.ids)
    assert [path.name for path in cache_dir().iterdir()] == [entry.name]


def test_the_cache_tells_contents_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path / "cache"))
    tokenizer = words()
    variants = [
        (["ab"], ["c"], words(), 16),
        (["a"], ["bc"], words(), 16),
        (["ab"], ["c"], words(), 15),
        (["ab"], ["c"], words(bos=None), 16),
    ]
    for number, (prompts, targets, made_of, length) in enumerate(variants, 1):
        cached_tokens(prompts, targets, ["f:1"], made_of, length, CausalLM)
        assert len(list(cache_dir().iterdir())) == number
    tokenizer(["ab", "abc"], padding=True, truncation=True, max_length=2)
    cached_tokens(["ab"], ["c"], ["f:1"], tokenizer, 16, CausalLM)
    assert len(list(cache_dir().iterdir())) == len(variants)


def test_without_a_place_to_write_there_is_no_cache(folder, tmp_path, monkeypatch):
    expected = load(folder).fingerprint
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path / "file"))
    data = load(folder)
    assert data.fingerprint == expected
    assert len(data.messages) == 1 and "not cached" in data.messages[0]


def test_a_user_without_a_home_is_no_error(folder, monkeypatch):
    def homeless(_path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FEDHPC_CACHE")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cached_tokens(["a"], ["b"], ["f:1"], words(), 8, CausalLM)[1] == (
        "tokens are not cached: Could not determine home directory."
    )


def test_a_sound_cache_entry_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path))
    texts = (["ab"], ["c"], ["f:1"])
    tokens, _ = cached_tokens(*texts, words(), 16, CausalLM)
    (entry,) = cache_dir().iterdir()
    inode = (entry / "ids.npy").stat().st_ino
    save_tokens(entry, tokens)  # what a slower process does
    assert (entry / "ids.npy").stat().st_ino == inode
    assert list(cache_dir().iterdir()) == [entry]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_cache_is_no_error(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("FEDHPC_CACHE", str(cache))
    assert "not cached" in load(folder).messages[0]


def test_a_full_disk_is_no_error(folder, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("FEDHPC_CACHE", str(folder / "cache"))
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in load(folder).messages[0]
    assert list(cache_dir().iterdir()) == []


def test_the_fingerprint_follows_the_content(folder):
    first = load(folder, label="k").fingerprint
    assert load(folder, label="k", partition={"name": "iid", "num_clients": 5}).fingerprint == first
    assert load(folder, label=None).fingerprint != first
    assert load(folder, label="k", max_length=6).fingerprint != first
    assert load(folder, label="k", prompt="{q}").fingerprint != first
    changed = rows(30)
    changed[7]["k"] = "y" if changed[7]["k"] == "x" else "x"
    write_jsonl(folder / "train.jsonl.gz", changed)
    assert load(folder, label="k").fingerprint != first


# Population


def test_held_out_examples_are_never_trained_on(folder):
    train_on = load(folder, partition={"name": "iid", "num_clients": 4}).population
    held = load(folder, partition={"name": "iid", "num_clients": 4}, evaluation={"client_fraction": 0.25}).population
    for client in range(4):
        parts = held.indices(client), held.held_out(client)
        assert np.array_equal(np.sort(np.concatenate(parts)), train_on.indices(client))
        assert len(parts[1]) == 2
        assert held.num_examples(client) == len(parts[0]) == held.sizes()[client]
        assert len(train_on.held_out(client)) == 0
    assert held.num_examples_of([3, 1]).tolist() == [held.num_examples(3), held.num_examples(1)]
    assert all(np.array_equal(of, held.indices(c)) for c, of in enumerate(held.indices_of(range(4))))
    other = load(
        folder, seed=5, partition={"name": "natural"}, client="k", evaluation={"client_fraction": 0.25}
    ).population
    assert not np.array_equal(other.held_out(0), held.held_out(0))


@pytest.mark.parametrize(("fraction", "expected"), [(0.01, 1), (0.5, 2), (0.99, 3)])
def test_every_client_keeps_an_example_for_training(tmp_path, fraction, expected):
    owners = ["a"] * 4 + ["b"]
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"q": "x", "a": "y", "k": k} for k in owners])
    population = load(
        tmp_path, client="k", partition={"name": "natural"}, evaluation={"client_fraction": fraction}
    ).population
    assert len(population.held_out(0)) == expected
    assert (population.num_examples(1), len(population.held_out(1))) == (1, 0)


def test_natural_clients_keep_their_names_and_filtered_ones_stay_empty(folder):
    data = load(folder, client="k", partition={"name": "natural"})
    assert data.population.names == ["x", "y", "z"]
    assert list(data.population.sizes()) == [10, 10, 10]
    filtered = load(folder, client="k", partition={"name": "natural"}, where_not={"k": ["z"]})
    assert list(filtered.population.sizes()) == [10, 10, 0]
    assert len(filtered.population.indices(2)) == 0
    assert "1 of 3 owners have no examples" in filtered.messages[0]
    assert any("clients without data: 1" in line for line in describe(filtered.population, filtered.train))
    kept = load(folder, client="k", partition={"name": "natural", "min_examples": 1}, where_not={"k": ["z"]})
    assert kept.population.names == ["x", "y"]
    with pytest.raises(UserError, match=r"no owner has 11 examples; the largest has 10"):
        load(folder, client="k", partition={"name": "natural", "min_examples": 11})


def test_centralized_is_one_client_with_everything(folder):
    population = load(folder, mode="centralized", partition={"name": "iid", "num_clients": 1000}).population
    assert population.num_clients == 1
    assert np.array_equal(population.indices(0), np.arange(30))


def test_a_virtual_population_has_no_arrays(folder):
    options = {"name": "virtual", "num_clients": 10**9, "examples_per_client": 8}
    data = load(folder, partition=options, evaluation={"client_fraction": 0.25})
    population = data.population
    assert population.num_clients == 10**9
    assert len(population.indices(999_999_999)) == population.num_examples(999_999_999) == 6
    assert not set(population.indices(5)) & set(population.held_out(5))
    many = [*range(40), 999_999_999]
    assert all(
        np.array_equal(of, population.indices(c)) for c, of in zip(many, population.indices_of(many), strict=True)
    )
    assert population.num_examples_of(many).tolist() == [6] * 41
    assert "1000000000 (virtual), 6 examples each, drawn from 30" in describe(population, data.train)[0]
    with pytest.raises(ValueError, match="virtual"):
        population.sizes()
    with pytest.raises(IndexError):
        population.indices(10**9)
    with pytest.raises(UserError, match="examples_per_client: 31"):
        load(folder, partition={**options, "examples_per_client": 31})


def test_label_counts_and_their_table(folder):
    data = load(folder, label="k", partition={"name": "dirichlet", "num_clients": 12, "alpha": 0.1})
    counts = data.population.label_counts(data.train)
    assert counts.shape == (12, 3)
    assert list(counts.sum(0)) == [10, 10, 10]
    for client in range(12):
        mine = np.bincount(data.train.labels[data.population.indices(client)], minlength=3)
        assert np.array_equal(counts[client], mine)
    lines = describe(data.population, data.train)
    assert lines[0] == "clients: 12"
    assert lines[2].split() == ["client", "x", "y", "z"]
    assert len(lines) == 2 + 1 + 10 + 1


# Real data


@pytest.fixture
def tinystories(shared):
    return AutoTokenizer.from_pretrained(shared / "models" / "tinystories-260k")


E2E = {"prompt": "{mr} :", "target": " {ref}", "label": "eatType", "client": "name"}


def test_e2e_references(shared, tinystories):
    data = load(shared / "data" / "e2e", tinystories, **E2E, train="dev", validation="dev")
    references = group_references(data.test)
    assert len(references) == 630
    assert sum(len(targets) for _, targets in references) == len(data.test) == 4693
    mr, ref = tinystories.decode(data.test.tokens(0), skip_special_tokens=True).split(" : ", 1)
    assert mr == "name[Blue Spice], eatType[coffee shop], area[city centre]"
    assert ref == "A coffee shop in the city centre area called Blue Spice."


@pytest.mark.slow
def test_e2e_in_full(shared, tinystories):
    data = load(shared / "data" / "e2e", tinystories, **E2E, partition={"name": "natural"})
    assert (len(data.train), len(data.validation), len(data.test)) == (42061, 4672, 4693)
    assert data.train.label_names == ["", "coffee shop", "pub", "restaurant"]
    assert data.population.num_clients == 34
    assert (data.population.sizes().min(), data.population.sizes().max()) == (348, 2826)
    assert data.train.lengths.max() == 256


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("trec", {"prompt": "{text} :", "target": " {label}", "label": "label"}, (5180, 272, 500)),
        ("xquad-en", {"train": "questions", "prompt": "{question}", "target": " {answers}"}, (1075, 59, 56)),
        ("instructions", {"train": "instructions", "prompt": "{instruction}", "target": " {output}",
                          "where": {"source": ["seed"]}, "client": "group", "max_length": 4096}, (159, 8, 8)),
    ],
)  # fmt: skip
def test_other_real_data(shared, tinystories, name, options, sizes):
    data = load(shared / "data" / name, tinystories, **options)
    assert (len(data.train), len(data.validation), len(data.test)) == sizes


# ---------------------------------------------------------------- columns of another file


def test_a_join_adds_the_columns_of_another_file(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"q": f"q{i}", "of": f"p{i % 3}"} for i in range(30)])
    write_jsonl(tmp_path / "test.jsonl", [{"q": "t", "of": "p2"}])
    write_jsonl(tmp_path / "texts.jsonl", [{"id": f"p{i}", "a": f"text {i}", "q": "not this"} for i in range(3)])
    join = {"file": "texts.jsonl", "column": "of", "key": "id"}
    data = load(tmp_path, join=join)
    assert data.test.targets == [" text 2"] and data.test.prompts == ["t :"]
    assert len(load(tmp_path, join=join, where={"a": ["text 1", "text 2"]}).train) == 20 - 1  # one is held out


@pytest.mark.parametrize(
    ("join", "words_"),
    [
        ({"file": "none.jsonl", "column": "of", "key": "id"}, "data.join.file: there is no split or file 'none.jsonl'"),
        ({"file": "texts.jsonl", "column": "off", "key": "id"}, "data.join.column names the column 'off'"),
        ({"file": "texts.jsonl", "column": "of", "key": "a"}, "texts.jsonl:2: data.join.key: 'same' stands twice"),
        (
            {"file": "texts.jsonl", "column": "q", "key": "id"},
            "train.jsonl:1: data.join: 'q0' is not in the column 'id'",
        ),
    ],
)
def test_a_join_that_fails_says_where(tmp_path, join, words_):
    write_jsonl(tmp_path / "train.jsonl", [{"q": f"q{i}", "of": "p0"} for i in range(30)])
    write_jsonl(tmp_path / "texts.jsonl", [{"id": "p0", "a": "same"}, {"id": "p1", "a": "same"}])
    with pytest.raises(UserError, match=words_):
        load(tmp_path, join=join)


# ---------------------------------------------------------------- what became of the texts


def test_cut_prompts_are_counted_for_each_split(tmp_path):
    """A rule and 20 letters in room for 13 tokens."""
    letters = "abcdefghijklmnopqrst"
    write_jsonl(tmp_path / "train.jsonl", [{"q": "ab", "a": "x"}, *[{"q": letters, "a": "x"}] * 39])
    write_jsonl(tmp_path / "validation.jsonl", [{"q": letters[:9], "a": "x"}] * 3)
    write_jsonl(tmp_path / "test.jsonl", [{"q": letters, "a": "x"}, {"q": letters[:11], "a": "xyz"}])
    data = load(tmp_path, max_length=13)
    # <s>, 20 letters, the colon, x, </s> are 24 tokens; <s>, 11, colon, xyz, </s> are 17.
    assert data.messages == [
        "data: 39 of 40 rows of train lose 429 tokens of their prompts; the longest has 24 tokens, data.max_length is "
        "13",
        "data: 2 of 2 rows of test lose 15 tokens of their prompts; the longest has 24 tokens, data.max_length is 13",
    ]
    assert data.train.lost.tolist() == [0, *[11] * 39] and data.test.lost.tolist() == [11, 4]
    assert load(tmp_path, max_length=24).messages == []
    encoder = load_data(settings(tmp_path, max_length=13, label="a"), words(), Classifier)
    assert encoder.messages[0] == "data.label: 1 of 2 rows of test have a label that no training row has, like 'xyz'"
    assert encoder.messages[1].startswith("data: 39 of 40 rows of train lose 312 tokens of their prompts")


def overlong_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of three splits of which some do not fit in 8 tokens; those of train that do."""
    table = [{"q": "ab", "a": "xyz" * (1 + 2 * (i % 4 == 1)), "k": "pq"[i == 1]} for i in range(9)]
    write_jsonl(folder / "train.jsonl", table)
    write_jsonl(folder / "validation.jsonl", table[:3])
    write_jsonl(folder / "test.jsonl", [{**row, "q": "abcdef"} for row in table[4:8]])
    return [row for row in table if len(row["a"]) == 3]


def test_rows_that_do_not_fit_are_left_out_and_counted(tmp_path):
    for name in ("all", "fit"):
        (tmp_path / name).mkdir()
    fit = overlong_rows(tmp_path / "all")
    write_jsonl(tmp_path / "fit" / "train.jsonl", fit)
    write_jsonl(tmp_path / "fit" / "validation.jsonl", [fit[0], fit[1]])
    write_jsonl(tmp_path / "fit" / "test.jsonl", [{**row, "q": "abcdef"} for row in fit[3:6]])
    data, fitting = load(tmp_path / "all", max_length=8), load(tmp_path / "fit", max_length=8)
    assert data.fingerprint == fitting.fingerprint
    assert [line for line in data.messages if "overlong" in line] == [
        f"data.overlong: {left} of {of} rows of {split} are left out, like {tmp_path}/all/{split}.jsonl:2, because "
        "their targets do not fit in data.max_length 8; 11 is enough for all of them"
        for split, left, of in (("train", 2, 9), ("validation", 1, 3), ("test", 1, 4))
    ]
    assert [line for line in data.messages if "lose" in line] == fitting.messages
    with pytest.raises(
        UserError, match=r"all/train\.jsonl:2: the target has 9 tokens .* or set data\.overlong to drop or"
    ):
        load(tmp_path / "all", max_length=8, overlong="error")
    with pytest.raises(
        UserError,
        match=r"train\.jsonl:1: the target does not fit in data\.max_length 4, .* 9 rows of train; 11 is enough",
    ):
        load(tmp_path / "all", max_length=4)
    write_jsonl(tmp_path / "all" / "validation.jsonl", [{"q": "ab", "a": "xyz" * 3, "k": "p"}])
    with pytest.raises(UserError, match=r"max_length 8, and there is no other row of validation; 11 is enough$"):
        load(tmp_path / "all", max_length=8)
    overlong_rows(tmp_path / "all")
    cut = load(tmp_path / "all", max_length=8, overlong="truncate")
    assert len(cut.train) == 9 and cut.train.lengths.max() == 8
    assert cut.messages[0] == "data.overlong: 2 of 9 rows of train lose 12 tokens at the ends of their targets"
    assert cut.validation.targets[1] == " xyzxyzxyz"


def test_owners_and_labels_of_rows_that_do_not_fit(tmp_path):
    """The owner q has one row, which is too long: a client without data, or none with partition.min_examples 1."""
    overlong_rows(tmp_path)
    for minimum, names in ((0, ["p", "q"]), (1, ["p"]), (7, ["p"])):
        natural = {"name": "natural", "min_examples": minimum}
        data = load(tmp_path, max_length=8, client="k", label="k", partition=natural)
        assert data.population.names == names and data.population.sizes().tolist() == [7, 0][: len(names)]
        assert data.train.labels.tolist() == [0] * 7 and data.train.label_names == ["p", "q"]
        assert len(data.train.owners) == 7
    (tmp_path / "mixed").mkdir()
    table = [{"q": "ab", "a": "xyz" * (1 + 2 * (i < 2)), "k": "pqr"[i % 3]} for i in range(9)]
    write_jsonl(tmp_path / "mixed" / "train.jsonl", [*table, {"q": "cd", "a": "v", "k": "r"}])
    rare = load(
        tmp_path / "mixed", max_length=8, client="k", partition={"name": "natural", "min_examples": 3},
        validation="../test.jsonl", test="../test.jsonl",
    )  # fmt: skip
    assert rare.population.names == ["r"] and rare.population.sizes().tolist() == [4]
    decoded = [words().decode(rare.train.tokens(i)).replace(" ", "") for i in range(4)]
    assert decoded == ["<s>ab:xyz</s>"] * 3 + ["<s>cd:v</s>"]


def test_a_row_loses_as_much_for_every_label(tmp_path):
    """Whichever label a row is asked about, it reads what it was trained on."""
    rows_ = [{"q": "abcdefgh", "a": "x"}, {"q": "abcdefgh", "a": "wxyz"}]
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows_)
    data = load(tmp_path, max_length=10, target=" {a}", label="a")
    # Room for <s>, wxyz and </s>: four tokens of the prompt are left, "fgh:".
    assert [words().decode(data.train.prompt(i)).split() for i in range(2)] == [["<s>", *"fgh:"]] * 2
    assert data.train.lost.tolist() == [5, 5]
    assert (data.train.lengths + 4 - np.array([1, 4])).tolist() == [10, 10]
    unlabelled = load(tmp_path, max_length=10, target=" {a}")
    assert unlabelled.train.lost.tolist() == [2, 5]


def test_what_is_said_comes_from_the_cache_too(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "train.jsonl", [{"q": "abc</s>defgh", "a": "x"}] * 30)
    first, again = (load(tmp_path, max_length=8) for _ in range(2))
    assert first.messages == again.messages and len(first.messages) == 2 + 2 * 3
    assert any("28 of 28 rows of train have the name of a special token" in line for line in first.messages)
