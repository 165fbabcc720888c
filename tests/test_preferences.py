"""Objectives of preferences: against PEFT's models trained by torch.optim on the papers' formulas, and as runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc import evaluate, objectives, registry
from fedhpc.approaches.prepare import prepare
from fedhpc.builtin.world import rows
from fedhpc.config import Model
from fedhpc.data import Data, load_data
from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.errors import UserError
from fedhpc.evaluation.metrics.base import Outputs
from fedhpc.evaluation.metrics.reward_accuracy import RewardAccuracy
from fedhpc.evaluation.metrics.reward_margin import RewardMargin
from fedhpc.main import main
from fedhpc.methods.base import as_one_client
from fedhpc.models.base import Attached
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.load import load_tokenizer
from fedhpc.objectives._preference import _with_prompts as with_prompts
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.training.block import Work
from fedhpc.training.schedule import batches
from tests import tiny
from tests.federations import Interrupted, federate, final, items_of, save_random_llama, table, tree
from tests.federations import settings as settings_of
from tests.test_block import relative, settings, works
from tests.test_data import words, write_jsonl
from tests.test_methods import in_peft, make, warm

PAIRED = ("dpo", "ipo", "orpo", "simpo")
ALL = (*PAIRED, "kto")


def of(name: str, base: Any, **options: Any) -> Any:
    """An objective as a configuration has it."""
    config = configuration.resolve({"partition": {"name": "iid"}, "objective": {"name": name, **options}})
    return objectives.for_model(type(base), config.objective)


def pairs(count: int = 60, seed: int = 0) -> Examples:
    """Random prompts, each with two answers of unequal length."""
    rng = np.random.default_rng(seed)
    both, fronts = [], []
    for _ in range(count):
        prompt = [1, *rng.integers(3, tiny.VOCABULARY, rng.integers(2, 10))]
        for _ in range(2):
            both.append([*prompt, *rng.integers(3, tiny.VOCABULARY, rng.integers(2, 10)), 2])
            fronts.append(len(prompt))
    offsets = np.cumsum([0, *map(len, both)]).astype(np.int64)
    tokens = Tokens(np.concatenate(both).astype(np.int32), offsets, np.array(fronts, np.int32))
    return examples_from(tokens, paired=True)


def judged(count: int = 60) -> Examples:
    """Random prompts, each with one answer that somebody likes or not."""
    plain = tiny.examples(count)
    desirable = np.random.default_rng(5).random(count) < 0.5
    return examples_from(Tokens(plain.ids, plain.offsets, plain.prompt_lengths), desirable=desirable)


def data_of(name: str) -> Examples:
    return judged() if name == "kto" else pairs()


# ---------------------------------------------------------------- the formulas, token by token


def token_log_likelihoods(model: Any, tokens: Any, virtual: int = 0) -> torch.Tensor:
    """Of every token of a row but the first: (n - 1,)."""
    ids = torch.tensor(np.asarray(tokens), dtype=torch.int64)[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, virtual:]
    return logits[:-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None]).squeeze(1)


class Formula:
    """The loss of one client's step as the papers write it, of PEFT's model `policy` against the model `reference`."""

    def __init__(self, name: str, policy: Any, reference: Any, virtual: int = 0) -> None:
        self.name, self.policy, self.reference, self.virtual = name, policy, reference, virtual

    def pair(self, examples: Examples, index: int) -> torch.Tensor:
        rows = examples.pairs
        assert rows is not None
        front = int(rows.prompt_lengths[2 * index])
        texts = [rows.tokens(2 * index + i) for i in (0, 1)]
        ours = [token_log_likelihoods(self.policy, text, self.virtual) for text in texts]
        with torch.no_grad():
            w0, r0 = (token_log_likelihoods(self.reference, text)[front - 1 :].sum() for text in texts)
        w, r = (of_tokens[front - 1 :].sum() for of_tokens in ours)
        nw, nr = (len(text) - front for text in texts)
        if self.name == "dpo":
            return -torch.log(1 / (1 + torch.exp(-0.1 * ((w - w0) - (r - r0)))))
        if self.name == "ipo":
            return ((w - w0) / nw - (r - r0) / nr - 1 / (2 * 0.1)) ** 2
        if self.name == "simpo":
            return -torch.log(1 / (1 + torch.exp(-(2.0 * w / nw - 2.0 * r / nr - 1.0))))
        odds = [torch.exp(mean) / (1 - torch.exp(mean)) for mean in (w / nw, r / nr)]
        return -ours[0].mean() - 0.1 * torch.log(1 / (1 + torch.exp(-torch.log(odds[0] / odds[1]))))

    def ratio(self, tokens: Any, front: int) -> torch.Tensor:
        """How much likelier an answer is than in the reference, as a logarithm."""
        with torch.no_grad():
            reference = token_log_likelihoods(self.reference, tokens)[front - 1 :].sum()
        return token_log_likelihoods(self.policy, tokens, self.virtual)[front - 1 :].sum() - reference

    def judgements(self, examples: Examples, indices: np.ndarray) -> torch.Tensor:
        """Of single answers: (E,)."""
        assert examples.desirable is not None
        indices = indices[np.argsort(examples.lengths[indices], kind="stable")]  # as a step has them
        longest = int(examples.lengths[indices].max())
        ratios, kl = [], []
        for position, index in enumerate(map(int, indices)):
            front, other = int(examples.prompt_lengths[index]), int(indices[position - 1])
            ratios.append(self.ratio(examples.tokens(index), front))
            prompt, answer = examples.prompt(index), examples.target(other)
            excess = max(len(prompt) + len(answer) - longest, 0)
            prompt = np.concatenate([prompt[:1], prompt[1 + excess :]])
            kl.append(self.ratio(np.concatenate([prompt, answer]), len(prompt)).detach())
        z0 = max(float(torch.stack(kl).mean()), 0.0) if len(kl) > 1 else 0.0
        losses = []
        for index, ratio in zip(map(int, indices), ratios, strict=True):
            gain = 0.1 * (ratio - z0) * (1 if examples.desirable[index] else -1)
            losses.append(1 - 1 / (1 + torch.exp(-gain)))
        return torch.stack(losses)

    def losses(self, examples: Examples, indices: np.ndarray) -> torch.Tensor:
        if self.name == "kto":
            return self.judgements(examples, indices)
        return torch.stack([self.pair(examples, int(index)) for index in indices])


def trained_by_torch(
    name: str, base: Any, method: Any, method_name: str, start: torch.Tensor, data: Examples, config: Any, work: Work
) -> torch.Tensor:
    """PEFT's model after the client's batches under torch.optim: (P,)."""
    model, named = in_peft(method_name, base, method)
    with torch.no_grad():
        for key, value in method.payload.views(start).items():
            named[key].copy_(value)
    formula = Formula(name, model, base.model)
    rule = torch.optim.SGD(named.values(), lr=config.client.lr)
    for picked in batches(len(work.indices), config.client, 0, 1, work.client_id):
        rule.zero_grad()
        formula.losses(data, work.indices[picked]).mean().backward()
        rule.step()
    return method.payload.flatten({n: p.detach() for n, p in named.items()})


@pytest.mark.parametrize("method_name", ["lora", "prefix"])
@pytest.mark.parametrize("name", ALL)
def test_a_client_trains_as_peft_and_torch_optim_do(name: str, method_name: str) -> None:
    base, data, config = tiny.base("llama"), data_of(name), settings(optimizer="sgd", lr=0.2)
    method = make(method_name, base)
    start, work = warm(method, torch.float64), works(2)[1]
    found = start[0] - tiny.train(base, method, of(name, base), start, [work], data, config).updates[0]
    wanted = trained_by_torch(name, base, method, method_name, start[0], data, config, work)
    assert float((found - start[0]).norm()) > 1e-6
    assert relative(found, wanted, start[0]) < 1e-9


@pytest.mark.parametrize("name", ALL)
def test_a_block_equals_its_clients_alone(name: str) -> None:
    base, data, config = tiny.base("llama"), data_of(name), settings(optimizer="sgd", lr=0.2)
    method, group, objective = make("lora", base), works(3), of(name, base)
    start = warm(method, torch.float64)
    together = tiny.train(base, method, objective, start, group, data, config)
    assert together.tokens.tolist() == [len(work.indices) for work in group]
    for i, work in enumerate(group):
        alone = tiny.train(base, method, of(name, base), start, [work], data, config)
        torch.testing.assert_close(together.updates[i], alone.updates[0], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(together.loss_sum[i], alone.loss_sum[0], rtol=1e-10)


@pytest.mark.parametrize("name", ["dpo", "orpo"])
@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
def test_losses_and_gradients_of_other_families(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits at once, in pieces, and behind a frozen head give one gradient: that of autograd through `losses`."""
    base, data = tiny.base(family), pairs()
    objective, rows = of(name, base), np.array([3, 17, 20, 41])
    embeddings = base.model.get_input_embeddings().weight
    batch = objective.batch(base, data, rows)
    embeddings.requires_grad_()
    weights = torch.linspace(0.1, 1.0, len(batch.example), dtype=torch.float64)
    losses = objective.losses(base, Attached(), batch)
    (wanted,) = torch.autograd.grad((losses * weights[: len(rows)]).sum(), embeddings)
    for at_once in (2**24, 64):
        monkeypatch.setattr("fedhpc.models.base.LOGITS_AT_ONCE", at_once)
        embeddings.grad = None
        torch.testing.assert_close(objective.backward(base, Attached(), batch, weights), losses.detach())
        assert embeddings.grad is not None
        torch.testing.assert_close(embeddings.grad, wanted, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- the reference


def test_a_reference_is_computed_once_and_is_the_same_bits_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    base, data, objective = tiny.base("llama", torch.float32), pairs(), of("dpo", tiny.base("llama"))
    first = objective.batch(base, data, np.array([4, 9])).reference
    calls = []
    monkeypatch.setattr(type(objective), "sums", lambda *_: calls.append(1))
    assert torch.equal(objective.batch(base, data, np.array([9, 4])).reference, first[[1, 0, 3, 2]])
    assert calls == []
    monkeypatch.undo()
    again = of("dpo", base)
    assert torch.equal(again.batch(base, data, np.arange(12)).reference[[4, 9, 16, 21]], first)


def test_the_reference_is_the_base_also_where_a_method_trains_its_weights() -> None:
    """Full fine-tuning puts weights of its own in front of those of the base, which stay."""
    base, data, config = tiny.base("llama"), pairs(), settings(optimizer="sgd", lr=0.05)
    method = registry.choice("methods", "full")(registry.options("methods", "full")(), base, 0)
    objective, start, work = of("dpo", base), warm(method, torch.float64), works(1)[0]
    trained = start[0] - tiny.train(base, method, objective, start, [work], data, config).updates[0]
    rows = work.indices[:3]
    reference = [-float(objective.sums(base, data.pairs, np.array([2 * i]))[0]) for i in rows]
    batch = objective.batch(base, data, rows)
    np.testing.assert_allclose(batch.reference[:3], reference, rtol=1e-12)
    views = as_one_client(method.payload.views(trained))
    with method.attach(views, views, torch.zeros(6, dtype=torch.int64)) as attached, torch.no_grad():
        losses = objective.losses(base, attached, batch)
        moved = Formula("dpo", base.model, tiny.base("llama").model).losses(data, rows)
    torch.testing.assert_close(losses, moved, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- data


def rows_of(count: int, offset: int = 0) -> list[dict[str, Any]]:
    return [
        {"q": f"q{i}", "a": f"b{i}", "b": f"c{i} x", "like": i % 3 == 0, "k": "xyz"[i % 3]}
        for i in range(offset, offset + count)
    ]


def load(folder: Path, train: list[dict[str, Any]], **data: Any) -> Data:
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "validation.jsonl", rows_of(4, 100))
    write_jsonl(folder / "test.jsonl", rows_of(5, 200))
    options = {"prompt": "{q} :", "chosen": " {a}", "rejected": " {b}", **data}
    config = configuration.resolve(
        {
            "data": {"source": str(folder), **options},
            "partition": {"name": "iid", "num_clients": 2},
            "evaluation": {"metrics": []},
        }
    )
    return load_data(config, words(), CausalLM)


def test_pairs_are_two_rows_behind_one_prompt(tmp_path: Path) -> None:
    data, tokenizer = load(tmp_path, rows_of(20)), words()
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 4, 5)
    assert (data.validation.prompts, data.validation.targets) == (
        [f"q{i} :" for i in range(100, 104)],
        [f" b{i}" for i in range(100, 104)],
    )
    pairs = data.train.pairs
    assert pairs is not None and len(pairs) == 40
    assert [tokenizer.decode(pairs.tokens(row)).replace(" ", "") for row in (14, 15)] == [
        "<s>q7:b7</s>",
        "<s>q7:c7x</s>",
    ]
    assert pairs.num_supervised(np.array([14, 15])).tolist() == [3, 4]
    assert tokenizer.decode(data.train.prompt(7)).replace(" ", "") == "<s>q7:"
    assert data.train.lengths[7] == pairs.lengths[14] + pairs.lengths[15]
    plain = load(tmp_path, rows_of(20), chosen="a", rejected="b")  # columns: words() leaves spaces out anyway
    assert np.array_equal(plain.train.ids, data.train.ids)
    assert plain.train.fingerprint == data.train.fingerprint
    swapped = load(tmp_path, rows_of(20), chosen="b", rejected="a")
    assert swapped.train.fingerprint != data.train.fingerprint


