"""Going on from an adapter (method.from): round 0 is what PEFT, or the run before, makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedhpc
from fedhpc.ranks.verdict import RefusedError
from tests.federations import federate, save_random_bert, settings, table, tree, write_texts
from tests.test_export import loss_of


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    save_random_bert(folder / "bert")
    return folder


def save_lora(texts: Path, folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Path:
    """A LoRA adapter as PEFT itself saves it, far from where it began."""
    model = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=dtype)
    shape = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **shape))
    drawing = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 2 * torch.randn(p.shape, generator=drawing, dtype=p.dtype)
    model.save_pretrained(folder)
    return folder


def on(texts: Path, folder: Path, method: dict[str, Any], ranks: int = 1, **changes: Any) -> dict[str, Any]:
    """Run a round of a method; the columns of /rounds."""
    changes = {"model": {"dtype": "float64"}, **changes}
    raw = tree(texts, client={"lr": 1.0, "steps": 1}, federation={"cohort_size": 3}, **changes)
    federate(settings(folder, {**raw, "method": method}), ranks)
    return table(folder, "rounds")


LORA = {"name": "lora", "rank": 4, "alpha": 12.0, "targets": ["q_proj", "v_proj"]}


# Ranks and scales of their own for some layers.
BY_LAYER = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}, "use_rslora": True}


@pytest.mark.parametrize(
    ("aggregation", "options"),
    [
        ("average", {}),
        ("average", {"use_rslora": True}),
        ("ffa", {}),
        ("exact", {}),
        ("stack", {"r": 3}),
        ("average", BY_LAYER),
        ("exact", BY_LAYER),
        ("average", {"use_dora": True, **BY_LAYER}),
        ("ffa", {"use_dora": True}),
    ],
)
def test_a_run_begins_where_peft_is(texts: Path, tmp_path: Path, aggregation: str, options: dict[str, Any]) -> None:
    folder = save_lora(texts, tmp_path / "peft", **options)
    method = {**LORA, "aggregation": aggregation, "from": str(folder)}
    if aggregation != "exact" and "r" not in options:
        method |= options
    rounds = on(texts, tmp_path / "run", method, ranks=2)
    base = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(texts / "model")
    rows = [json.loads(line) for line in (texts / "validation.jsonl").read_text().splitlines()]
    untouched = loss_of(base.eval(), tokenizer, rows)
    wanted = loss_of(PeftModel.from_pretrained(base, folder).eval(), tokenizer, rows)
    assert abs(untouched - wanted) > 1e-3
    assert rounds["eval_loss"][0] == pytest.approx(wanted, abs=1e-6)  # PEFT keeps adapters in float32
    assert abs(rounds["eval_loss"][1] - rounds["eval_loss"][0]) > 1e-8
    events = table(tmp_path / "run", "events")["message"]
    assert f"method.from: goes on from {folder}" in list(events)


@pytest.mark.parametrize("aggregation", ["average", "exact"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_peft_began_in_the_weights(texts: Path, tmp_path: Path, start: str, aggregation: str) -> None:
    """PEFT takes the first product from the weights again when it loads them; it does not do so in float64."""
    folder = save_lora(texts, tmp_path / "peft", torch.float32, init_lora_weights=start)
    method = {**LORA, "aggregation": aggregation, "from": str(folder)}
    if aggregation == "average":
        with pytest.raises(RefusedError, match=f"than init_lora_weights True; .* method.init_lora_weights=.?{start}"):
            on(texts, tmp_path / "refused", method)
        method["init_lora_weights"] = start
    rounds = on(texts, tmp_path / "run", method, model={"dtype": "float32"})
    base = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=torch.float32)
    rows = [json.loads(line) for line in (texts / "validation.jsonl").read_text().splitlines()]
    loaded = PeftModel.from_pretrained(base, folder).eval()
    wanted = loss_of(loaded, AutoTokenizer.from_pretrained(texts / "model"), rows)
    assert rounds["eval_loss"][0] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("options", [{"use_dora": True, **BY_LAYER}, {"layers_to_transform": [1]}], ids=str)
def test_adapters_of_peft_are_loaded_for_use(texts: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_lora(texts, tmp_path / "peft", **options)
    used = fedhpc.load(folder, str(texts / "model"))
    base = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=torch.float32)
    ids = torch.arange(5, 13).view(2, 4)
    with torch.no_grad(), used.attached(2):
        found = used.model(input_ids=ids).logits
    torch.testing.assert_close(
        found, PeftModel.from_pretrained(base, folder)(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


METHODS = {
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "lora": {"rank": 2},
    "dora": {"rank": 2, "use_dora": True},
    "ia3": {},
    "adapter": {"bottleneck": 4},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_begins_where_the_other_ended(texts: Path, tmp_path: Path, name: str) -> None:
    method = {"name": "lora" if name == "dora" else name, **METHODS[name]}
    first = on(texts, tmp_path / "one", method)
    second = on(texts, tmp_path / "two", {**method, "from": str(tmp_path / "one" / "adapter")})
    assert abs(first["eval_loss"][1] - first["eval_loss"][0]) > 1e-6
    assert second["eval_loss"][0] == pytest.approx(first["eval_loss"][1], rel=1e-9)


def test_a_head_goes_on_too(texts: Path, tmp_path: Path) -> None:
    more = {
        "model": {"name": str(texts / "bert"), "task": "classification", "dtype": "float64"},
        "data": {"prompt": "{mr}", "max_length": 40},
    }
    first = on(texts, tmp_path / "one", {"name": "lora"}, **more)
    folder = tmp_path / "one" / "adapter"
    second = on(texts, tmp_path / "two", {"name": "lora", "from": str(folder)}, **more)
    assert second["eval_loss"][0] == pytest.approx(first["eval_loss"][1], rel=1e-9)
    names = json.loads((folder / "config.json").read_text())
    names["id2label"]["0"] = "another"
    (folder / "config.json").write_text(json.dumps(names))
    with pytest.raises(RefusedError, match=r"tells apart another, .* and data.label has"):
        on(texts, tmp_path / "three", {"name": "lora", "from": str(folder)}, **more)


@pytest.mark.parametrize(
    ("options", "method", "message"),
    [
        (
            {},
            {"rank": 8},
            "method.from: the adapter has other options than rank 8; give method.rank=4 method.alpha=12.0",
        ),
        ({}, {"targets": ["k_proj"]}, r'other options than targets .*; give method.targets=\["q_proj","v_proj"\]'),
        (
            {"layers_to_transform": [0], "target_modules": ["q_proj"]},
            {},
            r'other options than targets .*; give method.targets=\["model.layers.0.self_attn.q_proj"\]',
        ),
        (
            {"rank_pattern": {"v_proj": 2}, "use_rslora": True},
            {},
            r"options than use_rslora False, .*; give method.rank=4 method.alpha=12.0 method.use_rslora=true method.r",
        ),
        (
            {"use_dora": True},
            {},
            "options than use_dora False; give method.rank=4 method.alpha=12.0 method.use_dora=true",
        ),
        ({"use_dora": True}, {"aggregation": "exact"}, "other options than use_dora False"),
        ({"bias": "lora_only"}, {}, r"self_attn.q_proj.bias is \(32,\), and nothing fits"),
        ({}, {"name": "prefix"}, "the adapter is LORA, and this method's are PREFIX_TUNING; choose the method"),
        ({}, {"name": "full"}, "method.from: this method cannot go on from an adapter"),
    ],
)
def test_what_does_not_fit_is_said(
    texts: Path, tmp_path: Path, options: dict[str, Any], method: dict[str, Any], message: str
) -> None:
    folder = save_lora(texts, tmp_path / "peft", **options)
    if options.get("bias"):  # Llama has none, so that PEFT saves none
        tensors = load_file(folder / "adapter_model.safetensors")
        extra = {"base_model.model.model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
        save_file({**tensors, **extra}, folder / "adapter_model.safetensors")
    chosen = {**LORA, **method} if "name" not in method else method
    with pytest.raises(RefusedError, match=message):
        on(texts, tmp_path / "run", {**chosen, "from": str(folder)})
    assert not (tmp_path / "run").exists()


def test_layers_that_peft_finds_by_a_pattern(texts: Path, tmp_path: Path) -> None:
    pattern = r".*\.(q|v)_proj"
    named, found = save_lora(texts, tmp_path / "named"), save_lora(texts, tmp_path / "found", target_modules=pattern)
    assert json.loads((found / "adapter_config.json").read_text())["target_modules"] == pattern
    prompts = ["name[Aromi] :", "food[Indian]"]
    assert fedhpc.load(found).generate(prompts) == fedhpc.load(named).generate(prompts)
    losses = [
        on(texts, folder / "run", {**LORA, "from": str(folder)})["eval_loss"].tolist() for folder in (named, found)
    ]
    assert losses[0] == losses[1]


def test_folders_that_are_no_adapter(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "old" / "adapter").mkdir(parents=True)
    for folder, message in (
        (tmp_path / "old", "is no export of a run; give '.*adapter'"),
        (tmp_path / "nowhere", "there is no folder"),
        (texts / "model", "the adapter is a whole model, .*; give the folder as model.name"),
        (texts, "is no adapter that fedhpc loads; give the adapter/ of a complete run"),
    ):
        with pytest.raises(RefusedError, match=rf"method\.from: .*{message}"):
            on(texts, tmp_path / "run", {**LORA, "from": str(folder)})


def test_an_adapter_that_diverged_is_refused(texts: Path, tmp_path: Path) -> None:
    folder = save_lora(texts, tmp_path / "peft")
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
    with pytest.raises(
        RefusedError, match=r"method\.from: the adapter's .*weight has values that are no finite numbers"
    ):
        on(texts, tmp_path / "run", {**LORA, "from": str(folder)})
    assert not (tmp_path / "run").exists()


def test_a_changed_adapter_is_another_run(texts: Path, tmp_path: Path) -> None:
    folder = save_lora(texts, tmp_path / "peft")
    on(texts, tmp_path / "run", {**LORA, "from": str(folder)})
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(RefusedError, match="the content of the model changed"):
        on(texts, tmp_path / "run", {**LORA, "from": str(folder)})
