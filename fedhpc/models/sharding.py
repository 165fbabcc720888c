"""A frozen base whose layers are spread over the ranks of a worker: each holds a part of every layer.

FSDP2 (Zhao et al. 2023, arXiv 2304.11277) keeps the parts and gathers a layer from them. When it does so is ours: ranks
of a group train clients of their own, so they agree on each gather (`fedhpc.ranks.group`), and hooks of our own ask for
a layer before it runs, forward and backward. They change nothing in autograd's graph, so gradients add up in the same
order, to the same bits, as with a base in one piece. What is outside the layers, as embeddings and the output layer,
every rank has whole.

The next layer is on its way while one computes. FSDP2 would see to that in hooks of its own, where it knows the order
of layers; called as here it gathers in the stream that computes. So the group says which layer is next, and its gather
begins as an asynchronous collective: NCCL has a stream of its own for it, gloo a thread.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from fedhpc.errors import UserError
from fedhpc.models.hooks import ask_for, named_parameters, size_bytes
from fedhpc.ranks.group import Group, Layer


class _All(dist.Work):
    """Collectives that are waited for together."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: datetime.timedelta = datetime.timedelta.max) -> bool:
        for work in self._works:
            work.wait()
        return True


class _Broadcasts:
    """Gathers over gloo: each rank broadcasts its part to where it belongs.

    Gloo's own all-gather receives all parts elsewhere and copies them: it takes the memory of one more layer.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What a layer is gathered in."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:
        """Begin to gather the output (G n,), in which FSDP2 has put this rank's part, the input (n,), in its place."""
        parts = enumerate(output_tensor.chunk(group.size()))
        return _All([dist.broadcast(part, group=group, async_op=True, group_src=rank) for rank, part in parts])


class _Held:
    """A layer of which this rank holds a part."""

    def __init__(self, layer: torch.nn.Module, mesh: DeviceMesh, policy: OffloadPolicy) -> None:
        self._layer, self.size_bytes = layer, size_bytes(layer)
        # FSDP2 hooks what it is given: a module around the layer, of which it then changes the parameters alone.
        around = torch.nn.Sequential(layer)
        self._sharded = fully_shard(around, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        if mesh.device_type == "cpu":
            self._sharded.set_custom_all_gather(_Broadcasts())  # type: ignore[arg-type]  # its type is not public

    def parameters(self) -> Sequence[Tensor]:
        return [parameter for _, _, parameter in named_parameters(self._layer)]

    def unshard(self) -> None:
        with torch.inference_mode(False):  # what is gathered first would never be part of a graph
            self._sharded.unshard()

    def prefetch(self) -> None:
        with torch.inference_mode(False):
            self._sharded.unshard(async_op=True)

    def reshard(self) -> None:
        self._sharded.reshard()


class _Borrowed(Layer):
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
    UserError where torch is too old to gather over gloo in place.
    """
    if device.type == "cpu" and not hasattr(FSDPModule, "set_custom_all_gather"):
        raise UserError(
            f"torch {torch.__version__} cannot spread a base over ranks without GPUs", key="runtime.worker_ranks",
            remedy="install a newer one, or give 1",
        )  # fmt: skip
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    mesh = None if group.is_guest else DeviceMesh.from_group(group.process_group, device.type)
    for module in layers:
        layer: Layer = _Borrowed(module) if mesh is None else _Held(module, mesh, policy)
        ask_for(module, group, layer)
