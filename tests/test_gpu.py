"""The CUDA path: the same checks as on the CPU, on one GPU. Marked gpu."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest
import torch

from fedhpc.main import main
from tests import test_methods, tiny
from tests.test_block import make, peft_reference, relative, settings, start_of, works
from tests.test_kernels import groups_agree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU here"),
]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_a_client_trains_as_in_peft(family: str, dtype: torch.dtype, tolerance: float) -> None:
    base, data, config = tiny.base(family, dtype, device="cuda"), tiny.examples(), settings(optimizer="sgd", lr=0.5)
    method = make(base)
    start = start_of(method, torch.float64 if dtype == torch.float64 else torch.float32)
    work = works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    reference = tiny.base(family, torch.float64)
    wanted = peft_reference(reference, make(reference), data, work, config, start.double())
    assert relative(found.double(), wanted, start[0].double()) < tolerance


@pytest.mark.parametrize("name", ["prefix", "lora", "prompt", "p_tuning", "ia3"])
def test_a_block_equals_its_clients_alone(name: str) -> None:
    base, data, config = tiny.base("llama", device="cuda"), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method, group = test_methods.make(name, base), works(5)
    start = test_methods.warm(method, torch.float64)
    together = tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1)
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
        assert float((together.updates[i] - alone).norm() / alone.norm()) < 1e-9


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch has it from 2.10 on")
def test_all_groups_at_once_equal_one_product_for_each() -> None:
    groups_agree("cuda", torch.bfloat16, 2e-2)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_stays_close_to_float32(precision: str) -> None:
    base, data = tiny.base("llama", torch.float32, device="cuda"), tiny.examples()
    method = make(base)
    start = start_of(method, torch.float32)
    config = settings(optimizer="sgd", lr=0.1)
    full = tiny.train(base, method, tiny.objective(base), start, works(3), data, config, 1, 1).updates
    config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"precision": precision})})
    half = tiny.train(base, method, tiny.objective(base), start, works(3), data, config, 1, 1).updates
    assert float((full - half).norm() / full.norm()) < 0.1


def test_deterministic_runs_have_the_same_bits(tmp_path: Path) -> None:
    finals = []
    for name in ("a", "b"):
        arguments = ["federation.rounds=2", "client.steps=3", "runtime.deterministic=true", "evaluation.max_examples=8"]
        assert main([f"run.dir={tmp_path / name}", *arguments]) == 0
        with h5py.File(tmp_path / name / "results.h5") as file:
            finals.append({k: v[()].tobytes() for k, v in file["final"].items()})
    assert finals[0] == finals[1]
