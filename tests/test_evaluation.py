"""Evaluation against plain Hugging Face and PEFT calls, one row at a time, and against itself on more ranks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from fedhpc import config, registry
from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.evaluation.evaluate import Evaluator, Outcome, subset
from fedhpc.methods.base import Attached, Method
from fedhpc.models import load as models
from fedhpc.models.base import Base
from fedhpc.ranks.placement import Placement
from fedhpc.ranks.transport.base import LoopbackTransport, Transport
from tests import tiny

METRICS = ["loss", "perplexity", "accuracy", "macro_f1", "bleu", "chrf", "rouge_l"]
LABELS = [" yes", " nay", " maybe"]


class Characters(tiny.TinyTokenizer):
    """One id per character, both ways."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(97 + i % 26) for i in ids if i > 2)


class Replayed(Transport):
    """Ranks one after the other, the last first: rank 0 adds up what the others gave."""

    name = "replayed"

    def __init__(self, rank: int, world_size: int, given: list[list[Tensor]]) -> None:
        super().__init__(rank, world_size)
        self.given, self.calls = given, 0

    def _reduce_sum(self, tensor: Tensor) -> None:
        if self.calls == len(self.given):
            self.given.append([])
        if self.rank == 0:
            for other in self.given[self.calls]:
                tensor += other
        else:
            self.given[self.calls].append(tensor.clone())
        self.calls += 1

    def close(self) -> None: ...

    _broadcast = _all_reduce_max = _exchange = None  # type: ignore[assignment]


def make(base: Base, name: str = "prefix", **options: Any) -> Method:
    if name == "prefix":
        options = {"num_virtual_tokens": 5, "init_text": "some words", **options}
    method: Method = registry.choice("methods", name)(registry.options("methods", name)(**options), base, 0)
    return method


def some_payloads(method: Method, count: int, noise: float = 0.5) -> Tensor:
    flat = method.payload.flatten({n: t.to(method.base.dtype) for n, t in method.initial().items()})
    generator = torch.Generator().manual_seed(3)
    return flat + noise * torch.randn(count, len(flat), dtype=flat.dtype, generator=generator)


def text_base(family: str = "gpt2") -> Base:
    return dataclasses.replace(tiny.base(family), tokenizer=Characters())


def text_examples(count: int = 14) -> Examples:
    """Prompts that come once to three times, with a label's text as target."""
    rng = np.random.default_rng(5)
    prompts = [("is it " + "so very " * int(n))[: 6 + int(n) * 3] for n in rng.integers(0, 7, count)]
    labels = rng.integers(0, 3, count).astype(np.int32)
    targets = [LABELS[label] for label in labels]
    rows = [
        [1, *Characters()(prompt)["input_ids"], *Characters()(target)["input_ids"], 2]
        for prompt, target in zip(prompts, targets, strict=True)
    ]
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    prompt_lengths = np.array([1 + len(p) for p in prompts], np.int32)
    tokens = Tokens(np.concatenate(rows).astype(np.int32), offsets, prompt_lengths)
    return examples_from(tokens, labels=labels, label_names=["a", "b", "c"], prompts=prompts, targets=targets)


def attached(method: Method, payload: Tensor) -> Any:
    lead = method.payload.views(payload.unsqueeze(0))
    return method.attach(method.start(lead), lead, torch.zeros(1, dtype=torch.int64))


