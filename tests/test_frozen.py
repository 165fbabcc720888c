"""What a run that an earlier version began must find again: names, orders, hashes and draws, written out.

A value here may be added to, never changed: a change makes runs that are under way refuse to resume, or go on with
other numbers without a word.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import fedhpc
from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.config import Model
from fedhpc.data.tokens import Tokens, cached_tokens, examples_from
from fedhpc.methods import with_head
from fedhpc.models.base import Base
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.encoder import Classifier, SentenceEncoder
from fedhpc.models.load import load_base
from fedhpc.models.seq2seq import Seq2Seq
from fedhpc.participation.blocks import form_blocks, resolve_block_size
from fedhpc.rng import bits, generator, generators, torch_seed
from fedhpc.training import rules
from fedhpc.training.local import LocalTraining
from fedhpc.updates.layout import Layout
from tests import tiny
from tests.federations import federate, save_random_bert, settings, tree, write_texts

# ---------------------------------------------------------------- random draws

#: Purpose of a draw -> the number of its keys; "*" where it has a list of them, {} for what is put in.
PURPOSES: dict[str, int | str] = {
    "adapter": 0,
    "askers": 0,
    "attack": 2,
    "attacked examples": 1,
    "attackers": 0,
    "available": "*",
    "batches": 3,
    "bootstrap": 0,
    "builtin/order": 1,
    "builtin/weights": 0,
    "builtin/{}": "*",
    "candidate": 2,
    "centroids": 1,
    "cma": "*",
    "cohort": "*",
    "demonstrations": 2,
    "device": 1,
    "direction": 3,
    "downlink.{}.{}": 1,
    "dropout": 2,
    "evaluated clients": 0,
    "evaluation subset": 0,
    "example noise": 3,
    "groups": 0,
    "head": 0,
    "held_out": 1,
    "hold_out:{}": 0,
    "label_noise": 0,
    "local clients": 0,
    "lora": "*",
    "noise": 2,
    "p-tuning": 0,
    "packed bytes": 0,
    "partition:dirichlet": 0,
    "partition:dirichlet:class": 1,
    "partition:iid": 0,
    "partition:max_examples": 1,
    "partition:quantity_skew": 0,
    "partition:shard": 0,
    "partition:virtual": 1,
    "poisson batches": 3,
    "preaggregation": 1,
    "prefix": 0,
    "prefix mlp": 0,
    "privacy": 1,
    "projection": 0,
    "prompt": 0,
    "proposals": 3,
    "public": 0,
    "public set": 0,
    "queue": 2,
    "root": 0,
    "scored": 2,
    "secure.chance": 0,
    "secure.client": 3,
    "secure.graph": 1,
    "shared": 2,
    "span of a weight": 0,
    "transforms.{}.{}": "*",
}


def purposes() -> dict[str, int | str]:
    """Of all calls of rng's functions that draw in the package, whatever they are imported as a part of."""
    every: dict[str, int | str] = {}
    for file in Path(fedhpc.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            if ast.unparse(node.func).rpartition(".")[2] not in ("generator", "generators", "torch_seed"):
                continue
            purpose, keys = node.args[1], node.args[2:]
            parts = purpose.values if isinstance(purpose, ast.JoinedStr) else [purpose]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            number: int | str = "*" if any(isinstance(key, ast.Starred) for key in keys) else len(keys)
            if text != "{}":  # rng itself
                assert every.setdefault(text, number) == number, f"{file}: {text}"
    return every


def test_purposes_of_random_draws() -> None:
    assert purposes() == PURPOSES


def test_draws_themselves() -> None:
    assert generator(3, "cohort", 1).choice(20, 4, replace=False).tolist() == [8, 19, 2, 15]
    assert generator(3, "batches", 1, 2, 0).permutation(6).tolist() == [2, 0, 3, 4, 5, 1]
    for seed in (0, 3, 2**32, 2**70 + 5):  # of many at once there are no others
        clients = [0, 2**32 - 1, *range(5, 40)]
        drawn = [draws.random(3).tolist() for draws in generators(seed, "partition:virtual", clients)]
        assert drawn == [generator(seed, "partition:virtual", client).random(3).tolist() for client in clients]
    assert torch_seed(3, "cohort", 7) == 7398901201097986113
    drawn = bits(torch.tensor([5, -9]), torch.tensor([0, 1 << 33]))
    assert drawn.tolist() == [7134611160154358618, 5483460494100681001]


# ---------------------------------------------------------------- layouts

LLAMA, GPT2, BERT = "model.layers.{0,1}.", "transformer.h.{0,1}.", "bert.encoder.layer.{0,1}."
PREFIX_MLP = ["embedding.weight", "transform.{0,2}.{weight,bias}"]
P_TUNING = ["embedding.weight", "mlp_head.{0,2,4}.{weight,bias}"]
HEAD = "classifier.{weight,bias}"
GPT2_FULL = ["{ln_1,attn.c_attn,attn.c_proj,ln_2,mlp.c_fc,mlp.c_proj}.{weight,bias}", "transformer.ln_f.{weight,bias}"]
BERT_LAYER = (
    "{attention.self.query,attention.self.key,attention.self.value,attention.output.dense,attention.output.LayerNorm,"
    "intermediate.dense,output.dense,output.LayerNorm}"
)

#: Base, method, its options, what is exchanged, and what is trained where that is something else. In order; with
#: braces as in a shell: a{0,1}.{b,c} is a0.b, a0.c, a1.b, a1.c.
LAYOUTS: list[tuple[str, str, dict[str, Any], list[str], list[str] | None]] = [
    ("llama", "adapter", {}, [LLAMA + "{self_attn.o_proj,mlp.down_proj}.adapter.{down,up}.{weight,bias}"], None),
    ("llama", "fedkseed", {}, ["coefficients"], None),
    (
        "llama",
        "full",
        {},
        [
            "model.embed_tokens.weight",
            "model.layers.{0,1}.{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,self_attn.o_proj,mlp.gate_proj,"
            "mlp.up_proj,mlp.down_proj,input_layernorm,post_attention_layernorm}.weight",
            "model.norm.weight",
        ],
        None,
    ),
    ("llama", "ia3", {}, [LLAMA + "self_attn.{k,v}_proj.ia3_l", LLAMA + "mlp.down_proj.ia3_l"], None),
    ("llama", "lora", {}, [LLAMA + "self_attn.{q,v}_proj.lora_{A,B}.weight"], None),
    ("llama", "lora", {"aggregation": "ffa"}, [LLAMA + "self_attn.{q,v}_proj.lora_B.weight"], None),
    (
        "llama",
        "lora",
        {"aggregation": "exact"},
        [LLAMA + "self_attn.{q,v}_proj.lora_{A,B}.weight", LLAMA + "self_attn.{q,v}_proj.lora_delta.weight"],
        [LLAMA + "self_attn.{q,v}_proj.lora_{A,B}.weight"],
    ),
    (
        "llama",
        "lora",
        {"aggregation": "stack"},
        [LLAMA + "self_attn.{q,v}_proj.lora_delta.weight"],
        [LLAMA + "self_attn.{q,v}_proj.lora_{A,B}.weight"],
    ),
    ("llama", "lora", {"aggregation": "alternate"}, [LLAMA + "self_attn.{q,v}_proj.lora_{A,B}.weight"], None),
    (
        "llama",
        "lora",
        {"aggregation": "svd"},
        [LLAMA + "self_attn.{q,v}_proj.lora_{A,B}.weight"],
        [LLAMA + "self_attn.{q,v}_proj.lora_B.weight"],
    ),
    (
        "llama",
        "lora",
        {"aggregation": "flex"},
        [LLAMA + "self_attn.{q,v}_proj.lora_{A,B}.weight", LLAMA + "self_attn.{q,v}_proj.lora_delta.weight"],
        [LLAMA + "self_attn.{q,v}_proj.lora_{A,B}.weight"],
    ),
    (
        "llama",
        "lora",
        {"aggregation": "dual"},
        [LLAMA + "self_attn.{q,v}_proj.lora_{A,B}.weight", LLAMA + "self_attn.{q,v}_proj.lora_{A,B}_local.weight"],
        None,
    ),
    ("llama", "lora", {"aggregation": "sb"}, [LLAMA + "self_attn.{q,v}_proj.lora_R.weight"], None),
    ("llama", "p_tuning", {}, P_TUNING, None),
    ("llama", "prefix", {"exchange": "raw"}, ["prompt_embeddings"], None),
    ("llama", "prefix", {"exchange": "mlp"}, PREFIX_MLP, None),
    ("llama", "prefix", {"exchange": "materialised"}, ["prompt_embeddings"], PREFIX_MLP),
    ("llama", "prompt", {}, ["prompt_embeddings"], None),
    ("gpt2", "adapter", {}, [GPT2 + "{attn,mlp}.c_proj.adapter.{down,up}.{weight,bias}"], None),
    ("gpt2", "full", {}, ["transformer.{wte,wpe}.weight", GPT2 + GPT2_FULL[0], GPT2_FULL[1]], None),
    ("gpt2", "full", {"last_layers": 1}, ["transformer.h.1." + GPT2_FULL[0], GPT2_FULL[1]], None),
    ("gpt2", "ia3", {}, [GPT2 + "attn.c_attn.ia3_l", GPT2 + "mlp.c_proj.ia3_l"], None),
    ("gpt2", "lora", {}, [GPT2 + "attn.c_attn.lora_{A,B}.weight"], None),
    (
        "bert",
        "adapter",
        {},
        [BERT + "{attention.output.dense,output.dense}.adapter.{down,up}.{weight,bias}", HEAD],
        None,
    ),
    (
        "bert",
        "full",
        {"parameters": "bias"},
        [
            "bert.embeddings.LayerNorm.bias",
            BERT + BERT_LAYER + ".bias",
            "bert.pooler.dense.bias",
            "classifier.{bias,weight}",
        ],
        None,
    ),
    (
        "bert",
        "ia3",
        {},
        [BERT + "attention.self.{key,value}.ia3_l", BERT + "{attention.output.dense,output.dense}.ia3_l", HEAD],
        None,
    ),
    (
        "bert",
        "lora",
        {"aggregation": "exact"},
        [BERT + "attention.self.{query,value}." + name + ".weight" for name in ("lora_{A,B}", "lora_delta")] + [HEAD],
        [BERT + "attention.self.{query,value}.lora_{A,B}.weight", HEAD],
    ),
    ("bert", "p_tuning", {}, [*P_TUNING, HEAD], None),
    ("bert", "prefix", {"exchange": "materialised"}, ["prompt_embeddings", HEAD], [*PREFIX_MLP, HEAD]),
    ("sentences", "retriever", {}, ["query_projection.weight"], None),
    ("sentences", "lora", {}, [BERT.removeprefix("bert.") + "attention.self.{query,value}.lora_{A,B}.weight"], None),
]


def expanded(patterns: list[str]) -> list[str]:
    """Every name that the braces stand for, the rightmost ones changing first."""
    names = []
    for pattern in patterns:
        parts = [part.split(",") if i % 2 else [part] for i, part in enumerate(re.split(r"\{(.*?)\}", pattern))]
        names += ["".join(choice) for choice in itertools.product(*parts)]
    return names


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """Tiny models of two layers: two decoders, a classifier and an encoder of sentences."""
    folder = tmp_path_factory.mktemp("encoder")
    save_random_bert(folder)
    model = Model.model_validate({"name": str(folder), "task": "embedding"})
    return {**{n: tiny.base(n) for n in ("llama", "gpt2", "bert")}, "sentences": load_base(model, torch.device("cpu"))}


@pytest.mark.parametrize(("family", "name", "options", "payload", "trainable"), LAYOUTS)
def test_layouts(
    bases: dict[str, Base],
    family: str,
    name: str,
    options: dict[str, Any],
    payload: list[str],
    trainable: list[str] | None,
) -> None:
    chosen = registry.options("methods", name)(**options)
    method = with_head(registry.choice("methods", name)(chosen, bases[family], 0))
    assert list(method.payload.shapes) == expanded(payload)
    assert list(method.trainable.shapes) == expanded(payload if trainable is None else trainable)


def test_methods_keep_their_names() -> None:
    """Those that are here have files; a new one may join them."""
    assert {name for _, name, *_ in LAYOUTS} <= set(registry.files("methods"))


def test_a_flat_vector_has_its_tensors_in_order() -> None:
    layout = Layout({"b": (2, 3), "a": (), "c": (2,)})
    views = layout.views(torch.arange(9.0))
    assert {n: t.tolist() for n, t in views.items()} == {"b": [[0, 1, 2], [3, 4, 5]], "a": 6, "c": [7, 8]}


# ---------------------------------------------------------------- files of a run


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real examples and a small Llama whose weights do not depend on any generator."""
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    network = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        for p in network.parameters():
            p.copy_((torch.arange(p.numel()) % 97 - 48).reshape(p.shape) / 512)
    network.save_pretrained(folder / "model")
    return folder


def tensors(path: Path) -> tuple[set[str], dict[str, Any]]:
    """The names of a safetensors file of a run, and the JSON in its header."""
    with safe_open(path, "np") as file:
        assert file.metadata()["format"] == "fedhpc-run"
        return set(file.keys()), json.loads(file.metadata()["meta"])


SCAFFOLD = {"client": {"scaffold": True}, "server": {"optimizer": "adam", "lr": 0.01}}
PERSONAL = {
    "client": {"momentum": 0.9},
    "server": {"momentum": 0.9},
    "personalization": {"parts": ["*lora_B*"]},
    "evaluation": {"client_fraction": 0.2},
}
PERSONAL_PARTS = {
    f"personal.model.layers.{layer}.self_attn.{projection}.lora_B.weight"
    for layer in (0, 1)
    for projection in ("q_proj", "v_proj")
}
LOCAL = {"mode": "local", "client": {"optimizer": "adamw", "lr": 0.01}}


@pytest.mark.parametrize(
    ("changes", "server", "client"),
    [
        pytest.param(SCAFFOLD, {"theta", "control", "server.mean", "server.square"}, {"control"}, id="scaffold"),
        pytest.param(PERSONAL, {"theta", "server.momentum"}, PERSONAL_PARTS, id="personal"),
        pytest.param(LOCAL, {"theta"}, {"theta", "memory.mean", "memory.square", "memory.count"}, id="local"),
    ],
)
def test_files_of_a_run(
    tmp_path: Path, texts: Path, changes: dict[str, Any], server: set[str], client: set[str]
) -> None:
    raw = {**tree(texts, federation={"rounds": 2, "cohort_size": 3}, **changes), "method": {"name": "lora", "rank": 2}}
    federate(settings(tmp_path, raw), ranks=2)

    names, meta = tensors(tmp_path / "checkpoint" / "state.safetensors")
    assert {name for name in names if not name.startswith("rows/")} == server | {"versions"}
    assert {name.split("/")[1] for name in names if name.startswith("rows/")} == {"rounds", "clients", "events"}
    assert set(meta) >= {"round", "rows", "block_size", "fingerprint_data", "fingerprint_model"}
    files = sorted((tmp_path / "clients").rglob("*.safetensors"))
    assert files
    for file in files:
        number, round_ = int(file.parent.name), int(file.stem)
        assert tensors(file) == (client, {"client": number, "round": round_})

    assert json.loads((tmp_path / "status.json").read_text())["format"] == "fedhpc-run"
    with h5py.File(tmp_path / "results.h5") as results:
        assert (results.attrs["format"], results.attrs["format_version"]) == ("fedhpc-run", 1)
        for key, value in (
            ("fingerprint_data", "16f2499e21885625c9ca8d74141c9bfc873398ac8dbb0b7bbb592615427ce010"),
            ("fingerprint_model", "8352a071939a57fe71c484ca69550fb1"),
        ):
            assert results.attrs[key] == meta[key] == value


@pytest.mark.parametrize(
    ("family", "name", "mark"),
    [("llama", "adapter", "fedhpc-adapter"), ("sentences", "retriever", "fedhpc-retriever")],
)
def test_formats_of_adapters(tmp_path: Path, bases: dict[str, Base], family: str, name: str, mark: str) -> None:
    base = bases[family]
    method = registry.choice("methods", name)(registry.options("methods", name)(), base, 0)
    method.export(method.initial(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["format"] == mark


# ---------------------------------------------------------------- hashes


def ints(*values: int) -> Any:
    """An array int32."""
    return np.array(values, dtype=np.int32)


def test_fingerprints_of_examples() -> None:
    tokens = Tokens(ints(1, 5, 6, 2, 1, 7, 2), np.array([0, 4, 7]), ints(2, 1))
    labelled = examples_from(
        tokens,
        labels=ints(1, 0),
        label_names=["a", "b"],
        owners=ints(0, 1),
        owner_names=["x", "yé"],
        prompts=["p", "q"],
        targets=["t", "u"],
    )
    assert examples_from(tokens).fingerprint == "06daa5e75a3e67a2e06fb5d1648e408b777cb6c2a4ec7ec8853ff00db1735c8e"
    assert labelled.fingerprint == "5653622c1bcae310c053489cfc2575df56bbbb0a22bf26855b59db940cfe8909"


def test_fingerprint_of_the_built_in_model() -> None:
    base = load_base(Model.model_validate({}), torch.device("cpu"))
    assert base.fingerprint == "57596f05ba1f240b6c784463fc1677c8"


class Characters:
    """A tokenizer of characters, without the library's own tables."""

    bos_token_id, eos_token_id, cls_token_id, sep_token_id = 1, 2, 1, 2
    all_special_tokens: ClassVar[tuple[str, ...]] = ()
    init_kwargs: ClassVar[dict[str, Any]] = {"lower": True}

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): 3 + i for i in range(26)}

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[3 + ord(c) % 26 for c in text] for text in texts]}

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return 2

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        return [1, *first, 2]


