"""Matrices as products of two thin ones (PowerSGD, Vogels, Karimireddy and Jaggi 2019, arXiv 1905.13727, algorithm 1).

A step of subspace iteration from the right factor Q of the client's last round: P = orthonormal(M Q), Q' = M^T P, and
what arrives is P Q'^T. There the workers add up P and Q' in turn, between the two products; here each client sends
both at the end of its round, so the factors are its own.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from fedhpc.lazy import Tensor
from fedhpc.updates.layout import Layout
from fedhpc.updates.transforms._compressor import Compression, Compressor, Numbers, Sender
from fedhpc.updates.transforms.base import TransformContext


class PowerSGD(Compressor):
    """Sends two factors of each tensor with two axes or more, and other tensors as they are.

    A tensor (n, a, b) is a matrix (n, a b). One whose factors would have as many numbers is sent as it is.
    """

    sends = "factors"
    remembers = ("basis",)  # Q of all matrices, one after the other

    class Options(Compression):
        rank: int = Field(2, ge=1, description="columns of each factor")

    def shape(self, name: str, layout: Layout) -> tuple[int, ...]:
        if name != "basis":
            return super().shape(name, layout)
        return (sum(m * r for _, m, r in map(self._sizes, layout.shapes.values())),)

    def compress(self, wanted: Tensor, context: TransformContext) -> Tensor:
        context.tensors["basis"] = context.tensors["basis"].clone()
        return super().compress(wanted, context)

    def encode(self, numbers: Numbers, sender: Sender) -> bytes:
        context, parts, begin = sender.context, [], 0
        basis = context.tensors["basis"][sender.row].numpy()
        tensors = np.split(numbers, np.cumsum(sender.sizes)[:-1])
        for index, (tensor, shape) in enumerate(zip(tensors, context.layout.shapes.values(), strict=True)):
            n, m, r = self._sizes(shape)
            if not r:
                parts.append(tensor)
                continue
            last = basis[begin : begin + m * r].reshape(m, r).astype(np.float64)
            if not last.any():
                drawn = context.generator(f"basis.{index}", context.clients[sender.row])
                last = drawn.standard_normal((m, r))
            matrix = tensor.reshape(n, m).astype(np.float64)
            left = np.linalg.qr(matrix @ last)[0]
            right = (matrix.T @ left).astype(sender.dtype)
            basis[begin : begin + m * r] = right.ravel()
            begin += m * r
            parts += [left.astype(sender.dtype).ravel(), right.ravel()]
        return b"".join(part.tobytes() for part in parts)

    def decode(self, data: bytes, sender: Sender) -> Numbers:
        numbers, begin, parts = np.frombuffer(data, sender.dtype), 0, []
        for shape in sender.context.layout.shapes.values():
            n, m, r = self._sizes(shape)
            if not r:
                size = math.prod(shape)
                parts.append(numbers[begin : begin + size])
                begin += size
                continue
            left, right = np.split(numbers[begin : begin + (n + m) * r].astype(np.float64), [n * r])
            parts.append((left.reshape(n, r) @ right.reshape(m, r).T).astype(sender.dtype).ravel())
            begin += (n + m) * r
        return np.concatenate(parts)

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """n and m of a tensor as a matrix, and the rank of its factors: 0 where it is sent as it is."""
        if len(shape) < 2:
            return math.prod(shape), 1, 0
        n, m = shape[0], math.prod(shape[1:])
        r = min(int(self.options.rank), n, m)
        return n, m, r if r * (n + m) < n * m else 0
