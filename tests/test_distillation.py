"""Distillation's formulas: the loss, what travels, the ensemble against plain numpy, tokenizers aligned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc.approaches.distillation.alignment import Alignment, Vocabularies, edit_distance, matched
from fedhpc.approaches.distillation.ensemble import exchange, mean
from fedhpc.approaches.distillation.knowledge import (
    Format,
    Knowledge,
    likeliest,
    one_hot,
    position_offsets,
    predict,
    targets_of,
    token_texts,
    with_targets_where_unknown,
)
from fedhpc.approaches.prepare import prepare
from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.methods import with_head
from fedhpc.methods.lora import Lora
from fedhpc.models.base import Attached
from fedhpc.objectives.language_modelling import LanguageModelling
from fedhpc.objectives.soft_targets import SoftTargets, soft_losses
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.training.block import Work
from tests import tiny
from tests.federations import on_threads

IID = {"partition": {"name": "iid"}}


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# ---------------------------------------------------------------- the loss


def soft(p: np.ndarray, index: np.ndarray, temperature: float, hard_weight: float = 0.0) -> tuple[Any, ...]:
    return torch.from_numpy(index), torch.from_numpy(p), temperature, hard_weight


def test_the_loss_with_all_classes_is_hintons() -> None:
    rng = np.random.default_rng(0)
    z, teacher, y = rng.normal(size=(7, 11)), rng.normal(size=(7, 11)), rng.integers(0, 11, 7)
    p, q = softmax(teacher / 2.5), softmax(z / 2.5)
    expected = 0.7 * 2.5**2 * (p * np.log(p / q)).sum(axis=1) + 0.3 * -np.log(softmax(z)[np.arange(7), y])
    everything = np.broadcast_to(np.arange(11), (7, 11)).copy()
    found = soft_losses(torch.from_numpy(z), torch.from_numpy(y), *soft(p, everything, 2.5, 0.3))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    # The gradient of T^2 KL is T (q - p), whatever classes the teacher names.
    logits = torch.from_numpy(z).requires_grad_()
    soft_losses(logits, torch.from_numpy(y), *soft(p, everything, 2.5)).sum().backward()
    np.testing.assert_allclose(logits.grad, 2.5 * (q - p), rtol=0, atol=1e-12)


def test_the_loss_with_k_classes_has_one_more_for_the_rest_and_is_never_larger() -> None:
    rng = np.random.default_rng(1)
    z, teacher = rng.normal(size=(50, 20)) * 2, rng.normal(size=(50, 20)) * 2
    p, q = softmax(teacher), softmax(z)
    whole = (p * np.log(p / q)).sum(axis=1)
    before = np.zeros(50)
    for k in (1, 3, 8, 19):
        index = np.argsort(-p, axis=1)[:, :k]
        pk, qk = np.take_along_axis(p, index, 1), np.take_along_axis(q, index, 1)
        pr, qr = 1 - pk.sum(axis=1), 1 - qk.sum(axis=1)
        expected = (pk * np.log(pk / qk)).sum(axis=1) + pr * np.log(pr / qr)
        found = soft_losses(torch.from_numpy(z), torch.zeros(50, dtype=torch.int64), *soft(pk, index, 1.0)).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert (found <= whole + 1e-12).all() and (found >= before - 1e-12).all()
        before = found
    np.testing.assert_allclose(before, whole, rtol=1e-9)  # the rest is then one class


def test_places_that_are_not_needed_change_nothing() -> None:
    rng = np.random.default_rng(2)
    logits, y = torch.from_numpy(rng.normal(size=(4, 9))), torch.zeros(4, dtype=torch.int64)
    narrow = soft(np.full((4, 1), 0.6), np.full((4, 1), 5), 1.0)
    wide = soft(np.array([[0.6, 0, 0]] * 4), np.full((4, 3), 5), 1.0)
    torch.testing.assert_close(soft_losses(logits, y, *narrow), soft_losses(logits, y, *wide))
    certain = one_hot(np.full(4, 3, np.int32), 3)
    hard = soft(certain.probability.astype(np.float64), certain.index.astype(np.int64), 1.0)
    by_label = torch.nn.functional.cross_entropy(logits, torch.full((4,), 3), reduction="none")
    torch.testing.assert_close(soft_losses(logits, y, *hard), by_label)


# ---------------------------------------------------------------- as an objective, and in the trainer


def with_soft(examples: Examples, base: Any, k: int, seed: int = 0, temperature: float = 2.0) -> SoftTargets:
    """The objective of `examples` with random teachers."""
    labels = tiny.objective(base)
    offsets = position_offsets(labels, examples)
    rng = np.random.default_rng(seed)
    classes = base.num_classes
    p = softmax(rng.normal(size=(offsets[-1], classes)) * 3)
    index = np.argsort(-p, axis=1)[:, :k]
    p = np.take_along_axis(p, index, 1)
    return SoftTargets(labels, index.astype(np.int32), p, offsets, temperature, 0.25)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_every_token_has_the_loss_of_its_own_teacher(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.base(family)
    examples = tiny.labelled(12) if family == "bert" else tiny.examples(12)
    objective = with_soft(examples, base, 2)
    rows = np.array([5, 0, 7])
    positions = np.concatenate([np.arange(*objective.offsets[r : r + 2]) for r in rows])
    batch = objective.batch(base, examples, rows)
    with torch.no_grad():
        logits = torch.cat(list(base.predictions(Attached(), batch.examples)))
        losses = objective.losses(base, Attached(), batch)
    assert len(logits) == len(positions)
    index, p = objective.index[positions].astype(np.int64), objective.probability[positions]
    targets = torch.from_numpy(targets_of(tiny.objective(base), examples)[positions].astype(np.int64))
    torch.testing.assert_close(losses, soft_losses(logits, targets, *soft(p, index, 2.0, 0.25)))
    # A piece of the logits at a time gives the same.
    monkeypatch.setattr("fedhpc.models.base.LOGITS_AT_ONCE", 3 * tiny.VOCABULARY)
    with torch.no_grad():
        torch.testing.assert_close(losses, objective.losses(base, Attached(), batch))
        torch.testing.assert_close(logits, torch.cat(list(base.predictions(Attached(), batch.examples))))


def lora_of(base: Any) -> Any:
    return with_head(Lora(configuration.resolve({"method": {"name": "lora", "rank": 2}, **IID}).method, base, 0))


def test_training_on_a_teacher_comes_close_to_it() -> None:
    base = tiny.base("llama", torch.float32)
    method = lora_of(base)
    examples = tiny.examples(8)
    start = method.payload.flatten(method.initial())[None]
    teacher = start + 0.05 * torch.randn(start.shape, generator=torch.Generator().manual_seed(3))
    objective = tiny.objective(base)
    (known,) = predict(base, method, objective, teacher, examples, tiny.VOCABULARY, 8, 1.0, 16, "float32")
    assert known is not None
    offsets = position_offsets(objective, examples)
    taught = SoftTargets(objective, known.index, known.probability, offsets, 1.0, 0.0)
    client = {"optimizer": "adamw", "lr": 0.02, "batch_size": 8, "steps": 60}
    config = configuration.resolve({"client": client, **IID})
    trained = tiny.train(base, method, taught, start, [Work(0, np.arange(8))], examples, config, 1, 1)
    assert trained.loss_last[0] < 0.1 * trained.loss_first[0]


# ---------------------------------------------------------------- what travels


def random_knowledge(rng: np.random.Generator, positions: int, classes: int, k: int, weighted: bool) -> Knowledge:
    index, p, entropy = likeliest(torch.from_numpy(rng.normal(size=(positions, classes)) * 2), k, 1.5)
    confidence = np.exp(-entropy.numpy()).astype(np.float16)
    return Knowledge(index.numpy().astype(np.int32), p.numpy().astype(np.float16), confidence if weighted else None)


def same(a: Knowledge, b: Knowledge) -> None:
    np.testing.assert_array_equal(a.index, b.index)
    np.testing.assert_array_equal(a.probability, b.probability)
    assert (a.confidence is None) == (b.confidence is None)
    if a.confidence is not None:
        np.testing.assert_array_equal(a.confidence, b.confidence)


@pytest.mark.parametrize(
    ("classes", "k", "weighted", "size"),
    [(100, 4, False, 16), (100, 4, True, 18), (70_000, 4, False, 24), (6, 6, False, 12), (6, 6, True, 14)],
)
def test_knowledge_is_the_same_after_its_bytes(classes: int, k: int, weighted: bool, size: int) -> None:
    known = random_knowledge(np.random.default_rng(0), 9, classes, k, weighted)
    as_bytes = Format(classes, k, weighted)
    records = as_bytes.pack(known)
    assert records.dtype == torch.uint8 and tuple(records.shape) == (9, size) and as_bytes.record_bytes == size
    same(as_bytes.unpack(records), known)


def test_all_classes_travel_in_whatever_order_they_come() -> None:
    """As an ensemble has them, largest first, or as one class repeated."""
    index = np.array([[2, 1, 0], [0, 0, 0]], np.int32)
    probability = np.array([[0.5, 0.375, 0.125], [1, 0, 0]], np.float16)
    as_bytes = Format(3, 3, weighted=False)
    found = as_bytes.unpack(as_bytes.pack(Knowledge(index, probability)))
    np.testing.assert_array_equal(dense(found, 3), [[0.125, 0.375, 0.5], [1, 0, 0]])


def test_the_likeliest_classes_of_a_model() -> None:
    """In blocks, whatever the batch, at the positions of their examples; one with a NaN says nothing."""
    base = tiny.base("llama")
    method, examples = lora_of(base), tiny.examples(10)
    start = method.payload.flatten(method.initial())
    noise = torch.randn(3, len(start), generator=torch.Generator().manual_seed(1), dtype=start.dtype)
    payloads = start + 0.05 * noise
    payloads[1, 0] = torch.nan
    first, second, third = predict(
        base, method, tiny.objective(base), payloads, examples, tiny.VOCABULARY, 5, 2.0, 12, "float32", confident=True
    )
    assert second is None and first is not None and third is not None
    offsets = position_offsets(tiny.objective(base), examples)
    for model, known in ((0, first), (2, third)):
        for e in range(len(examples)):
            batch = base.batch(examples, np.array([e]))
            views = method.payload.views(payloads[model : model + 1])
            with torch.no_grad(), method.attach(views, views, torch.zeros(1, dtype=torch.int64)) as attached:
                p = softmax(torch.cat(list(base.predictions(attached, batch))).numpy() / 2.0)
            here = slice(offsets[e], offsets[e + 1])
            np.testing.assert_array_equal(known.index[here], np.argsort(-p, axis=1)[:, :5])
            np.testing.assert_allclose(known.probability[here], -np.sort(-p, axis=1)[:, :5], rtol=1e-3, atol=1e-7)
            assert known.confidence is not None
            expected = np.exp((p * np.log(p)).sum(axis=1))
            np.testing.assert_allclose(known.confidence[here], expected, rtol=1e-3)


# ---------------------------------------------------------------- the ensemble


def dense(known: Knowledge, classes: int) -> np.ndarray:
    """(S, V), zeros where nothing is known."""
    p = np.zeros((len(known), classes))
    np.add.at(p, (np.arange(len(known))[:, None], known.index), known.probability.astype(np.float64))
    return p


def formula(clients: list[Knowledge], weights: np.ndarray, classes: int) -> np.ndarray:
    """sum_i n_i c_i p_i / sum_i n_i c_i in plain numpy."""
    counts = [
        n * np.ones(len(c)) if c.confidence is None else n * np.rint(c.confidence.astype(np.float64) * 2**14) / 2**14
        for n, c in zip(weights, clients, strict=True)
    ]
    top = sum(n[:, None] * dense(c, classes) for n, c in zip(counts, clients, strict=True))
    return np.asarray(top / np.maximum(sum(counts), 1e-300)[:, None])


def together(clients: list[Knowledge]) -> Knowledge:
    confidence = [c.confidence for c in clients if c.confidence is not None]
    return Knowledge(
        np.stack([c.index for c in clients]),
        np.stack([c.probability for c in clients]),
        np.stack(confidence) if confidence else None,
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [6, 30])
def test_the_mean_is_that_of_numpy(weighted: bool, k: int) -> None:
    rng = np.random.default_rng(4)
    clients = [random_knowledge(rng, 40, 30, k, weighted) for _ in range(5)]
    weights = np.array([3, 1, 1000, 7, 20])
    found, expected = mean(together(clients), weights, k), formula(clients, weights, 30)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.probability, np.take_along_axis(expected, order, 1).astype(np.float16))
    np.testing.assert_array_equal(found.index, order)
    # Whoever comes first: the same bits.
    backwards = mean(together(clients[::-1]), weights[::-1], k)
    same(found, backwards)


def test_nobody_knows_anything_of_a_position() -> None:
    rng = np.random.default_rng(5)
    clients = [random_knowledge(rng, 6, 30, 4, True) for _ in range(2)]
    for client in clients:
        assert client.confidence is not None
        client.confidence[2] = 0
    found = mean(together(clients), np.array([1, 1]), 4)
    assert not found.probability[2].any() and found.probability[[0, 1, 3, 4, 5]].max(axis=1).all()
    filled = with_targets_where_unknown(found, np.arange(10, 16, dtype=np.int32))
    assert filled.index[2].tolist() == [12] * 4 and filled.probability[2].tolist() == [1, 0, 0, 0]
    np.testing.assert_array_equal(filled.index[3:], found.index[3:])


@pytest.mark.parametrize("weighted", [False, True])
def test_the_exchange_has_the_same_bits_on_any_number_of_ranks(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedhpc.approaches.distillation.ensemble._ENTRIES", 7 * 4 * 5)  # several chunks
    rng = np.random.default_rng(6)
    clients = [random_knowledge(rng, 41, 50, 4, weighted) for _ in range(7)]
    weights = rng.integers(1, 100, 7)
    as_bytes = Format(50, 4, weighted)
    expected = mean(together(clients), weights, 4)
    for ranks in (1, 2, 3, 4):
        owners = rng.integers(min(1, ranks - 1), ranks, 7)  # rank 0 has no clients where there are others

        def one(transport: Any, owners: np.ndarray = owners) -> Knowledge | None:
            slots = np.flatnonzero(owners == transport.rank)[::-1].copy()
            none = torch.empty(0, 41, as_bytes.record_bytes, dtype=torch.uint8)
            records = torch.stack([as_bytes.pack(clients[i]) for i in slots]) if len(slots) else none
            return exchange(transport, slots, records, owners.tolist(), weights, as_bytes, 4)

        found, *others = on_threads(ranks, one)
        assert found is not None and others == [None] * (ranks - 1)
        same(found, expected)


def test_the_error_of_a_short_exchange_against_a_whole_one() -> None:
    """The mean over real models' predictions: what k classes leave out is bounded by the probability left out."""
    base = tiny.base("llama", scale=1.0)
    method, examples, objective = lora_of(base), tiny.examples(30), tiny.objective(base)
    start = method.payload.flatten(method.initial())
    noise = torch.randn(4, len(start), generator=torch.Generator().manual_seed(1), dtype=start.dtype)
    weights = np.ones(4, np.int64)
    classes = base.num_classes
    whole = predict(base, method, objective, start + 0.1 * noise, examples, classes, classes, 1.0, 64, "float32")
    reference = dense(mean(together([c for c in whole if c]), weights, classes), classes)
    errors = []
    for k in (1, 4, 16, 32, classes):
        short = [
            c
            for c in predict(base, method, objective, start + 0.1 * noise, examples, classes, k, 1.0, 64, "float32")
            if c
        ]
        found = dense(mean(together(short), weights, k), classes)
        left_out = 1 - found.sum(axis=1)
        # Of each class less is known, never more, but for rounding.
        assert (found <= reference + 1e-3).all()
        errors.append(float(np.abs(found - reference).sum(axis=1).mean()))
        np.testing.assert_allclose(np.abs(found - reference).sum(axis=1), left_out, atol=0.01)
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


