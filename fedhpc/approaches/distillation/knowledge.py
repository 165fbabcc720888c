"""What a model holds likely at the supervised positions of the public set, and how that travels.

Of the softmax of its logits at a temperature the k likeliest classes are kept, as class numbers and probabilities in 16
bits. A class is a token id, or a label of a classifier. S positions, V classes.
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
    """What one model, or an ensemble, holds likely at S positions.

    A place that is not needed repeats the first class with probability 0.
    """

    index: Int32  # (S, k)
    probability: Float16  # (S, k): not above 1; in all at most 1 but for rounding
    confidence: Float16 | None = None  # (S,): weight of the position in an ensemble, 0 to 1; None: 1 everywhere

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Format:
    """Knowledge as bytes, one record per position: class numbers, probabilities, and the confidence if `weighted`.

    Where all V classes are sent, their numbers are not.
    """

    classes: int  # V
    k: int
    weighted: bool

    @property
    def _numbers(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.classes <= 2**16 else "<u4")

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.k == self.classes

    @property
    def record_bytes(self) -> int:
        """Bytes per position."""
        return self.k * (2 + (0 if self.whole else self._numbers.itemsize)) + 2 * self.weighted

    def pack(self, knowledge: Knowledge) -> Tensor:
        """uint8 (S, record_bytes)."""
        parts = [] if self.whole else [knowledge.index.astype(self._numbers)]
        probability = knowledge.probability
        if self.whole:  # in the order of the classes, whatever order they come in
            probability = np.zeros_like(probability)
            np.add.at(probability, (np.arange(len(knowledge))[:, None], knowledge.index), knowledge.probability)
        parts.append(probability.astype("<f2"))
        if self.weighted:
            ones = np.ones(len(knowledge), np.float16)
            parts.append((ones if knowledge.confidence is None else knowledge.confidence).astype("<f2")[:, None])
        return torch.from_numpy(np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=1))

    def unpack(self, records: Tensor) -> Knowledge:
        """The inverse of `pack`; leading axes are kept."""
        array = records.numpy()
        lead, width = array.shape[:-1], 0 if self.whole else self.k * self._numbers.itemsize

        def part(start: int, stop: int, dtype: Any) -> NDArray[Any]:
            return np.ascontiguousarray(array[..., start:stop]).view(dtype)

        if self.whole:
            index: NDArray[Any] = np.broadcast_to(np.arange(self.k, dtype=np.int32), (*lead, self.k))
        else:
            index = part(0, width, self._numbers).astype(np.int32)
        probability = part(width, width + 2 * self.k, "<f2").astype(np.float16)
        confidence = part(array.shape[-1] - 2, array.shape[-1], "<f2").astype(np.float16)[..., 0]
        return Knowledge(index, probability, confidence if self.weighted else None)


def likeliest(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest classes of softmax(logits / temperature): int64 (S, k), their probabilities, and the entropy (S,)
    of all of them in nats. logits (S, V)."""
    log_p = (logits / temperature).log_softmax(dim=-1)
    p = log_p.exp()
    entropy = -torch.xlogy(p, p).sum(dim=-1)
    if k == p.shape[-1]:
        return torch.arange(k, device=p.device).expand(len(p), -1), p, entropy
    kept = p.topk(k, dim=-1)
    return kept.indices, kept.values, entropy


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
    """What each of the models `payloads` (K, P) holds likely at all supervised positions of `examples`.

    None for a model whose logits are not finite. classes: V, the first of the model's own, which may have some that no
    token uses. confident: with exp(-entropy), the inverse of the number of classes
    between which a model wavers, as the confidence. batch_size: rows of a forward, of all models together.
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
        place = (np.repeat(np.arange(models), len(positions)), np.tile(positions, models))
        done = 0
        with (
            torch.no_grad(),
            autocast(base, precision),
            method.attach(state, lead, torch.from_numpy(owner).to(base.device)) as attached,
        ):
            for logits in base.predictions(attached, batch):
                part = tuple(axis[done : done + len(logits)] for axis in place)
                done += len(logits)
                found = likeliest(logits[:, :classes], k, temperature)
                index[part], p, entropy = (t.cpu().numpy() for t in found)
                probability[part], confidence[part] = p, np.exp(-entropy)
                np.logical_and.at(finite, part[0], np.isfinite(entropy) & np.isfinite(p).all(axis=1))
    return [
        Knowledge(index[m], probability[m], confidence[m] if confident else None) if finite[m] else None
        for m in range(models)
    ]


def num_classes(base: Predictor) -> int:
    """V: the tokens of the vocabulary, or the labels."""
    return len(token_texts(base.tokenizer)) if base.has_target else base.num_classes


def token_texts(tokenizer: Any) -> list[str]:
    """The text of every token, by id: special tokens by their part, the others without their tokenizer's marks."""
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
    """The supervised positions of example e are offsets[e] to offsets[e + 1]: int64 (n + 1,)."""
    counts = objective.num_supervised(examples, np.arange(len(examples)))
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def own_targets(objective: PredictedObjective, examples: Examples) -> Int32:
    """The classes that the examples themselves have at their supervised positions: (S,)."""
    return objective.targets(examples, np.arange(len(examples)))


def one_hot(classes: Int32, k: int) -> Knowledge:
    """Certainty about the class of each position (S,), by nobody: the confidence is 0."""
    probability = np.zeros((len(classes), k), np.float16)
    probability[:, 0] = 1
    return Knowledge(
        np.repeat(classes[:, None].astype(np.int32), k, axis=1), probability, np.zeros(len(classes), np.float16)
    )


def where_known(knowledge: Knowledge, classes: Int32) -> Knowledge:
    """`knowledge`, with certainty about `classes` (S,) where nobody knew anything."""
    known = knowledge.probability.max(axis=1, keepdims=True) > 0
    hard = one_hot(classes, knowledge.index.shape[1])
    return Knowledge(
        np.where(known, knowledge.index, hard.index), np.where(known, knowledge.probability, hard.probability)
    )


def largest_sums(positions: int, k: int, position: Int64, index: Int64, value: Int64) -> tuple[Int32, Int64]:
    """`value` summed over equal (position, index), and of every position the k largest sums with their indices.

    All inputs are (n,), value >= 0; the outputs (positions, k), largest first, of two equal ones the lower index.
    Integers, so the result does not depend on the order of the inputs.
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
    out_index[position[nth == 0]] = index[nth == 0, None]  # fills what is not needed too
    kept = nth < k
    out_index[position[kept], nth[kept]] = index[kept]
    out_value[position[kept], nth[kept]] = value[kept]
    return out_index, out_value
