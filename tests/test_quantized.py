"""Bases in few bits: against weights that numpy dequantised, on any number of ranks, in PEFT, and as stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import fedhpc
from fedhpc import evaluate
from fedhpc.config import Model
from fedhpc.errors import UserError
from fedhpc.models import load, quantized
from fedhpc.models.footprint import footprint
from fedhpc.models.llama import written_out
from fedhpc.ranks.verdict import RefusedError
from tests import federations, tiny
from tests.federations import Interrupted, federate, final, settings, table, tree, write_texts
from tests.test_block import relative, start_of, works
from tests.test_block import settings as local
from tests.test_export import run_snippets
from tests.test_methods import make, warm
from tests.test_precision import TRAINED

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
BITS: dict[str, dict[str, Any]] = {
    "8bit": {"quantize": "8bit"},
    "nf4": {"quantize": "4bit"},
    "fp4": {"quantize": "4bit", "quantization_type": "fp4"},
    "double": {"quantize": "4bit", "double_quantization": True},
}
# Dettmers et al. 2023, arXiv 2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# One bit for the sign, two for the exponent, one for the mantissa, of which the largest, 12, stands for 1.
FP4 = [sign * value / 12 for sign in (-1, 1) for value in (0.0, 0.0625, 2, 3, 4, 6, 8, 12)]
SHARING = [name for name in TRAINED if name not in ("full", "fedkseed")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny families in float32, each in a folder of its name."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2", "qwen2", "roberta", "t5"):
        tiny.base(family, torch.float32).model.save_pretrained(root / family)
    return root


@pytest.fixture(autouse=True)
def tokens(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "folders" in request.fixturenames:
        monkeypatch.setattr(load, "load_tokenizer", lambda model: tiny.TinyTokenizer())


def loaded(folder: Path, **options: Any) -> Any:
    return load.load_base(Model(name=str(folder), **options), CPU, ["a", "b", "c"] if folder.name == "roberta" else [])


def dequantised(weight: np.ndarray, quantize: str, table: list[float]) -> np.ndarray:
    """What a weight (out, in) is after it was quantised: 8 bits by row, 4 bits by blocks of 64."""
    if quantize == "8bit":
        weight = weight.astype(np.float16).astype(np.float32)
        most = np.abs(weight).max(axis=1, keepdims=True)
        return np.round(weight * (1 / most * np.float32(127))) * (most / 127)
    values = np.sort(np.array(table, np.float32))
    blocks = weight.reshape(-1, 64)
    most = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs((blocks / most)[..., None] - values).argmin(axis=-1)
    return (values[nearest] * most).reshape(weight.shape)


def reference(folder: Path, few: Any, table: list[float]) -> Any:
    """The base in 32 bits, whose weights are those that `few` has in few bits, by numpy."""
    base = loaded(folder)
    for path in quantized.layers(few.model):
        weight, whole = base.model.get_submodule(path).weight, few.quantization["quantize"]
        turned = type(base.model.get_submodule(path)).__name__ == "Conv1D"
        plain = (weight.T if turned else weight).contiguous().numpy()
        made = torch.from_numpy(dequantised(plain, whole, table))
        weight.copy_(made.T if turned else made)
    return base


def states_of(base: Any) -> torch.Tensor:
    with torch.no_grad():
        return base.read_some(3, 4, 9)


@pytest.mark.parametrize("bits", ["8bit", "nf4", "fp4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "roberta", "t5"])
def test_it_computes_with_the_dequantised_weights(folders: Path, family: str, bits: str) -> None:
    base = loaded(folders / family, **BITS[bits])
    found, wanted = states_of(base), states_of(reference(folders / family, base, FP4 if bits == "fp4" else NF4))
    assert float((found - wanted).norm()) <= 1e-6 * float(wanted.norm())
    assert bits == "8bit" or torch.equal(found, wanted)
    plain = states_of(loaded(folders / family))
    assert float((plain - wanted).norm()) > 1e-4 * float(plain.norm())


def test_eva_begins_on_the_dequantised_weights(folders: Path) -> None:
    few = loaded(folders / "llama", **BITS["nf4"])
    options = {"rank": 2, "init_lora_weights": "eva", "init_text": "Two quiet rooms over the bridge."}
    found, wanted = (make("lora", base, **options).initial() for base in (few, reference(folders / "llama", few, NF4)))
    plain = make("lora", loaded(folders / "llama"), **options).initial()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-5)
    assert any((value - plain[name]).norm() > 1e-3 for name, value in found.items())


@pytest.mark.parametrize("bits", BITS)
def test_double_quantization_rounds_scales_and_its_memory_is_told(folders: Path, bits: str) -> None:
    base = loaded(folders / "llama", **BITS[bits])
    told = base.messages[-1]
    assert "15,360 of 17,472 weights in few bits" in told
    assert str(folders / "llama") not in Path("/proc/self/maps").read_text()  # a mapped file counts as memory
    single = loaded(folders / "llama", quantize="4bit")
    assert (base.fingerprint == single.fingerprint) == (bits == "nf4")
    if bits == "double":
        found, wanted = states_of(base), states_of(single)
        assert 0 < float((found - wanted).norm()) < 0.1 * float(wanted.norm())


@pytest.mark.parametrize("bits", ["8bit", "nf4", "double"])
@pytest.mark.parametrize("name", SHARING)
def test_methods_train_as_on_the_dequantised_weights(folders: Path, name: str, bits: str) -> None:
    """Losses, gradients and the path through the Llama that is written out."""
    few, updates = loaded(folders / "llama", **BITS[bits]), []
    assert written_out(few.model)
    for base in (few, in_32_bits(few, loaded(folders / "llama"))):
        method = make(name, base)
        start, config = warm(method, torch.float32), local(optimizer="sgd", lr=0.1, steps=2)
        trained = tiny.train(base, method, tiny.objective(base), start, works(3), tiny.examples(), config, 1, 1)
        updates.append(trained.updates)
    assert relative(updates[0], updates[1], torch.zeros_like(updates[1])) < 1e-4
    assert float(updates[0].norm()) > 1e-3


def test_torchao_trains_as_on_the_dequantised_weights(folders: Path) -> None:
    pytest.importorskip("torchao")
    few, updates = loaded(folders / "llama", quantize="8bit", quantization_library="torchao"), []
    assert "15,360 of 17,472 weights in few bits (8bit by torchao)" in few.messages[-1]
    assert few.fingerprint not in (
        loaded(folders / "llama").fingerprint,
        loaded(folders / "llama", **BITS["8bit"]).fingerprint,
    )
    for base in (few, in_32_bits(few, loaded(folders / "llama"))):
        method = make("lora", base)
        start, config = warm(method, torch.float32), local(optimizer="sgd", lr=0.1, steps=2)
        trained = tiny.train(base, method, tiny.objective(base), start, works(3), tiny.examples(), config, 1, 1)
        updates.append(trained.updates)
    assert relative(updates[0], updates[1], torch.zeros_like(updates[1])) < 1e-4
    assert float(updates[0].norm()) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", ["8bit", "nf4"])
def test_beside_16_bits_the_loss_falls(folders: Path, bits: str, dtype: str) -> None:
    base = loaded(folders / "llama", dtype=dtype, **BITS[bits])
    method = make("lora", base)
    config = local(optimizer="sgd", lr=0.5, steps=8)
    start = start_of(method, torch.float32)
    trained = tiny.train(base, method, tiny.objective(base), start, works(1), tiny.examples(), config, 1, 1)
    assert trained.loss_last[0] < trained.loss_first[0]


def in_32_bits(few: Any, base: Any) -> Any:
    """`base` with the weights that those of `few` stand for, by bitsandbytes."""
    for path, layer in quantized.layers(few.model).items():
        weight = layer.weight
        if type(weight).__module__.startswith("torchao."):
            made = weight.dequantize()
        elif few.quantization["quantize"] == "4bit":
            made = quantized._weight_of(layer, torch.float32)
        else:
            scales = layer.state.SCB if weight.SCB is None else weight.SCB
            made = weight.data.float() * (scales.unsqueeze(1) / 127)
        base.model.get_submodule(path).weight.copy_(made)
    return base


def test_a_head_that_is_trained_keeps_all_its_bits(folders: Path) -> None:
    base = loaded(folders / "roberta", **BITS["nf4"])
    assert base.head == ("classifier.dense", "classifier.out_proj")
    assert not set(base.head) & set(quantized.layers(base.model))
    assert sum("encoder.layer" in path for path in quantized.layers(base.model)) == 12


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def raw_of(texts: Path, bits: str, **changes: Any) -> dict[str, Any]:
    method = {"method": {"name": "lora"}, "client": {"optimizer": "adamw", "lr": 0.02}}
    federation = {"rounds": 3, "cohort_size": 4}
    raw = tree(texts, **{**method, "federation": federation, "evaluation": {"samples": 3}, **changes})
    return {**raw, "method": {"name": "lora", **changes.get("method", {})}, "model": {**raw["model"], **BITS[bits]}}


@pytest.mark.parametrize("bits", ["double", pytest.param("8bit", marks=pytest.mark.slow)])
def test_a_run_has_the_same_bits_on_any_ranks_and_resumed(tmp_path: Path, texts: Path, bits: str) -> None:
    raw = raw_of(texts, bits)
    federate(settings(tmp_path / "1", raw))
    collectives = federate(settings(tmp_path / "3", raw), ranks=3)
    stopped = settings(tmp_path / "stopped", raw)
    with pytest.raises(Interrupted):
        federate(stopped, ranks=3, stop_at=int(0.6 * collectives))
    federate(stopped, ranks=2)
    payload = final(tmp_path / "1")
    for other in ("3", "stopped"):
        assert all(np.array_equal(value, payload[name]) for name, value in final(tmp_path / other).items())
        assert table(tmp_path / other, "test")["loss"] == table(tmp_path / "1", "test")["loss"]
    assert table(tmp_path / "1", "test")["loss"] < table(tmp_path / "1", "base")["loss"]
    other = "4bit" if bits == "8bit" else "8bit"
    with pytest.raises(RefusedError, match=rf"another configuration: .*model\.quantize \w+ -> {other}"):
        federate(
            settings(
                tmp_path / "1", {**raw, "model": {**raw["model"], "quantize": other, "double_quantization": False}}
            )
        )


@pytest.mark.parametrize(
    ("name", "bits"),
    [("lora", "nf4"), ("prefix", "nf4"), *(pytest.param(n, "8bit", marks=pytest.mark.slow) for n in ("lora", "ia3"))],
)
def test_an_export_is_used_in_the_bits_that_it_was_trained_in(
    tmp_path: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    bits: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By fedhpc, by `fedhpc evaluate`, and in PEFT as its card says."""
    raw = raw_of(texts, bits)
    raw["method"] = {"name": name, **({"num_virtual_tokens": 3} if name == "prefix" else {})}
    federate(settings(tmp_path / "run", raw))
    folder, samples = tmp_path / "run" / "adapter", table(tmp_path / "run", "samples")
    model = fedhpc.load(folder)
    assert model.base.quantization["quantize"] == BITS[bits]["quantize"] and quantized.layers(model.model)
    assert model.generate(samples["prompt"].tolist(), max_new_tokens=8) == samples["text"].tolist()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == raw["model"]["name"]
    assert evaluate.main([str(tmp_path / "run"), f"--out={tmp_path / 'test.json'}"]) == 0
    tested = json.loads((tmp_path / "test.json").read_text())["test"]["loss"]["value"]
    assert tested == float(table(tmp_path / "run", "test")["loss"])
    if name == "prefix" and federations.PEFT_FORGETS:
        return
    monkeypatch.chdir(folder)
    in_peft = run_snippets((folder / "README.md").read_text())["model"]
    ids = torch.tensor([[model.tokenizer.bos_token_id, *range(10, 22)]])
    quantized.compute_exactly(in_peft.get_base_model(), CPU)  # 8 bits round inputs too in eval mode
    with torch.no_grad(), model.attached(1) as attached:
        ours = model.base.base_logits(model.base.read(attached, ids)[:, -13:])
        theirs = in_peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -13:]
    assert float((ours - theirs).abs().max()) < 1e-5 * float(ours.abs().max())


