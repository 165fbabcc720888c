"""A frozen base whose layers are spread over the ranks of a worker: each holds a part of every layer.

FSDP2 (Zhao et al. 2023, arXiv 2304.11277) keeps the parts and gathers a layer from them. When it does so is ours: ranks
of a group train clients of their own, so they agree on each gather (`fedhpc.ranks.group`), and hooks of our own ask for
a layer before it runs, forward and backward. They change nothing in autograd's graph, so gradients add up in the same
order, to the same bits, as with a base in one piece. What is outside the layers, as embeddings and the output layer,
every rank has whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from fedhpc.models.hooks import ask_for, named_parameters, size_bytes
from fedhpc.ranks.group import Group, Layer


class _Held:
    """A layer of which this rank holds a part."""

    def __init__(self, layer: torch.nn.Module, mesh: DeviceMesh, policy: OffloadPolicy) -> None:
        self._layer, self.size_bytes = layer, size_bytes(layer)
        # FSDP2 hooks what it is given: a module around the layer, of which it then changes the parameters alone.
        around = torch.nn.Sequential(layer)
        self._sharded = fully_shard(around, mesh=mesh, reshard_after_forward=True, offload_policy=policy)

    def parameters(self) -> Sequence[Tensor]:
        return [parameter for _, _, parameter in named_parameters(self._layer)]

    def unshard(self) -> None:
        with torch.inference_mode(False):  # what is gathered first would never be part of a graph
            self._sharded.unshard()

    def reshard(self) -> None:
        self._sharded.reshard()


class _Borrowed:
    """A layer of a guest: without memory but while it is whole, and for forward passes alone."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer, self.size_bytes = layer, size_bytes(layer)
        self.reshard()

    def parameters(self) -> Sequence[Tensor]:
        return [parameter for _, _, parameter in named_parameters(self._layer)]

    def unshard(self) -> None:
        self._replace(lambda parameter: torch.empty_like(parameter, device="cpu"))

    def reshard(self) -> None:
        self._replace(lambda parameter: parameter.to("meta"))

    def _replace(self, other: Callable[[Tensor], Tensor]) -> None:
        for module, name, parameter in named_parameters(self._layer):
            module._parameters[name] = torch.nn.Parameter(other(parameter.detach()), requires_grad=False)


def shard(layers: Sequence[torch.nn.Module], group: Group, device: torch.device, offload: bool = False) -> None:
    """Spread the frozen parameters of `layers` over the ranks of the group, in place; its guest keeps none.

    The layers run one after the other, forward and backward. offload: the parts stay in host memory.
    """
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    mesh = None if group.is_guest else DeviceMesh.from_group(group.process_group, device.type)
    for module in layers:
        layer: Layer = _Borrowed(module) if mesh is None else _Held(module, mesh, policy)
        ask_for(module, group, layer)
