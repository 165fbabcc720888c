"""What is done by layer: learning rates and FedProx's pull, in whole runs against transformers and torch.optim."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call
from transformers import DynamicCache

from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.approaches.prepare import prepare
from fedhpc.config import Config
from fedhpc.config.together import shared_settings
from fedhpc.errors import UserError
from fedhpc.methods import with_head
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.training import rules
from fedhpc.training.local import LocalTraining
from fedhpc.training.schedule import batches
from tests import tiny
from tests.federations import Interrupted, federate, federate_together, final, settings, tree, write_texts
from tests.test_block import relative, works
from tests.test_block import settings as block_settings
from tests.test_federation import same_results
from tests.test_methods import in_peft, make, trained_by_torch, warm

PREFIX, TOKENS, LAYERS, SCALE = "prompt_embeddings", 4, 2, 4.0  # LAYERS of the base; SCALE: alpha / rank
METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"name": "prefix", "num_virtual_tokens": TOKENS},
    "lora": {"name": "lora", "rank": 2, "alpha": 2 * SCALE, "targets": ["q_proj", "down_proj", "lm_head"]},
}
ADAMW = {"optimizer": "adamw", "lr": 0.02}
SGD = {"optimizer": "sgd", "lr": 0.3, "momentum": 0.5}
COSINE = {"schedule": "cosine", "lr_min": 0.001}
MU = {"prefix": 0.3, "lora": 3e-5}
#: Name -> (count) numbers of one block: keys or values of a layer of a prefix, or a tensor.
Blocks = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def raw_of(texts: Path, method: str, **changes: Any) -> dict[str, Any]:
    """A small federation of unequal clients, some of which drop out."""
    sections: dict[str, Any] = {
        "model": {"dtype": "float64"},
        "federation": {"rounds": 3, "cohort_size": 4, "dropout": 0.2},
        "evaluation": {"every": 3},
        "runtime": {"block_size": 3},
    }
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values} if isinstance(values, Mapping) else values
    return {**tree(texts, **sections), "method": METHODS[method]}


# ---------------------------------------------------------------- plain torch


def apart(payload: Mapping[str, np.ndarray | torch.Tensor]) -> Blocks:
    """The blocks of a payload."""
    tensors = {name: torch.as_tensor(value).double() for name, value in payload.items()}
    if PREFIX not in tensors:
        return tensors
    columns = tensors[PREFIX].chunk(2 * LAYERS, dim=-1)
    return {f"layers.{i // 2}.{'keys' if i % 2 == 0 else 'values'}": block for i, block in enumerate(columns)}


def layers_above(name: str) -> int:
    """Above a block; what is in no layer here is the output layer."""
    found = re.search(r"layers\.(\d+)\.", name)
    return 0 if found is None else LAYERS - 1 - int(found[1])


def logits_of(task: Averaging, blocks: Blocks, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What transformers' model makes of ids (B, T), of which mask (B, T) are real, with a client's blocks in it."""
    model, rows = task.base.model, len(ids)
    if "layers.0.keys" in blocks:
        cache, heads = DynamicCache(), task.base.num_kv_heads
        for layer in range(LAYERS):
            pair = [blocks[f"layers.{layer}.{part}"].view(TOKENS, heads, -1) for part in ("keys", "values")]
            cache.update(*(part.transpose(0, 1).expand(rows, -1, -1, -1) for part in pair), layer)
        mask = torch.cat([mask.new_ones(rows, TOKENS), mask], dim=1)
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        return logits
    weights = {}
    for name, a in blocks.items():
        if name.endswith("lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            product = blocks[f"{path}.lora_B.weight"] @ a
            weights[f"{path}.weight"] = model.get_submodule(path).weight + SCALE * product
    logits = functional_call(model, weights, (ids,), {"attention_mask": mask}).logits
    return logits


class Client:
    """One client under torch.optim, with a group of parameters for each block."""

    def __init__(self, task: Averaging, config: Config, number: int, start: Blocks) -> None:
        self.task, self.config, self.number = task, config, number
        self.indices = task.data.population.indices(number)
        self.leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
        groups = [{"params": [leaf], "name": name} for name, leaf in self.leaves.items()]
        client = config.client
        self.rule: torch.optim.Optimizer = (
            torch.optim.SGD(groups, lr=client.lr, momentum=client.momentum)
            if client.optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=client.lr, weight_decay=0.0)
        )

    def train(self, round_: int, rounds: int, start: Blocks) -> None:
        """One round, from `start`."""
        client, data = self.config.client, self.task.data.train
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(start[name])
        plan = batches(len(self.indices), client, self.config.run.seed, round_, self.number)
        for number, picked in enumerate(plan):
            chosen = self.indices[picked]
            rows = [torch.from_numpy(data.tokens(int(i)).astype(np.int64)) for i in chosen]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            real = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
            prompt = torch.from_numpy(data.prompt_lengths[chosen].astype(np.int64))
            supervised = ((torch.arange(ids.shape[1]) >= prompt[:, None]) & real)[:, 1:].flatten()
            logits = logits_of(self.task, self.leaves, ids, real.long())
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            self.rule.zero_grad()
            losses[supervised].mean().backward()
            for name, leaf in self.leaves.items() if client.proximal else ():
                scale = float(start[name].square().mean()) if client.proximal_metric == "relative" else 1.0
                if scale > 0 and leaf.grad is not None:  # LoRA's B begins at zero
                    leaf.grad += client.proximal * (leaf.detach() - start[name]) / scale
            rate = client.lr
            if client.schedule == "cosine":
                share = (round_ - 1 + number / len(plan)) / rounds
                rate = client.lr_min + (client.lr - client.lr_min) * (1 + math.cos(math.pi * share)) / 2
            for group in self.rule.param_groups:
                group["lr"] = rate * client.layer_lr_decay ** layers_above(group["name"])
            self.rule.step()

    @property
    def blocks(self) -> Blocks:
        return {name: leaf.detach().clone() for name, leaf in self.leaves.items()}