# ---------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "stored in few bits by gptq and needs gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "stored in few bits by awq and needs gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "by compressed-tensors and needs compressed-tensors to load; pip"),
        ({"quant_method": "of_mine"}, "by 'of_mine', as its config.json says, and transformers knows no such"),
        ({}, "by 'None', as its config.json says"),
    ],
    ids=str,
)
def test_a_folder_in_few_bits_names_what_it_needs(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any], words: str
) -> None:
    absent = ("gptqmodel", "optimum", "compressed_tensors")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None if name in absent else object())
    folder = tmp_path / "stored"
    shutil.copytree(folders / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(UserError, match=words):
        loaded(folder)


@pytest.mark.parametrize(("library", "extra"), [("bitsandbytes", "quantize"), ("torchao", "torchao")])
def test_a_library_that_is_not_there_is_named(
    folders: Path, monkeypatch: pytest.MonkeyPatch, library: str, extra: str
) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None if name == library else object())
    with pytest.raises(UserError, match=rf"8bit needs {library}: pip install 'fedhpc\[{extra}\]'"):
        loaded(folders / "llama", quantize="8bit", quantization_library=library)


def test_a_folder_of_bitsandbytes_is_loaded_as_it_is_stored(folders: Path, tmp_path: Path) -> None:
    made = loaded(folders / "llama", **BITS["double"])
    folder = tmp_path / "stored"
    made.model.save_pretrained(folder)
    base = loaded(folder)
    assert torch.equal(states_of(base), states_of(made))
    assert base.fingerprint == made.fingerprint and "as stored" in base.messages[-1]
    assert footprint(Model(name=str(folder))) == footprint(Model(name=str(folders / "llama"), quantize="4bit"))
    with pytest.raises(UserError, match=r"runtime\.worker_ranks: .* stored in few bits, which cannot be divided"):
        load.load_base(Model(name=str(folder)), CPU, group=cast(Any, object()))
    with pytest.raises(UserError, match=r"stored in few bits already \(bitsandbytes\); take it out"):
        loaded(folder, **BITS["nf4"])
    for name in ("full", "fedkseed"):
        with pytest.raises(UserError, match=f"{name} trains the weights of the base, and .* has them as integers"):
            make(name, base)
