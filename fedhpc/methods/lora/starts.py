"""Where A and B begin, if not at random values and zero: at parts of the weight itself, or at what it is given.

With parts of the weight it loses what the factors begin with, so that the layer computes the same at first:
W x - s B_0 A_0 x + s B A x. Nothing is subtracted from the frozen base, which all clients share and which may be in 16
bits: B_0 and A_0 stay beside it. The sums are in float64, whatever the weight's own type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.methods._linear import Layer, inputs_on
from fedhpc.methods._text import tokens_of
from fedhpc.methods.lora.factors import leading

if TYPE_CHECKING:
    from fedhpc.models.base import Base

_AT_ONCE = 256  # tokens of a text that are read together


def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose scaled product is the best approximation of a weight (out, in) of rank r.

    PiSSA (Meng et al. 2024, arXiv 2404.02948, equations 2 and 3): the first singular vectors, each times the root of
    its singular value. scale: s, by which the product is multiplied.
    """
    u, sigma, vt = leading(weight.double(), rank)
    root = (sigma / scale).sqrt()
    return root.unsqueeze(1) * vt, u * root


def olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in), the first rows of R, and B (out, r), the first columns of Q, of a weight (out, in) = Q R.

    OLoRA (Buyukakyuz 2024, arXiv 2406.01775, algorithm 1). scale: not taken into account, as in PEFT.
    """
    q, r = torch.linalg.qr(weight.double())
    return r[:rank], q[:, :rank]


#: Parts of the weight.
STARTS = {"pissa": pissa, "olora": olora}


def pieces_of(base: Base, texts: Sequence[str], rank: int) -> list[list[int]]:
    """The token ids of texts, in pieces that are read at once. UserError where they are too few for `rank`."""
    longest = min(_AT_ONCE, base.max_positions or _AT_ONCE)
    pieces: list[list[int]] = []
    for text in texts:
        ids = tokens_of(base, text)
        if len(ids) < 2:
            raise UserError(f"'{text}' is one token", key="method.init_text", remedy="give texts of two or more")
        pieces += [piece.tolist() for piece in np.array_split(ids, math.ceil(len(ids) / longest))]
    # Of n tokens a layer before or behind an encoder is given half, any other n or all but the last.
    halves = base.model.config.is_encoder_decoder
    least = sum(len(piece) // 2 if halves else len(piece) - 1 for piece in pieces)
    if least <= rank:
        raise UserError(
            f"layers are given {least} tokens of these texts, and rank {rank} needs more than that",
            key="method.init_text", remedy="give more text, or a lower rank",
        )  # fmt: skip
    return pieces


def eva(
    base: Base, layers: Mapping[str, Layer], ranks: Mapping[str, int], pieces: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """A (r, in) of every layer that a text passes through, by its path: the first r components of what it is given.

    EVA (Paischer et al. 2024, arXiv 2410.07170, section 3), with the rank that a layer has: ranks are not
    redistributed. The largest number of a component is positive. pieces: token ids of texts.
    """
    read = [inputs_on(base, layers, piece) for piece in pieces]
    components: dict[tuple[int, ...], Tensor] = {}  # layers that are given the same begin alike
    starts = {}
    for path, rank in ranks.items():
        given = [one for inputs in read for one in inputs.get(path, ())]
        key = (rank, *(one.data_ptr() for one in given))
        if given and key not in components:
            components[key] = _components(torch.cat(given).double(), rank)
        if given:
            starts[path] = components[key]
    return starts


def _components(inputs: Tensor, rank: int) -> Tensor:
    """The first principal components (r, in) of inputs (n, in)."""
    _, _, vt = leading(inputs - inputs.mean(0), rank)
    return vt * vt.gather(1, vt.abs().argmax(1, keepdim=True)).sign()
