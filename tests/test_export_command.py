"""`fedhpc export`: merged models, clients' and rounds' adapters, and what cannot be written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedhpc
from fedhpc import evaluate
from fedhpc.approaches.export import export
from fedhpc.approaches.prepare import prepare
from fedhpc.config import Model, parse_yaml
from fedhpc.errors import nearest
from fedhpc.export import llama_cpp, merged
from fedhpc.export.__main__ import main
from fedhpc.export.target import written as written_to
from fedhpc.methods import make_method
from fedhpc.methods.base import Method
from fedhpc.models.load import load_base
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.results.files import TEMPORARY
from fedhpc.results.results_file import Results
from tests.federations import (
    federate,
    final,
    save_random_bert,
    save_random_llama,
    save_random_t5,
    settings,
    table,
    tree,
    write_texts,
)

TEXTS = ["name[Aromi], area[city centre]", "name[Blue Spice], food[Chinese], near[Crowne Plaza Hotel]"]
LABELS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny random models in float32, by what they are."""
    folder = tmp_path_factory.mktemp("models")
    for name, save in (("llama", save_random_llama), ("bert", save_random_bert), ("t5", save_random_t5)):
        (folder / name).mkdir()
        save(folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(1)
    experts = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 4, "head_dim": 8}
    shapes: dict[str, tuple[type[Any], Any]] = {
        "gpt2": (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, **ends),
        ),
        "qwen2": (
            transformers.Qwen2ForCausalLM,
            transformers.Qwen2Config(**size, **heads, **ends, tie_word_embeddings=True),
        ),
        "qwen2_moe": (
            transformers.Qwen2MoeForCausalLM,
            transformers.Qwen2MoeConfig(**size, **heads, **ends, **experts, num_experts_per_tok=2),
        ),
    }
    for name, (model, shape) in shapes.items():
        network = model(shape)
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(4.0 if p.ndim > 1 else 1.0)
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    # A temperature without sampling, as published models have it: transformers warns of it, and no run says so.
    (folder / "qwen2" / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    return folder


def drawn(method: Method) -> dict[str, Tensor]:
    """A payload whose effect shows, but which does not blow the logits up."""
    drawing = torch.Generator().manual_seed(0)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=drawing, dtype=value.dtype)
        for name, value in method.initial().items()
    }


def adapter(folder: Path, model: Path, options: Mapping[str, Any], dtype: str = "float32") -> Path:
    """The export of a method with drawn values."""
    raw = {"model": {"name": str(model), "dtype": dtype}, "method": dict(options), "partition": {"name": "iid"}}
    config = settings(folder, raw)
    labels = LABELS if model.name == "bert" else []
    base = load_base(Model(name=str(model), dtype=dtype), torch.device("cpu"), labels)
    method = make_method(config.method, base, 0, 32)
    export(method, drawn(method), folder / "adapter", config)
    return folder / "adapter"


def logits(folder: Path) -> Tensor:
    """What an export computes on texts."""
    model = fedhpc.load(folder)
    return merged._logits(model) if "texts" in model.base.answers else model.logits(TEXTS)


LORA = {"name": "lora", "rank": 3, "alpha": 4.0}
MERGED: list[tuple[str, dict[str, Any]]] = [
    ("llama", LORA),
    ("llama", {**LORA, "use_rslora": True, "targets": "all-linear", "rank_pattern": {"q_proj": 2}}),
    ("llama", {**LORA, "use_dora": True}),
    ("llama", {**LORA, "init_lora_weights": "pissa"}),
    ("llama", {**LORA, "init_lora_weights": "olora", "aggregation": "exact"}),
    ("llama", {"name": "ia3"}),
    ("gpt2", {**LORA, "targets": "all-linear"}),
    ("gpt2", {**LORA, "use_dora": True, "targets": ["c_attn", "lm_head"]}),
    ("gpt2", {"name": "ia3"}),
    ("qwen2", {**LORA, "targets": ["q_proj", "lm_head"]}),
    ("qwen2", {"name": "ia3"}),
    ("qwen2_moe", {**LORA, "targets": ["q_proj", "experts.down_proj", "experts.gate_up_proj", "gate"]}),
    ("qwen2_moe", {"name": "ia3", "outputs": ["experts.gate_up_proj", "v_proj"], "inputs": ["experts.down_proj"]}),
    ("bert", LORA),
    ("bert", {**LORA, "use_dora": True}),
    ("bert", {"name": "ia3"}),
    ("bert", {"name": "full", "parameters": "bias"}),
    ("t5", LORA),
    ("t5", {"name": "ia3"}),
    ("t5", {**LORA, "targets": ["lm_head", "v"]}),
    ("llama", {"name": "full"}),
]


