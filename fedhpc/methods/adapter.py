"""Bottleneck adapters: small trained networks inside each layer (Houlsby et al. 2019, arXiv 1902.00751, section 2.1).

An adapter stands behind the output projection of a sub-layer, before the residual connection, and has a residual
connection of its own: h <- h + W_up f(W_down h + b_down) + b_up, with W_down (m, D), W_up (D, m) and m << D.

- placement: houlsby behind attention and behind the feed-forward; pfeiffer behind the feed-forward alone (Pfeiffer et
  al. 2021, arXiv 2005.00247, section 4.1).

The weights start from a normal distribution of deviation 0.01, cut at two deviations, so near the identity (Houlsby et
al., section 3.1). PEFT has no such adapter: the export is a format of our own, and `load` attaches it to a transformers
model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._architectures import architecture
from fedhpc.methods._changes import Change, Rows, changed
from fedhpc.methods._linear import Layer, ends_with, features, find_layers, unreached
from fedhpc.methods.base import Attached, Method, PerClient, Tensors
from fedhpc.registry import Section
from fedhpc.rng import torch_seed
from fedhpc.updates.layout import Layout

FORMAT = "fedhpc-adapter"
_DEVIATION = 0.01
_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


class Adapter(Method):
    """Bottleneck adapters: small trained networks behind some layers (Houlsby et al. 2019, arXiv 1902.00751)."""

    class Options(Section):
        bottleneck: int = Field(16, ge=1, description="m, width of the adapter")
        activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="f, the non-linearity")
        placement: Literal["houlsby", "pfeiffer"] = Field(
            "houlsby", description="behind attention and feed-forward, or behind the feed-forward alone"
        )
        attention: list[str] | None = Field(
            None, min_length=1, description="names of attention's output layers; default: by architecture"
        )
        feed_forward: list[str] | None = Field(
            None, min_length=1, description="names of the feed-forward's output layers; default: by architecture"
        )

    options: Options
    starts_from_payload = True

    @property
    def messages(self) -> list[str]:
        return unreached(self.base, self._layers, "method")

    @cached_property
    def _layers(self) -> dict[str, Layer]:
        """Path in the base -> the linear layer behind which an adapter stands, in the model's order."""
        usual = architecture(self.base)
        attention = self.options.attention or list(usual.attention_output)
        feed_forward = self.options.feed_forward or [usual.feed_forward_output]
        layers = find_layers(self.base, feed_forward, "method.feed_forward")
        if self.options.placement == "pfeiffer":
            # BERT's attention.output.dense ends like its feed-forward's output.dense.
            return {p: layer for p, layer in layers.items() if not any(ends_with(p, name) for name in attention)}
        layers |= find_layers(self.base, attention, "method.attention")
        return {path: layers[path] for path, _ in self.base.model.named_modules() if path in layers}

    @cached_property
    def payload(self) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        for path, layer in self._layers.items():
            width, m = layer.widths[1], self.options.bottleneck
            shapes[f"{path}.adapter.down.weight"] = (m, width)
            shapes[f"{path}.adapter.down.bias"] = (m,)
            shapes[f"{path}.adapter.up.weight"] = (width, m)
            shapes[f"{path}.adapter.up.bias"] = (width,)
        return Layout(shapes)

    def initial(self) -> dict[str, Tensor]:
        drawing = torch.Generator().manual_seed(torch_seed(self.seed, "adapter"))
        return {
            name: torch.zeros(shape)
            if name.endswith("bias")
            else torch.nn.init.trunc_normal_(
                torch.empty(shape), std=_DEVIATION, a=-2 * _DEVIATION, b=2 * _DEVIATION, generator=drawing
            )
            for name, shape in self.payload.shapes.items()
        }

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        with changed(self._layers, self._change, Rows(trained, received, rows)) as output:
            yield Attached(output=output)

    def _change(self, path: str, rows: Rows) -> Change:
        """The adapter behind the layer at `path`, of the client of each row."""
        parts = {part: rows.trained[f"{path}.adapter.{part}"] for part in _PARTS}  # each (K, ...)
        activation = _activation(self.options.activation)

        def affine(x: Tensor, name: str) -> Tensor:
            weight, bias = (parts[f"{name}.{part}"].to(x.dtype) for part in ("weight", "bias"))
            if len(weight) == 1:
                return torch.nn.functional.linear(x, weight[0], bias[0])
            bias, weight = kernels.of_rows(bias, rows.clients), kernels.of_rows(weight, rows.clients)
            return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

        return Change(behind=lambda _, h: h + affine(activation(affine(h, "down")), "up"))

    def serving(self, exported: Mapping[str, Any] | None = None) -> str:
        return "servers know no such adapter: fedhpc.load serves it, or fedhpc.methods.adapter.load in transformers"

    def export(self, values: Tensors, path: Path) -> None:
        """adapter_config.json and adapter_model.safetensors, for `load`."""
        config = {
            "format": FORMAT,
            "format_version": 1,
            "bottleneck": self.options.bottleneck,
            "activation": self.options.activation,
            "placement": self.options.placement,
        }
        self.write_adapter(path, config, values)

    def imported(self, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        from fedhpc.methods._peft import as_payload, require, require_method

        require_method(config, FORMAT)
        options = ("bottleneck", "activation", "placement")
        require({key: getattr(self.options, key) for key in options}, {key: config[key] for key in options})
        return as_payload(tensors, self.payload.shapes)


def load(model: Any, path: str | Path) -> Any:
    """Attach the adapters in the folder `path` to a transformers model of the same shape, in place; returns it.

    Each adapter becomes a submodule `adapter` of the layer that it stands behind, so it moves and is saved with the
    model. UserError where the folder holds no such adapters or they belong to another model.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: holds no adapter_config.json that can be read: {error}") from None
    if config.get("format") != FORMAT:
        raise UserError(f"{folder}: is not an export of method adapter; PEFT's adapters load with peft.PeftModel")
    tensors = load_file(folder / "adapter_model.safetensors")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name in [name for name in tensors if ".adapter." not in name]:  # a head that was trained beside them
        parameters[name].data.copy_(tensors.pop(name))
    for path in dict.fromkeys(name.split(".adapter.")[0] for name in tensors):
        parts = {part: tensors[f"{path}.adapter.{part}"] for part in _PARTS}
        m, width = parts["down.weight"].shape
        module: Any = modules.get(path)
        if (features(module) or (0, 0))[1] != width:
            raise UserError(f"{folder}: belongs to another model: this one has no linear layer {path} of width {width}")
        adapter = torch.nn.ModuleDict({"down": torch.nn.Linear(width, m), "up": torch.nn.Linear(m, width)})
        adapter.load_state_dict(parts)
        module.adapter = adapter.to(module.weight.device, model.dtype).requires_grad_(False)
        module.register_forward_hook(partial(_through, activation=_activation(config["activation"])))
    return model


def _through(module: Any, inputs: Any, output: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """A forward hook: the output of a layer that `load` gave an adapter, through it."""
    return output + module.adapter["up"](activation(module.adapter["down"](output)))


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    function: Callable[[Tensor], Tensor] = getattr(torch.nn.functional, name)
    return function
