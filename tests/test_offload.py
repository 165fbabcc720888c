"""Layers that wait in host memory: the bits of a base that lies on the device, which has one of them at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedhpc.config import Model, resolve
from fedhpc.errors import UserError
from fedhpc.main import main
from fedhpc.models.footprint import Footprint
from fedhpc.models.load import checkpoint_layers, layer_stacks, offloads
from fedhpc.models.streaming import stream
from tests import tiny
from tests.group_program import learnt, read

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "pair", ["llama/prefix", "gpt2/ia3", "qwen2/lora-dora", "bert/prompt", "t5/lora", "llama/adapter"]
)
def test_what_is_learned_has_the_same_bits(pair: str) -> None:
    """Memory that a layer does not have at the moment cannot be read: what used another layer would fail."""
    model, _, method = pair.partition("/")
    whole, waiting = (tiny.base(model, torch.float32) for _ in range(2))
    layers = [layer for stack in layer_stacks(waiting.model) for layer in stack]
    stream(layers, CPU)
    for base in (whole, waiting) if method == "adapter" else ():
        checkpoint_layers(base.model)
    assert torch.equal(read(whole), read(waiting))
    expected = learnt(whole, method, 1)
    assert torch.equal(expected, learnt(waiting, method, 1)) and expected.abs().max() > 0
    held = [any(p.untyped_storage().nbytes() for p in layer.parameters()) for layer in layers]
    assert len(held) > 1 and sum(held) == 1


def test_a_device_has_a_layer_of_it() -> None:
    mib = 2**20
    weights = Footprint(80 * mib, 10 * mib, 20 * mib, offloaded=True)
    assert [weights.on_rank(ranks) / mib for ranks in (1, 2, 4)] == [30, 40, 40]
    model = Model(offload="cpu")
    assert offloads(model, "cuda") and not offloads(model, "cpu") and not offloads(Model(), "cuda")


def test_what_cannot_be_offloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"model\.offload cpu .*; give one of the two"):
        resolve({"partition": {"name": "iid"}, "model": {"quantize": "4bit", "offload": "cpu"}})
    words = [f"run.dir={tmp_path / 'run'}", "model.offload=cpu", "--check"]
    assert main([*words, "method.name=full"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.offload: method.name full changes the weights of the base" in line
    assert main(words) == 0
    assert "model.offload: clients train on CPUs, which compute with the base where it is" in capsys.readouterr().out