@pytest.mark.parametrize(("name", "options"), MERGED, ids=lambda value: value if isinstance(value, str) else None)
def test_a_merged_model_has_the_adapters_logits(
    tmp_path: Path, models: Path, name: str, options: dict[str, Any]
) -> None:
    folder = adapter(tmp_path, models / name, options)
    difference, _ = merged.merge(folder, tmp_path / "merged")
    if options["name"] == "full":  # another base would be exported untrained
        with pytest.raises(fedhpc.UserError, match="is a whole model and has no base; leave --base out"):
            fedhpc.load(folder, base=str(models / name))
    expected, found = logits(folder), logits(tmp_path / "merged")
    scale = max(1.0, float(expected.abs().max()))
    assert difference.largest <= 1e-6 * max(1.0, difference.values)
    torch.testing.assert_close(found, expected, atol=1e-6 * scale, rtol=0)


def test_an_output_layer_leaves_the_embeddings_that_it_was_tied_to(
    tmp_path: Path, models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path, models / "qwen2", {**LORA, "targets": ["lm_head"]})
    (folder / "chat_template.jinja").write_text("{{ messages }}")  # as of a run on chats with a template of its own
    facts = json.loads((folder / "fedhpc.json").read_text())
    (folder / "fedhpc.json").write_text(json.dumps({**facts, "precision": "bfloat16"}))  # whose rounding is no mistake
    capfd.readouterr()
    merged.merge(folder, tmp_path / "merged")
    assert capfd.readouterr() == ("", "")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }}"
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["temperature"] == 0.5
    before = AutoModelForCausalLM.from_pretrained(models / "qwen2")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    embeddings = after.get_input_embeddings().weight
    assert not after.config.tie_word_embeddings and after.lm_head.weight is not embeddings
    assert torch.equal(embeddings, before.get_input_embeddings().weight)
    assert not torch.equal(after.lm_head.weight, embeddings)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"name": "prefix", "num_virtual_tokens": 2}, "a prefix stands in front of a text"),
        ({"name": "p_tuning", "num_virtual_tokens": 2}, "a soft prompt stands in front of a text"),
        ({"name": "adapter", "bottleneck": 2}, "a bottleneck adapter is a network"),
    ],
    ids=["prefix", "p_tuning", "adapter"],
)
def test_what_is_no_change_of_weights_is_not_merged(
    tmp_path: Path, models: Path, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(fedhpc.UserError, match=rf"{what}.*cannot be merged; .*fedhpc\.load or transformers"):
        merged.merge(adapter(tmp_path, models / "llama", options), tmp_path / "merged")


def test_a_base_in_few_bits_is_not_merged(tmp_path: Path, models: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = adapter(tmp_path, models / "llama", LORA)
    facts = json.loads((folder / "fedhpc.json").read_text())
    (folder / "fedhpc.json").write_text(json.dumps({**facts, "quantize": "8bit"}))
    with pytest.raises(fedhpc.UserError, match="is stored in 8bit, so merged weights would be rounded again; serve"):
        merged.merge(folder, tmp_path / "merged")


def test_a_merged_classifier_is_a_pipeline(tmp_path: Path, models: Path) -> None:
    folder = adapter(tmp_path, models / "bert", LORA)
    merged.merge(folder, tmp_path / "merged")
    labels = [one["label"] for one in transformers.pipeline("text-classification", str(tmp_path / "merged"))(TEXTS)]
    assert labels == [LABELS[int(row.argmax())] for row in logits(folder)]


# ---------------------------------------------------------------- of runs


class Killed(Exception):  # noqa: N818  not an error of the program
    """Stands for a signal."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def raw_of(texts: Path, **changes: Any) -> dict[str, Any]:
    raw = tree(
        texts,
        data={"client": "label"},
        federation={"cohort_size": 2, "rounds": 3},
        client={"optimizer": "adamw", "lr": 0.05},
        **changes,
    )
    return {**raw, "partition": {"name": "natural"}, "method": {"name": "lora", "rank": 2}}


@pytest.fixture(scope="module")
def run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose best round is not the last one."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    raw = raw_of(texts, evaluation={"keep": "best"}, server={"lr": 5.0})  # which goes too far after the first round
    federate(settings(folder, raw))
    return folder


def written(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, by the names that they have in /final."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def test_a_merged_run_is_a_model_of_transformers(
    run: Path, texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(run), "--merge", "out/model", "--adapter", "out/adapter", "--dtype", "float32"]) == 0
    screen = capfd.readouterr()
    assert screen.err == "" and len(screen.out.splitlines()) == 2 and "differ by" in screen.out
    pipe = transformers.pipeline("text-generation", "out/model", dtype="float32")
    ids = pipe.tokenizer(f"{pipe.tokenizer.bos_token}{TEXTS[0]} :", add_special_tokens=False, return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, "out/adapter")
    with torch.no_grad():
        torch.testing.assert_close(pipe.model(**ids).logits, model(**ids).logits, atol=1e-6, rtol=1e-5)
    assert pipe(TEXTS[0], max_new_tokens=2)
    card = Path("out/model/README.md").read_text()
    base_temp = str(run.parents[1])
    for file in [*Path("out/model").glob("*.json"), *Path("out").glob("*/README.md")]:
        assert base_temp not in file.read_text(), file
    loss = float(table(run, "test")["loss"])
    for text in (
        "fedhpc export run --adapter adapter --merge model",
        f"{loss:.3f}",
        "partition natural",
        "with 90 examples",
        '"rank": 2',
        "fedhpc export",
    ):
        assert text in card, text


PERSONAL: dict[str, dict[str, Any]] = {
    "dual": {
        "method": {"name": "lora", "rank": 2, "aggregation": "dual"},
        "personalization": {"parts": ["*_local.weight"]},
    },
    "fine-tuned": {"method": {"name": "lora", "rank": 2}, "personalization": {"finetune_steps": 2}},
}


@pytest.mark.parametrize("name", PERSONAL)
def test_a_clients_model_is_the_one_that_the_run_tested(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    raw = raw_of(texts, evaluation={"client_fraction": 0.3})
    federate(settings(tmp_path / "run", {**raw, **PERSONAL[name]}))
    tested = table(tmp_path / "run", "client_eval")
    row = int(np.flatnonzero(np.isin(tested["client_id"], table(tmp_path / "run", "clients")["client_id"]))[0])
    client = str(tested["client_name"][row])
    capsys.readouterr()
    assert main([str(tmp_path / "run"), "--client", client, "--adapter", str(tmp_path / "one")]) == 0
    assert f"the adapter of client {client}, round 3 of 3\n" in capsys.readouterr().out
    config, out = str(tmp_path / "run" / "config.yaml"), tmp_path / "one.json"
    assert evaluate.main([str(tmp_path / "one"), config, "--per-client", "--out", str(out)]) == 0
    clients = json.loads(out.read_text())["clients"]
    assert clients["loss"][clients["name"].index(client)] == pytest.approx(
        float(tested["loss_personal"][row]), abs=1e-6
    )
    assert abs(float(tested["loss_personal"][row]) - float(tested["loss"][row])) > 1e-4


def test_a_round_that_is_kept_is_exported_and_no_other(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = int(Results.read(run / "results.h5").attributes["best_round"])
    assert best < 3
    for round_ in (best, 3):
        assert main([str(run), "--round", str(round_), "--adapter", str(tmp_path / str(round_))]) == 0
    a = "model.layers.0.self_attn.q_proj.lora_A.weight"
    theta = load_file(run / "checkpoint" / "state.safetensors")["theta"]
    last, of_best = written(tmp_path / "3")[a], written(tmp_path / str(best))[a]
    assert torch.equal(last.flatten(), theta[: last.numel()])
    assert torch.equal(of_best, torch.from_numpy(final(run)[a])) and not torch.equal(last, of_best)
    capsys.readouterr()
    other = next(round_ for round_ in (1, 2) if round_ != best)
    assert main([str(run), "--round", str(other), "--adapter", str(tmp_path / "none")]) == 2
    assert f"round {other} is not kept; give one of: {best}, 3" in capsys.readouterr().err


@pytest.fixture(scope="module")
def unfinished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose clients keep B, and which was killed after its second round; its paths are those of its folder."""
    folder = tmp_path_factory.mktemp("runs") / "unfinished"
    raw = raw_of(texts, model={"name": "model"}, personalization={"parts": ["*lora_B*"]})
    raw["data"]["source"], raw["evaluation"]["client_fraction"] = ".", 0.2

    def stop(round_: int) -> None:
        if round_ == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(texts)
        with pytest.raises(Killed):
            federate(settings(folder, raw), on_round=stop)
    return folder


def test_of_an_unfinished_run_the_last_round_is_exported_from_any_folder(
    unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(unfinished), "--merge", "merged"]) == 0
    assert "merged: round 2 of 3 (the run is unfinished), merged in float32" in capsys.readouterr().out
    assert fedhpc.load("merged").generate([f"{TEXTS[0]} :"], 2)
    assert "round 2 of 3" in Path("merged/README.md").read_text()


def test_a_client_has_an_adapter_of_its_own(unfinished: Path, texts: Path, tmp_path: Path) -> None:
    names = [str(name) for name in table(unfinished, "partition")["client_names"]]
    shutil.copytree(texts / "model", tmp_path / "moved")
    state = load_file(unfinished / "checkpoint" / "state.safetensors")
    client, version = state["versions"][0].tolist()
    personal = load_file(unfinished / "clients" / str(client) / f"{version}.safetensors")
    assert all(tensor.any() for tensor in personal.values())
    for number, word in enumerate((names[client], str(client))):
        folder = tmp_path / str(number)
        base = ["--base", str(tmp_path / "moved")] * number
        assert main([str(unfinished), "--client", word, "--adapter", str(folder), *base]) == 0
        tensors = written(folder)
        own = {name: tensor for name, tensor in tensors.items() if "lora_B" in name}
        assert {f"personal.{name}" for name in own} == {*personal}
        assert all(torch.equal(tensor, personal[f"personal.{name}"]) for name, tensor in own.items())
        shared = torch.cat([tensor.flatten() for name, tensor in tensors.items() if "lora_A" in name])
        assert sorted(shared.tolist()) == sorted(state["theta"].tolist())
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(texts / "model"), folder)
    about = json.loads((folder / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tmp_path / "moved")
    assert f"client {client}, round" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "--merge", "{tmp}/x"], "there is no such run"),
        (["{tmp}", "--merge", "{tmp}/x"], "holds no results.h5"),
        (["{run}"], "it is not said what to write; give --adapter DIR"),
        (["{run}", "--adapter", "{tmp}/x", "--dtype", "float32"], "--dtype is of the weights of --merge"),
        (["{run}", "--adapter", "{tmp}/x", "--client", "0", "--round", "1"], "take one of them out"),
        (["{run}", "--adapter", "{tmp}/x", "--client", "nobody"], "there is no client 'nobody': "),
        (["{run}", "--adapter", "{tmp}/x", "--merge", "{tmp}/y/../x"], "two options write to the same place"),
        (["{run}", "--adapter", "/proc/none/x"], "'/proc/none' cannot be read or written: No such file"),
        (["{run}", "--push", "me/mine"], "the adapter would name its base by a folder of this machine"),
        (
            ["{run}", "--merge", "{tmp}/x", "--push", "not a name"],
            "--push 'not a name' is no name of a repository; give",
        ),
        (["{run}", "--adapter", "{tmp}/x", "--client", "0"], "clients of this run have no models of their own"),
        (["{run}", "--adapter", "{run}"], "is there already; choose another one"),
        (["{run}", "--merge", "{tmp}/x", "--base", "{tmp}/none"], "is not a model folder"),
        (["{run}", "--merge", "{tmp}/x", "--base", "none"], "base: the tokenizer of 'none' cannot be loaded"),
    ],
)
def test_bad_input_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([word.format(run=run, tmp=tmp_path) for word in arguments]) == 2
    screen = capsys.readouterr()
    assert message in screen.err and screen.err.count("\n") == 1 and screen.out == ""
    assert not (tmp_path / "x").exists()


