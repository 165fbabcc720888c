"""The server's model on its way to the clients, as compressed differences to what they know of it.

As in DoubleSqueeze (Tang et al. 2019, arXiv 1905.05957, algorithm 1): all clients know one and the same reconstructed
model. A round sends what the compressors make of the difference between the server's model and that one, so what a
difference loses is in the next one. A client that was not in the cohort for some rounds is sent the differences of
these rounds too, or the whole model, whichever takes fewer bytes; one that never was is sent the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedhpc import rng
from fedhpc.lazy import Tensor, torch
from fedhpc.updates.layout import Layout
from fedhpc.updates.transforms._compressor import Compressor
from fedhpc.updates.transforms.base import TransformContext

_KNOWN, _SIZES, _HEARD = "downlink.known", "downlink.sizes", "downlink.heard"


class Downlink:
    """Sends the model to the clients in the rounds of one run, on rank 0. S is the size of its shared part."""

    def __init__(self, compressors: Sequence[Compressor], seed: int, layout: Layout, dtype: torch.dtype) -> None:
        """compressors: in their order. layout, dtype: of the model."""
        self._compressors, self._seed, self._layout, self._dtype = list(compressors), seed, layout, dtype

    def initial(self, theta: Tensor) -> dict[str, Tensor]:
        """What the server keeps before the first round, when the clients will be sent the whole model theta (S,)."""
        tensors = {
            _KNOWN: theta.clone(),  # what the clients know
            _SIZES: torch.zeros(0, dtype=torch.int64),  # bytes of each round's difference
            _HEARD: torch.zeros(0, 2, dtype=torch.int64),  # client, and the last round that it was in
        }
        for position, compressor in enumerate(self._compressors):
            for name in compressor.remembers:
                shape = compressor.shape(name, self._layout)
                tensors[_key(position, name)] = torch.zeros(1, *shape, dtype=self._dtype)
        return tensors

    def send(self, theta: Tensor, round_: int, cohort: Sequence[int], tensors: dict[str, Tensor]) -> tuple[Tensor, int]:
        """What the clients know of theta (S,) in this round, and the bytes that tell the cohort, all together.

        tensors: what the server keeps, as `initial` has it, updated in place.
        """
        known = tensors[_KNOWN]
        difference, size = self._sent((theta.double() - known.double()).to(self._dtype).unsqueeze(0), round_, tensors)
        tensors[_KNOWN] = known + difference[0]
        tensors[_SIZES] = torch.cat([tensors[_SIZES], torch.tensor([size])])
        # Bytes of the differences from round 1 to each round.
        so_far = np.concatenate([[0], np.cumsum(tensors[_SIZES].numpy())])
        heard = dict(tensors[_HEARD].tolist())
        model_bytes = self._layout.size * self._dtype.itemsize
        missed = [int(so_far[-1] - so_far[heard[client]]) if client in heard else model_bytes for client in cohort]
        heard.update(dict.fromkeys(cohort, round_))
        tensors[_HEARD] = torch.tensor(sorted(heard.items()), dtype=torch.int64).reshape(-1, 2)
        return tensors[_KNOWN], sum(min(model_bytes, one) for one in missed)

    def _sent(self, difference: Tensor, round_: int, tensors: dict[str, Tensor]) -> tuple[Tensor, int]:
        """What arrives of the difference (1, S), and its bytes."""
        coordinates: list[np.ndarray | None] = [None]
        size, coordinate_bytes = np.zeros(1, np.int64), np.zeros(1, np.int64)
        for position, compressor in enumerate(self._compressors):
            remembered = {name: tensors[_key(position, name)] for name in compressor.remembers}
            context = _DownContext(
                round_, [0], remembered, size, self._layout, self._seed, position, coordinates, coordinate_bytes
            )
            difference = compressor.compress(difference, context)
            size = context.bytes_up
            tensors.update({_key(position, name): tensor for name, tensor in context.tensors.items()})
        return difference, int(size[0])


class _DownContext(TransformContext):
    """What a compressor knows of the round in which it sends the model: the one row is the server's."""

    def generator(self, purpose: str, client: int | None = None) -> np.random.Generator:
        return rng.generator(self.seed, f"downlink.{self.position}.{purpose}", self.round)


def _key(position: int, name: str) -> str:
    return f"downlink.{position}.{name}"