@pytest.mark.parametrize(
    ("model", "key"),
    [
        (CausalLM, "7236255431fcae8744cf714d74fcb509ce52b5b52c723e485e19042f907925a3"),
        (Classifier, "69140266d61cb64fc36ff3f9e3ecc9eb210c2b637879d580e4db98ce42effee6"),
        (Seq2Seq, "9cd26a76fcefb9f5d8ad3a71f08d6169acaf0ed0e46b950a764c9348e3ca4752"),
        (SentenceEncoder, "5d37d98ccf2daf8bb87369299e2df30e01e1c1dca0971f991238e188ae94dc8c"),
    ],
)
def test_keys_of_the_token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, key: str) -> None:
    """They follow from "fedhpc-tokens-3", the model's task, the limits, the tokenizer and the texts."""
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path))
    tokenizer: Any = Characters()
    _, message = cached_tokens(["ab", "c"], ["d", "ef"], ["1", "2"], tokenizer, 16, model)
    assert message is None
    (folder,) = (tmp_path / "tokens").iterdir()
    assert folder.name == key
    names = {"ids", "offsets", "prompt_lengths", "lost", "needed", "apart", "spelled", "cut", "overlong"}
    assert {file.name for file in folder.iterdir()} == {f"{name}.npy" for name in names}