def test_a_prompt_that_is_cut_is_the_same_for_both_answers(tmp_path: Path) -> None:
    train = rows_of(20)
    train[3] |= {"q": "0123456789", "a": "abc", "b": "abcdef"}
    data = load(tmp_path, train, max_length=14)
    pairs = data.train.pairs
    assert pairs is not None
    assert [words().decode(pairs.tokens(row)).replace(" ", "") for row in (6, 7)] == [
        "<s>56789:abc</s>",
        "<s>56789:abcdef</s>",
    ]
    assert pairs.lost is not None and pairs.lost[6:8].tolist() == [5, 5]
    assert any("1 of 20 rows of train (data.rejected) lose 5 tokens" in line for line in data.messages)


def test_without_a_prompt_it_is_what_both_texts_begin_with(tmp_path: Path) -> None:
    train = [row | {"a": f"q{i} : is ax", "b": f"q{i} : is ay b"} for i, row in enumerate(rows_of(20))]
    splits = {"prompt": "", "chosen": "a", "rejected": "b", "validation": "train.jsonl", "test": "train.jsonl"}
    data = load(tmp_path, train, **splits)
    assert (data.test.prompts or [])[3] == "q3 : is" and (data.test.targets or [])[3] == " ax"
    pairs = data.train.pairs
    assert pairs is not None
    assert words().decode(pairs.target(7)).replace(" ", "") == "ayb</s>"
    train[2]["b"] = "no"
    with pytest.raises(UserError, match=r"train\.jsonl:3: .* do not begin with the same word"):
        load(tmp_path, train, **splits)


