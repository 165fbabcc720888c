"""Preferences against TRL's trainers: the losses, rewards and gradients of the same pairs in float64.

TRL's own code computes the loss from the token log-likelihoods of a PEFT model; its fused output layer, which works in
float32 whatever the model's dtype, is replaced by transformers' logits.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.methods.base import Method
from fedhpc.models.base import Attached
from fedhpc.training.block import Work
from fedhpc.training.schedule import batches
from tests import tiny
from tests.test_block import settings, works
from tests.test_methods import in_peft, make, warm
from tests.test_preferences import ALL, of, pairs

pytestmark = pytest.mark.slow
PAD = 0


@pytest.fixture(autouse=True, scope="module")
def _trl() -> None:
    pytest.importorskip("trl")


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's odds ratio casts to float32, which would hide all but seven digits."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.to(torch.promote_types(self.dtype, torch.float32)))


def judged() -> Examples:
    """Single answers to prompts of one length, so that every prompt has room for every answer."""
    rng = np.random.default_rng(2)
    rows = [[1, *rng.integers(3, tiny.VOCABULARY, 5 + rng.integers(2, 10)), 2] for _ in range(60)]
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    tokens = Tokens(np.concatenate(rows).astype(np.int32), offsets, np.full(60, 6, np.int32))
    return examples_from(tokens, desirable=rng.random(60) < 0.5)


class Scored:
    """A model as TRL's trainers call it: token log-likelihoods, or logits."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> Any:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        if labels is None:
            return SimpleNamespace(logits=logits)
        targets = labels[:, 1:]
        log_p = logits[:, :-1].log_softmax(dim=-1).gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        zeros = torch.zeros_like(log_p)
        return SimpleNamespace(
            log_probs=log_p.masked_fill(targets == -100, 0), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


def trainer_of(cls: type[Any], model: Any, reference: Any, **attributes: Any) -> Any:
    """A trainer of TRL without its set-up."""
    trainer = object.__new__(cls)
    same = lambda value: value  # noqa: E731
    vars(trainer).update(
        model=model, ref_model=Scored(reference), is_encoder_decoder=False, padding_value=PAD, pad_token_id=PAD,
        aux_loss_enabled=False, precompute_ref_logps=False, use_weighting=False, ld_alpha=None, label_smoothing=0.0,
        f_divergence_type="reverse_kl", loss_weights=[1.0], args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, **attributes,
    )  # fmt: skip
    return trainer


def trl_loss(name: str, model: Any, reference: Any, data: Examples, indices: np.ndarray) -> torch.Tensor:
    """TRL's loss of these examples."""
    if name in ("orpo", "simpo"):  # the mean over pairs of what TRL says of each alone; its first term is over tokens
        return torch.stack([_of_odds_or_means(name, model, reference, data, int(i)) for i in indices]).mean()
    if name == "kto":
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

        assert data.desirable is not None
        indices = indices[np.argsort(data.lengths[indices], kind="stable")]
        rows = [
            {
                "prompt_ids": data.prompt(int(i)).tolist(),
                "completion_ids": data.target(int(i)).tolist(),
                "KL_completion_ids": data.target(int(indices[position - 1])).tolist(),
                "label": bool(data.desirable[i]),
            }
            for position, i in enumerate(indices)
        ]
        trainer = trainer_of(
            KTOTrainer, model, reference, beta=0.1, calculate_KL=True, loss_type="kto", desirable_weight=1.0,
            undesirable_weight=1.0,
        )  # fmt: skip
        loss: torch.Tensor = trainer._compute_loss(Scored(model), DataCollatorForUnpairedPreference(PAD)(rows), False)
        return loss
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    trainer = trainer_of(DPOTrainer, model, reference, beta=0.1, loss_types=[{"dpo": "sigmoid"}.get(name, name)])
    rows = [_pair(data, int(i)) for i in indices]
    loss = trainer._compute_loss(Scored(model), DataCollatorForPreference(PAD)(rows), False)
    return loss


def _pair(data: Examples, index: int) -> dict[str, Any]:
    assert data.pairs is not None
    chosen, rejected = (data.pairs.target(2 * index + i).tolist() for i in (0, 1))
    return {"prompt_ids": data.prompt(index).tolist(), "chosen_ids": chosen, "rejected_ids": rejected}


def _of_odds_or_means(name: str, model: Any, reference: Any, data: Examples, index: int) -> torch.Tensor:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    pair, batch = _pair(data, index), {}
    for which in ("chosen", "rejected"):
        front, answer = pair["prompt_ids"], pair[f"{which}_ids"]
        batch[f"{which}_input_ids"] = torch.tensor([front + answer])
        batch[f"{which}_attention_mask"] = torch.ones(1, len(front + answer), dtype=torch.int64)
        batch[f"{which}_labels"] = torch.tensor([[-100] * len(front) + answer])
    if name == "orpo":
        trainer = trainer_of(ORPOTrainer, model, reference, beta=0.1)
    else:
        trainer = trainer_of(
            CPOTrainer, model, reference, beta=2.0, simpo_gamma=1.0, loss_type="simpo", cpo_alpha=0.0, alpha=0.0
        )
    loss: torch.Tensor = trainer.get_batch_loss_metrics(Scored(model), batch)[0]
    return loss


def trl_gradient(
    name: str, method_name: str, base: Any, method: Method, start: torch.Tensor, data: Examples, indices: np.ndarray
) -> tuple[float, torch.Tensor]:
    """TRL's loss of a step and its gradient by the payload `start` (P,)."""
    model, named = in_peft(method_name, base, method)
    with torch.no_grad():
        for key, value in method.payload.views(start).items():
            named[key].copy_(value)
    loss = trl_loss(name, model, base.model, data, indices)
    loss.backward()
    gradients = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in named.items()}
    return float(loss.detach()), method.payload.flatten(gradients)