# ---------------------------------------------------------------- arithmetic that follows an order


@pytest.mark.parametrize(
    ("costs", "block_size", "workers", "blocks"),
    [
        ([], 4, 8, []),
        ([3, 1, 2], 8, 8, [(10, 12, 11)]),
        ([5] * 6, 2, 8, [(10, 11), (12, 13), (14, 15)]),
        ([8, 8, 4, 4], 2, 8, [(10,), (11,), (12,), (13,)]),
        ([8, 8, 4, 4], 2, 2, [(10, 12), (11, 13)]),
        ([21, 15, 12, 9, 8, 6, 5, 3, 2, 1], 5, 2, [(10, 13, 15, 17, 18), (11, 12, 14, 16, 19)]),
        ([21, 15, 12, 9, 8, 6, 5, 3, 2, 1], 5, 1, [(10, 11, 12, 13, 14), (15, 16, 17, 18, 19)]),
        ([100, *[1] * 9], 4, 8, [(10, 11, 12, 13), (14, 15, 16), (17, 18, 19)]),
        (
            [(7 * i) % 23 + 1 for i in range(16)],
            2,
            8,
            [
                (23,), (13,), (16,), (19,), (22,), (12,), (25,), (15,), (18, 21), (11,), (24,), (14, 17), (20, 10),
            ],
        ),
        (
            [(7 * i) % 23 + 1 for i in range(40)],
            3,
            8,
            [
                (23,), (46, 13), (36, 26, 49), (16, 39, 29), (19, 42, 32), (22, 45, 12), (35, 25, 48), (15, 38, 28),
                (18, 41, 31), (21, 44), (11, 34), (24, 47), (14, 37), (27, 17), (40, 30), (20, 43), (10, 33),
            ],
        ),
    ],
)  # fmt: skip
def test_blocks(costs: list[int], block_size: int, workers: int, blocks: list[tuple[int, ...]]) -> None:
    assert form_blocks({10 + i: float(cost) for i, cost in enumerate(costs)}, block_size, workers) == blocks


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [1, 2, 2, 2, 3, 8, 8, 8]), ("cuda", [1, 2, 2, 2, 3, 8, 9, 32])])
def test_block_size_auto(device: str, sizes: list[int]) -> None:
    config = configuration.resolve({"partition": {"name": "iid"}})
    assert [resolve_block_size(config, cohort, device) for cohort in (1, 2, 5, 16, 17, 64, 65, 300)] == sizes