def test_a_pair_of_which_one_answer_does_not_fit_is_left_out(tmp_path: Path) -> None:
    train = rows_of(20)
    train[3]["b"] = "a" * 40
    train[8]["a"] = "a" * 50
    data = load(tmp_path, train, max_length=16)
    assert len(data.train) == 18 and data.train.pairs is not None and len(data.train.pairs) == 36
    assert words().decode(data.train.prompt(3)).replace(" ", "") == "<s>q4:"
    assert sum("data.overlong" in line for line in data.messages) == 2
    with pytest.raises(UserError, match=r"train.jsonl:4: the target has 40 tokens"):
        load(tmp_path, train[:5], max_length=16, overlong="error")


def test_equal_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    train = rows_of(20)
    train[3]["b"], train[9]["b"] = train[3]["a"], f" {train[9]['a']} "
    data = load(tmp_path, train)
    assert len(data.train) == 18
    assert [line for line in data.messages if "data.rejected" in line] == [
        f"data.rejected: 2 of 20 rows are left out, like {tmp_path}/train.jsonl:4, whose answers are the same"
    ]


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"a": ""}, {}, r"train\.jsonl:1: data\.chosen is empty here; leave the row out with data\.where_not"),
        ({"b": None}, {}, r"train\.jsonl:1: data\.rejected is empty here"),
        ({}, {"chosen": "{a}", "rejected": "{a}"}, r"train\.jsonl:1: .*are the same here and in all 20 rows"),
        (
            {},
            {"prompt": "{mr} :"},
            r'the column \'mr\', which is not there; where both .* write data\.prompt: ""; valid',
        ),
        ({}, {"rejected": "worse"}, r"data\.rejected names the column 'worse', which is not there"),
        ({}, {"chosen": "{a"}, r"data\.chosen: lone '{'"),
        ({"like": "maybe"}, {"desirable": "like"}, r"train\.jsonl:1: data\.desirable: .* has 'maybe'; write true or"),
        (
            {"like": None},
            {"desirable": "like"},
            r"train\.jsonl:1: data\.desirable: the column 'like' has no value here",
        ),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], data: dict[str, Any], message: str) -> None:
    train = rows_of(20)
    train[0] |= change
    if "desirable" in data:
        data = {"chosen": None, "rejected": None, "target": " {a}", **data}
    with pytest.raises(UserError, match=message):
        load(tmp_path, train, **data)


