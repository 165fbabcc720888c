"""(IA)^3: trained vectors rescale keys, values and inner activations (Liu et al. 2022, arXiv 2205.05638, section 3.3).

One vector of ones per adapted layer: it multiplies the output of the attention projections and the input of the
feed-forward's second layer. Payload and export are named and shaped as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._architectures import architecture
from fedhpc.methods._changes import Change, Rows, changed
from fedhpc.methods._linear import Layer, find_layers, is_conv1d, unreached
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
    def _layers(self) -> dict[str, tuple[Layer, bool]]:
        """Path in the base -> (layer, whether its input is rescaled)."""
        outputs = find_layers(self.base, self.outputs, "method.outputs")
        inputs = find_layers(self.base, self.inputs, "method.inputs")
        if both := sorted(outputs.keys() & inputs.keys()):
            raise UserError(
                f"method.inputs: {both[0]} is among the layers of method.outputs too, and has one vector",
                key="method.inputs", remedy="name it in one of the two",
            )  # fmt: skip
        return {path: (layer, False) for path, layer in outputs.items()} | {
            path: (layer, True) for path, layer in inputs.items()
        }

    @cached_property
    def payload(self) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        for path, (layer, is_input) in self._layers.items():
            inside, outside = layer.widths
            shapes[f"{path}.ia3_l"] = (1, inside) if is_input else (outside, 1)
        return Layout(shapes)

    def initial(self) -> dict[str, Tensor]:
        return {name: torch.ones(shape) for name, shape in self.payload.shapes.items()}

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        layers = {path: layer for path, (layer, _) in self._layers.items()}
        with changed(layers, self._change, Rows(trained, received, rows)) as output:
            yield Attached(output=output)

    def _change(self, path: str, rows: Rows) -> Change:
        """The layer at `path` with its inputs or outputs rescaled."""
        vectors = rows.trained[f"{path}.ia3_l"].flatten(1)  # (K, width)
        factors = kernels.of_rows(vectors, rows.clients).unsqueeze(1)  # (B, 1, width)

        def scaled(x: Tensor) -> Tensor:
            return x * factors.to(x.dtype)

        is_input = self._layers[path][1]
        return Change(before=scaled) if is_input else Change(behind=lambda _, y: scaled(y))

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT (IA)^3 adapter."""
        config = {
            "peft_type": "IA3",
            "target_modules": [*self.outputs, *self.inputs],
            "feedforward_modules": self.inputs,
            "fan_in_fan_out": any(is_conv1d(layer.module) for layer, _ in self._layers.values()),
        }
        self.write_adapter(path, config, {f"base_model.model.{n}": t for n, t in values.items()})

    def imported(self, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        from fedhpc.methods._peft import as_payload, require_method, without_wrappers

        require_method(config, "IA3")
        return as_payload(without_wrappers(tensors), self.payload.shapes)
