"""BM25 (Robertson and Zaragoza 2009, equation 3.15) with statistics that several indexes share.

The weight of a term is log(1 + (N - n + 0.5) / (n + 0.5)), which is never negative, for n of N chunks that hold it, and
lengths are relative to the mean. An index of its own would take both from its own chunks, and its scores would mean
something else than its neighbour's. Here N, the total length and n of each term asked for are summed over all indexes
first (`Statistics`), so a chunk scores what it would score in one index of everything. The contribution of each term is
rounded to a multiple of 2^-22, so that sums are exact in any order.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedhpc.approaches.rag.ranking import SCALE_BITS, Int64

_TERM = re.compile(r"\w+")


def terms(text: str) -> list[str]:
    """The words of a text, folded to one case; no stemming, no stop words."""
    return _TERM.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True)
class Statistics:
    """What BM25 knows of all chunks: their number, their terms in all, and how many hold each term asked for."""

    chunks: int
    length: int
    holding: dict[str, int]


def statistics(counts: Int64, asked: Sequence[str]) -> Statistics:
    """From `Lexical.counts`, or a sum of them."""
    return Statistics(int(counts[-2]), int(counts[-1]), dict(zip(asked, counts[:-2].tolist(), strict=True)))


class Lexical:
    """The inverted index of some chunks.

    copies: how often each is held, once by default. They count in the statistics, as if all of them were indexed.
    """

    def __init__(self, texts: Sequence[str], copies: Int64 | None = None) -> None:
        self._copies = np.ones(len(texts), np.int64) if copies is None else copies
        found = [Counter(terms(text)) for text in texts]
        self._lengths: Int64 = np.array([sum(counts.values()) for counts in found], np.int64)
        postings: dict[str, tuple[list[int], list[int]]] = {}
        for place, counts in enumerate(found):
            for term, times in counts.items():
                places, frequencies = postings.setdefault(term, ([], []))
                places.append(place)
                frequencies.append(times)
        self._postings = {
            term: (np.array(places, np.int64), np.array(times, np.float64))
            for term, (places, times) in postings.items()
        }

    def counts(self, asked: Sequence[str]) -> Int64:
        """How many chunks hold each term, how many there are, and their terms in all: (len(asked) + 2,)."""
        found = [int(self._copies[self._postings[t][0]].sum()) if t in self._postings else 0 for t in asked]
        return np.array([*found, self._copies.sum(), self._copies @ self._lengths], np.int64)

    def scores(
        self, questions: Sequence[Sequence[str]], known: Statistics, k1: float, b: float, weight: float = 1.0
    ) -> Int64:
        """weight * BM25 of every chunk for questions in terms, in units of 2^-22: (Q, n)."""
        scores = np.zeros((len(questions), len(self._lengths)), np.int64)
        # A length of 0 happens only where no chunk has a term, and then nothing is scored.
        relative = self._lengths * (known.chunks / max(known.length, 1))
        part = {
            term: self._part(term, known, k1 * (1 - b + b * relative), k1, weight)
            for term in {term for question in questions for term in question}
            if term in self._postings
        }
        for row, question in zip(scores, questions, strict=True):
            for term, times in Counter(question).items():
                if term in part:
                    row[self._postings[term][0]] += times * part[term]
        return scores

    def _part(self, term: str, known: Statistics, saturation: np.ndarray, k1: float, weight: float) -> Int64:
        places, frequencies = self._postings[term]
        n = known.holding[term]
        idf = math.log(1 + (known.chunks - n + 0.5) / (n + 0.5))
        found = weight * idf * (k1 + 1) * frequencies / (frequencies + saturation[places])
        return np.rint(found * 2.0**SCALE_BITS).astype(np.int64)