def test_single_answers_are_wanted_or_not(tmp_path: Path) -> None:
    data = load(tmp_path, rows_of(20), chosen=None, rejected=None, target=" {a}", desirable="like")
    assert data.train.pairs is None and data.train.desirable is not None
    assert data.train.desirable.tolist() == [i % 3 == 0 for i in range(20)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.chosen=chosen"], r"objective\.name dpo needs data\.rejected"),
        (
            ["data.chosen=a", "data.rejected=b", "objective.name=kto"],
            r"data\.chosen: objective\.name kto does not read",
        ),
        (["objective.name=kto"], r"objective\.name kto needs data\.desirable, which names a column"),
        (["data.desirable=good", "objective.name=auto"], r"data\.desirable: objective\.name auto does not read it"),
        (
            ["data.chosen=a", "data.rejected=b", "data.target=c"],
            r"data\.target: the answers are data\.chosen and data\.rejected; take it out",
        ),
        (["data.chosen=a", "data.rejected=b", "evaluation.metrics=[perplexity]"], r"perplexity is not of preferences"),
        (
            ["objective.name=kto", "data.desirable=good", "evaluation.metrics=[]", "client.batch_size=1"],
            r"client\.batch_size: objective\.name kto compares with other answers",
        ),
        (["objective.name=auto", "evaluation.metrics=[reward_margin]"], r"reward_margin is of preferences"),
    ],
)
def test_configurations_that_do_not_go_together(overrides: list[str], message: str) -> None:
    given = ["objective.name=dpo", "evaluation.metrics=[loss]", *overrides]
    with pytest.raises((UserError, RefusedError), match=message):
        prepare(configuration.load(None, given), LoopbackTransport(), Launch(), write_cache=False)


