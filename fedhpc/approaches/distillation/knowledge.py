"""The knowledge of a model: the classes it predicts at the supervised positions of the public set, and their bytes.

Of the softmax of its logits at a temperature, the k likeliest classes are kept, as class numbers and probabilities in
16 bits. A class is a token id, or a label of a classifier. There are S positions and V classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.data.tokens import Examples, ranges
from fedhpc.lazy import lazy
from fedhpc.methods.base import Method
from fedhpc.models.base import Predictor
from fedhpc.models.load import autocast
from fedhpc.objectives.base import Objective, PredictedObjective

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float16 = NDArray[np.float16]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_MARKS = {"\u2581": " ", "\u0120": " ", "\u010a": "\n"}  # how tokenizers write a space and a new line


@dataclass(frozen=True)
class Knowledge:
    """The likeliest classes at S positions, of one model or of an ensemble.

    Where a position has fewer than k classes, the other elements repeat its first class with probability 0.
    """

    index: Int32  # (S, k): class numbers
    probability: Float16  # (S, k): each at most 1; their sum at most 1, apart from rounding
    confidence: Float16 | None = None  # (S,): the weight of the position in an ensemble, 0 to 1; None means 1

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Format:
    """Knowledge as bytes, with one record per position: class numbers, probabilities, and confidence if `weighted`.

    Class numbers are left out where all V classes are sent, in their order.
    """

    classes: int  # V
    k: int
    weighted: bool

    @property
    def _numbers(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.classes <= 2**16 else "<u4")

    @property
    def has_all_classes(self) -> bool:
        """Whether all classes are sent, and not only the likeliest."""
        return self.k == self.classes

    @property
    def record_bytes(self) -> int:
        """Bytes per position."""
        return self.k * (2 + (0 if self.has_all_classes else self._numbers.itemsize)) + 2 * self.weighted

    def pack(self, knowledge: Knowledge) -> Tensor:
        """Write knowledge as records: uint8 (S, record_bytes)."""
        parts = [] if self.has_all_classes else [knowledge.index.astype(self._numbers)]
        probability = knowledge.probability
        if self.has_all_classes:  # sorted by class number
            probability = np.zeros_like(probability)
            np.add.at(probability, (np.arange(len(knowledge))[:, None], knowledge.index), knowledge.probability)
        parts.append(probability.astype("<f2"))
        if self.weighted:
            ones = np.ones(len(knowledge), np.float16)
            parts.append((ones if knowledge.confidence is None else knowledge.confidence).astype("<f2")[:, None])
        return torch.from_numpy(np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=1))

    def unpack(self, records: Tensor) -> Knowledge:
        """Read knowledge from records (..., record_bytes): the inverse of `pack`, with the same leading axes."""
        array = records.numpy()
        lead, width = array.shape[:-1], 0 if self.has_all_classes else self.k * self._numbers.itemsize

        def part(start: int, stop: int, dtype: Any) -> NDArray[Any]:
            return np.ascontiguousarray(array[..., start:stop]).view(dtype)

        if self.has_all_classes:
            index: NDArray[Any] = np.broadcast_to(np.arange(self.k, dtype=np.int32), (*lead, self.k))
        else:
            index = part(0, width, self._numbers).astype(np.int32)
        probability = part(width, width + 2 * self.k, "<f2").astype(np.float16)
        confidence = part(array.shape[-1] - 2, array.shape[-1], "<f2").astype(np.float16)[..., 0]
        return Knowledge(index, probability, confidence if self.weighted else None)


def likeliest(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest classes of softmax(logits / temperature), for logits (S, V).

    Returns class numbers int64 (S, k), their probabilities (S, k), and the entropy over all classes in nats (S,).
    """
    log_p = (logits / temperature).log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -torch.xlogy(p, p).sum(dim=-1)
    if k == p.shape[-1]:
        return torch.arange(k, device=p.device).expand(len(p), -1), p, entropy
    top = p.topk(k, dim=-1)
    return top.indices, top.values, entropy