def by_hand(task: Averaging, config: Config) -> Blocks:
    """The blocks after all rounds: one client at a time; in mode local with a client axis in front."""
    theta = apart(task.method.initial())
    alone: dict[int, Client] = {}
    for t in range(1, task.rounds + 1):
        ends, counts = [], []
        for number in task.plan(t).training:
            client = alone.get(number) or Client(task, config, number, theta)
            if config.mode != "federated":
                alone[number] = client
            client.train(t, task.rounds, client.blocks if config.mode == "local" else theta)
            ends.append(client.blocks)
            counts.append(len(client.indices))
        shares = (np.array(counts) / sum(counts)).tolist()
        if config.mode != "local":
            theta = {name: sum(w * end[name] for w, end in zip(shares, ends, strict=True)) for name in theta}  # type: ignore[misc]
    if config.mode == "local":
        return {name: torch.stack([alone[number].blocks[name] for number in sorted(alone)]) for name in theta}
    return theta


def check(config: Config) -> None:
    """The run of a configuration ended where plain torch does; all of its blocks have moved."""
    task = prepare(config, LoopbackTransport(), Launch(), False)
    assert isinstance(task, Averaging)
    first, wanted, found = apart(task.method.initial()), by_hand(task, config), apart(final(config.run_dir))
    assert set(found) == set(wanted)
    for name in wanted:
        moved = float((wanted[name] - first[name]).norm())
        assert moved > 1e-3, name
        assert float((found[name] - wanted[name]).norm()) < 1e-9 * moved, name


def on_any_ranks(folder: Path, raw: dict[str, Any]) -> Config:
    """The run of folder/3, by three ranks: two ranks, and one that was stopped and went on, made the same bits."""
    config, stopped = settings(folder / "3", raw), settings(folder / "1", raw)
    collectives = federate(config, ranks=3)
    federate(settings(folder / "2", raw), ranks=2)
    with pytest.raises(Interrupted):
        federate(stopped, stop_at=int(0.6 * collectives))
    federate(stopped)
    for other in ("1", "2"):
        same_results(folder / "3", folder / other, ("rounds", "clients"))
    return config


