"""The CUDA path without a GPU: devices and dtypes that fit, and a step that never waits (tests/fake_gpu.py)."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc import federation, kernels
from fedhpc.approaches.prepare import prepare
from fedhpc.bench import bed
from fedhpc.config import Model
from fedhpc.evaluation.evaluate import Evaluator
from fedhpc.methods import with_head
from fedhpc.methods._experts import Routed
from fedhpc.methods.base import Method
from fedhpc.models.base import Base
from fedhpc.models.load import load_base
from fedhpc.objectives import base as objectives_base
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.placement import Placement
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.results.status import read_status
from fedhpc.training.local import LocalTraining
from fedhpc.training.memory import Memory
from tests import tiny
from tests.fake_gpu import GPU, PAGEABLE, READ, fake_gpu
from tests.federations import settings as settings_of
from tests.federations import write_texts
from tests.test_bench_gpu import SIZES
from tests.test_block import works
from tests.test_methods import make


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


BLOCK = {READ: 4, PAGEABLE: 1}  # what a block brings back: updates and three kinds of losses; and the payload down
ADAMW = {"optimizer": "adamw", "lr": 0.1, "clip_norm": 1.0, "proximal": 0.1, "weight_decay": 0.01}
SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}


def settings(steps: int, precision: str, client: dict[str, Any]) -> configuration.Config:
    tree = {
        "partition": {"name": "iid"},
        "client": {"batch_size": 2, "steps": steps, **client},
        "runtime": {"precision": precision},
    }
    return configuration.resolve(tree)


def data_of(family: str) -> Any:
    return tiny.labelled() if family in tiny.ENCODERS else tiny.examples()


def start_of(method: Method) -> torch.Tensor:
    return torch.zeros(1, method.payload.size)


def waits(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
    client: dict[str, Any] = ADAMW,
    remember: bool = False,
) -> list[Counter[tuple[str, str]]]:
    """What a block waits for the GPU with one step and with three."""
    found = []
    with fake_gpu(monkeypatch) as gpu:
        base = tiny.base(family, dtype, device="cuda:0")
        method = with_head(make(name, base, **options))
        group = works(3 if method.shares_base else 1)
        for steps in (1, 3):
            gpu.waits.clear()
            config = settings(steps, precision, client)
            memory = fresh_memory(config, len(group), method.trainable.size) if remember else None
            examples, objective = data_of(family), tiny.objective(base)
            trained = tiny.train(base, method, objective, start_of(method), group, examples, config, memory=memory)
            assert trained.updates.shape == (len(group), method.payload.size)
            assert trained.updates.dtype == torch.float32
            found.append(gpu.waits.copy())
    return found


def fresh_memory(config: configuration.Config, clients: int, size: int) -> Memory:
    optimizer = LocalTraining.of(config, 1, 1).optimizer
    buffers = {name: torch.zeros(clients, size) for name in optimizer.buffers}
    return Memory(buffers, torch.zeros(clients, dtype=torch.int64))


def of_kind(counted: Counter[tuple[str, str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for (why, _), count in counted.items():
        total[why] += count
    return dict(total)


# ---------------------------------------------------------------- the fake GPU itself


def test_the_fake_gpu_refuses_and_counts_what_a_real_one_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch) as gpu:
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        assert not isinstance(here, type(there)) and there.device == GPU
        for wrong in (
            lambda: there + here,
            lambda: there.index_select(0, torch.zeros(1, dtype=torch.int64)),
            lambda: torch.mm(there[None], there.half()[:, None]),
            lambda: there.nonzero(),
        ):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                wrong()
        assert not gpu.waits
        copies = [here.to(GPU), here.to(GPU, non_blocking=True), torch.tensor([1, 2], device=GPU), there.copy_(here)]
        assert of_kind(gpu.waits) == {PAGEABLE: len(copies)}
        gpu.waits.clear()
        reads = [there.sum().item(), bool(there.any()), there.cpu().numpy(), here.copy_(there), there.to("cpu").sum()]
        assert of_kind(gpu.waits) == {READ: len(reads)}
        gpu.waits.clear()
        assert here.pin_memory().to(GPU, non_blocking=True).device == GPU
        assert not gpu.waits
        weight, label = torch.ones(3, 3, device=GPU, requires_grad=True), torch.full((), 1, device=GPU)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            product = there @ weight
            loss = torch.nn.functional.cross_entropy(product, label)
        loss.backward()
        assert (product.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
        assert weight.grad is not None and (weight.grad.dtype, weight.grad.device) == (torch.float32, GPU)
        assert not gpu.waits


# ---------------------------------------------------------------- copies


def test_an_array_is_pinned_for_a_gpu_and_stays_where_it_is_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(6)
    kernels.on_device(array, torch.device("cpu"))[0] = 7
    assert array[0] == 7
    assert kernels.on_device(array / 3, torch.device("cpu"), torch.float32).dtype == torch.float32
    with fake_gpu(monkeypatch) as gpu:
        there = kernels.on_device(array / 3, GPU, torch.float32)
        assert (there.device, there.dtype, len(gpu.pinned)) == (GPU, torch.float32, 1)
        assert not gpu.waits


# ---------------------------------------------------------------- steps

B16 = torch.bfloat16
QUICK: list[tuple[Any, ...]] = [
    ("llama", "prefix", {}),
    ("llama", "lora", {"dropout": 0.1}, B16),
    ("gpt2", "prompt", {}, torch.float32, "float16", SGD),
    ("bert", "lora", {}),
    ("bart", "prefix", {}),
]
LORA = [{"aggregation": "exact"}, {"aggregation": "ffa"}]
EVERY = ["prefix", "lora", "prompt", "p_tuning", "ia3", "adapter", "full"]
SLOW: list[tuple[Any, ...]] = [
    *[("llama", name, {}) for name in EVERY],
    *[("llama", name, {}, B16) for name in ("prefix", "prompt", "adapter", "full")],
    *[("llama", name, {}, torch.float32, "bfloat16") for name in ("prefix", "lora", "p_tuning", "ia3")],
    *[("gpt2", name, {}, torch.float32, "float16", SGD) for name in EVERY],
    *[("llama", "lora", options) for options in LORA],
    *[("llama", "prefix", {"exchange": exchange}) for exchange in ("mlp", "materialised")],
    *[("llama", "full", {"last_layers": 1}), ("gpt2", "full", {"parameters": "bias"})],
    *[(family, name, {}) for family in ("bert", "t5", "bart") for name in ("prefix", "lora", "prompt", "full")],
]


@pytest.mark.parametrize(
    "case", [*QUICK, *[pytest.param(case, marks=pytest.mark.slow) for case in SLOW if case not in QUICK]], ids=str
)
def test_no_step_waits_for_the_gpu(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    one, three = waits(monkeypatch, *case)
    assert three - one == Counter()
    drawn = 5 if case[2].get("exchange") == "materialised" else 0  # an MLP of five tensors for every block
    assert of_kind(three) == {**BLOCK, PAGEABLE: BLOCK[PAGEABLE] + drawn}


def test_layers_in_host_memory_come_without_a_wait(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    with fake_gpu(monkeypatch) as gpu:
        base = load_base(Model(name=str(texts / "model"), dtype="float32", offload="cpu"), GPU)
        layers = list(base.model.model.layers)
        assert {p.device for p in base.model.parameters()} == {b.device for b in base.model.buffers()} == {GPU}
        waiting = [p.shape for layer in layers for p in layer.parameters()]
        assert [p.shape for p in gpu.pinned[: len(waiting)]] == waiting
        method = make("lora", base)
        for steps in (1, 3):
            gpu.waits.clear()
            config = settings(steps, "float32", ADAMW)
            tiny.train(base, method, tiny.objective(base), start_of(method), works(3), tiny.examples(), config)
            found.append(gpu.waits.copy())
        held = [{p.untyped_storage().nbytes() > 0 for p in layer.parameters()} for layer in layers]
    assert found[1] - found[0] == Counter() and of_kind(found[1]) == BLOCK
    assert held == [{True}, {False}]  # the one that the backward pass came to last


def test_clients_with_memory_bring_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, three = waits(monkeypatch, "llama", "prefix", {}, remember=True)
    assert one == three
    assert of_kind(one) == {READ: BLOCK[READ] + 2, PAGEABLE: BLOCK[PAGEABLE] + 2}  # mean and square of all clients


def test_fedkseed_reads_its_coefficients_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice a step, which draws the whole model three times: where the working copy is moved to."""
    client = {"optimizer": "sgd", "lr": 0.1}
    one, three = waits(monkeypatch, "llama", "fedkseed", {"num_seeds": 16}, client=client)
    assert sum((three - one).values()) == 4
    assert {line.split(":")[0] for _, line in three - one} == {"methods/fedkseed.py"}


