"""(IA)^3: trained vectors rescale keys, values and inner activations (Liu et al. 2022, arXiv 2205.05638, section 3.3).

One vector of ones per adapted layer: it multiplies the output of the attention projections and the input of the
feed-forward's second layer. Payload and export are named and shaped as in PEFT. Each of a layer's routed experts has a
vector of its own; PEFT knows none of these, so with them the export is a format of our own, and `load` multiplies the
weights of a transformers model by the vectors.
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
from fedhpc.methods._experts import ChangeOfExperts, Routed
from fedhpc.methods._linear import Layer, find_layers, is_conv1d, is_transposed, unreached
from fedhpc.methods._peft import adapter_config
from fedhpc.methods.base import Attached, Method, PerClient, Tensors
from fedhpc.registry import Section
from fedhpc.updates.layout import Layout

FORMAT = "fedhpc-ia3"


class IA3(Method):
    """(IA)^3: trained vectors rescale what some layers read or write (Liu et al. 2022, arXiv 2205.05638)."""

    class Options(Section):
        outputs: list[str] | None = Field(None, min_length=1, description="layers whose output is rescaled")
        inputs: list[str] | None = Field(None, min_length=1, description="layers whose input is rescaled")

    options: Options
    starts_from_payload = True

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
        return unreached(self.base, {path: layer for path, (layer, _) in self._layers.items()}, "method")

    @cached_property
    def _layers(self) -> dict[str, tuple[Layer, bool]]:
        """Path in the base -> (layer, whether its input is rescaled)."""
        outputs = find_layers(self.base, self.outputs, "method.outputs", experts=True)
        inputs = find_layers(self.base, self.inputs, "method.inputs", experts=True)
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
            each = (layer.experts,) if layer.experts else ()
            shapes[f"{path}.ia3_l"] = (*each, 1, inside) if is_input else (*each, outside, 1)
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

    def _change(self, path: str, rows: Rows) -> Change | ChangeOfExperts:
        """The layer at `path` with its inputs or outputs rescaled."""
        layer, is_input = self._layers[path]
        if layer.experts:
            return _of_experts(rows.trained[f"{path}.ia3_l"].flatten(2), is_input)
        vectors = rows.trained[f"{path}.ia3_l"].flatten(1)  # (K, width)
        factors = kernels.of_rows(vectors, rows.clients).unsqueeze(1)  # (B, 1, width)

        def scaled(x: Tensor) -> Tensor:
            return x * factors.to(x.dtype)

        return Change(before=scaled) if is_input else Change(behind=lambda _, y: scaled(y))

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT (IA)^3 adapter, or with experts or routers one for `load`."""
        if any(layer.parameter for layer, _ in self._layers.values()):
            config = {"format": FORMAT, "format_version": 1, "outputs": self.outputs, "inputs": self.inputs}
            self.write_adapter(path, config, values)
            return
        config = {
            "peft_type": "IA3",
            "target_modules": [*self.outputs, *self.inputs],
            "feedforward_modules": self.inputs,
            "fan_in_fan_out": any(is_conv1d(layer.module) for layer, _ in self._layers.values()),
        }
        self.write_adapter(path, config, {f"base_model.model.{n}": t for n, t in values.items()})

    def serving(self, exported: Mapping[str, Any] | None = None) -> str:
        return "vLLM loads LoRA and no (IA)^3: merge it into the base with fedhpc export --merge"

    def merge(self, values: Tensors) -> None:
        """Put the vectors into the weights of the base, which then computes alone what `attach` makes it compute."""
        dtype = self.base.payload_dtype
        for path, (layer, is_input) in self._layers.items():
            vector = values[f"{path}.ia3_l"].to(dtype)  # (1, in) or (out, 1), of experts one each
            bias = None if is_input or layer.bias is None else layer.bias.to(dtype) * vector.squeeze(-1)
            layer.hold(layer.weight.to(dtype) * vector, bias)

    def imported(self, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        from fedhpc.methods._peft import as_payload, require_method, without_wrappers

        require_method(config, "IA3", FORMAT)
        return as_payload(without_wrappers(tensors), self.payload.shapes)


def _of_experts(vectors: Tensor, is_input: bool) -> ChangeOfExperts:
    """What rescales the inputs or outputs of experts by vectors (1 or K, E, width)."""

    def scaled(x: Tensor, routed: Routed) -> Tensor:
        return x * routed.of_tokens(vectors).to(x.dtype)

    return (
        ChangeOfExperts(before=scaled) if is_input else ChangeOfExperts(behind=lambda _, y, routed: scaled(y, routed))
    )


def load(model: Any, path: str | Path) -> Any:
    """Multiply weights of a transformers model by the vectors in the folder `path`, in place; returns it.

    UserError where the folder holds no such vectors or they belong to another model.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    config = adapter_config(folder)
    if config.get("format") != FORMAT:
        raise UserError(f"{folder}: is not an export of method ia3 with experts; PEFT's load with peft.PeftModel")
    tensors = {
        name: t for name, t in load_file(folder / "adapter_model.safetensors").items() if name.endswith(".ia3_l")
    }
    modules = dict(model.named_modules())
    for name, vector in tensors.items():
        at = name.removesuffix(".ia3_l")
        module: Any = modules.get(at)
        parameter = "weight"
        if module is None:
            module, parameter = modules.get(at.rpartition(".")[0]), at.rpartition(".")[2]
        transposed = is_transposed(module)
        weight: Any = getattr(module, parameter, None)
        if weight is None or not _fits(factor := vector.mT if transposed else vector, weight):
            raise UserError(f"{folder}: belongs to another model: this one has no weight {at} that {name} fits")
        weight.data.mul_(factor.to(weight))
        bias = getattr(module, "bias" if parameter == "weight" else f"{parameter}_bias", None)
        if bias is not None and vector.shape[-1] == 1:
            bias.data.mul_(vector.squeeze(-1).to(bias))
    return model


def _fits(factor: Tensor, weight: Tensor) -> bool:
    """Whether a factor multiplies a weight along one of its axes, or for each expert along one."""
    return factor.ndim == weight.ndim and all(a in (1, b) for a, b in zip(factor.shape, weight.shape, strict=True))