# ---------------------------------------------------------------- chats


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Chats of two turns: as a prompt with two answers, and as two chats with a common beginning."""
    made = []
    for one, other in zip(rows("preferences", "train")[:count], rows("preferences", "train")[count:], strict=False):
        first = [{"role": "user", "content": other["mr"]}, {"role": "assistant", "content": other["chosen"]}]
        prompt = [*first, {"role": "user", "content": one["mr"]}]
        better, worse = ({"role": "assistant", "content": one[key]} for key in ("chosen", "rejected"))
        made.append(
            {
                "prompt": prompt, "better": one["chosen"], "worse": [worse], "chosen": [*prompt, better],
                "rejected": [*prompt, worse], "good": len(made) % 2 == 0, "chat": [*prompt, better],
            }
        )  # fmt: skip
    return made


def chats(folder: Path, made: list[dict[str, Any]], **data: Any) -> Data:
    write_jsonl(folder / "train.jsonl", made)
    splits = {"validation": "train.jsonl", "test": "train.jsonl"}
    raw = {
        "data": {"source": str(folder), "chosen": "chosen", "rejected": "rejected", **splits, **data},
        "partition": {"name": "iid", "num_clients": 2},
    }
    config = configuration.resolve(raw, given={})
    return load_data(config, load_tokenizer(Model.model_validate({})), CausalLM, write_cache=False)


def test_check_shows_the_first_pair(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = ["data.prompt={mr} :", "data.chosen= {chosen}", "data.rejected= {rejected}", "objective.name=dpo"]
    given = [
        f"data.source={texts}",
        f"model.name={texts}/model",
        "partition.num_clients=4",
        "evaluation.metrics=[loss]",
    ]
    assert main([*given, *columns, "partition.name=iid", "data.label=", "--check"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " tokens learned (" in line]
    first = rows("preferences", "train")[0]
    assert [line.partition(":")[0] for line in lines] == ["chosen", "rejected"]
    for line, key in zip(lines, ("chosen", "rejected"), strict=True):
        assert first["mr"] in line and first[key][-20:] in line.partition(">>>")[2]


def test_two_chats_have_their_common_beginning_for_a_prompt(tmp_path: Path) -> None:
    """Learned are the tokens behind it of the last turn and its end, in either row."""
    made, tokenizer = chat_rows(12), load_tokenizer(Model.model_validate({}))
    data = chats(tmp_path, made)
    pairs = data.train.pairs
    assert pairs is not None and pairs.spans is not None
    for example, row in enumerate(made):
        question = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for number, key in ((2 * example, "chosen"), (2 * example + 1, "rejected")):
            ids = tokenizer.apply_chat_template(row[key])["input_ids"]
            assert pairs.tokens(number).tolist() == ids
            assert pairs.supervised(np.array([number]))[1].tolist() == list(range(len(question), len(ids)))
    assert data.test.questions is not None and len(data.test.questions.offsets) == len(made) + 1
    assert data.test.question(3).tolist() == data.test.prompt(3).tolist()
    assert (data.test.targets or [])[3].strip() == made[3]["better"]
    explicit = chats(tmp_path, made, messages="prompt", chosen="better", rejected="worse")
    assert explicit.train.fingerprint == data.train.fingerprint
    as_json = [{**row, "chosen": json.dumps(row["chosen"]), "rejected": json.dumps(row["rejected"])} for row in made]
    assert chats(tmp_path, as_json).train.fingerprint == data.train.fingerprint


def test_a_text_in_brackets_is_no_chat(tmp_path: Path) -> None:
    train = rows_of(20)
    train[0]["a"] = "[ x ] y"
    data = load(tmp_path, train, chosen="a", rejected="b")
    assert len(data.train) == 20 and data.train.pairs is not None and data.train.pairs.spans is None


def test_keys_that_nobody_would_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.prompt is of texts, and data\.chosen holds chats; name the column"):
        chats(tmp_path, chat_rows(6), prompt="{better} :")
    with pytest.raises(UserError, match=r"data\.train_on: of pairs the loss is on the answers"):
        chats(tmp_path, chat_rows(6), train_on="all")
    with pytest.raises(UserError, match=r"data\.chat_template is of chats, and data\.chosen holds texts"):
        load(tmp_path, rows_of(20), chat_template="mine.jinja")


def test_chats_that_are_cut_stay_behind_one_prompt(tmp_path: Path) -> None:
    made = chat_rows(12)
    whole, cut = chats(tmp_path, made).train.pairs, chats(tmp_path, made, max_length=90).train.pairs
    assert whole is not None and cut is not None and cut.lengths.max() <= 90 < whole.lengths.max()
    assert len(whole) == len(cut)
    for row in range(0, len(cut), 2):
        assert np.array_equal(cut.prompt(row), cut.prompt(row + 1))
        for number in (row, row + 1):
            (a, b), (c, d) = (one.supervised(np.array([number])) for one in (whole, cut))
            assert np.array_equal(whole.tokens(number)[b], cut.tokens(number)[d]) and len(a) == len(c)


def test_all_of_a_better_chat_can_be_supervised(tmp_path: Path) -> None:
    rows_, examples = np.arange(8), chats(tmp_path, chat_rows(4)).train.pairs
    assert examples is not None
    wider = with_prompts(examples)
    for row in rows_.tolist():
        expected = examples.supervised(np.array([row]))[1] if row % 2 else np.arange(1, examples.lengths[row])
        assert wider.supervised(np.array([row]))[1].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": [{"role": "user", "content": "b"}]}, "the two chats do not begin with the same message"),
        ({"rejected": [{"role": "user"}]}, r"data\.rejected: message 1 \(user\) has no content"),
        ({"chosen": []}, r"data\.chosen: the conversation is empty"),
    ],
)
def test_bad_chats(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = chat_rows(6)
    made[1] |= change
    with pytest.raises(UserError, match=rf"train\.jsonl:2: .*{message}"):
        chats(tmp_path, made)


def test_the_conversation_so_far_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl:1: data\.chosen: an answer to .* a message of role user; leave"):
        chats(tmp_path, chat_rows(6), messages="prompt")


def test_an_answer_that_the_template_joins_to_the_turn_in_front_is_refused(tmp_path: Path) -> None:
    made = chat_rows(6)
    for key in ("chosen", "rejected"):
        made[2][key] = [*made[2][key][:-1], {"role": "assistant", "content": "Well,"}, made[2][key][-1]]
    chats(tmp_path, made)  # each message ends with a token of its own
    (tmp_path / "joins.jinja").write_text(
        "{%- for message in messages -%}{%- if message.role == 'assistant' -%}{{- ' ' ~ message.content -}}"
        "{{- eos_token if loop.last or loop.nextitem.role != 'assistant' -}}"
        "{%- else -%}{{- bos_token ~ message.content ~ ' :' -}}{%- endif -%}{%- endfor -%}"
    )
    with pytest.raises(UserError, match=r"train\.jsonl:3: data\.chosen: the chat template makes one turn of several"):
        chats(tmp_path, made, chat_template=str(tmp_path / "joins.jinja"))


def test_a_chat_without_an_answer_and_equal_ones(tmp_path: Path) -> None:
    made = chat_rows(6)
    made[4]["rejected"] = made[4]["chosen"]
    data = chats(tmp_path, made)
    assert len(data.train) == 5 and any("1 of 6 rows are left out" in line for line in data.messages)
    made[3]["rejected"] = made[3]["prompt"]
    with pytest.raises(UserError, match=r"train\.jsonl:4: data\.rejected: behind what both chats begin with, no mess"):
        chats(tmp_path, made)


@pytest.mark.parametrize("objective", ["orpo", "kto"])
def test_a_run_on_chats(tmp_path: Path, objective: str) -> None:
    made = chat_rows(40)
    for split, part in (("train", made[:30]), ("validation", made[30:35]), ("test", made[35:])):
        write_jsonl(tmp_path / f"{split}.jsonl", part)
    columns: dict[str, Any] = {"chosen": "chosen", "rejected": "rejected"}
    if objective == "kto":
        columns = {"messages": "chat", "desirable": "good", "train_on": "last_assistant"}
    raw = {
        "data": {"source": str(tmp_path), **columns},
        "objective": {"name": objective},
        "partition": {"name": "iid", "num_clients": 4},
        "method": {"name": "lora", "rank": 2},
        "federation": {"rounds": 2, "cohort_size": 3},
        "client": {"lr": 0.01, "batch_size": 4, "steps": 2},
        "evaluation": {"every": 1, "samples": 1, "max_new_tokens": 4, "metrics": ["loss", "reward_margin"]},
    }
    federate(settings_of(tmp_path / "run", raw))
    rounds = table(tmp_path / "run", "rounds")
    assert np.isfinite(rounds["eval_reward_margin"]).all() and (rounds["tokens"][1:] >= 18).all()


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and single answers in both columns of which the first is one that people want."""
    folder = tmp_path_factory.mktemp("preferences")
    for split, count in (("train", 60), ("validation", 8), ("test", 9)):
        of_split = [row | {"good": i % 2 == 0} for i, row in enumerate(rows("preferences", split)[:count])]
        singles = [row["chosen" if row["good"] else "rejected"] for row in of_split]
        write_jsonl(
            folder / f"{split}.jsonl", [row | {"single": one} for row, one in zip(of_split, singles, strict=True)]
        )
    save_random_llama(folder / "model")
    return folder


