"""The parts of a search against brute force, plain formulas and other packages; ranks by name in test_rag.py."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fedhpc.approaches.rag import lexical
from fedhpc.approaches.rag.chunks import chunks
from fedhpc.approaches.rag.context import context
from fedhpc.approaches.rag.dense import Dense, on_grid, products
from fedhpc.approaches.rag.lexical import Lexical, Statistics, terms
from fedhpc.approaches.rag.ranking import (
    CLIENT,
    KEY,
    ORDER,
    SCALE_BITS,
    SCORE,
    SOURCE,
    best,
    filled,
    first_hits,
    nothing,
    reciprocal_ranks,
    top,
)
from fedhpc.approaches.rag.routing import centroids, closeness
from fedhpc.builtin import base_path, rows
from fedhpc.data.templates import parse
from fedhpc.ranks.collectives import broadcast_bytes, gather_bytes, tree_merge
from tests.federations import ThreadTransport, _Group

rng = np.random.default_rng(0)


def unit(n: int, width: int) -> np.ndarray:
    vectors = rng.normal(size=(n, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def entries(questions: int, m: int, scores: int = 4, keys: int = 10**6) -> np.ndarray:
    """Random lists with many ties."""
    found = nothing(questions, m)
    found[..., ORDER] = found[..., SCORE] = rng.integers(0, scores, (questions, m))
    found[..., KEY] = rng.integers(0, keys, (questions, m))
    found[..., SOURCE] = found[..., KEY]
    found[..., CLIENT] = rng.integers(0, 5, (questions, m))
    return found


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize(("count", "size", "overlap"), [(1, 5, 2), (5, 5, 2), (6, 5, 2), (57, 10, 3), (30, 4, 0)])
def test_chunks_cover_the_text_and_overlap(count: int, size: int, overlap: int) -> None:
    words = [f"w{i}" for i in range(count)]
    found = [piece.split() for piece in chunks("  " + " \n".join(words) + " ", size, overlap)]
    assert all(len(piece) <= size for piece in found)
    assert found[0][0] == words[0] and found[-1][-1] == words[-1]
    for one, following in pairwise(found):
        assert len(one) == size and one[size - overlap :] == following[:overlap]
    assert sum(map(len, found)) - overlap * (len(found) - 1) == count


def test_chunks_keep_what_is_between_words_and_nothing_gives_none() -> None:
    assert chunks("one  two,\nthree", 9, 2) == ["one  two,\nthree"]
    assert chunks(" \n", 3, 1) == []


# ---------------------------------------------------------------- lists


def by_hand(row: np.ndarray, k: int, distinct: bool) -> list[tuple[int, ...]]:
    ordered = sorted(row.tolist(), key=lambda e: (-e[ORDER], -e[SCORE], e[KEY], e[CLIENT]))
    if distinct:
        seen: set[int] = set()
        ordered = [e for e in ordered if not (e[KEY] in seen or seen.add(e[KEY]))]  # type: ignore[func-returns-value]
    return [tuple(e) for e in ordered[:k]]


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_best_is_a_sort(distinct: bool, k: int) -> None:
    lists = entries(20, 30, keys=12)
    found = best(lists, k, distinct)
    assert found.shape == (20, k, 5)
    for row, result in zip(lists, found, strict=True):
        assert [tuple(e) for e in result[filled(result)].tolist()] == by_hand(row, k, distinct)


@pytest.mark.parametrize("distinct", [False, True])
def test_merges_of_truncated_lists_in_any_tree_are_one_sort(distinct: bool) -> None:
    lists, k = entries(50, 64, keys=30), 6
    wanted = best(lists, k, distinct)
    parts = [best(lists[:, part], k, distinct) for part in np.array_split(rng.permutation(64), 7)]
    while len(parts) > 1:
        i, j = sorted(rng.choice(len(parts), 2, replace=False))
        other = parts.pop(j)
        parts[i] = best(np.concatenate([other, parts[i]], axis=1), k, distinct)
    assert np.array_equal(parts[0], wanted)


def test_top_breaks_ties_by_place_and_bears_negative_scores() -> None:
    scores = rng.integers(-3, 4, (40, 100)) * 2**30
    for k in (1, 7, 100, 500):
        found = top(scores, k)
        for row, places in zip(scores, found, strict=True):
            assert places.tolist() == sorted(range(100), key=lambda i: (-row[i], i))[:k]


def test_reciprocal_ranks_are_the_formula() -> None:
    one, other = np.array([[5, 9, 1]]), np.array([[7, 2, 8]])
    found = reciprocal_ranks([one, other])[0] / 2**SCALE_BITS
    wanted = [1 / 62 + 1 / 62, 1 / 61 + 1 / 63, 1 / 63 + 1 / 61]
    assert found == pytest.approx(wanted, abs=2**-SCALE_BITS)


def test_first_hits() -> None:
    ranked = nothing(3, 2)
    ranked[0, :, SOURCE], ranked[0, :, CLIENT] = [7, 8], 0
    ranked[1, :1, SOURCE], ranked[1, :1, CLIENT] = 8, 0
    assert first_hits(ranked, [{8, 9}, {8}, {0}]).tolist() == [2, 1, 0]  # an empty place is no passage 0


# ---------------------------------------------------------------- dense


@pytest.mark.parametrize("width", [3, 384, 1024])
def test_products_on_the_grid_are_exact_in_float32_whatever_the_batch(width: int) -> None:
    pytest.importorskip("faiss")
    questions, vectors = on_grid(unit(40, width)), on_grid(unit(300, width))
    vectors[:40] = questions  # the largest products there are
    exact = questions.astype(np.int64) @ vectors.astype(np.int64).T
    assert np.array_equal(products(questions, vectors), exact)
    alone = np.stack([products(q[None], v[None])[0, 0] for q in questions[:5] for v in vectors[:50]]).reshape(5, 50)
    assert np.array_equal(alone, exact[:5, :50])
    scores, places = Dense(vectors).search(questions, 10)
    assert np.array_equal(scores, np.take_along_axis(exact, places, axis=1))
    assert abs(exact / 2**22 - unit_products(questions, vectors)).max() < 3e-3


def unit_products(questions: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    q, v = (a / np.linalg.norm(a.astype(float), axis=1, keepdims=True) for a in (questions, vectors))
    return q @ v.T


@pytest.mark.parametrize("k", [1, 5, 64, 100])
def test_faiss_finds_what_brute_force_does_with_ties(k: int) -> None:
    pytest.importorskip("faiss")
    few = on_grid(unit(9, 16))
    vectors = few[rng.integers(0, 9, 64)]  # every score several times
    questions = np.concatenate([few[:4], on_grid(unit(4, 16))])
    scores, places = Dense(vectors).search(questions, k)
    everything = products(questions, vectors)
    assert np.array_equal(places, top(everything, k))
    assert np.array_equal(scores, np.take_along_axis(everything, places, axis=1))


# ---------------------------------------------------------------- lexical

TEXTS = [row["text"] for row in rows("passages", "train")][:60]
QUESTIONS = [row["question"] for row in rows("questions", "test")][:25]


def statistics(indexes: list[Lexical], asked: list[str]) -> Statistics:
    return lexical.statistics(np.sum([index.counts(asked) for index in indexes], axis=0), asked)


def test_bm25_is_the_formula_and_what_bm25s_computes() -> None:
    bm25s = pytest.importorskip("bm25s")
    asked = [terms(question) for question in QUESTIONS]
    distinct = sorted({term for question in asked for term in question})
    index = Lexical(TEXTS)
    found = index.scores(asked, statistics([index], distinct), 1.2, 0.75) / 2**SCALE_BITS
    documents = [Counter(terms(text)) for text in TEXTS]
    mean = np.mean([sum(d.values()) for d in documents])
    for i, question in enumerate(asked):
        for j, document in enumerate(documents):
            score = 0.0
            for term in question:
                n = sum(term in d for d in documents)
                idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
                norm = 1.2 * (1 - 0.75 + 0.75 * sum(document.values()) / mean)
                score += idf * document[term] * 2.2 / (document[term] + norm)
            assert found[i, j] == pytest.approx(score, abs=1e-5)
    theirs = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    theirs.index([terms(text) for text in TEXTS], show_progress=False)
    for question, row in zip(asked, found, strict=True):
        known = [term for term in question if term in theirs.vocab_dict]
        assert row == pytest.approx(2.2 * theirs.get_scores(known), abs=1e-4)  # it leaves the factor k1 + 1 out


def test_bm25_of_parts_with_summed_statistics_is_bm25_of_the_whole() -> None:
    asked = [terms(question) for question in QUESTIONS]
    distinct = sorted({term for question in asked for term in question})
    parts = [Lexical(TEXTS[part]) for part in (slice(0, 1), slice(1, 20), slice(20, 60))]
    known, whole = statistics(parts, distinct), Lexical(TEXTS)
    assert known == statistics([whole], distinct)
    together = np.concatenate([part.scores(asked, known, 1.2, 0.75) for part in parts], axis=1)
    assert np.array_equal(together, whole.scores(asked, known, 1.2, 0.75))
    twice = Lexical(TEXTS + TEXTS[:7])
    assert known != statistics([twice], distinct)
    copies = np.array([2] * 7 + [1] * 53)
    assert statistics([Lexical(TEXTS, copies)], distinct) == statistics([twice], distinct)
    own = parts[1].scores(asked, statistics([parts[1]], distinct), 1.2, 0.75)
    assert not np.array_equal(own, together[:, 1:20])  # what summing is for


# ---------------------------------------------------------------- routing


def test_a_question_goes_to_the_client_with_passages_like_it() -> None:
    directions = unit(6, 32)
    held = {c: on_grid(normalised(directions[c] + 0.1 * unit(20, 32))) for c in range(6)}
    known = {c: centroids(vectors, 1, 0, c) for c, vectors in held.items()}
    routed = best(closeness(on_grid(directions), known), 2)[..., CLIENT]
    assert routed[:, 0].tolist() == list(range(6))


def test_more_centroids_tell_a_client_with_two_subjects() -> None:
    directions = unit(2, 32)
    two = on_grid(normalised(np.repeat(directions, 20, axis=0) + 0.1 * unit(40, 32)))
    for count, close in ((1, 0.9), (2, 0.97)):
        nearest = products(on_grid(directions), centroids(two, count, 0, 0)).max(axis=1) / 2**22
        assert (nearest > close).all() == (count == 2)
    assert len(centroids(two[:1], 5, 0, 0)) == 1


def normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# ---------------------------------------------------------------- collectives


def on_ranks(ranks: int, act: Callable[[Any], Any]) -> list[Any]:
    group = _Group(ranks, None)
    found: list[Any] = [None] * ranks

    def one(rank: int) -> None:
        found[rank] = act(ThreadTransport(rank, group))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("ranks", range(1, 9))
def test_a_tree_merges_what_all_ranks_have(ranks: int) -> None:
    lists = [best(entries(9, 12), 5) for _ in range(ranks)]

    def merge(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(best(np.concatenate([one.numpy(), other.numpy()], axis=1), 5))

    found = on_ranks(ranks, lambda t: tree_merge(t, torch.from_numpy(lists[t.rank]), merge))[0]
    assert np.array_equal(found.numpy(), best(np.concatenate(lists, axis=1), 5))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_bytes_are_fetched_from_their_owners(ranks: int) -> None:
    items = [f"item {i} ü".encode() * (i % 4) for i in range(13)]
    found = on_ranks(ranks, lambda t: gather_bytes(t, 13, {i: c for i, c in enumerate(items) if i % ranks == t.rank}))
    assert found[0] == items and all(other == [] for other in found[1:])
    for shared in (items, [b""] * 3, []):
        told = on_ranks(ranks, lambda t, shared=shared: broadcast_bytes(t, shared if t.rank == 0 else []))
        assert told == [shared] * ranks


# ---------------------------------------------------------------- context


def test_the_context_keeps_its_budget_best_passage_last() -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    template = parse("{passage}\n", "method.context")

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    passages = TEXTS[:6]
    for budget in (*range(1, 60, 7), 120, 200, 10_000):
        text, count, cut = context(tokenizer, passages, template, budget)
        if cut:
            assert tokens(text) <= budget < tokens(passages[0] + "\n")
            assert passages[0].startswith(text.strip())
        else:
            assert text == "".join(p + "\n" for p in reversed(passages[:count]))
            assert sum(tokens(p + "\n") for p in passages[:count]) <= budget
            assert count == 6 or sum(tokens(p + "\n") for p in passages[: count + 1]) > budget
    assert context(tokenizer, [], template, 50) == ("", 0, False)
