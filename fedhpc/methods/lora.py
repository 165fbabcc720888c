"""LoRA: a trained low-rank term beside frozen weights (Hu et al. 2022, arXiv 2106.09685, equation 3).

h = W x + (alpha / r) B A x, with A (r, in) drawn at random and B (out, r) zero at first; in training with dropout on
the x of the second term. Payload and export are named and shaped as in PEFT.

How the clients' terms combine is the option `aggregation`:
average: A and B are averaged apart from each other, as in FedIT (Zhang et al. 2023, arXiv 2305.05644). The product of
the means is not the mean of the products.
ffa: A stays as it was drawn, and B alone is trained and exchanged (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313,
section 4). The mean of the B_i A is then the mean of the B_i times A, and the payload is half as large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedhpc.lazy import lazy
from fedhpc.methods._linear import features, find_layers, is_conv1d
from fedhpc.methods.base import Attached, Method
from fedhpc.payload import Layout
from fedhpc.registry import Section
from fedhpc.rng import bits, torch_seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

# The attention projections that the paper adapts (section 4.2), by model_type.
_TARGETS = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "bloom": ["query_key_value"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "xlm-roberta": ["query", "value"],
    "electra": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "t5": ["q", "v"],
    "mt5": ["q", "v"],
}
_USUAL_TARGETS = ["q_proj", "v_proj"]


_A, _B = "lora_A.weight", "lora_B.weight"


class Options(Section):
    rank: int = Field(8, ge=1, description="r, rank of the added term")
    alpha: float = Field(16.0, gt=0, description="the term is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the inputs of the term dropped in training")
    aggregation: Literal["average", "ffa"] = Field("average", description="what is trained and how it combines")
    targets: list[str] | None = Field(
        None, min_length=1, description="names of the adapted linear layers; default: attention, by architecture"
    )


class Lora(Method):
    """See the module."""

    @property
    def _targets(self) -> list[str]:
        return self.options.targets or _TARGETS.get(self.base.model.config.model_type, _USUAL_TARGETS)

    @cached_property
    def _modules(self) -> dict[str, Any]:
        """Path in the base -> adapted module, in the model's order."""
        return find_layers(self.base, self._targets, "method.targets")

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of A and B of every module."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path, module in self._modules.items():
            inside, outside = features(module) or (0, 0)
            shapes[_a(path)] = (self.options.rank, inside)
            shapes[_b(path)] = (outside, self.options.rank)
        return shapes

    @cached_property
    def payload(self) -> Layout:
        return Layout({name: shape for name, shape in self._shapes.items() if name not in self._frozen})

    def initial(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._drawn().items() if name in self.payload.shapes}

    def _drawn(self) -> dict[str, Tensor]:
        """A and B before the first round."""
        noise = torch.Generator().manual_seed(torch_seed(self.seed, "lora"))
        # The uniform bound that torch.nn.Linear and PEFT use for A.
        return {
            name: (torch.rand(shape, generator=noise) * 2 - 1) / shape[1] ** 0.5
            if name.endswith(_A)
            else torch.zeros(shape)
            for name, shape in self._shapes.items()
        }

    @cached_property
    def _frozen(self) -> dict[str, Tensor]:
        """With ffa A of every module (1, r, in), on the device."""
        if self.options.aggregation != "ffa":
            return {}
        dtype = torch.float64 if self.base.dtype == torch.float64 else torch.float32
        return {n: t.to(self.base.device, dtype).unsqueeze(0) for n, t in self._drawn().items() if n.endswith(_A)}

    @contextmanager
    def attach(
        self, state: Mapping[str, Tensor], payload: Mapping[str, Tensor], rows: Tensor, noise: Tensor | None = None
    ) -> Iterator[Attached]:
        hooks = []
        for number, (path, module) in enumerate(self._modules.items()):
            keys = bits(noise, torch.tensor(number)) if noise is not None and self.options.dropout else None
            factors = {**self._frozen, **state}
            hooks.append(module.register_forward_hook(self._term(factors[_a(path)], factors[_b(path)], rows, keys)))
        try:
            yield Attached()
        finally:
            for hook in hooks:
                hook.remove()

    def _term(self, a: Tensor, b: Tensor, rows: Tensor, keys: Tensor | None) -> Callable[[Any, Any, Tensor], Tensor]:
        """A forward hook that adds the term of row i's client: a (1 or K, r, in), b (K, out, r), rows (B,).

        keys: int64 (B,) of the dropout, None for none.
        """
        scale = self.options.alpha / self.options.rank

        def per_row(x: Tensor, weight: Tensor) -> Tensor:
            weight = weight.to(x.dtype)
            return x @ weight[0].mT if len(weight) == 1 else torch.bmm(x, weight.index_select(0, rows).mT)

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            x = inputs[0]  # (B, T, in)
            if keys is not None:
                x = x * self.kept(keys, *x.shape[1:]) / (1 - self.options.dropout)
            return output + scale * per_row(per_row(x, a), b)

        return hook

    def kept(self, keys: Tensor, length: int, width: int) -> Tensor:
        """Which inputs of a layer the dropout keeps: bool (B, length, width) for keys int64 (B,).

        Position t of a row has the same draws whatever the length, so padding changes nothing.
        """
        drawn = bits(keys.unsqueeze(1), torch.arange(length * width, device=keys.device))
        # int64 is uniform over [-2^63, 2^63): the lowest share p is dropped.
        return (drawn >= round(self.options.dropout * 2**64) - 2**63).view(-1, length, width)

    def export(self, payload: Mapping[str, Tensor], path: Path) -> None:
        """A PEFT LoRA adapter: adapter_config.json and adapter_model.safetensors."""
        from fedhpc.methods._peft import write_adapter

        config = {
            "peft_type": "LORA",
            "r": self.options.rank,
            "lora_alpha": self.options.alpha,
            "lora_dropout": self.options.dropout,
            "bias": "none",
            "target_modules": self._targets,
            "fan_in_fan_out": any(is_conv1d(m) for m in self._modules.values()),
        }
        frozen = {name: tensor[0] for name, tensor in self._frozen.items()}
        named = {f"base_model.model.{name}": tensor for name, tensor in {**frozen, **payload}.items()}
        write_adapter(path, config, named, self.base)


def _a(path: str) -> str:
    return f"{path}.{_A}"


def _b(path: str) -> str:
    return f"{path}.{_B}"


METHOD = Lora
