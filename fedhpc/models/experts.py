"""The experts of a mixture: where a transformers model holds them, and how many tokens are sent to each.

Shapes: L layers with routed experts, E experts of a layer, B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from fedhpc.lazy import Tensor, torch

if TYPE_CHECKING:
    from fedhpc.models.base import Base, Batch


def weights_of_experts(model: Any) -> dict[str, tuple[Any, str]]:
    """Path -> (module, name) of the weights that hold those of all routed experts of a layer."""
    return {
        f"{path}.{name}": (module, name)
        for path, module in model.named_modules()
        if getattr(module._parameters.get("down_proj"), "ndim", 0) == 3
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def biases_of_experts(model: Any) -> set[str]:
    """The paths of the biases (E, out) of routed experts, as gpt-oss has them."""
    names = dict(model.named_parameters())
    return {f"{path}_bias" for path in weights_of_experts(model)} & names.keys()


def routers(model: Any) -> dict[str, tuple[Any, str]]:
    """Path -> (module, name of its weight (E, D)) of every router that is not a linear layer."""
    of_blocks = {}
    for path in {path.rpartition(".")[0].rpartition(".")[0]: None for path in weights_of_experts(model)}:
        for name, module in model.get_submodule(path).named_children():
            weight = module._parameters.get("weight")
            if getattr(weight, "ndim", 0) == 2 and hasattr(module, "top_k") and not hasattr(module, "in_features"):
                of_blocks[f"{path}.{name}"] = (module, "weight")
    return of_blocks


class ExpertLoad:
    """Counts the tokens that a decoder sends to each of its routed experts."""

    def __init__(self, base: Base) -> None:
        weights = weights_of_experts(base.model) if base.one_text else {}
        at = {path.rpartition(".")[0]: module for path, (module, _) in weights.items()}
        #: The layers of the model that have experts, from 0, in order.
        self.layers = [int(next(part for part in path.split(".") if part.isdigit())) for path in at]
        self._modules = list(at.values())
        most = max((len(module.down_proj) for module in self._modules), default=0)
        #: int64 (L, E): pairs of a token and an expert that it was sent to. Without experts nothing waits for a GPU.
        self.counts = torch.zeros(len(at), most, dtype=torch.int64, device=base.device if at else "cpu")

    @contextmanager
    def of(self, batch: Batch) -> Iterator[None]:
        """Count the tokens of a batch while the model reads it, without padding and what stands in front of the text.

        A row ends with the last of its tokens on which the loss depends.
        """
        with ExitStack() as open_:
            if self._modules:
                real = _real(batch)
                for counts, module in zip(self.counts, self._modules, strict=True):
                    hook = module.register_forward_pre_hook(
                        lambda _, given, counts=counts: _count(counts, real, given[1])
                    )
                    open_.callback(hook.remove)
            yield


def _real(batch: Any) -> Tensor:
    """Which tokens count: bool (B, T)."""
    rows, length = batch.ids.shape
    last = batch.positions.new_full((rows,), -1)
    last.scatter_reduce_(0, batch.positions // length, batch.positions % length, "amax")
    return torch.arange(length, device=last.device) <= last.unsqueeze(1)


def _count(counts: Tensor, real: Tensor, index: Tensor) -> None:
    """Add to counts (E) the tokens of each expert: index (N, k), of the N = B (n + T) tokens behind n virtual ones."""
    rows, length = real.shape
    virtual = len(index) // rows - length
    wanted = torch.nn.functional.pad(real, (virtual, 0)).reshape(-1, 1).expand_as(index)
    counts.index_add_(0, index.reshape(-1), wanted.reshape(-1).to(counts.dtype))