# ---------------------------------------------------------------- FedProx


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("client", [ADAMW | COSINE, SGD], ids=["adamw", "sgd"])
def test_a_run_with_a_relative_pull_is_its_formula(
    tmp_path: Path, texts: Path, method: str, client: dict[str, Any]
) -> None:
    pull = {"proximal": MU[method], "proximal_metric": "relative", "steps": 3}
    config = on_any_ranks(tmp_path, raw_of(texts, method, client={**client, **pull}))
    check(config)
    free = settings(tmp_path, raw_of(texts, method, client={**client, "steps": 3}))
    task = prepare(config, LoopbackTransport(), Launch(), False)
    assert isinstance(task, Averaging)
    first, found, without = apart(task.method.initial()), apart(final(config.run_dir)), by_hand(task, free)
    for name, value in without.items():
        assert float((found[name] - value).norm()) > 1e-4 * float((value - first[name]).norm()), name


def test_a_relative_pull_does_not_know_the_scale() -> None:
    """Keys a hundred times as long may go a hundred times as far: the objective is the same."""
    base, scale = tiny.base("llama"), 100.0
    method = make("prefix", base)
    layout, keys = method.trainable, torch.zeros(method.trainable.size, dtype=torch.bool)
    keys.view(5, 4, -1)[:, ::2] = True
    start, way = warm(method, torch.float64), torch.randn(3, layout.size).double()
    local = LocalTraining.of(block_settings(proximal=0.3, proximal_metric="relative"), 1, 1)
    objective = []
    for factor in (torch.ones(layout.size).double(), torch.where(keys, scale, 1.0).double()):
        begin = (start * factor).expand(3, -1).contiguous()
        (rule,) = rules.in_order(local, begin, None, method)
        gradient = torch.zeros_like(begin)
        rule.change(gradient[:2], begin[:2] + way[:2] * factor)
        objective.append((gradient * way * factor).sum(1))
        assert not gradient[2].any()
    torch.testing.assert_close(objective[0], objective[1], rtol=1e-12, atol=0)


# ---------------------------------------------------------------- learning rates


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("client", [ADAMW | COSINE, SGD], ids=["adamw", "sgd"])
def test_a_run_with_rates_by_layer_is_torch_optim_with_groups(
    tmp_path: Path, texts: Path, method: str, client: dict[str, Any]
) -> None:
    decay = 0.6 if client["optimizer"] == "adamw" else 1.7
    check(on_any_ranks(tmp_path, raw_of(texts, method, client={**client, "layer_lr_decay": decay})))


@pytest.mark.parametrize("mode", ["centralized", "local"])
def test_clients_alone_have_rates_by_layer(tmp_path: Path, texts: Path, mode: str) -> None:
    raw = raw_of(texts, "prefix", mode=mode, client={**ADAMW, "layer_lr_decay": 0.6}, federation={"dropout": 0.0})
    config = settings(tmp_path, raw)
    federate(config, ranks=2)
    check(config)


def test_runs_with_the_same_decay_train_together(tmp_path: Path, texts: Path) -> None:
    def of(name: str, **client: Any) -> Config:
        return settings(tmp_path / name, raw_of(texts, "lora", client={**ADAMW, "layer_lr_decay": 0.6, **client}))

    configs = [of("one"), of("two", lr=0.01)]
    federate_together(configs)
    for config in configs:
        check(config)
    assert shared_settings(configs[0]) == shared_settings(configs[1])
    assert shared_settings(configs[0]) != shared_settings(of("three", layer_lr_decay=0.7))


