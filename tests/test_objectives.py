"""Spans of supervised tokens, objectives with several rows per example, and the templates of chats."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc import objectives, registry
from fedhpc.data.tokens import Examples, Spans, Tokens, examples_from, ranges
from fedhpc.errors import UserError
from fedhpc.models.base import Attached, Batch, TargetBatch
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.encoder import Classifier
from fedhpc.models.load import MODELS
from fedhpc.objectives.base import Objective
from fedhpc.objectives.language_modelling import LanguageModelling
from tests import tiny
from tests.test_block import make, settings, start_of, works


def with_spans(examples: Examples, chosen: list[list[tuple[int, int]]]) -> Examples:
    """The same rows with these (start, end) of supervised tokens."""
    offsets = np.cumsum([0, *map(len, chosen)]).astype(np.int64)
    bounds = np.array([bound for spans in chosen for bound in spans], np.int32).reshape(-1, 2)
    firsts = np.array([spans[0][0] for spans in chosen], np.int32)
    tokens = Tokens(examples.ids, examples.offsets, firsts)
    return examples_from(tokens, spans=Spans(offsets, bounds[:, 0].copy(), bounds[:, 1].copy()))


def turns(examples: Examples, seed: int = 0) -> tuple[Examples, list[list[tuple[int, int]]]]:
    """Two or three turns in each row, the first of them behind at least one token."""
    draw = np.random.default_rng(seed)
    chosen = []
    for length in examples.lengths:
        count = 2 if length < 7 else int(draw.integers(2, 4))
        bounds = np.sort(draw.choice(np.arange(1, length + 1), 2 * count, replace=False)).reshape(-1, 2)
        chosen.append([(int(a), int(b)) for a, b in bounds])
    return with_spans(examples, chosen), chosen


def test_ranges() -> None:
    assert ranges(np.array([2, 5, 7]), np.array([4, 5, 8])).tolist() == [2, 3, 7]
    assert ranges(np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []


def test_one_span_from_the_prompt_to_the_end_is_what_examples_have_without_spans() -> None:
    plain = tiny.examples(20)
    spelled = with_spans(plain, [[(int(p), int(n))] for p, n in zip(plain.prompt_lengths, plain.lengths, strict=True)])
    chosen = np.array([7, 0, 19, 7])
    assert spelled.num_supervised(chosen).tolist() == plain.num_supervised(chosen).tolist()
    for one, other in zip(spelled.supervised(chosen), plain.supervised(chosen), strict=True):
        assert np.array_equal(one, other)
    for family in ("llama", "t5"):
        base = tiny.base(family)
        batches = [vars(base.batch(examples, chosen)) for examples in (plain, spelled)]
        for name, value in batches[0].items():
            assert value is None or np.array_equal(value, batches[1][name]), name
    assert spelled.fingerprint != plain.fingerprint


def test_nothing_predicts_the_first_token_of_a_row() -> None:
    """A row without a prompt, as of a passage: its prompt length is 0, and its first token is no target."""
    tokens = Tokens(np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 3, 5]), np.array([0, 1], np.int32))
    for spans in (None, Spans(np.array([0, 1, 2]), np.array([0, 1], np.int32), np.array([3, 2], np.int32))):
        examples = examples_from(tokens, spans=spans)
        assert examples.num_supervised(np.arange(2)).tolist() == [2, 1]
        row, position = examples.supervised(np.arange(2))
        assert (row.tolist(), position.tolist()) == ([0, 0, 1], [1, 2, 1])
        assert LanguageModelling().targets(examples, np.arange(2)).tolist() == [6, 7, 9]


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_spans_have_the_cross_entropy_of_their_own_tokens(family: str, dtype: torch.dtype) -> None:
    """Against the model called row by row and torch's own cross-entropy: losses, and gradients by the embeddings."""
    base = tiny.base(family, dtype)
    examples, chosen = turns(tiny.examples(12))
    assert min(map(len, chosen)) == 2 and max(map(len, chosen)) == 3
    rows = np.array([5, 0, 7, 11])
    weights = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=dtype)
    wanted, total = [], torch.zeros((), dtype=dtype)
    embeddings = base.model.get_input_embeddings().weight.requires_grad_()
    for weight, row in zip(weights, rows, strict=True):
        ids = torch.from_numpy(examples.tokens(int(row)).astype(np.int64))
        first = chosen[row][0][0]
        if family in tiny.SEQ2SEQ:
            start = torch.tensor([base.model.config.decoder_start_token_id])
            inputs = torch.cat([start, ids[first:-1]])
            logits = base.model(input_ids=ids[None, :first], decoder_input_ids=inputs[None]).logits[0]
            logits = torch.cat([logits.new_zeros(first - 1, logits.shape[-1]), logits])  # so that t - 1 predicts t
        else:
            logits = base.model(input_ids=ids[None]).logits[0]
        for begin, end in chosen[row]:
            losses = torch.nn.functional.cross_entropy(logits[begin - 1 : end - 1], ids[begin:end], reduction="none")
            wanted.append(losses)
            total = total + weight * losses.sum()
    (gradient,) = torch.autograd.grad(total, embeddings)

    objective: LanguageModelling = tiny.objective(base)
    batch = objective.batch(base, examples, rows)
    close: Any = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    with torch.no_grad():
        torch.testing.assert_close(objective.losses(base, Attached(), batch), torch.cat(wanted), **close)
    assert batch.supervised.tolist() == [sum(b - a for a, b in chosen[row]) for row in rows]
    embeddings.grad = None
    found = objective.backward(base, Attached(), batch, weights)
    torch.testing.assert_close(found, torch.cat(wanted).detach(), **close)
    torch.testing.assert_close(embeddings.grad, gradient, **close)