def predict(
    base: Predictor,
    method: Method,
    objective: PredictedObjective,
    payloads: Tensor,
    examples: Examples,
    classes: int,
    k: int,
    temperature: float,
    batch_size: int,
    precision: str,
    confident: bool = False,
) -> list[Knowledge | None]:
    """The knowledge of each of the models `payloads` (K, P) at all supervised positions of `examples`.

    None for a model whose logits are not finite. classes: V; the model may have more outputs, which no token uses.
    confident: whether exp(-entropy) is the confidence; its inverse is the number of classes between which a model is
    undecided. batch_size: rows of one forward pass, of all models together.
    """
    models, offsets = len(payloads), position_offsets(objective, examples)
    index = np.zeros((models, offsets[-1], k), np.int32)
    probability = np.zeros((models, offsets[-1], k), np.float16)
    confidence = np.zeros((models, offsets[-1]), np.float16)
    finite = np.ones(models, bool)
    lead = method.payload.views(payloads.to(base.device))
    state = method.start(lead)
    order = np.argsort(-examples.lengths, kind="stable")
    each = max(1, batch_size // models)
    for start in range(0, len(order), each):
        rows = order[start : start + each]
        owner = np.repeat(np.arange(models), len(rows))
        batch = base.batch(examples, np.tile(rows, models))
        positions = ranges(offsets[rows], offsets[rows + 1])
        elements = (np.repeat(np.arange(models), len(positions)), np.tile(positions, models))
        done = 0
        with (
            torch.no_grad(),
            autocast(base, precision),
            method.attach(state, lead, torch.from_numpy(owner).to(base.device)) as attached,
        ):
            for logits in base.predictions(attached, batch):
                part = tuple(axis[done : done + len(logits)] for axis in elements)
                done += len(logits)
                top = likeliest(logits[:, :classes], k, temperature)
                index[part], p, entropy = (t.cpu().numpy() for t in top)
                probability[part], confidence[part] = p, np.exp(-entropy)
                np.logical_and.at(finite, part[0], np.isfinite(entropy) & np.isfinite(p).all(axis=1))
    return [
        Knowledge(index[m], probability[m], confidence[m] if confident else None) if finite[m] else None
        for m in range(models)
    ]


def num_classes(base: Predictor) -> int:
    """V: how many tokens the vocabulary has, or how many labels a classifier."""
    return min(len(token_texts(base.tokenizer)), base.num_classes) if base.has_target else base.num_classes


def token_texts(tokenizer: Any) -> list[str]:
    """The text of every token, by id; special tokens are called "<bos>", "<eos>", "<pad>" and "<unk>".

    The other texts have plain spaces and new lines in place of the marks that tokenizers use for them.
    """
    texts = [""] * (max(tokenizer.get_vocab().values()) + 1)
    for token, number in tokenizer.get_vocab().items():
        text = "".join(_MARKS.get(c, c) for c in token)
        byte = _BYTE.fullmatch(text)
        texts[number] = chr(int(byte[1], 16)) if byte else text
    for part in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{part}_token_id")
        if number is not None:
            texts[number] = f"<{part}>"
    return texts


def position_offsets(objective: Objective, examples: Examples) -> Int64:
    """Where the supervised positions of examples begin, (n + 1,): example e has offsets[e] to offsets[e + 1]."""
    counts = objective.num_supervised(examples, np.arange(len(examples)))
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def targets_of(objective: PredictedObjective, examples: Examples) -> Int32:
    """The right class at each supervised position, as the examples have it: (S,)."""
    return objective.targets(examples, np.arange(len(examples)))


def one_hot(classes: Int32, k: int) -> Knowledge:
    """Knowledge that is certain about the class of each position (S,), with confidence 0."""
    probability = np.zeros((len(classes), k), np.float16)
    probability[:, 0] = 1
    return Knowledge(
        np.repeat(classes[:, None].astype(np.int32), k, axis=1), probability, np.zeros(len(classes), np.float16)
    )


def with_targets_where_unknown(knowledge: Knowledge, classes: Int32) -> Knowledge:
    """Fill the positions about which nothing is known with certainty about `classes` (S,)."""
    known = knowledge.probability.max(axis=1, keepdims=True) > 0
    hard = one_hot(classes, knowledge.index.shape[1])
    return Knowledge(
        np.where(known, knowledge.index, hard.index), np.where(known, knowledge.probability, hard.probability)
    )


def largest_sums(positions: int, k: int, position: Int64, index: Int64, value: Int64) -> tuple[Int32, Int64]:
    """Sum `value` over equal (position, index); returns the k largest sums of every position and their indices.

    The inputs are (n,), with value >= 0. The outputs are (positions, k), largest first, and of equal sums the lower
    index first. All are integers, so the result does not depend on the order of the inputs.
    """
    out_index, out_value = np.zeros((positions, k), np.int32), np.zeros((positions, k), np.int64)
    if not len(position):
        return out_index, out_value
    order = np.lexsort((index, position))
    position, index, value = position[order], index[order], value[order]
    first = np.flatnonzero(np.r_[True, (np.diff(position) != 0) | (np.diff(index) != 0)])
    position, index, value = position[first], index[first], np.add.reduceat(value, first)
    order = np.lexsort((index, -value, position))
    position, index, value = position[order], index[order], value[order]
    nth = np.arange(len(position)) - np.searchsorted(position, position)
    out_index[position[nth == 0]] = index[nth == 0, None]  # also fills elements for which there is no k-th class
    in_top = nth < k
    out_index[position[in_top], nth[in_top]] = index[in_top]
    out_value[position[in_top], nth[in_top]] = value[in_top]
    return out_index, out_value
