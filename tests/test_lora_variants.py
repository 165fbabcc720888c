"""LoRA with the options that people give PEFT: each trains, exports and goes on as PEFT's own does."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from fedhpc import config as configuration
from fedhpc.errors import UserError
from fedhpc.methods import with_head
from fedhpc.methods.lora import Lora, starts
from tests import tiny
from tests.test_block import relative, settings, works
from tests.test_linear import qwen3_moe
from tests.test_lora import injects, train_in_peft
from tests.test_methods import make, trained_by_torch, warm

FAMILIES = ["llama", "gpt2"]  # grouped queries and tied embeddings; Conv1D and biases

#: Name of a case -> options here, and the same in PEFT.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "patterns": (
        {
            "targets": "all-linear",
            "rank_pattern": {"(c_fc|up_proj)": 1, r"layers\.0\..*": 5, "h.0.attn.c_attn": 5},
            "alpha_pattern": {"(q_proj|c_attn)": 11.0},
            "use_rslora": True,
        },
        {
            "target_modules": "all-linear",
            "rank_pattern": {"(c_fc|up_proj)": 1, r"layers\.0\..*": 5, "h.0.attn.c_attn": 5},
            "alpha_pattern": {"(q_proj|c_attn)": 11.0},
            "use_rslora": True,
        },
    ),
    "dora": ({"use_dora": True, "targets": "all-linear"}, {"use_dora": True}),
    "pissa": ({"init_lora_weights": "pissa"}, {}),
    "olora": ({"init_lora_weights": "olora", "use_rslora": True}, {"use_rslora": True}),
    "all": (
        {
            "init_lora_weights": "pissa",
            "use_dora": True,
            "use_rslora": True,
            "loraplus_lr_ratio": 4.0,
            "rank_pattern": {"(q_proj|c_attn)": 5},
        },
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"(q_proj|c_attn)": 5}},
    ),
    "loraplus": ({"loraplus_lr_ratio": 8.0}, {}),
    "eva": ({"init_lora_weights": "eva", "init_text": ["The kitchen closes at ten.", "A pub by the sea."]}, {}),
}


def options_of(case: str, family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options of a case and PEFT's; of the patterns those that the family has layers for."""
    both = copy.deepcopy(CASES[case])
    for options in both:
        for key in ("rank_pattern", "alpha_pattern"):
            patterns = options.get(key, {})
            for name in [name for name in patterns if ("layers" in name if family == "gpt2" else "h.0" in name)]:
                del patterns[name]
    return both


def lora(base: Any, **options: Any) -> Lora:
    method = make("lora", base, **options)
    assert isinstance(method, Lora)
    return method


def adapted(base: Any, method: Any, **options: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """PEFT's own model, and its trained parameters under our names."""
    shape = {"r": method.options.rank, "lora_alpha": method.options.alpha, "target_modules": method.targets}
    config = peft.LoraConfig(task_type=base.task_type, fan_in_fan_out=base.name == "gpt2", **{**shape, **options})
    model = peft.get_peft_model(copy.deepcopy(base.model), config).to(base.dtype)
    if method.options.init_lora_weights is not True:  # PEFT has the residual in the weights of the base
        first = method._rule.factors.first
        with torch.no_grad():
            for path, scale in method._rule.factors.scales.items():
                layer = model.get_submodule(f"base_model.model.{path}.base_layer")
                product = scale * first[f"{path}.lora_B.weight"] @ first[f"{path}.lora_A.weight"]
                layer.weight -= product.T if base.name == "gpt2" else product
    named = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in model.named_parameters()}
    named = {n.replace("magnitude_vector.weight", "magnitude_vector"): p for n, p in named.items()}
    return model, {n: p for n, p in named.items() if "lora_" in n}