def plain_nll(
    base: Base, method: Method | None, payload: Tensor, prompt: Sequence[int], target: Sequence[int]
) -> float:
    """Of one row: the whole model's logits, our own log-softmax."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *target]])
        if method is None:
            logits = base.model(input_ids=ids).logits[0]
        else:
            with attached(method, payload) as now:
                cache = DynamicCache(list(now.past)) if now.past else None
                logits = base.model(input_ids=ids, past_key_values=cache).logits[0]
        log = logits.log_softmax(-1)
        return -float(sum(log[len(prompt) - 1 + t, token] for t, token in enumerate(target)))


def row_nll(base: Base, method: Method | None, payload: Tensor, examples: Examples, i: int) -> float:
    tokens, prompt = examples.tokens(i).tolist(), int(examples.prompt_lengths[i])
    return plain_nll(base, method, payload, tokens[:prompt], tokens[prompt:])


def run(
    base: Base, method: Method | None, payloads: Tensor, examples: Examples, metrics: list[str], **kw: Any
) -> Outcome:
    transport = kw.pop("transport", None) or LoopbackTransport()
    indices = kw.pop("indices", np.arange(len(examples)))
    options = config.Evaluation(batch_size=kw.pop("batch_size", 4), max_new_tokens=kw.pop("max_new_tokens", 6))
    return evaluator(base, transport, options).evaluate(method, payloads, examples, indices, metrics, **kw)  # type: ignore[return-value]


def evaluator(base: Base, transport: Transport, options: config.Evaluation) -> Evaluator:
    return Evaluator(base, tiny.objective(base), options, "float32", transport, LABELS)


# --- losses


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_loss_equals_the_model_called_row_by_row(family: str) -> None:
    base, examples = tiny.base(family), tiny.examples(21)
    method = make(base)
    payload = some_payloads(method, 1)
    indices = subset(len(examples), 13)
    for chosen in (method, None):
        want = sum(row_nll(base, chosen, payload[0], examples, int(i)) for i in indices)
        tokens = int((examples.lengths - examples.prompt_lengths)[indices].sum())
        outcome = run(base, chosen, payload, examples, ["loss", "perplexity"], indices=indices)
        assert outcome.metrics["loss"] == pytest.approx(want / tokens, rel=1e-10)
        assert outcome.metrics["perplexity"] == pytest.approx(np.exp(want / tokens), rel=1e-9)
        assert outcome.samples == []


@pytest.mark.parametrize(("name", "batch_size"), [("prefix", 4), ("prefix", 32), ("full", 4)])
def test_losses_of_many_payloads(name: str, batch_size: int) -> None:
    """batch_size 4: batches of one payload; 32: mixed ones; full: one payload at a time in any case."""
    base, examples = tiny.base("llama"), tiny.examples(9)
    method = make(base, name)
    payloads = some_payloads(method, 3, noise=0.05)
    want = [
        sum(row_nll(base, method, payload, examples, i) for i in range(9))
        / int((examples.lengths - examples.prompt_lengths).sum())
        for payload in payloads
    ]
    outcome = run(base, method, payloads, examples, ["loss"], batch_size=batch_size)
    assert len(set(want)) == 3
    assert outcome.metrics["loss"] == pytest.approx(np.mean(want), rel=1e-10)


@pytest.mark.parametrize("count", [1, 4])
def test_client_evaluation(count: int) -> None:
    base, examples = tiny.base("gpt2"), tiny.examples(30)
    method = make(base)
    payloads = some_payloads(method, count)
    held_out = [np.array([3, 7, 8]), np.array([], np.int64), np.array([1]), np.arange(10, 16)]
    clients = [5, 6, 9, 40]

    def on(transport: Transport) -> dict[str, Any] | None:
        options = config.Evaluation(batch_size=4)
        return evaluator(base, transport, options).by_client(method, payloads, examples, clients, held_out)

    columns = on(LoopbackTransport())
    assert columns is not None
    assert columns["client_id"].tolist() == clients
    assert columns["num_examples"].tolist() == [3, 0, 1, 6]
    for i, part in enumerate(held_out):
        tokens = int((examples.lengths - examples.prompt_lengths)[part].sum())
        nll = sum(row_nll(base, method, payloads[i % count], examples, int(e)) for e in part)
        assert columns["tokens"][i] == tokens
        assert columns["loss"][i] == pytest.approx(nll / tokens if tokens else np.nan, rel=1e-10, nan_ok=True)
        sums = np.array([row_nll(base, method, payloads[i % count], examples, int(e)) for e in part])
        counts = np.array([int(examples.lengths[e] - examples.prompt_lengths[e]) for e in part])
        half = np.nan
        if len(part) > 1:
            residuals = sums - nll / tokens * counts
            half = 1.959964 * np.sqrt(len(part) / (len(part) - 1) * (residuals**2).sum()) / tokens
        assert columns["loss_high"][i] == pytest.approx(columns["loss"][i] + half, rel=1e-9, nan_ok=True)
        assert columns["loss_low"][i] == pytest.approx(max(columns["loss"][i] - half, 0.0), rel=1e-9, nan_ok=True)
    given: list[list[Tensor]] = []
    assert [on(Replayed(rank, 3, given)) for rank in (2, 1)] == [None, None]
    again = on(Replayed(0, 3, given))
    assert again is not None
    for name, column in columns.items():
        np.testing.assert_array_equal(again[name], column)


def part_of(examples: Examples, indices: Sequence[int]) -> Examples:
    """Some examples of a split, as a split of their own."""
    rows = [examples.tokens(i) for i in indices]
    lengths = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    assert examples.labels is not None and examples.prompts is not None and examples.targets is not None
    return examples_from(
        Tokens(np.concatenate(rows), lengths, examples.prompt_lengths[indices]),
        labels=examples.labels[indices],
        label_names=examples.label_names,
        prompts=[examples.prompts[i] for i in indices],
        targets=[examples.targets[i] for i in indices],
    )


@pytest.mark.parametrize("count", [1, 4])
def test_every_metric_of_a_client_is_that_of_its_examples_alone(count: int) -> None:
    base, examples = text_base(), text_examples(30)
    method = make(base)
    payloads, metrics = some_payloads(method, count), [*METRICS, "exact_match", "f1"]
    held_out = [np.array([3, 7, 8, 9, 21]), np.array([], np.int64), np.array([1]), np.arange(10, 16)]

    def on(transport: Transport) -> dict[str, Any] | None:
        measure = evaluator(base, transport, config.Evaluation(batch_size=4, max_new_tokens=6))
        return measure.by_client(method, payloads, examples, [5, 6, 9, 40], held_out, metrics)

    columns = on(LoopbackTransport())
    assert columns is not None
    assert set(columns) == {"client_id", "num_examples", "tokens"} | {
        f"{name}{end}" for name in metrics for end in ("", "_low", "_high")
    }
    for i, held in enumerate(held_out):
        if not len(held):
            assert all(np.isnan(columns[name][i]) for name in metrics)
            continue
        payload = payloads[i % count].unsqueeze(0)
        alone = run(base, method, payload, part_of(examples, held.tolist()), metrics, intervals=True)
        for name in metrics:
            assert columns[name][i] == pytest.approx(alone.metrics[name], rel=1e-9), name
            if name not in ("loss", "perplexity"):  # whose examples count one by one here
                ends = [columns[f"{name}_{end}"][i] for end in ("low", "high")]
                assert ends == pytest.approx([alone.sampling[name].low, alone.sampling[name].high], nan_ok=True), name
    given: list[list[Tensor]] = []
    assert [on(Replayed(rank, 3, given)) for rank in (2, 1)] == [None, None]
    again = on(Replayed(0, 3, given))
    assert again is not None
    for name, column in columns.items():
        np.testing.assert_array_equal(again[name], column)


def test_subset_is_fixed_sorted_and_complete_where_it_can_be() -> None:
    assert subset(5, 5).tolist() == subset(5, 9).tolist() == [0, 1, 2, 3, 4]
    chosen = subset(1000, 50)
    assert len(set(chosen.tolist())) == 50 and (np.diff(chosen) > 0).all()
    assert (chosen == subset(1000, 50)).all() and len(set(chosen.tolist()) - set(range(950))) > 0


def test_it_is_said_on_how_many_items_and_how_well_they_stand_for_others() -> None:
    base, examples = text_base(), text_examples(30)
    method = make(base)
    payloads, prompts = some_payloads(method, 2), len(set(examples.prompts or []))
    assert 5 < prompts < 30
    whole = run(base, method, payloads, examples, METRICS, intervals=True).sampling
    part = run(base, method, payloads, examples, METRICS, indices=subset(30, 5), intervals=True).sampling
    for name in METRICS:
        texts = name in ("bleu", "chrf", "rouge_l")
        assert whole[name][:3] == ((prompts, prompts, "prompts") if texts else (30, 30, "examples"))
        assert part[name][:3] == ((5, prompts, "prompts") if texts else (5, 30, "examples"))
        assert whole[name].items == (f"{prompts} prompts" if texts else "30 examples")
        assert part[name].items == (f"5 of {prompts} prompts" if texts else "5 of 30 examples")
    # The loss is over all pairs of payload and example; what varies are the prompts.
    nll, tokens = np.zeros(prompts), np.zeros(prompts)
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(examples.prompts or []))}
    for i, prompt in enumerate(examples.prompts or []):
        nll[numbers[prompt]] += sum(row_nll(base, method, payload, examples, i) for payload in payloads)
        tokens[numbers[prompt]] += 2 * int(examples.lengths[i] - examples.prompt_lengths[i])
    residuals = nll - nll.sum() / tokens.sum() * tokens
    half = 1.959964 * np.sqrt(prompts / (prompts - 1) * (residuals**2).sum()) / tokens.sum()
    mean = nll.sum() / tokens.sum()
    assert whole["loss"][3:] == (pytest.approx(mean - half), pytest.approx(mean + half), "normal")
    plain = run(base, method, payloads, examples, ["loss", "bleu"]).sampling  # as during the run
    assert all(one.n and not one.known for one in plain.values())


# --- labels


@pytest.mark.parametrize("count", [1, 3])
def test_label_predictions_are_those_of_the_likeliest_target(count: int) -> None:
    base, examples = text_base(), text_examples()
    method = make(base)
    payloads = some_payloads(method, count)
    characters = Characters()
    want_scores = []
    for i in range(len(examples)):
        prompt = examples.tokens(i)[: examples.prompt_lengths[i]].tolist()
        want_scores.append(
            [
                -plain_nll(base, method, payloads[i % count], prompt, [*characters(label)["input_ids"], 2])
                for label in LABELS
            ]
        )
    n, want_shares = np.arange(len(examples)), np.exp(want_scores) / np.exp(want_scores).sum(axis=1, keepdims=True)
    measure = evaluator(base, LoopbackTransport(), config.Evaluation(batch_size=4))
    for m in range(count):
        part = n[n % count == m]
        _, shares = measure.mixed_probabilities(method, payloads[m : m + 1], np.ones(1), examples, part, labels=True)
        np.testing.assert_allclose(shares, want_shares[part], rtol=1e-9)
    predictions = np.argmax(want_scores, axis=1).tolist()
    assert len(set(predictions)) > 1
    want = np.mean(np.array(predictions) == examples.labels)
    assert 0 < want < 1
    assert run(base, method, payloads, examples, ["accuracy"]).metrics == {"accuracy": want}


def test_a_label_longer_than_the_room_shortens_the_prompt_but_for_its_start() -> None:
    prompts = [np.array([1, 5, 6, 7], np.int32), np.array([8, 9], np.int32)]
    answers = [np.array([20, 2], np.int32), np.array([21, 22, 2], np.int32)]
    base = tiny.base("gpt2")  # of 96 positions
    room_for_4 = Attached(embeddings=torch.zeros(2, 92, 32))
    joined = base.with_answers(room_for_4, prompts, answers)
    assert [joined.tokens(i).tolist() for i in range(2)] == [[1, 7, 20, 2], [9, 21, 22, 2]]
    assert joined.prompt_lengths.tolist() == [2, 1]
    whole = base.with_answers(Attached(), prompts, answers)
    assert [whole.tokens(i).tolist() for i in range(2)] == [[1, 5, 6, 7, 20, 2], [8, 9, 21, 22, 2]]


# --- texts


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.concatenate([[1], rng.integers(3, tiny.VOCABULARY, n - 1)]).astype(np.int32) for n in lengths]


def generate(
    base: Base, method: Method | None, payloads: Tensor, prompts: list[np.ndarray], count: int
) -> list[list[int]]:
    with torch.no_grad():
        if method is None:
            return base.generate(Attached(), prompts, count).tolist()
        lead = method.payload.views(payloads)
        rows = torch.arange(len(prompts)) % len(payloads)
        with method.attach(method.start(lead), lead, rows) as now:
            return base.generate(now, prompts, count).tolist()


@pytest.mark.parametrize("with_prefix", [True, False])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_row_does_not_depend_on_its_batch(family: str, with_prefix: bool) -> None:
    """Also against greedy decoding without padding, mask or cache."""
    base, prompts = tiny.base(family), prompts_of([7, 2, 12, 1, 5])
    method = make(base) if with_prefix else None
    payloads = some_payloads(make(base), 2)
    together = generate(base, method, payloads, prompts, 8)
    for i, prompt in enumerate(prompts):
        one = payloads[i % 2]
        assert generate(base, method, one.unsqueeze(0), [prompt], 8) == [together[i]]
        ids = prompt.tolist()
        for token in together[i]:
            with torch.no_grad():
                if method is None:
                    logits = base.model(input_ids=torch.tensor([ids])).logits
                else:
                    with attached(method, one) as now:
                        cache = DynamicCache(list(now.past))
                        logits = base.model(input_ids=torch.tensor([ids]), past_key_values=cache).logits
            want = int(logits[0, -1].argmax())
            assert token == (-1 if want == 2 else want)
            if token == -1:
                break
            ids.append(token)
    assert len({tuple(row) for row in together}) > 1


def peft_generate(model: Any, prompt: np.ndarray, count: int) -> list[int]:
    ids = torch.from_numpy(prompt.astype(np.int64)).unsqueeze(0)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        eos_token_id=2, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    out = out[: out.index(2)] if 2 in out else out
    return out + [-1] * (count - len(out))


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_generation_equals_peft_with_the_exported_adapter(family: str, tmp_path: Path) -> None:
    base, prompts = tiny.base(family, torch.float32), prompts_of([6, 3, 9])
    method = make(base)
    payload = some_payloads(method, 1)
    method.export({n: t[0] for n, t in method.payload.views(payload).items()}, tmp_path)
    got = generate(base, method, payload, prompts, 8)
    reference = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).eval()
    assert got == [peft_generate(reference, prompt, 8) for prompt in prompts]
    assert got != generate(base, None, payload, prompts, 8)


def test_generation_ends_at_eos_or_where_the_positions_end() -> None:
    tokenizer = Characters()
    tokenizer.eos_token_id = -5  # never
    base, prompts = dataclasses.replace(tiny.base("gpt2"), tokenizer=tokenizer), prompts_of([20, 3, 9])
    method = make(base)
    payloads = some_payloads(method, 3)
    long = generate(base, method, payloads, prompts, 100)
    # Position 95 is the last that can be an input; the token it predicts is the last one.
    assert [row.index(-1) for row in long] == [96 - 5 - len(prompt) + 1 for prompt in prompts]
    eos = tokenizer.eos_token_id = long[1][4]
    ends = [row.index(eos) if eos in row else row.index(-1) for row in long]
    again = generate(base, method, payloads, prompts, 100)
    assert again == [row[:end] + [-1] * (100 - end) for row, end in zip(long, ends, strict=True)]


def test_generation_of_a_real_model_equals_peft(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "tinystories-260k"
    if not folder.is_dir():
        pytest.skip("no tinystories-260k in shared/models")
    base = models.load_base(config.Model(name=str(folder)), torch.device("cpu"))
    method = make(base, num_virtual_tokens=8, init_text="Lily and Tom went to the park to play with a big red ball")
    payload = method.payload.flatten(method.initial()).unsqueeze(0)
    tokenizer = base.tokenizer
    texts = ["Once upon a time", "The dog was very sad because his friend did not", "She"]
    prompts = [
        np.array([tokenizer.bos_token_id, *tokenizer(t, add_special_tokens=False)["input_ids"]], np.int32)
        for t in texts
    ]
    method.export({n: t[0] for n, t in method.payload.views(payload).items()}, tmp_path)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path).eval()
    got = generate(base, method, payload, prompts, 24)
    assert got == [peft_generate(reference, prompt, 24) for prompt in prompts]
    assert got != generate(base, None, payload, prompts, 24)


@pytest.mark.parametrize("count", [1, 2])
def test_texts_are_made_once_per_prompt_and_kept_with_all_references(count: int) -> None:
    base, examples = text_base("llama"), text_examples()
    method = make(base)
    payloads = some_payloads(method, count)
    distinct = list(dict.fromkeys(examples.prompts or []))
    references = [
        [t.strip() for p, t in zip(examples.prompts or [], examples.targets or [], strict=True) if p == prompt]
        for prompt in distinct
    ]
    assert max(map(len, references)) > 1 and len(distinct) < len(examples)
    texts = []
    for i, prompt in enumerate(distinct):
        ids = np.array([1, *Characters()(prompt)["input_ids"]])
        row = generate(base, method, payloads[i % count].unsqueeze(0), [ids], 6)[0]
        texts.append(Characters().decode([t for t in row if t >= 0]))
    outcome = run(base, method, payloads, examples, ["bleu", "chrf", "rouge_l"], samples=100)
    want = [{"prompt": p, "references": r, "text": t} for p, r, t in zip(distinct, references, texts, strict=True)]
    assert outcome.samples == want
    few = run(base, method, payloads, examples, ["chrf"], samples=2)
    alone = run(base, method, payloads, examples, ["loss"], samples=2)
    assert len(few.samples) == 2 and few.samples == alone.samples
    limited = run(base, method, payloads, examples, ["chrf"], indices=np.array([4, 5, 9]), samples=100)
    assert len(limited.samples) == 3


# --- ranks


@pytest.mark.parametrize("count", [1, 3])
def test_the_world_size_does_not_change_a_bit(count: int) -> None:
    base, examples = text_base(), text_examples()
    method = make(base)
    payloads = some_payloads(method, count)
    alone = run(base, method, payloads, examples, METRICS, samples=4, intervals=True)
    assert list(alone.metrics) == METRICS
    for world, gpus in [(2, ()), (3, ()), (5, ()), (3, ("", "a", "b"))]:
        given: list[list[Tensor]] = []
        for rank in range(world - 1, 0, -1):
            transport = Replayed(rank, world, given)
            transport.use_placement(Placement(gpus))
            one = run(base, method, payloads, examples, METRICS, samples=4, intervals=True, transport=transport)
            assert one is None
            assert any(bool(slots[-1].any()) for slots in given)
        transport = Replayed(0, world, given)
        transport.use_placement(Placement(gpus))
        outcome = run(base, method, payloads, examples, METRICS, samples=4, intervals=True, transport=transport)
        assert (outcome.metrics, outcome.samples) == (alone.metrics, alone.samples)
        assert outcome.sampling == alone.sampling
