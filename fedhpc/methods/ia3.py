"""(IA)^3: trained vectors rescale keys, values and inner activations (Liu et al. 2022, arXiv 2205.05638, section 3.3).

One vector of ones per adapted layer: it multiplies the output of the attention projections and the input of the
feed-forward's second layer. Payload and export are named and shaped as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._linear import by_row, features, find_layers, is_conv1d
from fedhpc.methods.base import Attached, Method, PerClient, Tensors
from fedhpc.registry import Section
from fedhpc.updates.layout import Layout

# By model_type: layers whose output is rescaled, and layers whose input is.
_LAYERS = {
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "gpt_neox": (["query_key_value"], ["dense_4h_to_h"]),
    "opt": (["k_proj", "v_proj"], ["fc2"]),
    "bart": (["q_proj", "v_proj"], ["fc2"]),
    "bert": (["key", "value"], ["output.dense"]),
    "roberta": (["key", "value"], ["output.dense"]),
    "xlm-roberta": (["key", "value"], ["output.dense"]),
    "electra": (["key", "value"], ["output.dense"]),
    "distilbert": (["k_lin", "v_lin"], ["lin2"]),
    "t5": (["k", "v"], ["wo"]),
    "mt5": (["k", "v"], ["wo"]),
}
_USUAL_LAYERS = (["k_proj", "v_proj"], ["down_proj"])


class Options(Section):
    outputs: list[str] | None = Field(None, min_length=1, description="layers whose output is rescaled")
    inputs: list[str] | None = Field(None, min_length=1, description="layers whose input is rescaled")


class IA3(Method):
    """See the module."""

    @property
    def _names(self) -> tuple[list[str], list[str]]:
        outputs, inputs = _LAYERS.get(self.base.model.config.model_type, _USUAL_LAYERS)
        return self.options.outputs or outputs, self.options.inputs or inputs

    @cached_property
    def _modules(self) -> dict[str, tuple[Any, bool]]:
        """Path in the base -> (module, whether its input is rescaled)."""
        outputs, inputs = self._names
        found = {p: (m, False) for p, m in find_layers(self.base, outputs, "method.outputs").items()}
        return found | {p: (m, True) for p, m in find_layers(self.base, inputs, "method.inputs").items()}

    @cached_property
    def payload(self) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        for path, (module, is_input) in self._modules.items():
            inside, outside = features(module) or (0, 0)
            shapes[f"{path}.ia3_l"] = (1, inside) if is_input else (outside, 1)
        return Layout(shapes)

    def initial(self) -> dict[str, Tensor]:
        return {name: torch.ones(shape) for name, shape in self.payload.shapes.items()}

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        hooks = []
        for path, (module, is_input) in self._modules.items():
            vectors = trained[f"{path}.ia3_l"].flatten(1)  # (K, width)
            per_row = kernels.of_rows(vectors, rows).unsqueeze(1)
            if is_input:
                hooks.append(module.register_forward_pre_hook(lambda _, xs, v=per_row: (_scaled(xs[0], v, rows),)))
            else:
                hooks.append(module.register_forward_hook(lambda _, xs, y, v=per_row: _scaled(y, v, rows)))
        try:
            yield Attached()
        finally:
            for hook in hooks:
                hook.remove()

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT (IA)^3 adapter."""
        from fedhpc.methods._peft import write_adapter

        outputs, inputs = self._names
        config = {
            "peft_type": "IA3",
            "target_modules": [*outputs, *inputs],
            "feedforward_modules": inputs,
            "fan_in_fan_out": any(is_conv1d(m) for m, _ in self._modules.values()),
        }
        write_adapter(path, config, {f"base_model.model.{n}": t for n, t in values.items()}, self.base)


def _scaled(x: Tensor, factors: Tensor, rows: Tensor) -> Tensor:
    """x with the factors (1 or B, 1, width) of its rows."""
    return (by_row(x, rows) * factors.to(x.dtype)).reshape(x.shape)


METHOD = IA3
