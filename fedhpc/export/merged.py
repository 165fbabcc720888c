"""A model folder that has in its weights what a run trained: transformers and servers load it like any other model.

The weights are made by the method's own formula in full precision, and the folder is compared with the adapter before
it gets its name: both read the same tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhpc import customized
from fedhpc.approaches.export import FACTS
from fedhpc.customized import Customized
from fedhpc.errors import UserError
from fedhpc.methods import adapter as bottleneck
from fedhpc.methods._peft import adapter_config, read_json
from fedhpc.methods._weights import save_model
from fedhpc.methods.ia3 import IA3
from fedhpc.methods.lora import Lora
from fedhpc.models.base import Base
from fedhpc.models.encoder import Classifier
from fedhpc.models.generative import Generative
from fedhpc.models.seq2seq import Seq2Seq

_ROWS, _LENGTH = 2, 12  # of the tokens that both read
_IN_FRONT = "stands in front of a text and is no change of the base's weights"
_SERVED = "serve the adapter/ with fedhpc.load or transformers (docs/export.md)"
#: Type or format of an adapter that is in no weights of a base -> what it is, and what serves it.
_APART = {
    "PREFIX_TUNING": (f"a prefix {_IN_FRONT}", _SERVED),
    "PROMPT_TUNING": (f"a soft prompt {_IN_FRONT}", _SERVED),
    "P_TUNING": (f"a soft prompt {_IN_FRONT}", _SERVED),
    bottleneck.FORMAT: ("a bottleneck adapter is a network behind layers and no change of their weights", _SERVED),
}


@dataclass(frozen=True)
class Difference:
    """How far what a merged model computes is from what the adapter on its base does, on the same tokens."""

    largest: float  # difference of two values
    values: float  # the largest value, by its absolute value
    dtype: str  # of the merged model
    of: str = "logits"  # what the values are

    def __str__(self) -> str:
        values = f"{self.of}, up to {self.values:.3g}"
        return f"{self.dtype}; {values}, differ by {self.largest:.1e} at most from the adapter's"


def merge(adapter: Path, folder: Path, dtype: str | None = None, base: str | None = None) -> tuple[Difference, Any]:
    """Write a model folder `folder`, which is new, of the export in `adapter`; what it differs by, and the
    base as the export names it.

    dtype: of the stored weights; None: that of the base. base: where it is another than the export names.
    UserError where the method changes no weights, and where the merged model would compute something else.
    """
    require_mergeable(adapter)
    model = customized.load(adapter, base)
    require_all_bits(model.base, adapter)
    network, expected = model.base.model, _logits(model)
    if model.method is not None:
        _put(model)
    network.to(getattr(torch, dtype) if dtype else model.base.dtype)
    if model.chat_template is not None:
        model.tokenizer.chat_template = model.chat_template
    save_model(model.base, folder)
    named = str(network.dtype).removeprefix("torch.")
    facts = {**read_json(adapter / FACTS, missing_ok=True), "task": model.base.task, "dtype": named}
    (folder / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return compare(expected, _logits(customized.load(folder)), named), model.base


def require_mergeable(adapter: Path) -> None:
    """UserError, with what does serve it, where an export is in no weights of its base."""
    config = adapter_config(adapter)
    apart = _APART.get(str(config.get("peft_type", config.get("format"))))
    if apart is not None:
        raise UserError(f"{apart[0]}, so it cannot be merged", remedy=apart[1])


def require_all_bits(base: Base, adapter: Path) -> None:
    """UserError for an adapter whose base is stored in few bits."""
    if base.quantization.get("quantize", "none") != "none":
        raise UserError(
            f"the base of '{adapter}' is stored in {base.quantization['quantize']}, so merged weights would be "
            "rounded again", remedy="serve the adapter/ on the same base",
        )  # fmt: skip


def _put(model: Customized) -> None:
    """Change the weights of the base by what was trained."""
    network, method = model.base.model, model.method
    assert isinstance(method, (Lora, IA3)), "what else is loaded with a method stands in _APART"
    output, embeddings = network.get_output_embeddings(), network.get_input_embeddings()
    were_tied = output is not None and output.weight is embeddings.weight
    method.merge(model.payload)
    if were_tied and output.weight is not embeddings.weight:
        _untie(model)


def _untie(model: Customized) -> None:
    """Let the output layer keep the weight of its own that it has now; what else was shared is stored once for each."""
    network = model.base.model
    for config in (network.config, network.config.get_text_config()):
        config.tie_word_embeddings = False
    # T5's kind scales the states in front of a tied output layer; most of its classes keep that apart from the tie.
    if isinstance(model.base, Seq2Seq) and not hasattr(network.config, "scale_decoder_outputs"):
        network.get_output_embeddings().weight.data.mul_(model.base.output_scale)
    seen: set[int] = set()
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
            seen.add(id(parameter))


def _logits(model: Customized) -> Tensor:
    """The logits of a few tokens, on the CPU, in the type of the weights."""
    model = replace(model, precision="float32")  # rounding of the products would hide what is compared
    base = model.base
    ids = base.some_ids(_ROWS, 2 * _LENGTH)
    with model.attached(_ROWS) as attached:
        if isinstance(base, Classifier):
            ids = base.ended(ids, [2 * _LENGTH] * _ROWS)
            return base.class_logits(attached, ids, torch.ones_like(ids)).cpu()
        assert isinstance(base, Generative)
        rows = ids.cpu().numpy().astype(np.int32)
        examples = base.with_answers(attached, [row[:_LENGTH] for row in rows], [row[_LENGTH:] for row in rows])
        return torch.cat(list(base.predictions(attached, base.batch(examples, np.arange(_ROWS))))).cpu()


def compare(expected: Tensor, merged: Tensor, dtype: str, of: str = "logits") -> Difference:
    """The difference. UserError where it is more than rounding to the type of the weights."""
    difference = Difference(float((merged - expected).abs().max()), float(expected.abs().max()), dtype, of)
    # Rounding of every weight grows with depth: half the digits of the type are a wide margin, and a mistake is wider.
    if not difference.largest <= torch.finfo(getattr(torch, dtype)).eps ** 0.5 * max(difference.values, 1.0):
        raise UserError(
            f"a merged model would not compute what the adapter does: {of} differ by {difference.largest:.2g}",
            remedy="serve the adapter/",
        )
    return difference