def test_a_block_of_clients_trains_on_the_turns_of_chats() -> None:
    """Each client gets what it would get alone, and the mean of a step is over its supervised tokens."""
    base = tiny.base("llama")
    examples, _ = turns(tiny.examples())
    method, config, group = make(base), settings(), works(3)
    start = start_of(method, torch.float64)
    together = tiny.train(base, method, tiny.objective(base), start, group, examples, config)
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), start, [work], examples, config)
        torch.testing.assert_close(together.updates[i], alone.updates[0], rtol=1e-8, atol=1e-10)
    whole = tiny.train(base, method, tiny.objective(base), start, group, tiny.examples(), config)
    assert not torch.allclose(together.updates, whole.updates)


# ---------------------------------------------------------------- the seam


@dataclass(frozen=True)
class TwoRows(Batch):
    """Each example in two rows, as the answers of a preference are."""

    both: TargetBatch


class Doubled(Objective):
    """The mean of the losses of an example's two rows, which are equal."""

    def __init__(self, labels: LanguageModelling) -> None:
        self.labels = labels

    def num_supervised(self, examples: Examples, indices: np.ndarray) -> np.ndarray:
        return self.labels.num_supervised(examples, indices)

    def batch(self, base: Any, examples: Examples, indices: np.ndarray, clients: Any = None) -> TwoRows:
        both = base.batch(examples, np.concatenate([indices, indices]))
        return TwoRows(
            row=both.row[: len(both.row) // 2],
            supervised=both.supervised[: len(indices)],
            tokens=both.tokens,
            real_tokens=both.real_tokens,
            example=np.tile(np.arange(len(indices)), 2),
            both=both,
        )

    def losses(self, base: Any, attached: Attached, batch: TwoRows) -> torch.Tensor:
        first, second = self.labels.losses(base, attached, batch.both).chunk(2)
        return (first + second) / 2


def test_an_objective_may_have_two_rows_for_each_example() -> None:
    """Each behind its own client's payload: two equal rows whose losses are halved are one."""
    base, examples = tiny.base("llama"), tiny.examples()
    method, config, group = make(base), settings(), works(3)
    start = start_of(method, torch.float64)
    plain = tiny.objective(base)
    one, two = (
        tiny.train(base, method, objective, start, group, examples, config) for objective in (plain, Doubled(plain))
    )
    torch.testing.assert_close(one.updates, two.updates, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(one.loss_sum, two.loss_sum)


def test_every_class_of_models_names_an_objective() -> None:
    assert list(MODELS) == ["causal_lm", "seq2seq", "classification", "embedding"]
    for model in MODELS.values():
        assert model.objective in registry.names("objectives")
        assert isinstance(objectives.for_model(model), Objective)
        assert model.answers >= {"losses"}


# ---------------------------------------------------------------- chats

_CHAT = """
import sys
from fedhpc.config import Model
from fedhpc.models.load import load_tokenizer

tokenizer = load_tokenizer(Model())
assert "jinja2" not in sys.modules, "jinja2 is imported though nobody has asked for a template"
template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ '\\n' }}{% endfor %}"
chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
for _ in range(2):
    print(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False))
"""


def test_the_template_of_a_chat_is_applied() -> None:
    """In a process of its own, where transformers is imported as in a run: without jinja2, until it is needed."""
    pytest.importorskip("jinja2")
    done = subprocess.run([sys.executable, "-c", _CHAT], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [
        "[user] Where?",
        "[assistant] Here.",
        "",
        "[user] Where?",
        "[assistant] Here.",
        "",
        "",
    ]


def test_the_objective_of_the_configuration() -> None:
    """auto is the model's own; another one must be for such models."""
    named = configuration.load(None, ["objective.name=language_modelling"])
    assert type(objectives.for_model(CausalLM, named.objective)) is type(objectives.for_model(CausalLM))
    with pytest.raises(UserError, match=r"objective\.name: language_modelling is for model\.task causal_lm or seq2seq"):
        objectives.for_model(Classifier, named.objective)
    with pytest.raises(UserError, match=r"objective\.name: unknown value 'dpoo'"):
        configuration.load(None, ["objective.name=dpoo"])
    soft = configuration.load(None, ["objective.name=soft_targets"])
    with pytest.raises(UserError, match=r"soft_targets is for no model\.task by itself"):
        objectives.for_model(CausalLM, soft.objective)
