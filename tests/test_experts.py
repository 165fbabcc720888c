"""Mixtures of experts: what methods change in routed experts and their routers, against PEFT and plain formulas."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf

import fedhpc
from fedhpc.approaches.describe import describe
from fedhpc.approaches.prepare import prepare
from fedhpc.errors import UserError
from fedhpc.methods.ia3 import load
from fedhpc.methods.lora.stored import stored, unstored
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.experts import ExpertLoad
from fedhpc.models.load import BUILTIN
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from tests import tiny
from tests.federations import Interrupted, federate, final, table, tree, write_texts
from tests.federations import settings as run_settings
from tests.test_block import relative, settings, start_of, works
from tests.test_export import loss_of, rows_of
from tests.test_federation import same_results
from tests.test_methods import make, trained_by_torch, warm

COMMON: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 96, "moe_intermediate_size": 16,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
NETWORKS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**COMMON, num_local_experts=4)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**COMMON, num_experts=4, shared_expert_intermediate_size=32)
    ),
    # A dense layer below one with experts.
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**COMMON, num_experts=4, mlp_only_layers=[0])),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**COMMON, num_experts=4)),
    "deepseek_v2": lambda: tf.DeepseekV2ForCausalLM(tf.DeepseekV2Config(**COMMON, **DEEPSEEK)),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**COMMON, **DEEPSEEK)),
    # Biases, gates and inputs interleaved, weights (E, in, out).
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**COMMON, num_local_experts=4, head_dim=8)),
}
FAMILIES = list(NETWORKS)
# Those that hold and compute nothing in another way than one of the others.
_ALIKE = {"qwen2_moe", "olmoe", "deepseek_v2"}
SOME = [pytest.param(family, marks=pytest.mark.slow) if family in _ALIKE else family for family in FAMILIES]
# DeepSeek's router computes in 32 bits, whatever the model's type is.
TOLERANCE = {family: 1e-6 if "deepseek" in family else 1e-9 for family in FAMILIES}
PATTERNS = {"mixtral": {"experts.gate_up_proj": 2, "gate": 1}, "deepseek_v2": {"mlp.*": 2}}
ROUTER = {family: "router" if family == "gpt_oss" else "gate" for family in FAMILIES}
WEIGHTS = ["experts.gate_up_proj", "experts.down_proj"]


def base_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model, with weights larger than usual and biases that are not zero."""
    torch.manual_seed(0)
    model = NETWORKS[family]().to(dtype).eval().requires_grad_(False)
    model.set_experts_implementation("eager")  # grouped products know no float64
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
            elif p.ndim > 1 and "embed" not in name:
                p.mul_(3)
    return CausalLM.of(model, tiny.TinyTokenizer(), torch.device("cpu"), family, family)