def test_weights_of_the_mean() -> None:
    """Shares over their sum, divided in float64."""
    used: list[np.ndarray] = []
    cohort: Any = SimpleNamespace(shares=np.array([3, 1, 7, 0.3]) / 13, weighted_sum=used.append)
    registry.choice("aggregators", "mean")(None).combine(cohort)
    assert [weight.hex() for weight in used[0].tolist()] == [
        "0x1.0fdbc090fdbc1p-2",
        "0x1.6a7a5616a7a56p-4",
        "0x1.3d2b0b53d2b0bp-1",
        "0x1.b2f9341b2f933p-6",
    ]


def test_order_of_the_local_rules() -> None:
    """FedProx's pull is clipped with the gradient, SCAFFOLD's correction comes after."""
    local = LocalTraining(optimizer=None, lr=0.1, batch_size=1, clip_norm=1.0, proximal=0.5)  # type: ignore[arg-type]
    corrections, start = torch.tensor([[10.0, 0.0]]), torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    applied = rules.in_order(local, start, corrections, method=None)  # type: ignore[arg-type]
    gradient, parameters = torch.tensor([[3.0, 2.0]], dtype=torch.float64), start + torch.tensor([[0.0, 4.0]])
    for rule in applied:
        rule.change(gradient, parameters)
    # (3, 2) + 0.5 (0, 4) = (3, 4), of length 5; to length 1; plus (10, 0).
    torch.testing.assert_close(gradient, torch.tensor([[10.6, 0.8]], dtype=torch.float64), rtol=0, atol=1e-6)
