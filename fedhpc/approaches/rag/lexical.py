"""Lexical search by BM25 (Robertson and Zaragoza 2009, equation 3.15) with statistics that several indexes share.

A term that n of N chunks hold has the weight log(1 + (N - n + 0.5) / (n + 0.5)), which is never negative; lengths of
chunks are relative to their mean. If each client took N, n and the mean from its own chunks alone, the scores of two
clients could not be compared. So these numbers are first summed over all clients' indexes (`Statistics`), and a chunk
scores what it would score in one index of everything. The contribution of each term is rounded to a multiple of 2^-22,
so that sums are exact in any order.
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
    """The words of a text, without regard to case; no stemming, no stop words: "A Bar!" gives ["a", "bar"]."""
    return _TERM.findall(unicodedata.normalize("NFKC", text).casefold())


@dataclass(frozen=True)
class Statistics:
    """The statistics of BM25 over the chunks of all clients."""

    chunks: int  # how many there are
    length: int  # how many terms they have in all
    holding: dict[str, int]  # for each term of the questions: how many chunks hold it


def statistics(counts: Int64, asked: Sequence[str]) -> Statistics:
    """Make statistics of the result of `Lexical.counts` for the terms `asked`, or of a sum of such results."""
    return Statistics(int(counts[-2]), int(counts[-1]), dict(zip(asked, counts[:-2].tolist(), strict=True)))


class Lexical:
    """An inverted index of chunks: for each term, the chunks that hold it and how often."""

    def __init__(self, texts: Sequence[str], copies: Int64 | None = None) -> None:
        """Index chunks; `copies` says how often the statistics count each of them (default 1)."""
        self._copies = np.ones(len(texts), np.int64) if copies is None else copies
        term_counts = [Counter(terms(text)) for text in texts]
        self._lengths: Int64 = np.array([sum(counts.values()) for counts in term_counts], np.int64)
        postings: dict[str, tuple[list[int], list[int]]] = {}
        for chunk, counts in enumerate(term_counts):
            for term, times in counts.items():
                chunks, frequencies = postings.setdefault(term, ([], []))
                chunks.append(chunk)
                frequencies.append(times)
        self._postings = {
            term: (np.array(chunks, np.int64), np.array(times, np.float64))
            for term, (chunks, times) in postings.items()
        }

    def counts(self, asked: Sequence[str]) -> Int64:
        """For each term of `asked` how many chunks hold it, then how many chunks and terms there are in all.

        Shape (len(asked) + 2,).
        """
        holding = [int(self._copies[self._postings[t][0]].sum()) if t in self._postings else 0 for t in asked]
        return np.array([*holding, self._copies.sum(), self._copies @ self._lengths], np.int64)

    def scores(
        self, questions: Sequence[Sequence[str]], totals: Statistics, k1: float, b: float, weight: float = 1.0
    ) -> Int64:
        """weight * BM25 of every chunk for every question (given as its terms), in units of 2^-22: (Q, n).

        totals: the statistics over all clients. k1, b: the parameters of BM25.
        """
        scores = np.zeros((len(questions), len(self._lengths)), np.int64)
        # A length of 0 happens only where no chunk has a term, and then nothing is scored.
        relative = self._lengths * (totals.chunks / max(totals.length, 1))
        part = {
            term: self._part(term, totals, k1 * (1 - b + b * relative), k1, weight)
            for term in {term for question in questions for term in question}
            if term in self._postings
        }
        for row, question in zip(scores, questions, strict=True):
            for term, times in Counter(question).items():
                if term in part:
                    row[self._postings[term][0]] += times * part[term]
        return scores

    def _part(self, term: str, totals: Statistics, saturation: np.ndarray, k1: float, weight: float) -> Int64:
        chunks, frequencies = self._postings[term]
        n = totals.holding[term]
        idf = math.log(1 + (totals.chunks - n + 0.5) / (n + 0.5))
        part = weight * idf * (k1 + 1) * frequencies / (frequencies + saturation[chunks])
        return np.rint(part * 2.0**SCALE_BITS).astype(np.int64)