@pytest.mark.slow
def test_the_error_of_a_short_exchange_of_pretrained_models(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models on the references of E2E: the figures of configs/distillation/README.md."""
    names = ["The Eagle", "Alimentum"]
    raw = {
        "data": {"source": str(shared / "data" / "e2e"), "validation": "dev", "test": "dev", "where": {"name": names}},
        "method": {"name": "distillation", "student": {"name": "lora"}, "public": {"max_examples": 40}},
    }
    teachers: dict[int | None, list[Knowledge]] = {k: [] for k in (1, 2, 4, 8, 16, 32, 64, None)}
    for name in ("tinystories-260k", "tinystories-bit-3m"):
        config = configuration.resolve({**raw, **IID, "model": {"name": str(shared / "models" / name)}})
        approach: Any = prepare(config, LoopbackTransport(), Launch(), False)
        model = approach.student
        for k, said in teachers.items():
            about = (model.public, 512, k or 512, 1.0, 40, "float32")
            said += [
                known
                for known in predict(model.base, model.method, model.objective, model.initial[None], *about)
                if known
            ]
    weights = np.ones(2, np.int64)
    whole = dense(mean(together(teachers[None]), weights, 512), 512)
    errors = {
        k: float(np.abs(dense(mean(together(said), weights, k or 512), 512) - whole).sum(axis=1).mean())
        for k, said in teachers.items()
    }
    with capsys.disabled():
        print("\nprobability that top-k leaves out or moves, mean over positions:", errors)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert errors[16] < 0.25 and errors[64] < 0.05 and errors[None] == 0


# ---------------------------------------------------------------- tokenizers


def test_edit_distances_one_by_one_and_all_at_once() -> None:
    assert [edit_distance(*pair) for pair in (("", "abc"), ("utilize", "utilise"), ("kitten", "sitting"))] == [3, 1, 3]
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abc"), rng.integers(1, 7))) for _ in range(40)]
    vocabularies = Vocabularies(words, words)
    for word in ["", "a", "abcabc", "ccb", "bbbbbbbb"]:
        assert vocabularies.distances(word).tolist() == [edit_distance(word, other) for other in words]


def test_a_token_stands_for_the_nearest_and_of_several_the_first() -> None:
    stands_for = Vocabularies(["utilize", " the", "b", "xyz"], ["utilise", "the", " the", "bc", "ab", "utilises"])
    assert stands_for(np.array([[0, 1], [2, 2]], np.int32)).tolist() == [[0, 2], [3, 3]]
    assert stands_for(np.array([9], np.int32)).tolist() == [3]  # without a text: the shortest


def test_texts_are_matched_where_their_tokens_are() -> None:
    # The example of FuseLLM's figure 2 in spirit: one word is one token here and two there.
    assert matched(["now", " get", "s"], ["now", " gets"]) == [[0], [1, 2]]
    assert matched(["a", "b", "c"], ["a", "b", "c"]) == [[0], [1], [2]]
    assert matched(["ab", "c"], ["a", "b", "c"]) == [[0], [0], [1]]


class Words:
    """A tokenizer over a list of words; 0 begins and 1 ends a text."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id = 0, 1, None, None

    def __init__(self, words: list[str]) -> None:
        self.words = ["<s>", "</s>", *words]

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}