def federation_of(texts: Path, objective: str, **changes: Any) -> dict[str, Any]:
    pairs_or_singles = {"chosen": " {chosen}", "rejected": " {rejected}"}
    if objective == "kto":
        pairs_or_singles = {"desirable": "good", "target": " {single}"}
    raw = tree(
        texts,
        data={"prompt": "{mr} :", **pairs_or_singles},
        objective={"name": objective},
        federation={"rounds": 3},
        client={"lr": 0.3},
        evaluation={"metrics": ["loss", "reward_accuracy", "reward_margin"], "client_fraction": 0.2},
        **changes,
    )
    return raw | {"method": {"name": "lora", "rank": 2, "alpha": 4}}


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_any_number_of_ranks_and_a_resume_give_the_same_bits(texts: Path, objective: str, tmp_path: Path) -> None:
    raw = federation_of(texts, objective)
    whole = federate(settings_of(tmp_path / "one", raw))
    federate(settings_of(tmp_path / "three", raw), ranks=3)
    stopped = settings_of(tmp_path / "stopped", raw)
    with pytest.raises(Interrupted):
        federate(stopped, stop_at=int(0.6 * whole))
    federate(stopped, ranks=2)
    expected = final(tmp_path / "one")
    for other in ("three", "stopped"):
        assert all(np.array_equal(value, expected[name]) for name, value in final(tmp_path / other).items())
        for name in ("rounds", "client_eval", "test"):
            one, same = table(tmp_path / "one", name), table(tmp_path / other, name)
            for column in ("eval_loss", "eval_reward_margin", "loss", "reward_accuracy", "reward_margin"):
                if column in one:
                    np.testing.assert_array_equal(one[column], same[column])


