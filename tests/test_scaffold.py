"""SCAFFOLD with AdamW on prefixes and LoRA: whole rounds against PEFT's modules under torch.optim."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.approaches.prepare import prepare
from fedhpc.config import Config
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.training.block import Work
from tests.federations import compare_with_peft, federate, final, settings, table, tree, write_texts
from tests.test_methods import in_peft, trained_by_torch

ADAMW = {
    "optimizer": "adamw", "lr": 0.03, "scaffold": True, "weight_decay": 0.1, "clip_norm": 0.5, "batch_size": 2,
    "gradient_accumulation_steps": 2, "steps": 3,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "prefix": {"method": {"name": "prefix", "num_virtual_tokens": 5}},
    "lora": {"method": {"name": "lora", "rank": 2}, "client": {"micro_batch": 1}},
    "rates": {"method": {"name": "lora", "rank": 2, "loraplus_lr_ratio": 4.0}, "client": {"layer_lr_decay": 0.6}},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def federation(texts: Path, variant: str, **changes: Any) -> dict[str, Any]:
    """Four rounds, in which clients come again, and some drop out."""
    rounds = {"rounds": 4, "cohort_size": 4, "dropout": 0.2}
    client = {**ADAMW, **VARIANTS[variant].get("client", {})}
    raw = tree(texts, model={"dtype": "float64"}, federation=rounds, client=client, **changes)
    return {**raw, "method": VARIANTS[variant]["method"]}


class Corrected:
    """torch.optim.AdamW on clipped gradients to which `correction` (P,) is added; adds up what they were before."""

    def __init__(self, named: dict[str, Any], config: Config, correction: np.ndarray) -> None:
        self.named, self.clip = named, config.client.clip_norm
        self.correction, self.total, self.steps = correction, np.zeros_like(correction), 0
        ratio, client = getattr(config.method, "loraplus_lr_ratio", None) or 1.0, config.client
        rates = [
            client.lr * (ratio if "lora_B" in name else 1.0) * (client.layer_lr_decay if "layers.0" in name else 1.0)
            for name in named
        ]
        groups = [{"params": [p], "lr": rate} for p, rate in zip(named.values(), rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=client.weight_decay)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.named.values(), self.clip)
        gradient = torch.cat([p.grad.flatten() for p in self.named.values()]).numpy()
        self.total, self.steps = self.total + gradient, self.steps + 1
        after = torch.from_numpy(gradient + self.correction).split([p.numel() for p in self.named.values()])
        for parameter, part in zip(self.named.values(), after, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        self.optimizer.step()


def by_hand(config: Config, task: Averaging) -> tuple[np.ndarray, np.ndarray]:
    """The first and the final payload (P,): clients one at a time."""
    method, data = task.method, task.data.train
    theta = first = method.payload.flatten({n: t.double() for n, t in method.initial().items()}).numpy()
    c, own = np.zeros_like(theta), defaultdict(lambda: np.zeros_like(theta))
    for t in range(1, config.federation.rounds + 1):
        ends, counts, changes = [], [], []
        for client in task.plan(t).training:
            work = Work(client, task.data.population.indices(client))
            model, named = in_peft(config.method.name, task.base, method)
            with torch.no_grad():
                for name, value in method.payload.views(torch.from_numpy(theta)).items():
                    named[name].copy_(value)
            rule = Corrected(named, config, c - own[client])
            ends.append(trained_by_torch(model, named, method, data, config, work, rule=rule, round_=t).numpy())
            counts.append(len(work.indices))
            changes.append(rule.total / rule.steps - own[client])
            own[client] = rule.total / rule.steps
        theta = np.average(ends, axis=0, weights=counts)
        c = c + sum(changes) / task.data.population.num_clients
    return first, theta


@pytest.mark.parametrize("variant", VARIANTS)
def test_adamw_with_control_variates_is_the_formula(tmp_path: Path, texts: Path, variant: str) -> None:
    """On one rank and, to the bit, on two and three."""
    raw = federation(texts, variant)
    compare_with_peft(raw["method"]["name"])
    config = settings(tmp_path / "1", raw)
    federate(config)
    task = prepare(config, LoopbackTransport(), Launch(), False)
    first, wanted = by_hand(config, task)
    tensors = final(tmp_path / "1")
    found = np.concatenate([tensors[name].ravel() for name in task.method.payload.shapes])
    moved = np.linalg.norm(wanted - first)
    assert moved > 1e-2
    assert np.linalg.norm(found - wanted) / moved < 1e-9
    for ranks in (2, 3):
        federate(settings(tmp_path / str(ranks), raw), ranks)
        for name, tensor in final(tmp_path / str(ranks)).items():
            assert tensor.tobytes() == tensors[name].tobytes()
    clients = table(tmp_path / "1", "clients")
    assert (clients["status"] == 1).any() and (np.unique(clients["client_id"], return_counts=True)[1] > 1).any()