@pytest.mark.parametrize("client", [{"optimizer": "sgd", "lr": 0.2}, {"optimizer": "adamw", "lr": 0.02}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_a_client_trains_as_peft_and_torch_optim_do(case: str, family: str, client: dict[str, Any]) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(**client)
    ours, theirs = options_of(case, family)
    method = lora(base, **ours)
    start, work = warm(method, torch.float64), works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    model, named = adapted(base, method, **theirs)
    assert set(named) == set(method.payload.shapes)
    with torch.no_grad():
        for name, value in method.payload.views(start[0]).items():
            named[name].copy_(value)
    rule = None
    if ratio := method.options.loraplus_lr_ratio:
        optimizer = torch.optim.SGD if client["optimizer"] == "sgd" else torch.optim.AdamW
        rule = create_loraplus_optimizer(model, optimizer, lr=client["lr"], loraplus_lr_ratio=ratio)
    wanted = trained_by_torch(model, named, method, data, config, work, rule=rule)
    assert relative(found, wanted, start[0]) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_a_block_equals_its_clients_alone(case: str, family: str) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method = lora(base, **options_of(case, family)[0])
    start, group = warm(method, torch.float64), works(3)
    together = tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1).updates
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
        assert float((together[i] - alone).norm() / alone.norm()) < 1e-9


@pytest.mark.parametrize(
    ("case", "aggregation"),
    [
        *((case, "average") for case in CASES),
        *(("patterns", aggregation) for aggregation in ("ffa", "exact", "stack")),
        ("pissa", "exact"),
        ("all", "ffa"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_gives_the_same_logits_in_peft(case: str, family: str, aggregation: str, tmp_path: Path) -> None:
    base = tiny.base(family)
    method = lora(base, aggregation=aggregation, **options_of(case, family)[0])
    values = method.payload.views(warm(method, torch.float64))
    method.export({name: value[0] for name, value in values.items()}, tmp_path)
    ours = logits(method, values, [0, 0])
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).double()
    torch.testing.assert_close(loaded(input_ids=ids_of(2)).logits, ours, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(base.model(input_ids=ids_of(2)).logits, ours)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids_of(2)).logits, ours, rtol=1e-6, atol=1e-6)


def ids_of(rows: int) -> torch.Tensor:
    return torch.randint(3, tiny.VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(1))


def logits(method: Lora, values: Any, clients: list[int]) -> torch.Tensor:
    """The logits (B, T, vocabulary) of rows of these clients, whose payloads are `values`."""
    ids, base = ids_of(len(clients)), method.base
    batch: Any = SimpleNamespace(
        ids=ids, row=torch.arange(len(ids)).repeat_interleave(9), positions=torch.arange(ids.numel())
    )
    with torch.no_grad(), method.attach(method.start(values), values, torch.tensor(clients)) as attached:
        found: torch.Tensor = base.logits(attached, base.states(attached, batch), batch.row)
    return found.view(*ids.shape, -1)


@pytest.mark.parametrize("options", [CASES["all"][0], {"use_dora": True, "targets": ["q_proj", "lm_head"]}], ids=str)
def test_rows_of_several_clients_are_each_its_own(options: dict[str, Any]) -> None:
    base = tiny.base("qwen2")
    method = lora(base, **options)
    start = warm(method, torch.float64)
    several = method.payload.views(torch.cat([start, 1.5 * start]))
    mixed = logits(method, several, [1, 0, 1])
    for client in (0, 1):
        alone = method.payload.views(start if client == 0 else 1.5 * start)
        found = logits(method, alone, [0, 0, 0])
        rows = [0, 2] if client else [1]
        torch.testing.assert_close(mixed[rows], found[rows], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(mixed[1], logits(method, several, [1, 1, 1])[1])
    loaded = in_peft_from(method, {name: value[0] for name, value in several.items()})
    torch.testing.assert_close(loaded(input_ids=ids_of(3)).logits[1], mixed[1], rtol=1e-6, atol=1e-6)


def in_peft_from(method: Lora, values: dict[str, torch.Tensor]) -> Any:
    """The export of a payload, loaded by PEFT."""
    with tempfile.TemporaryDirectory() as folder:
        method.export(values, Path(folder))
        return peft.PeftModel.from_pretrained(copy.deepcopy(method.base.model), folder).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_same_masks_peft_trains_dora_alike(family: str) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method = lora(base, use_dora=True, init_lora_weights="pissa", dropout=0.3)
    start, work = warm(method, torch.float64), works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    model, named = adapted(base, method, use_dora=True)
    with torch.no_grad():
        for name, value in method.payload.views(start[0]).items():
            named[name].copy_(value)
    inject = injects(model, 0.3, work.client_id)
    train_in_peft(model, named, config, data, work, inject)
    assert relative(found, method.payload.flatten({n: p.detach() for n, p in named.items()}), start[0]) < 1e-9


# ---------------------------------------------------------------- where training begins


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_factors_begin_as_those_of_peft(name: str, family: str, use_rslora: bool) -> None:
    base = tiny.base(family, torch.float32)
    method = lora(base, init_lora_weights=name, use_rslora=use_rslora)
    config = peft.LoraConfig(
        r=3, lora_alpha=6.0, target_modules=method.targets, fan_in_fan_out=family == "gpt2", init_lora_weights=name,
        use_rslora=use_rslora,
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    values = method.initial()
    for path in method._layers:
        layer = model.get_submodule(f"base_model.model.{path}")
        theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        if family == "gpt2" and name == "olora":  # PEFT takes the QR decomposition of Conv1D's transposed weight
            continue
        ours = values[f"{path}.lora_B.weight"] @ values[f"{path}.lora_A.weight"]
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-6)
    # The model is at first what the base is.
    views = {n: t.to(torch.float32).unsqueeze(0) for n, t in values.items()}
    torch.testing.assert_close(
        logits(method, views, [0, 0]), base.model(input_ids=ids_of(2)).logits, rtol=1e-4, atol=1e-4
    )


def components(inputs: torch.Tensor, rank: int) -> np.ndarray:
    """By numpy: eigenvectors (rank, in) of the covariance of inputs (..., in), with the largest number positive."""
    flat = inputs.flatten(0, -2).double().numpy()
    a = np.linalg.eigh(np.cov(flat.T))[1][:, ::-1].T[:rank]
    return a * np.sign(np.take_along_axis(a, np.abs(a).argmax(1)[:, None], 1))


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2", "bert", "t5"])
def test_eva_begins_with_the_components_of_what_layers_are_given(family: str) -> None:
    """Each layer by itself, in whole texts; the rank by a pattern, and the output layer of predictions."""
    base, text = tiny.base(family), "Two quiet rooms over the bridge."
    targets = [name for name in ("lm_head", "q_proj", "c_attn", "c_proj", "query", "q", "v_proj", "down_proj", "wo")
               if any(path.rsplit(".", 1)[-1] == name for path, _ in base.model.named_modules())]  # fmt: skip
    method = lora(base, init_lora_weights="eva", init_text=text, targets=targets, rank_pattern={targets[-1]: 5})
    seen: dict[str, torch.Tensor] = {}
    for path, layer in method._layers.items():
        layer.module.register_forward_hook(lambda _, given, __, path=path: seen.update({path: given[0].clone()}))
    ids = torch.tensor([tiny.TinyTokenizer()(text)["input_ids"]])
    half = ids.shape[1] // 2
    if family == "t5":  # the target follows what T5 begins with
        begun = torch.nn.functional.pad(ids[:, half:-1], (1, 0), value=base.model.config.decoder_start_token_id)
        base.model(input_ids=ids[:, :half], decoder_input_ids=begun)
    else:
        base.model(input_ids=ids)
    seen, values = dict(seen), method.initial()
    for path in method._layers:
        a, b = values[f"{path}.lora_A.weight"], values[f"{path}.lora_B.weight"]
        given = seen[path]
        if family in ("llama", "gpt2", "qwen2"):  # nothing follows the last token
            given = given[:, :-1]
        assert a.shape[0] == (5 if path.endswith(targets[-1]) else 3) and not b.any()
        np.testing.assert_allclose(a.numpy(), components(given, len(a)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_eva_begins_as_that_of_peft(family: str) -> None:
    """With so few tokens that PEFT's randomised decomposition, in 32 bits, is exact; ranks not redistributed."""
    base, text = tiny.base(family, torch.float32), "A pub."
    method = lora(base, init_lora_weights="eva", init_text=text)
    config = peft.LoraConfig(
        r=3, target_modules=method.targets, fan_in_fan_out=family == "gpt2", init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(base.model), config, low_cpu_mem_usage=True)
    ids = torch.tensor([tiny.TinyTokenizer()(text)["input_ids"]])
    peft.initialize_lora_eva_weights(model, [{"input_ids": ids[:, :-1]}], show_progress_bar=False)
    values = method.initial()
    for path in method._layers:
        theirs = model.get_submodule(f"base_model.model.{path}").lora_A["default"].weight
        torch.testing.assert_close(values[f"{path}.lora_A.weight"].float(), theirs.detach(), rtol=0, atol=1e-4)


def test_eva_on_long_texts_and_on_layers_that_none_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are read in pieces; layers that are given the same begin alike, those that are given nothing as drawn."""
    base, text = tiny.base("llama"), "The harbour is quiet in the morning and loud at night."
    monkeypatch.setattr(starts, "_AT_ONCE", 20)
    whole = lora(base, init_lora_weights="eva", init_text=text, targets=["q_proj", "v_proj"]).initial()
    parts = [text[:18], text[18:36], text[36:]]
    pieces = lora(base, init_lora_weights="eva", init_text=parts, targets=["q_proj", "v_proj"]).initial()
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)
    first = "model.layers.0.self_attn.{}.lora_A.weight"
    assert torch.equal(whole[first.format("q_proj")], whole[first.format("v_proj")])
    base.model.tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 8)})
    beside = lora(base, init_lora_weights="eva", init_text=text, targets=["q_proj", "v_proj"])
    drawn = lora(base, targets=["q_proj", "v_proj"]).initial()
    assert all(
        torch.equal(value, (drawn[n].double() if "tower" in n else whole[n])) for n, value in beside.initial().items()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_begins_as_the_base(family: str) -> None:
    base = tiny.base(family)
    method = lora(base, use_dora=True)
    _, named = adapted(base, method, use_dora=True)
    values = {n: t.double() for n, t in method.initial().items()}
    for name, value in values.items():
        if "magnitude" in name:
            torch.testing.assert_close(value, named[name].double(), rtol=1e-6, atol=0)
    found = logits(method, {n: t.unsqueeze(0) for n, t in values.items()}, [0, 0])
    torch.testing.assert_close(found, base.model(input_ids=ids_of(2)).logits, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- which layers


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.ENCODERS, *tiny.SEQ2SEQ])
@pytest.mark.parametrize(
    ("targets", "exclude"),
    [
        ("all-linear", None),
        ("all-linear", ["query_key_value", "q_proj", "k_proj", "c_attn", "query", "q"]),
        (r".*[._](q|query|c_attn|q_proj|query_key_value)", None),
        ("all-linear", r".*\.0\..*"),
    ],
)
def test_layers_are_those_of_peft(family: str, targets: str, exclude: list[str] | str | None) -> None:
    base = tiny.base(family)
    if isinstance(exclude, list):
        there = {path.rsplit(".", 1)[-1] for path, _ in base.model.named_modules()}
        exclude = [name for name in exclude if name in there]
    method = lora(base, targets=targets, exclude_modules=exclude)
    config = peft.LoraConfig(
        task_type=base.task_type, target_modules=targets, exclude_modules=exclude, fan_in_fan_out=family == "gpt2"
    )
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    theirs = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert theirs and list(method._layers) == theirs
    # PEFT reads the names of the export as the same layers.
    again = peft.LoraConfig(target_modules=method.targets, fan_in_fan_out=family == "gpt2")
    model = peft.get_peft_model(copy.deepcopy(base.model), again)
    assert [n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")] == theirs
    assert with_head(method).messages[0].startswith(f"method.targets: {len(theirs)} layers are adapted, named ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"init_lora_weights": "olora", "rank": 40},
            "method.init_lora_weights: rank 40 is more than model.layers.0.*has",
        ),
        (
            {"init_lora_weights": "eva", "init_text": "abc"},
            "method.init_text: layers are given 2 tokens of these texts, and rank 3 needs more than that",
        ),
        (
            {"init_lora_weights": "eva", "init_text": "abc", "rank": 40},
            "method.init_lora_weights: rank 40 is more than",
        ),
        ({"init_lora_weights": "eva", "init_text": ["abcd", "a"]}, "method.init_text: 'a' is one token"),
        ({"targets": ["nope"]}, "method.targets: the model has no linear layer named nope; it has: down_proj"),
        (
            {"targets": "q_proj"},
            r"method.targets: the expression 'q_proj' matches no .*; write method.targets=\[q_proj\]",
        ),
        ({"exclude_modules": "v_p"}, r"method.exclude_modules: the expression 'v_p' .* write method.exclude_modules="),
        ({"targets": "(q_proj"}, r"method.targets: '\(q_proj' is no regular expression: missing \)"),
        ({"exclude_modules": ["nope"]}, "method.exclude_modules: nope matches none of the adapted layers, which are "),
        ({"exclude_modules": "*"}, r"method.exclude_modules: '\*' is no regular expression: nothing to repeat"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "method.exclude_modules: no layer is left to adapt; exclude fewer"),
        ({"rank_pattern": {"down_proj": 2}}, "method.rank_pattern: 'down_proj' matches no adapted layer; they are: m"),
        ({"alpha_pattern": {"nope": 2.0}}, "method.alpha_pattern: 'nope' matches no adapted layer"),
        ({"rank_pattern": {"(q_proj": 2}}, r"method.rank_pattern: '\(q_proj' is no regular expression: missing \)"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as refused:
        lora(tiny.base("llama"), **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ({"use_dora": True, "aggregation": "exact"}, {}, "use_dora with method.aggregation exact: lengths .* ffa"),
        ({"use_dora": True, "aggregation": "stack"}, {}, "method.use_dora with method.aggregation stack"),
        ({"init_lora_weights": "pissa", "aggregation": "stack"}, {}, "init_lora_weights pissa with .* use average"),
        ({"use_dora": True}, {"model": {"quantize": "4bit"}}, "method.use_dora needs the weights, which model.q"),
        ({"init_lora_weights": "olora"}, {"model": {"quantize": "8bit"}}, "init_lora_weights olora needs the weights"),
        ({"init_lora_weights": "eva"}, {}, "init_lora_weights eva and method.init_text need each other"),
        ({"init_text": "Two rooms."}, {}, "init_lora_weights eva and method.init_text need each other"),
        ({"init_lora_weights": "eva", "init_text": "Two rooms.", "aggregation": "sb"}, {}, "eva with .* use average"),
        ({"init_lora_weights": "eva", "init_text": []}, {}, "method.init_text"),
        ({"init_lora_weights": "eva", "init_text": "Two rooms.", "aggregation": "ffa"}, {}, "ffa sends no A; use a"),
        ({"loraplus_lr_ratio": 0.0}, {}, "method.loraplus_lr_ratio"),
        ({"loraplus_lr_ratio": 4.0}, {"client": {"scaffold": True, "optimizer": "sgd"}}, "sgd divides by one"),
        (
            {"loraplus_lr_ratio": 4.0},
            {"client": {"optimizer": "sgd"}, "server": {"aggregator": "fednova"}},
            "server.aggregator fednova divides by one learning rate, and method.loraplus_lr_ratio has two: give one",
        ),
        ({"aggregation": "stack", "ranks": [1, 2], "rank_pattern": {"q_proj": 2}}, {}, "method.ranks is of clients"),
        ({"rank_pattern": {"q_proj": 0}}, {}, "method.rank_pattern.q_proj"),
        ({"rank": 0}, {}, "method.rank"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(method: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        configuration.resolve(
            {"partition": {"name": "iid", "num_clients": 4}, "method": {"name": "lora", **method}, **more}
        )
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"init_lora_weights": "olora"}, {"init_lora_weights": "eva", "init_text": "Two rooms."}],
    ids=str,
)
def test_experts_have_neither_magnitudes_nor_a_start(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^method\.targets: method\..* is for linear layers, and .*experts"):
        lora(qwen3_moe(), targets=["q_proj", "experts.down_proj"], **options)
