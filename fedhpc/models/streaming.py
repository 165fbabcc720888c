"""A frozen base whose layers wait in host memory: the device has a copy of one of them at a time.

A layer is copied from pinned memory before it runs, forward and backward, into the same tensors: what autograd has
saved of them is filled again. Its graph stays as it is, so gradients have the bits of a base that lies on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedhpc.models.hooks import ask_for, named_parameters, size_bytes
from fedhpc.ranks.group import Layer, OneWhole


class _Waiting(Layer):
    """A layer whose parameters have memory on the device only while it is gathered."""

    def __init__(self, layer: torch.nn.Module, device: torch.device) -> None:
        self._layer, self.size_bytes = layer, size_bytes(layer)
        self._here, self._there = [], []
        for module, name, parameter in named_parameters(layer):
            here = parameter.detach()
            self._here.append(here.pin_memory() if device.type == "cuda" else here.clone())
            there = torch.nn.Parameter(torch.empty_like(here, device=device), requires_grad=False)
            module._parameters[name] = there
            self._there.append(there)
        self.reshard()

    def parameters(self) -> Sequence[Tensor]:
        return self._there

    def unshard(self) -> None:
        versions = torch.autograd._unsafe_preserve_version_counter(tuple(self._there))  # type: ignore[attr-defined]
        with torch.no_grad(), versions:
            for here, there in zip(self._here, self._there, strict=True):
                there.untyped_storage().resize_(here.untyped_storage().nbytes())
                there.copy_(here, non_blocking=True)

    def reshard(self) -> None:
        for there in self._there:
            there.untyped_storage().resize_(0)


def stream(layers: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Let the frozen parameters of `layers` wait where they are, in place, and copy a layer to `device` for its use.

    The layers run one after the other, forward and backward.
    """
    waiting = OneWhole()
    for module in layers:
        ask_for(module, waiting, _Waiting(module, device))