def test_what_a_run_measures(texts: Path, tmp_path: Path) -> None:
    """Before the first round LoRA is the base: log 2, no margins. Then the clients' own pairs tell the two apart."""
    federate(settings_of(tmp_path, federation_of(texts, "dpo")))
    rounds, clients, test = (table(tmp_path, name) for name in ("rounds", "client_eval", "test"))
    assert rounds["eval_loss"][0] == pytest.approx(np.log(2), abs=1e-5)
    assert rounds["eval_reward_margin"][0] == pytest.approx(0, abs=1e-5)
    assert rounds["train_loss"][3] < rounds["train_loss"][1]
    assert 0 <= test["reward_accuracy"] <= 1 and items_of(tmp_path)["test/reward_margin"] == "9 examples"
    assert rounds["tokens"][1:].tolist() == table(tmp_path, "clients")["tokens"].reshape(3, -1).sum(axis=1).tolist()
    has = clients["num_examples"] > 0
    assert (clients["tokens"] == clients["num_examples"]).all()
    assert np.isfinite(clients["reward_margin"][has]).all() and np.isnan(clients["reward_margin"][~has]).all()
    several = clients["num_examples"] > 1  # one tie alone has no interval
    assert (clients["reward_accuracy_low"][several] <= clients["reward_accuracy"][several]).all()


