"""LoRA: a trained low-rank term beside frozen weights (Hu et al. 2022, arXiv 2106.09685, equation 3).

h = W x + (alpha / r) B A x, with A (r, in) drawn at random and B (out, r) zero at first. Payload and export are named
and shaped as in PEFT. A and B are averaged apart from each other, as in FedIT (Zhang et al. 2023, arXiv 2305.05644).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.lazy import lazy
from fedhpc.methods.base import Attached, Method
from fedhpc.payload import Layout
from fedhpc.registry import Section
from fedhpc.rng import torch_seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

# The attention projections that the paper adapts (section 4.2), by model_type.
_TARGETS = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "bloom": ["query_key_value"]}
_USUAL_TARGETS = ["q_proj", "v_proj"]


class Options(Section):
    rank: int = Field(8, ge=1, description="r, rank of the added term")
    alpha: float = Field(16.0, gt=0, description="the term is scaled by alpha / rank")
    targets: list[str] | None = Field(
        None, min_length=1, description="names of the adapted linear layers; default: attention, by architecture"
    )


class Lora(Method):
    """See the module."""

    @cached_property
    def _modules(self) -> dict[str, Any]:
        """Path in the base -> adapted module, in the model's order."""
        targets = self.options.targets or _TARGETS.get(self.base.model.config.model_type, _USUAL_TARGETS)
        found = {
            path: module
            for path, module in self.base.model.named_modules()
            if path.rsplit(".", 1)[-1] in targets and getattr(module, "weight", None) is not None
        }
        if missing := set(targets) - {path.rsplit(".", 1)[-1] for path in found}:
            linear = {p.rsplit(".", 1)[-1] for p, m in self.base.model.named_modules() if _features(m)}
            raise UserError(
                f"method.targets: the model has no layer named {', '.join(sorted(missing))}; it has: "
                f"{', '.join(sorted(linear))}"
            )
        return found

    @cached_property
    def payload(self) -> Layout:
        shapes: dict[str, tuple[int, ...]] = {}
        for path, module in self._modules.items():
            size = _features(module)
            if size is None:
                raise UserError(f"method.targets: '{path}' is not a linear layer")
            shapes[f"{path}.lora_A.weight"] = (self.options.rank, size[0])
            shapes[f"{path}.lora_B.weight"] = (size[1], self.options.rank)
        return Layout(shapes)

    def initial(self) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed(torch_seed(self.seed, "lora"))
        # The uniform bound that torch.nn.Linear and PEFT use for A.
        return {
            name: (torch.rand(shape, generator=noise) * 2 - 1) / shape[1] ** 0.5
            if name.endswith("lora_A.weight")
            else torch.zeros(shape)
            for name, shape in self.payload.shapes.items()
        }

    @contextmanager
    def attach(self, state: Mapping[str, Tensor], payload: Mapping[str, Tensor], rows: Tensor) -> Iterator[Attached]:
        hooks = [
            module.register_forward_hook(
                self._term(state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"], rows)
            )
            for path, module in self._modules.items()
        ]
        try:
            yield Attached()
        finally:
            for hook in hooks:
                hook.remove()

    def _term(self, a: Tensor, b: Tensor, rows: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
        """A forward hook that adds the term of row i's client: a (K, r, in), b (K, out, r), rows (B,)."""
        scale = self.options.alpha / self.options.rank

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            x = inputs[0]  # (B, T, in)
            one, two = (t.to(x.dtype) if t.dtype != x.dtype else t for t in (a, b))
            if len(one) == 1:
                return output + scale * (x @ one[0].mT @ two[0].mT)
            hidden = torch.bmm(x, one.index_select(0, rows).mT)  # (B, T, r)
            return output + scale * torch.bmm(hidden, two.index_select(0, rows).mT)

        return hook

    def export(self, payload: Mapping[str, Tensor], path: Path) -> None:
        """A PEFT LoRA adapter: adapter_config.json and adapter_model.safetensors."""
        from fedhpc.methods._peft import write_adapter

        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.options.rank,
            "lora_alpha": self.options.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({p.rsplit(".", 1)[-1] for p in self._modules}),
            "fan_in_fan_out": any(_is_conv1d(m) for m in self._modules.values()),
        }
        named = {f"base_model.model.{name}": tensor for name, tensor in payload.items()}
        write_adapter(path, config, named, self.base)


def _is_conv1d(module: Any) -> bool:
    """GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def _features(module: Any) -> tuple[int, int] | None:
    """(in, out) of a linear layer, None for anything else."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if _is_conv1d(module):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


METHOD = Lora