def test_a_frozen_head_in_pieces_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objectives_base.LOGITS_AT_ONCE, "cuda", 20 * tiny.VOCABULARY)
    one, three = waits(monkeypatch, "llama", "prefix", {})
    assert three - one == Counter()


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch has it from 2.10 on")
@pytest.mark.parametrize(("capability", "reads"), [((9, 0), {}), ((8, 0), {READ: 2})])
def test_products_of_experts_wait_only_where_each_is_a_product_of_its_own(
    capability: tuple[int, int], reads: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with fake_gpu(monkeypatch) as gpu:
        x = torch.zeros(11, 16, dtype=B16, device=GPU, requires_grad=True)
        factors = torch.zeros(2, 3, 16, 8, dtype=B16, device=GPU, requires_grad=True)
        routed = Routed.of(torch.zeros(11, dtype=torch.int64, device=GPU), experts=3, clients=2)
        of_base = routed.product(x, factors[:1].detach())
        (routed.product(x, factors) + of_base).sum().backward()
        assert of_kind(gpu.waits) == reads  # the ends of the experts' tokens, and of those of their clients
        assert x.grad is not None and factors.grad is not None and factors.grad.shape == factors.shape


# ---------------------------------------------------------------- evaluation


def outcome(base: Base, method: Method, family: str, metrics: list[str], precision: str) -> None:
    data, options = data_of(family), settings(1, precision, SGD).evaluation.model_copy(update={"batch_size": 6})
    payloads = torch.zeros(2, method.payload.size, device=GPU)
    targets = ["a", "bb", "ccc"] if "accuracy" in metrics else None
    chosen = np.arange(9)
    evaluator = Evaluator(base, tiny.objective(base), options, precision, LoopbackTransport(), targets)
    found = evaluator.evaluate(method, payloads, data, chosen, metrics)
    assert found is not None and set(found.metrics) == set(metrics)


@pytest.mark.parametrize(
    ("family", "name", "metrics", "dtype"),
    [
        ("llama", "lora", ["loss"], B16),
        pytest.param("llama", "prefix", ["loss"], torch.float32, marks=pytest.mark.slow),
        pytest.param("bert", "prefix", ["loss", "accuracy"], torch.float32, marks=pytest.mark.slow),
        pytest.param("bart", "prompt", ["loss"], torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_evaluation_reads_once_a_batch(
    family: str, name: str, metrics: list[str], dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_gpu(monkeypatch) as gpu:
        base = tiny.base(family, dtype, device="cuda:0")
        method = with_head(make(name, base))
        gpu.waits.clear()
        outcome(base, method, family, metrics, precision)
        read = of_kind(gpu.waits)[READ]
    # Two payloads with 9 examples each, in batches of 6; for accuracy 9 rows of both together.
    assert read == (4 if metrics == ["loss"] else 6)


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("name", ["prefix", "prompt", "lora"])
@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "bart"])
def test_masks_that_are_not_read_hide_the_same(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.base(family)
    method = with_head(make(name, base))
    start = start_of(method).double() + 0.1
    updates = []
    for _ in range(2):
        updates.append(
            tiny.train(
                base, method, tiny.objective(base), start, works(3), data_of(family), settings(2, "float32", SGD), 1, 1
            )
        )
        monkeypatch.setattr("fedhpc.models.masks._READ_FOR_NOTHING", ())
    plain, made = (trained.updates for trained in updates)
    assert float((plain - made).norm() / plain.norm()) < 1e-9


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["prefix", "lora"])
def test_the_bench_of_a_gpu_trains_there(monkeypatch: pytest.MonkeyPatch, model: str, method: str) -> None:
    monkeypatch.setattr(bed, "clock", lambda _: time.perf_counter)
    for name in ("reset_peak", "peak_bytes"):
        monkeypatch.setattr(bed, name, lambda _: 0)
    with fake_gpu(monkeypatch) as gpu:
        made = bed.Bed(model, method, GPU, SIZES)
        assert made.base.device == GPU and made.texts(2, 8).device == GPU
        gpu.operators = 0
        assert made.blocks([2], 2, 8, bed.Clock()).best == 2
        assert gpu.operators > 500


# ---------------------------------------------------------------- whole runs

STEP = {"optimizer": "sgd", "lr": 0.1, "batch_size": 2, "steps": 1}
EVALUATION = {"every": 1, "metrics": ["loss"], "max_examples": 4, "samples": 1, "max_new_tokens": 2}
RUNS: list[dict[str, Any]] = [
    {"method": {"name": "full"}},
    {"method": {"name": "prefix", "exchange": "mlp"}},
    {"method": {"name": "lora", "aggregation": "ffa"}},
    {"method": {"name": "lora", "aggregation": "exact"}},
    {"method": {"name": "lora", "aggregation": "stack"}},
    *[{"method": {"name": name}} for name in ("prefix", "prompt", "p_tuning", "ia3", "adapter")],
    {"method": {"name": "fedkseed", "num_seeds": 8}, "client": STEP},
    {"method": {"name": "lora"}, "client": {**STEP, "scaffold": True}},
    {"method": {"name": "lora"}, "client": {**STEP, "optimizer": "adamw", "scaffold": True}},
    {"method": {"name": "lora"}, "mode": "local"},
    {"method": {"name": "lora"}, "mode": "centralized"},
    {
        "method": {"name": "lora"},
        "personalization": {"finetune_steps": 1},
        "evaluation": {**EVALUATION, "client_fraction": 0.3},
    },
]


@pytest.mark.parametrize("case", [RUNS[0], *[pytest.param(run, marks=pytest.mark.slow) for run in RUNS[1:]]], ids=str)
def test_a_run_ends_well(case: dict[str, Any], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the model's weights to the export, with `block_size: auto` for a GPU and a text written."""
    tree = {
        "model": {"name": str(texts / "model")},
        "data": {"source": str(texts), "max_length": 96},
        "partition": {"name": "iid", "num_clients": 3},
        "federation": {"rounds": 1, "cohort_size": 3},
        "client": STEP,
        "evaluation": EVALUATION,
        **case,
    }
    launch = Launch(placement=Placement(("a GPU",), 1))
    monkeypatch.setattr("fedhpc.approaches.inputs.device_of", lambda launch: GPU)
    for module in ("report", "inputs", "averaging.approach"):
        monkeypatch.setattr(f"fedhpc.approaches.{module}.peak_memory", lambda device: 0)
    monkeypatch.setattr("fedhpc.approaches.memory.memory_of", lambda device: 2**34)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with fake_gpu(monkeypatch) as gpu:
        approach = prepare(settings_of(tmp_path / "run", tree), LoopbackTransport(), launch, False)
        assert approach.base.device == GPU
        federation.run(approach, LoopbackTransport(), True, lambda round_: None)
        assert gpu.operators > 500
    assert read_status(tmp_path / "run").state == "complete"