def test_every_client_alone_and_personal_parts(texts: Path, tmp_path: Path) -> None:
    """Margins of one payload for each client, and after fine-tuning."""
    federate(settings_of(tmp_path / "local", federation_of(texts, "simpo", mode="local")))
    assert np.isfinite(table(tmp_path / "local", "client_eval")["reward_margin"]).any()
    federate(settings_of(tmp_path / "tuned", federation_of(texts, "dpo", personalization={"finetune_steps": 2})))
    columns = table(tmp_path / "tuned", "client_eval")
    assert {"reward_margin_personal", "reward_margin_personal_low", "reward_accuracy_personal_high"} <= columns.keys()


def test_metrics_of_margins() -> None:
    outputs = Outputs(margins=np.array([[0.5, -0.25, 0.0, 2.0], [1.5, 0.75, 0.0, -1.0]]))
    assert RewardAccuracy().of_items(outputs).tolist() == [1.0, 0.5, 0.5, 0.5]
    assert RewardMargin().compute(outputs) == pytest.approx((1.0 + 0.25 + 0.0 + 0.5) / 4)


@pytest.mark.parametrize("method", ["lora", "adapter", "full"])
def test_an_export_is_compared_with_its_base_or_with_nothing(
    texts: Path, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that is loaded beside its base has the run's own numbers again."""
    raw = federation_of(texts, "dpo") | {"method": {"name": method}, "federation": {"rounds": 1}}
    federate(settings_of(tmp_path, raw))
    capsys.readouterr()
    code, reported = evaluate.main([str(tmp_path)]), table(tmp_path, "test")
    out, err = capsys.readouterr()
    if method == "lora":
        assert code == 0
        for name in ("loss", "reward_accuracy", "reward_margin"):
            assert f"test {name} {float(reported[name]):.4f} (95 %" in out
    else:
        assert code == 2 and "objective.name dpo compares with the base, and of " in err