OUTSIDE = ("wte", "wpe", "embed_tokens", "embed_positions", "shared", "embeddings", "layernorm_embedding")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "bert", "roberta", "t5", "bart"])
def test_every_parameter_is_in_its_layer(family: str) -> None:
    """Layers are counted in each of encoder and decoder; the embeddings are below the taller one."""
    base = tiny.base(family)
    tallest = 3 if family in tiny.SEQ2SEQ else 2
    method = with_head(make("full", base))
    for name in method.trainable.shapes:
        found = re.search(r"(encoder|decoder)?\.(?:layers?|h|block)\.(\d)\.", name)
        if found is not None:
            layers = tallest if found[1] == "encoder" else 2
            assert method.layers_above(name) == [layers - 1 - int(found[2])], name
        else:
            below = set(OUTSIDE) & set(name.split(".")) or "embed_in" in name
            assert method.layers_above(name) == [tallest if below else 0], name


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("name", ["prefix", "lora", "ia3", "adapter"])
def test_what_methods_add_is_in_the_layer_that_it_changes(name: str, family: str) -> None:
    base = tiny.base(family)
    method = make(name, base)
    for tensor in method.trainable.shapes:
        if name == "prefix":  # in front of the decoder's layers
            assert method.layers_above(tensor) == [1, 1, 0, 0]
        else:
            found = re.search(r"(encoder|decoder)?\.(?:layers|block)\.(\d)\.", tensor)
            assert found is not None
            layers = 3 if found[1] == "encoder" else 2
            assert method.layers_above(tensor) == [layers - 1 - int(found[2])]


@pytest.mark.parametrize("name", ["ia3", "full"])
def test_a_client_trains_as_torch_optim_does_with_groups(name: str) -> None:
    base, data = tiny.base("llama"), tiny.examples()
    config = block_settings(optimizer="adamw", lr=0.02, layer_lr_decay=0.5)
    method = make(name, base)
    start, work = warm(method, torch.float64), works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    if name == "ia3":
        model, named = in_peft(name, base, method)
    else:
        model = tiny.base("llama").model.requires_grad_(True)
        named = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in method.payload.views(start[0]).items():
            named[key].copy_(value)
    rule = torch.optim.AdamW(
        [{"params": [p], "lr": 0.02 * 0.5 ** method.layers_above(key)[0]} for key, p in named.items()], weight_decay=0.0
    )
    wanted = trained_by_torch(model, named, method, data, config, work, rule=rule)
    assert relative(found, wanted, start[0]) < 1e-9


@pytest.mark.parametrize(
    "method",
    [
        {"name": "prompt"},
        {"name": "p_tuning"},
        {"name": "prefix", "exchange": "mlp"},
        {"name": "prefix", "exchange": "materialised"},
        {"name": "fedkseed"},
    ],
    ids=lambda method: "-".join(method.values()),
)
def test_what_is_in_no_layer_is_refused(tmp_path: Path, texts: Path, method: dict[str, Any]) -> None:
    raw = raw_of(texts, "prefix", client={**SGD, "momentum": 0.0, "layer_lr_decay": 0.9})
    config = settings(tmp_path, {**raw, "method": method})
    with pytest.raises(RefusedError, match=r"client\.layer_lr_decay: .* is in no layer of the base"):
        prepare(config, LoopbackTransport(), Launch(), False)


def test_a_student_in_no_layer_is_refused(tmp_path: Path, texts: Path) -> None:
    raw = raw_of(texts, "prefix", client={**ADAMW, "layer_lr_decay": 0.9})
    for name, refused in (("lora", False), ("prompt", True)):
        method = {"name": "distillation", "student": {"name": name}, "public": {"max_examples": 8}}
        config = settings(tmp_path / name, {**raw, "method": method})
        with pytest.raises(RefusedError, match="is in no layer") if refused else nullcontext():
            prepare(config, LoopbackTransport(), Launch(), False)


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"client": {"scaffold": True}}, "client.scaffold with client.optimizer sgd divides by one learning rate"),
        ({"server": {"aggregator": "fednova"}}, "server.aggregator fednova divides by one learning rate"),
    ],
)
def test_what_divides_by_one_rate_is_refused(tmp_path: Path, texts: Path, sections: Any, names: str) -> None:
    client = {"optimizer": "sgd", "layer_lr_decay": 0.9, **sections.get("client", {})}
    with pytest.raises(UserError, match=names):
        settings(tmp_path, raw_of(texts, "prefix", **{**sections, "client": client}))