def test_an_empty_folder_is_filled_and_else_stays_as_it_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("mine")
    before = (tmp_path / "mine").stat().st_ino
    assert main([str(run), "--adapter", str(tmp_path / "link"), "--gguf", str(tmp_path / "none" / ".." / "link")]) == 2
    assert main([str(run), "--adapter", str(tmp_path / "link"), "--base", str(tmp_path), "--merge", "x"]) == 2
    assert [*(tmp_path / "mine").iterdir()] == []
    monkeypatch.chdir(tmp_path / "mine")
    assert main([str(run), "--adapter", "."]) == 0
    assert Path("adapter_config.json").is_file() and (tmp_path / "link").stat().st_ino == before
    assert not [*tmp_path.rglob("*.fedhpc-tmp")]


def test_the_nearest_client_is_looked_for_among_all() -> None:
    hint = nearest("Blue Spise", ["Aromi", "Cocum", "Zizzi", "Blue Spice"], shown=2)
    assert hint == "did you mean 'Blue Spice'? valid: Aromi, Cocum, ..."


def test_a_failed_write_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    def fail() -> None:
        with written_to(tmp_path / "x") as partial:
            partial.write_text("half")
            raise OSError("full")

    (tmp_path / f".x{TEMPORARY}").write_text("of a killed export")
    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            fail()
        assert [*tmp_path.iterdir()] == []
    with written_to(tmp_path / "x") as partial:
        partial.write_text("whole")
    assert (tmp_path / "x").read_text() == "whole"