def in_peft(base: Any, method: Any, modules: list[str], parameters: list[str]) -> tuple[Any, dict[str, Any]]:
    """PEFT's own model, and its trained parameters by their names in files."""
    o = method.options
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=o.rank, lora_alpha=o.alpha, target_modules=modules, target_parameters=parameters
    )
    model = peft.get_peft_model(copy.deepcopy(base.model), config).to(base.dtype)
    named = {
        name.removeprefix("base_model.model.").replace(".default", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return model, named


def as_peft(method: Any, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """A payload (P,) by the names and in the shapes of PEFT."""
    return stored(method.payload.views(values), method._layers)


def equal_to_peft(family: str, targets: list[str], modules: list[str], parameters: list[str], **client: Any) -> float:
    """How far a client's training is from PEFT's with torch.optim."""
    base, data, config = base_of(family), tiny.examples(), settings(**client)
    method = make("lora", base, targets=targets, rank=3)
    start, work = warm(method, torch.float64), works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    model, named = in_peft(base, method, modules, parameters)
    with torch.no_grad():
        for name, value in as_peft(method, start[0]).items():
            named[name].copy_(value)
    assert len(named) == len(method.payload.shapes)
    trained_by_torch(model, named, _Flat(), data, config, work)  # type: ignore[arg-type]
    values = unstored({name: p.detach() for name, p in named.items()}, method._layers)
    return relative(found, method.payload.flatten(values), start[0])


class _Flat:
    """In place of a method: nothing is made of the parameters that were trained."""

    payload = property(lambda self: self)

    def flatten(self, values: Any) -> None:
        pass


@pytest.mark.parametrize("family", SOME)
def test_a_client_trains_experts_as_peft_and_torch_optim_do(family: str) -> None:
    adamw = family in ("mixtral", "gpt_oss")
    client = {"optimizer": "adamw", "lr": 0.02} if adamw else {"optimizer": "sgd", "lr": 0.2}
    attention = "o_proj"
    assert equal_to_peft(family, [attention, *WEIGHTS], [attention], WEIGHTS, **client) < TOLERANCE[family]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_client_trains_the_router_as_peft_does(family: str) -> None:
    router = ROUTER[family]
    found = equal_to_peft(
        family, [router, "experts.down_proj"], [], [f"{router}.weight", "experts.down_proj"], optimizer="sgd", lr=0.2
    )
    assert found < 1e-9


def test_one_weight_of_experts_alone() -> None:
    for name in WEIGHTS:
        assert equal_to_peft("qwen3_moe", [name], [], [name], optimizer="sgd", lr=0.2) < 1e-9


@pytest.mark.parametrize("options", [{}, {"aggregation": "ffa"}], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_block_equals_its_clients_alone(family: str, options: dict[str, Any]) -> None:
    base, data, config = base_of(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method = make("lora", base, targets=["o_proj", ROUTER[family], *WEIGHTS], rank=3, **options)
    start, group = warm(method, torch.float64), works(4)
    together = tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1).updates
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
        assert float((together[i] - alone).norm() / alone.norm()) < TOLERANCE[family]


def logits_of(base: Any, method: Any, values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits with a payload (1, P) attached."""
    views = method.payload.views(values)
    with torch.no_grad(), method.attach(views, views, torch.zeros(len(ids), dtype=torch.int64)):
        logits: torch.Tensor = base.model(input_ids=ids).logits
    return logits


# PEFT looks for patterns among modules alone when it warns of those that match nothing; it applies these.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_scores_the_same_in_peft(family: str, tmp_path: Path) -> None:
    base = base_of(family)
    shared = {"qwen2_moe": ["shared_expert.down_proj"], "deepseek_v2": ["down_proj"], "deepseek_v3": ["up_proj"]}
    targets = ["o_proj", ROUTER[family], *WEIGHTS, *shared.get(family, [])]
    method = make("lora", base, targets=targets, rank=3, rank_pattern=PATTERNS.get(family, {}))
    start = warm(method, torch.float64)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    method.export(method.payload.views(start[0]), tmp_path)
    plain, ours = base.model(input_ids=ids).logits, logits_of(base, method, start, ids)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).double()
    with torch.no_grad():
        theirs = loaded(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, plain, atol=1e-2)
    torch.testing.assert_close(base.model(input_ids=ids).logits, plain, rtol=0, atol=0)  # nothing stays attached


def test_training_goes_on_from_the_export(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = base_of("mixtral")
    method = make("lora", base, targets=["o_proj", "gate", *WEIGHTS], rank=3)
    start = warm(method, torch.float64)
    method.export(method.payload.views(start[0]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    again = method.imported(config, tensors)
    assert torch.equal(method.payload.flatten(again), start[0])
    other = make("lora", base, targets=["o_proj", *WEIGHTS], rank=3)
    with pytest.raises(UserError, match=r"give method\.targets="):
        other.imported(config, tensors)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["gate_proj"], r"no linear layer named gate_proj; it has: .*experts\.down_proj, experts\.gate_up_proj, gate,"),
        (["experts.nope"], "no linear layer named experts.nope"),
    ],
)
def test_names_that_nothing_has_are_refused_with_those_that_are_there(targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("lora", base_of("mixtral", torch.float32), targets=targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "exact"}, r"^method\.aggregation: exact knows no factors of experts"),
        ({"dropout": 0.1}, r"^method\.dropout: in experts, like those of model\.layers\.0\.mlp\.experts\.down_proj"),
    ],
)
def test_options_that_know_no_experts_are_refused(options: dict[str, Any], message: str) -> None:
    base = base_of("mixtral", torch.float32)
    with pytest.raises(UserError, match=message):
        make("lora", base, targets=["experts.down_proj"], **options)
    make("lora", base, targets=["q_proj", "gate"], **options)


def test_experts_that_compute_otherwise_are_refused() -> None:
    """Llama 4 sends every token to every expert, most of them times zero."""
    config = tf.Llama4TextConfig(**{**COMMON, "num_key_value_heads": 2}, num_local_experts=4, head_dim=8)
    base = CausalLM.of(tf.Llama4ForCausalLM(config).eval(), tiny.TinyTokenizer(), torch.device("cpu"), "l4", "l4")
    with pytest.raises(UserError, match=r"^method\.targets: .*experts\.down_proj"):
        make("lora", base, targets=["experts.down_proj"])


def test_what_names_do_not_reach_is_said() -> None:
    base = base_of("deepseek_v3", torch.float32)
    some = make("lora", base, targets=["down_proj", "experts.down_proj"])
    assert some.messages == [
        "method.targets: 3 of 20 linear layers are adapted; those of routed experts, experts.gate_up_proj, are not "
        "among them"
    ]
    assert make("lora", base, targets=WEIGHTS).messages == []
    assert "experts.down_proj, experts.gate_up_proj, are not" in make("ia3", base, outputs=["o_proj"]).messages[0]
    assert make("lora", tiny.base("llama")).messages == []


# ---------------------------------------------------------------- (IA)^3 and full

RESCALED = {"outputs": ["k_proj", "experts.gate_up_proj"], "inputs": ["experts.down_proj"]}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_client_rescales_experts_as_a_model_with_multiplied_weights_does(family: str) -> None:
    """The reference multiplies weights and biases by what torch.optim trains, in the model's own forward pass."""
    base, data, config = base_of(family), tiny.examples(), settings(optimizer="sgd", lr=0.5)
    method = make("ia3", base, **RESCALED)
    start, work = warm(method, torch.float64), works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    named = {name: torch.nn.Parameter(value.clone()) for name, value in method.payload.views(start[0]).items()}
    model = copy.deepcopy(base.model)
    plain = dict(model.named_parameters())

    def multiplied(**inputs: Any) -> Any:
        weights = dict(plain)
        for name, vector in named.items():
            path = name.removesuffix(".ia3_l")
            weight = path if path in plain else f"{path}.weight"
            weights[weight] = plain[weight] * (vector.mT if "experts" in path and family == "gpt_oss" else vector)
            bias = f"{path}_bias" if path in plain else f"{path}.bias"
            if bias in plain and vector.shape[-1] == 1:
                weights[bias] = plain[bias] * vector.squeeze(-1)
        return torch.func.functional_call(model, weights, kwargs=inputs)

    wanted = trained_by_torch(multiplied, named, method, data, config, work)
    assert relative(found, wanted, start[0]) < 1e-9


def test_a_block_that_rescales_experts_equals_its_clients_alone() -> None:
    base, data, config = base_of("mixtral"), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method = make("ia3", base, **RESCALED)
    start, group = warm(method, torch.float64), works(4)
    together = tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1).updates
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
        assert float((together[i] - alone).norm() / alone.norm()) < 1e-9


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_rescaled_experts_load_into_a_plain_model(family: str, tmp_path: Path) -> None:
    base = base_of(family)
    method = make("ia3", base, outputs=["k_proj", ROUTER[family], "experts.gate_up_proj"], inputs=["experts.down_proj"])
    start = warm(method, torch.float64)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    method.export(method.payload.views(start[0]), tmp_path)
    ours = logits_of(base, method, start, ids)
    loaded = load(copy.deepcopy(base.model), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, ours, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(base.model(input_ids=ids).logits, ours, atol=1e-2)
    with pytest.raises(UserError, match="belongs to another model"):
        load(tiny.base("llama").model, tmp_path)


def test_biases_of_experts_are_trained_with_the_others() -> None:
    method = make("full", base_of("gpt_oss", torch.float32), parameters="bias")
    assert {"model.layers.0.mlp.experts.down_proj_bias", "model.layers.0.self_attn.q_proj.bias"} <= set(
        method.payload.shapes
    )


# ---------------------------------------------------------------- whole runs


def save(folder: Path, family: str, dtype: torch.dtype) -> None:
    """A random mixture with the tokenizer of the built-in base."""
    tokenizer = tf.AutoTokenizer.from_pretrained(BUILTIN)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**COMMON, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    special = {f"{part}_token_id": getattr(tokenizer, f"{part}_token_id") for part in ("pad", "bos", "eos")}
    config: Any = (
        tf.MixtralConfig(**{**sizes, **special}, num_local_experts=4)
        if family == "mixtral"
        else tf.Qwen3MoeConfig(**{**sizes, **special}, num_experts=4, mlp_only_layers=[0])
    )
    model = tf.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embed" not in name:
                p.mul_(4)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    save(folder / "mixtral", "mixtral", torch.float32)
    save(folder / "qwen3_moe", "qwen3_moe", torch.float64)
    return folder


def raw_of(texts: Path, family: str, **changes: Any) -> dict[str, Any]:
    dtype = "float64" if family == "qwen3_moe" else "float32"
    common: dict[str, Any] = {
        "model": {"name": str(texts / family), "dtype": dtype},
        "client": {"optimizer": "adamw", "lr": 0.02},
        "federation": {"rounds": 2, "cohort_size": 5, "dropout": 0.2},
    }
    return {
        **tree(texts, **{**common, **changes}),
        "method": {"name": "lora", "rank": 3, "targets": ["o_proj", "gate", *WEIGHTS]},
    }


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_federation_moves_experts_with_the_same_bits_on_any_number_of_ranks(
    family: str, texts: Path, tmp_path: Path
) -> None:
    raw = raw_of(texts, family)
    federate(run_settings(tmp_path / "1", raw))
    for ranks in (2, 3):
        federate(run_settings(tmp_path / str(ranks), raw), ranks)
        same_results(tmp_path / "1", tmp_path / str(ranks))
        same_load(tmp_path / "1", tmp_path / str(ranks))
    config = run_settings(tmp_path / "stopped", raw)
    with pytest.raises(Interrupted):
        federate(config, 2, stop_at=25)
    federate(config)
    assert set(table(tmp_path / "stopped", "events")["kind"]) >= {"resumed"}
    same_results(tmp_path / "1", tmp_path / "stopped", ("rounds", "clients"))
    same_load(tmp_path / "1", tmp_path / "stopped")

    values = final(tmp_path / "1")
    moved = {name: value for name, value in values.items() if "experts" in name and "lora_B" in name}
    layers = 2 if family == "mixtral" else 1  # the other one is dense
    assert len(moved) == 2 * layers
    for name, value in moved.items():
        assert value.shape[0] == 4 and (np.abs(value).max(axis=(1, 2)) > 0).all(), name

    load = table(tmp_path / "1", "experts")
    assert load["round"].tolist() == [1] * 4 * layers + [2] * 4 * layers
    assert load["layer"].tolist() == [layer for layer in range(2 - layers, 2) for _ in range(4)] * 2
    assert load["expert"].tolist() == [0, 1, 2, 3] * layers * 2
    np.testing.assert_allclose(load["share"].reshape(-1, 4).sum(axis=1), 1, rtol=1e-12)

    model = tf.AutoModelForCausalLM.from_pretrained(texts / family, experts_implementation="eager")
    tokenizer = tf.AutoTokenizer.from_pretrained(BUILTIN)
    untouched = loss_of(model.eval(), tokenizer, rows_of(texts))
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "1" / "adapter").eval()
    reported = float(table(tmp_path / "1", "test")["loss"])
    assert loss_of(loaded, tokenizer, rows_of(texts)) == pytest.approx(reported, abs=1e-5)
    assert abs(untouched - reported) > 1e-3
    # fedhpc's own use of it.
    ours = fedhpc.load(tmp_path / "1" / "adapter").payload
    for name, value in values.items():
        np.testing.assert_array_equal(ours[name].numpy(), value)


def same_load(one: Path, other: Path) -> None:
    mine, theirs = table(one, "experts"), table(other, "experts")
    for name, values in mine.items():
        np.testing.assert_array_equal(values, theirs[name])


def test_the_load_leaves_out_padding_and_what_stands_in_front() -> None:
    """Counted again by hand, from the router's own choice for each row alone."""
    base, data = base_of("mixtral"), tiny.examples()
    indices = np.array([3, 8, 11, 20])
    method = make("prompt", base, num_virtual_tokens=5)
    views = method.payload.views(start_of(method, torch.float64))
    load, rows = ExpertLoad(base), torch.zeros(4, dtype=torch.int64)
    batch = base.batch(data, indices)
    with torch.no_grad(), method.attach(views, views, rows) as attached, load.of(batch):
        base.states(attached, batch)
    wanted = torch.zeros(2, 4, dtype=torch.int64)
    experts = [base.model.model.layers[i].mlp.experts for i in range(2)]

    def note(i: int, given: Any) -> None:
        wanted[i] += given[1][5:].flatten().bincount(minlength=4)

    hooks = [module.register_forward_pre_hook(lambda _, given, i=i: note(i, given)) for i, module in enumerate(experts)]
    for index in indices:
        one = base.batch(data, np.array([index]))
        with torch.no_grad(), method.attach(views, views, rows[:1]) as attached:
            base.states(attached, one)
    for hook in hooks:
        hook.remove()
    assert torch.equal(load.counts, wanted)
    assert int(wanted[0].sum()) == 2 * int((data.lengths_of(indices) - 1).sum())


def test_the_check_says_how_a_trial_forward_loads_the_experts(texts: Path, tmp_path: Path) -> None:
    config = run_settings(tmp_path, raw_of(texts, "mixtral"))
    approach = prepare(config, LoopbackTransport(), Launch(), write_cache=False)
    lines = describe(approach, LoopbackTransport())
    at = next(i for i, line in enumerate(lines) if line.startswith("load of experts: one trial forward"))
    for layer in (0, 1):
        name, shares = lines[at + 1 + layer].split(": ")
        assert name == f"experts of layer {layer}"
        assert sum(float(share.removesuffix("%")) for share in shares.split(", ")) == pytest.approx(100, abs=0.3)


def test_full_trains_experts_and_its_folder_loads(texts: Path, tmp_path: Path) -> None:
    raw = {**raw_of(texts, "mixtral", federation={"rounds": 1, "cohort_size": 2}), "method": {"name": "full"}}
    federate(run_settings(tmp_path, raw))
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    before = tf.AutoModelForCausalLM.from_pretrained(texts / "mixtral", dtype=torch.float32)
    for name in ("gate_up_proj", "down_proj"):
        one, other = (getattr(m.model.layers[1].mlp.experts, name) for m in (model, before))
        assert float((one - other).detach().abs().amax(dim=(1, 2)).min()) > 0
    tokenizer = tf.AutoTokenizer.from_pretrained(BUILTIN)
    reported = float(table(tmp_path, "test")["loss"])
    assert loss_of(model, tokenizer, rows_of(texts)) == pytest.approx(reported, abs=1e-5)
