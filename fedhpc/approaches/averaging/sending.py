"""How updates and the server's model are sent: what changes and packs them, and the bytes that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from fedhpc import registry
from fedhpc.approaches.averaging.personal import PersonalPart
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.methods.base import Method
from fedhpc.rng import generator
from fedhpc.updates.downlink import Downlink
from fedhpc.updates.pipeline import Pipeline
from fedhpc.updates.transforms._compressor import Compressor


class Sending:
    """The transforms of one run, on the way up and down. Plans ask it for bytes, so it knows nothing of training."""

    def __init__(self, config: Config, method: Method, personal: PersonalPart) -> None:
        """UserError where a transform cannot pack what the method sends."""
        self._method, self._personal, self._seed = method, personal, config.run.seed
        shared = personal.split.shared
        transforms = [registry.choice("transforms", section.name)(section) for section in config.transforms]
        of_updates = [one for one in transforms if one.direction != "down"]
        of_model = [one for one in transforms if isinstance(one, Compressor) and one.direction != "up"]
        #: What is done to the updates before they are sent, and to their aggregate on the server.
        self.pipeline = Pipeline(of_updates, self._seed, shared, personal.dtype)
        #: How the server's model is sent where it is compressed; None: as it is.
        self.downlink = Downlink(of_model, self._seed, shared, personal.dtype) if of_model else None
        packs = any(transform.packs for transform in of_updates)
        if packs and method.numbers_sent(0, 1) != method.payload.size:
            raise UserError(
                f"{config.method.name} with these options sends other numbers than its payload's, which are packed",
                key="transforms", remedy="take out what packs them (lora: or use aggregation average or ffa)",
            )  # fmt: skip
        if of_model and method.numbers_received(0) != method.payload.size:
            raise UserError(
                f"{config.method.name} with these options sends other numbers down than its payload's",
                key="transforms", remedy="use direction up, or take out what packs them",
            )  # fmt: skip

    def raw_bytes(self, clients: Sequence[int], round_: int) -> np.ndarray:
        """Bytes of each client's update as it is before the transforms: int64 (K,)."""
        return self._bytes([self._method.numbers_sent(client, round_) for client in clients])

    def bytes_down(self, clients: Sequence[int]) -> np.ndarray:
        """Bytes of the model as each client needs it, uncompressed: int64 (K,)."""
        return self._bytes([self._method.numbers_received(client) for client in clients])

    def _bytes(self, numbers: Sequence[int]) -> np.ndarray:
        """Bytes of numbers of the payload, less those that stay on the clients: int64 (K,)."""
        shared = np.array(numbers, dtype=np.int64) - self._personal.split.personal.size
        return self._personal.dtype.itemsize * shared

    def expected_bytes(self, clients: Sequence[int], round_: int) -> np.ndarray:
        """Bytes of each client's update as it is sent: int64 (K,). How well normal numbers can be packed decides."""
        if not any(transform.packs for transform in self.pipeline.transforms):
            return self.raw_bytes(clients, round_)
        return np.full(len(clients), self._packed_bytes, dtype=np.int64)

    @cached_property
    def _packed_bytes(self) -> int:
        """Bytes of an update of normal numbers as it is sent; the same on every processor, since plans hang on it."""
        numbers = generator(self._seed, "packed bytes").standard_normal((1, self._personal.split.shared.size))
        tensors = {name: self.pipeline.initial(name).unsqueeze(0) for name in self.pipeline.keeps}
        update = torch.from_numpy(numbers).to(self._personal.dtype)
        return int(self.pipeline.on_clients(update, 1, [0], tensors, self.raw_bytes([0], 1)).bytes_up[0])