def test_a_run_is_exported_without_its_trackers(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with h5py.File(tmp_path / "run" / "results.h5", "r+") as file:
        tree = parse_yaml(str(file.attrs["config"]), "config")
        file.attrs["config"] = json.dumps({**tree, "trackers": [{"name": "./gone.py"}]})
    assert main([str(tmp_path / "run"), "--adapter", str(tmp_path / "x")]) == 0


# ---------------------------------------------------------------- servers


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "prefix", "num_virtual_tokens": 2}, "vLLM loads LoRA and no prefix: fedhpc.load serves it, or"),
        ({"name": "prompt", "num_virtual_tokens": 2}, "vLLM loads LoRA and no soft prompt"),
        ({**LORA, "rank": 24}, "vLLM loads it with --max-lora-rank 32, which is 16 unless raised"),
        ({**LORA, "init_lora_weights": "pissa", "rank": 12}, "vLLM loads it with --max-lora-rank 32"),
        ({**LORA, "alpha_pattern": {"v_proj": 1.0}}, "vLLM scales all layers alike"),
        ({**LORA, "use_dora": True}, "vLLM loads no DoRA"),
        (LORA, ""),
    ],
)
def test_check_and_card_say_what_servers_take(
    tmp_path: Path, texts: Path, models: Path, options: dict[str, Any], said: str
) -> None:
    raw = {**tree(texts), "method": dict(options)}
    approach = prepare(settings(tmp_path, raw), LoopbackTransport(), Launch(), write_cache=False)
    lines = [line for line in approach.details(approach.plan(1)) if line.startswith("serving: ")]
    card = (adapter(tmp_path, models / "llama", options) / "README.md").read_text()
    assert [line.startswith(f"serving: {said}") for line in lines] == [True] * bool(said)
    assert (f"Serving: {said}" in card) if said else "Serving" not in card


