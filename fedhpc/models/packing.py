"""Several short texts in one row, apart from each other: which texts share a row, and what each position may look at.

A row of packed texts has the positions of each text counted from 0, and a token looks at the earlier ones of its own
text alone (Krell et al. 2021, arXiv 2107.02027, section 3.2), so every text is computed as in a row of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedhpc.lazy import Tensor, torch
from fedhpc.models.base import Int64
from fedhpc.models.generative import TokenBatch


@dataclass(frozen=True)
class PackedBatch(TokenBatch):
    """Rows of several texts each."""

    columns: Tensor  # int64 (B, T): the position of a token within its text
    texts: Tensor  # int64 (B, T): which text a token is of; -1 for padding


def pack(sizes: Int64, groups: Int64) -> tuple[Int64, Int64]:
    """Put texts into as few rows as the longest of them allows: the row, and the first column there, of each (E,).

    sizes (E,): tokens of each text; groups (E,): those of one group alone share rows. The longest text that is left
    goes into the first row that has room (first fit, decreasing; Johnson 1973).
    """
    room = int(sizes.max(initial=1))
    row, first = np.zeros_like(sizes), np.zeros_like(sizes)
    used: list[int] = []
    rows_of: dict[int, list[int]] = {}
    for text in np.argsort(-sizes, kind="stable").tolist():
        rows, size = rows_of.setdefault(int(groups[text]), []), int(sizes[text])
        chosen = next((r for r in rows if used[r] + size <= room), None)
        if chosen is None:
            chosen = len(used)
            used.append(0)
            rows.append(chosen)
        row[text], first[text] = chosen, used[chosen]
        used[chosen] += size
    return row, first


def packed_mask(batch: PackedBatch, before: int, like: Tensor | None) -> Tensor:
    """Which columns each token looks at: (B, 1, T, before + T), of its own text and the `before` in front of all rows.

    like: None for booleans; else 0 where it looks and the least number elsewhere, of this tensor's dtype, to be added.
    """
    length = batch.texts.shape[1]
    same = batch.texts.unsqueeze(2) == batch.texts.unsqueeze(1)
    seen = torch.nn.functional.pad(same.tril_(), (before, 0), value=True).view(-1, 1, length, before + length)
    if like is None:
        return seen
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, torch.finfo(like.dtype).min)
