"""What client optimizers remember: the memory of clients that go on with their optimizer from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedhpc.lazy import Tensor, torch
from fedhpc.training.optimizers.base import ClientOptimizer

_COUNT, _BUFFER = "memory.count", "memory."  # names in a client's file


@dataclass(frozen=True)
class Memory:
    """What the optimizers of K clients remember, on the CPU."""

    buffers: Mapping[str, Tensor]  # each (K, T)
    count: Tensor  # int64 (K,): steps taken

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Memory:
        """The memory among the tensors that clients keep."""
        buffers = {name.removeprefix(_BUFFER): t for name, t in tensors.items() if name.startswith(_BUFFER)}
        count = buffers.pop(_COUNT.removeprefix(_BUFFER))
        return cls(buffers, count)

    def tensors(self) -> dict[str, Tensor]:
        """The inverse of `of`."""
        return {f"{_BUFFER}{name}": buffer for name, buffer in self.buffers.items()} | {_COUNT: self.count}


@dataclass(frozen=True)
class OptimizerMemory:
    """Keeps the memory of a client's optimizer (modes centralized and local)."""

    optimizer: ClientOptimizer
    size: int  # T
    dtype: torch.dtype

    @property
    def keeps(self) -> tuple[str, ...]:
        return (*(f"{_BUFFER}{name}" for name in self.optimizer.buffers), _COUNT)

    def initial(self, name: str) -> Tensor:
        if name == _COUNT:
            return torch.tensor(0)
        return torch.zeros(self.size, dtype=self.dtype)