def test_a_prefix_is_served_by_transformers_as_a_cache(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path / "runs" / "mine", models / "llama", {"name": "prefix", "num_virtual_tokens": 3})
    monkeypatch.chdir(tmp_path)
    snippet = (Path(__file__).parents[1] / "docs/export.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet, {})
    assert capsys.readouterr().out.strip() == fedhpc.load(folder).generate([f"{TEXTS[0]} :"], 12)[0]


def rotated(x: Tensor, position: int, is_paired: bool) -> Tensor:
    """x (heads, width) by the rotary embedding: of the halves of a head, or of pairs of neighbours."""
    angles = position * 10000 ** (-torch.arange(0, x.shape[1], 2) / x.shape[1])
    first, second = (x[:, ::2], x[:, 1::2]) if is_paired else x.chunk(2, 1)
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.stack(turned, 2).flatten(1) if is_paired else torch.cat(turned, 1)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_lora_for_llama_cpp_is_tensor_by_tensor_that_of_peft(tmp_path: Path, models: Path, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    folder = adapter(tmp_path, models / name, {**LORA, "targets": "all-linear", "rank_pattern": {"v_proj": 2}})
    llama_cpp.write(folder, tmp_path / "lora.gguf")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == name
    there = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    layers = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    theirs = written(folder)
    assert len(there) == len(theirs) == 2 * 2 * len(layers)
    for layer in (0, 1):
        for path, short in layers.items():
            a, b = (theirs[f"model.layers.{layer}.{path}.lora_{x}.weight"] for x in "AB")
            a_there, b_there = (there[f"blk.{layer}.{short}.weight.lora_{x}"] for x in "ab")
            assert torch.equal(a_there, a)
            # llama.cpp multiplies by alpha over the rank of B; here v_proj has another rank.
            scaled = b * (4.0 / fields["adapter.lora.alpha"])
            if name == "qwen2" or short not in ("attn_q", "attn_k"):
                assert torch.equal(b_there, scaled), path
    q, k = (theirs[f"model.layers.0.self_attn.{x}_proj.lora_B.weight"][:, 0].view(-1, 8)[:2] for x in "qk")
    q_there, k_there = (there[f"blk.0.attn_{x}.weight.lora_b"][:, 0].view(-1, 8)[:2] for x in "qk")
    paired = name == "llama"
    ours = (rotated(q_there, 3, paired) * rotated(k_there, 5, paired)).sum(1)
    torch.testing.assert_close(ours, (rotated(q, 3, False) * rotated(k, 5, False)).sum(1))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {**LORA, "use_dora": True}, "llama.cpp knows no DoRA; use --merge"),
        ("llama", {"name": "ia3"}, "writes a LoRA, and what the run trained is IA3"),
        ("gpt2", LORA, "is for bases of llama, mistral, qwen2, qwen3, and this one is 'gpt2'"),
        ("qwen2", {**LORA, "targets": ["lm_head"]}, "no output layer of its own for a base that shares"),
    ],
)
def test_what_llama_cpp_would_not_load_is_refused(
    tmp_path: Path, models: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(fedhpc.UserError, match=re.escape(message)):
        llama_cpp.write(adapter(tmp_path, models / name, options), tmp_path / "lora.gguf")


# ---------------------------------------------------------------- the hub


def test_an_adapter_is_pushed_with_its_card_and_the_hub_id_of_its_base(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repository: str, **options: Any) -> None:
            pushed["made"] = (repository, options)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            pushed["files"] = {file.name: file.read_text() for file in folder_path.glob("*.[jm][sd]*")}
            pushed["all"] = b"".join(file.read_bytes() for file in folder_path.rglob("*") if file.is_file())
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert main([str(run), "--push", "me/mine", "--base", "them/base"]) == 0
    assert "https://hub/me/mine" in capsys.readouterr().out
    assert pushed["made"] == ("me/mine", {"private": True, "exist_ok": True})
    assert json.loads(pushed["files"]["adapter_config.json"])["base_model_name_or_path"] == "them/base"
    card = pushed["files"]["README.md"]
    assert card.startswith('---\nbase_model: "them/base"\n') and "rounds, on `them/base` in" in card
    assert "## The run" in card and "fedhpc export run --base them/base --push me/mine\n" in card
    assert str(run.parents[1]).encode() not in pushed["all"]


def test_without_network_a_push_says_so_in_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*arguments: Any, **options: Any) -> None:
        raise OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.\nMore")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", offline)
    assert main([str(run), "--adapter", str(tmp_path / "x"), "--push", "me/mine", "--base", "them/base"]) == 1
    error = capsys.readouterr().err
    assert "'me/mine' could not be brought to the hub: Cannot reach the hub" in error and error.count("\n") == 1
    assert (tmp_path / "x" / "adapter_config.json").is_file()
