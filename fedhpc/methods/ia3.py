"""(IA)^3: trained vectors rescale keys, values and inner activations (Liu et al. 2022, arXiv 2205.05638, section 3.3).

One vector of ones per adapted layer: it multiplies the output of the attention projections and the input of the
feed-forward's second layer. Payload and export are named and shaped as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._architectures import architecture
from fedhpc.methods._linear import by_row, find_layers, is_conv1d, unreached, widths
from fedhpc.methods.base import Attached, Method, PerClient, Tensors
from fedhpc.registry import Section
from fedhpc.updates.layout import Layout


class IA3(Method):
    """(IA)^3: trained vectors rescale what some layers read or write (Liu et al. 2022, arXiv 2205.05638)."""

    class Options(Section):
        outputs: list[str] | None = Field(None, min_length=1, description="layers whose output is rescaled")
        inputs: list[str] | None = Field(None, min_length=1, description="layers whose input is rescaled")

    options: Options

    @property
    def outputs(self) -> list[str]:
        """Names of the layers whose output is rescaled."""
        return self.options.outputs or architecture(self.base).keys_and_values

    @property
    def inputs(self) -> list[str]:
        """Names of the layers whose input is rescaled."""
        return self.options.inputs or [architecture(self.base).feed_forward_output]

    @property
    def messages(self) -> list[str]:
        return unreached(self.base, [*self.outputs, *self.inputs])

    @cached_property
    def _layers(self) -> dict[str, tuple[Any, bool]]:
        """Path in the base -> (layer, whether its input is rescaled)."""
        outputs = find_layers(self.base, self.outputs, "method.outputs")
        inputs = find_layers(self.base, self.inputs, "method.inputs")
        return {path: (layer, False) for path, layer in outputs.items()} | {
            path: (layer, True) for path, layer in inputs.items()
        }

    @cached_property
    def payload(self) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        for path, (layer, is_input) in self._layers.items():
            inside, outside = widths(layer)
            shapes[f"{path}.ia3_l"] = (1, inside) if is_input else (outside, 1)
        return Layout(shapes)

    def initial(self) -> dict[str, Tensor]:
        return {name: torch.ones(shape) for name, shape in self.payload.shapes.items()}

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        with ExitStack() as attached:
            for path, (layer, is_input) in self._layers.items():
                vectors = trained[f"{path}.ia3_l"].flatten(1)  # (K, width)
                per_row = kernels.of_rows(vectors, rows).unsqueeze(1)
                hook = (
                    layer.register_forward_pre_hook(lambda _, xs, v=per_row: (_scaled(xs[0], v, rows),))
                    if is_input
                    else layer.register_forward_hook(lambda _, xs, y, v=per_row: _scaled(y, v, rows))
                )
                attached.callback(hook.remove)
            yield Attached()

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT (IA)^3 adapter."""
        config = {
            "peft_type": "IA3",
            "target_modules": [*self.outputs, *self.inputs],
            "feedforward_modules": self.inputs,
            "fan_in_fan_out": any(is_conv1d(layer) for layer, _ in self._layers.values()),
        }
        self.write_adapter(path, config, {f"base_model.model.{n}": t for n, t in values.items()})

    def imported(self, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        from fedhpc.methods._peft import as_payload, require_method, without_wrappers

        require_method(config, "IA3")
        return as_payload(without_wrappers(tensors), self.payload.shapes)


def _scaled(x: Tensor, factors: Tensor, rows: Tensor) -> Tensor:
    """x with the factors (1 or B, 1, width) of its rows."""
    return (by_row(x, rows) * factors.to(x.dtype)).reshape(x.shape)