def rows_of(rows: list[list[int]]) -> Examples:
    """Examples whose target begins at their second token."""
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return examples_from(Tokens(np.concatenate(rows).astype(np.int32), offsets, np.ones(len(rows), np.int32)))


def test_knowledge_in_another_tokenizer() -> None:
    theirs, ours = Words(["\u2581now", "\u2581get", "s", "\u2581colour"]), Words(["Ġcolor", "Ġgets", "Ġnow", "x"])
    assert token_texts(theirs) == ["<bos>", "<eos>", " now", " get", "s", " colour"]
    of = rows_of([[0, 2, 3, 4, 1], [0, 5, 1]])  # now get s eos, colour eos
    to = rows_of([[0, 4, 3, 1], [0, 2, 1]])  # now gets eos, color eos
    alignment = Alignment(LanguageModelling(), of, token_texts(theirs), to, token_texts(ours))
    assert alignment.position.tolist() == [0, -1, 3, 4, 5]  # " gets" is two tokens there
    assert alignment.share == 0.8
    index = np.array([[2, 3], [3, 2], [4, 3], [1, 4], [5, 3], [1, 5]], np.int32)
    probability = np.array([[0.5, 0.25]] * 6, np.float16)
    found = alignment(Knowledge(index, probability), 2)
    assert found.index.tolist() == [[4, 3], [3, 3], [1, 5], [2, 3], [1, 2]]  # " get" stands for " gets", "s" for "x"
    assert found.probability.tolist() == [[0.5, 0.25], [1, 0], [0.5, 0.25], [0.5, 0.25], [0.5, 0.25]]
    assert found.confidence is not None and found.confidence.tolist() == [1, 0, 1, 1, 1]
    # Two tokens that stand for the same one add up.
    twice = alignment(Knowledge(np.array([[2, 2]] * 6, np.int32), probability), 2)
    assert twice.index[0].tolist() == [4, 4] and twice.probability[0].tolist() == [0.75, 0]


def test_a_tokenizer_aligned_with_itself_changes_nothing() -> None:
    words = Words([f"w{i}" for i in range(20)])
    rows = rows_of([[0, 2, 3, 4, 5, 1], [0, 7, 8, 1]])
    alignment = Alignment(LanguageModelling(), rows, token_texts(words), rows, token_texts(words))
    assert alignment.share == 1.0
    known = random_knowledge(np.random.default_rng(0), 8, 22, 5, False)
    np.testing.assert_array_equal(dense(alignment(known, 5), 22), dense(known, 22))


def test_the_examples_targets_of() -> None:
    examples = tiny.examples(5)
    expected = [t for e in range(5) for t in examples.tokens(e)[examples.prompt_lengths[e] :].tolist()]
    assert targets_of(LanguageModelling(), examples).tolist() == expected
    assert position_offsets(LanguageModelling(), examples)[-1] == len(expected)
