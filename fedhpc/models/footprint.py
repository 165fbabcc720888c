"""What the weights of a base take of a rank's memory, told from the model's configuration before any are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedhpc.config import Model
from fedhpc.models.load import empty_network, layer_stacks, offloads, stored_dtype
from fedhpc.models.quantized import bits_of

_BLOCK = 64  # weights that share a scale in bitsandbytes' 4 bits
_SCALE = 4  # bytes of a scale


@dataclass(frozen=True)
class Footprint:
    """Bytes of a base's weights, in the type that they are computed in. Tied weights count once."""

    layers: int  # all layers together
    largest_layer: int
    outside: int  # embeddings, output layer and norms, which every rank has whole
    few_bits: bool = False  # so that no layer can be divided
    mapped: bool = False  # as they are stored, so that ranks of a machine that read them whole share their pages
    offloaded: bool = False  # the layers stay in host memory: the device has one at a time

    @property
    def total(self) -> int:
        return self.layers + self.outside

    def on_rank(self, worker_ranks: int) -> int:
        """The most that the device of a rank holds where `worker_ranks` of them hold the layers between them.

        Of several each has its part and two layers: that which computes and the next one on its way, or the next one as
        it arrives and as it is used.
        """
        part = 0 if self.offloaded else -(-self.layers // worker_ranks)
        if worker_ranks == 1:
            return self.outside + part + (self.largest_layer if self.offloaded else 0)
        return self.outside + part + 2 * self.largest_layer

    def on_machine(self, worker_ranks: int, ranks: int) -> int:
        """The most that `ranks` ranks of one machine without GPUs hold, all together."""
        return self.on_rank(worker_ranks) * (1 if worker_ranks == 1 and self.mapped else ranks)


def footprint(model: Model, device_type: str = "cpu") -> Footprint:
    """The footprint of the base that `model` names, on such a device. Reads its configuration, and no weights.

    UserError where there is no such model.
    """
    network = empty_network(model)
    head, bits = network.get_output_embeddings(), bits_of(model, network.config)
    packed = {
        id(module.weight)
        for module in network.modules()
        if bits is not None and type(module).__name__ in ("Linear", "Conv1D") and module is not head
    }
    sizes = {
        id(p): _packed(p, bits) if bits is not None and id(p) in packed else int(p.nbytes) for p in network.parameters()
    }
    layers, counted = [], set[int]()
    for layer in (layer for stack in layer_stacks(network) for layer in stack):
        uncounted = {id(p) for p in layer.parameters()} - counted
        counted |= uncounted
        layers.append(sum(sizes[one] for one in uncounted))
    return Footprint(
        layers=sum(layers),
        largest_layer=max(layers, default=0),
        outside=sum(sizes.values()) - sum(layers),
        few_bits=bits is not None,
        mapped=bits is None and stored_dtype(model) == model.dtype,
        offloaded=offloads(model, device_type),
    )


def _packed(weight: Any, bits: int) -> int:
    """Bytes of a weight (out, in) in few bits, with its scales: one a row in 8 bits, one a block in fewer."""
    if bits == 8:
        return int(weight.numel() + weight.shape[0] * _SCALE)
    return int(weight.numel() * bits // 8 + -(-weight.numel() // _BLOCK) * _SCALE)