@pytest.mark.parametrize("method_name", ["lora", "prefix"])
@pytest.mark.parametrize("name", ALL)
def test_a_block_has_trls_losses_and_gradients(name: str, method_name: str) -> None:
    """Three clients with payloads of their own in one forward pass, each against TRL's step of it alone."""
    base, config = tiny.base("llama"), settings(optimizer="sgd", lr=1.0, batch_size=8, steps=1)
    data = judged() if name == "kto" else pairs()
    method, group = make(method_name, base), [Work(w.client_id, w.indices) for w in works(3)]
    starts = torch.cat([warm(method, torch.float64) * scale for scale in (1.0, 0.7, 1.3)])
    trained = tiny.train(base, method, of(name, base), starts, group, data, config)
    for i, work in enumerate(group):
        (picked,) = batches(len(work.indices), config.client, 0, 1, work.client_id)
        loss, gradient = trl_gradient(name, method_name, base, method, starts[i], data, work.indices[picked])
        assert trained.loss_first[i] == pytest.approx(loss, rel=1e-9)
        assert float((trained.updates[i] - gradient).norm() / gradient.norm()) < 1e-9


def test_margins_are_trls() -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    base, data, rows = tiny.base("llama"), pairs(), np.array([3, 8, 21, 40])
    method, objective = make("lora", base), of("dpo", base)
    start = warm(method, torch.float64)
    model, named = in_peft("lora", base, method)
    with torch.no_grad():
        for key, value in method.payload.views(start[0]).items():
            named[key].copy_(value)
    trainer = trainer_of(DPOTrainer, model, base.model, beta=0.1, loss_types=["sigmoid"])
    trainer._compute_loss(Scored(model), DataCollatorForPreference(PAD)([_pair(data, int(i)) for i in rows]), False)
    (measured,) = [m for m in trainer._metrics.values() if m["rewards/margins"]]
    views, batch = method.payload.views(start), objective.batch(base, data, rows)
    with method.attach(views, views, torch.zeros(8, dtype=torch.int64)) as attached, torch.no_grad():
        margins = objective.measured(base, attached, batch)[1]
    with torch.no_grad():
        assert objective.measured(base, Attached(), batch)[1].abs().max() < 1e-12
    assert measured["rewards/margins"] == pytest.approx([float(margins.mean())], rel=1e-9)
    assert measured["rewards/accuracies"] == pytest.approx([float((margins > 0).double().mean())])
