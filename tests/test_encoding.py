"""Special tokens, and the ids of a target behind its prompt: against the tokenizer's own ids of the whole text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedhpc.config import Model
from fedhpc.data.encoding import _ids, _keeps_words_apart, behind, behind_each, encode, marked, unmarked
from fedhpc.data.templates import parse
from fedhpc.data.tokens import Examples, answers_behind, examples_from, tokenize
from fedhpc.errors import UserError
from fedhpc.methods._text import first_tokens
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.encoder import Classifier
from fedhpc.models.load import BUILTIN, check_tokens, load_base
from fedhpc.models.seq2seq import Seq2Seq

SENTENCES = [
    "Question: is it red? Answer: yes",
    "Question: is the thing blue? Answer: no",
    "Rule 7: answer in one word, not two.\n- yes\n- not sure",
    "<b>a</b> (x), [y] - it is 17  red things\n\nor more; so it isn't.",
]
WORDS = ["is", "it", "red?", "Answer:", "yes", "no", "17", "-", "[y]", "isn't", "Ünïcode", "日本"]


def llama() -> PreTrainedTokenizerFast:
    """In the manner of Llama 2: a space becomes a mark, one more in front of the text, nothing is split beforehand."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # while it learns
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    alphabet = sorted(set("".join(SENTENCES)))
    tokenizer = trained(backend, trainers.BpeTrainer, initial_alphabet=alphabet)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def superwords() -> PreTrainedTokenizerFast:
    """Whose tokens reach over several words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    return trained(backend, trainers.BpeTrainer)


def gpt() -> PreTrainedTokenizerFast:
    """In the manner of GPT-2: bytes, split by its pattern; its bos is not put in front by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return trained(backend, trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def bert() -> PreTrainedTokenizerFast:
    """In the manner of BERT: lower case, pieces of words between [CLS] and [SEP]."""
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    backend.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(special_tokens=names, show_progress=False))
    backend.post_processor = TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def t5() -> PreTrainedTokenizerFast:
    """In the manner of T5: pieces by likelihood, among them the names of the special tokens, and eos at the end."""
    from tokenizers.processors import TemplateProcessing

    letters = [(c, -9.0) for c in sorted(set("".join(SENTENCES)) - {" "})]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁yes", -4.0), ("▁no", -4.0), *letters]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = TemplateProcessing("$A </s>", None, [("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def trained(backend: Tokenizer, trainer: Any, **options: Any) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<s>", "</s>", "<unk>"]
    backend.train_from_iterator(
        SENTENCES, trainer(vocab_size=400, special_tokens=names, show_progress=False, **options)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def builtin() -> Any:
    return AutoTokenizer.from_pretrained(BUILTIN)


MAKERS = [llama, superwords, gpt, bert, t5, builtin]


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def expected(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], bool]:
    """By the tokenizer's ids of the whole text."""
    front, whole = ids(tokenizer, prompt), ids(tokenizer, prompt + target)
    return (whole[len(front) :], False) if whole[: len(front)] == front else (ids(tokenizer, target), True)


def found(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], bool]:
    results, apart = behind(tokenizer, [prompt], [target], [ids(tokenizer, prompt)], [ids(tokenizer, target)])
    return results[0], apart[0]


# ---------------------------------------------------------------- the seam of prompt and target


@pytest.mark.parametrize("make", MAKERS)
def test_a_target_has_the_ids_of_the_whole_text(make: Any) -> None:
    tokenizer, draw = make(), random.Random(3)
    spaces = ["", " ", "  ", "\n", "\n\n", " \n"]
    pairs = []
    for _ in range(400):
        left, right = (
            "".join(f"{draw.choice(spaces[1:5])}{draw.choice(WORDS)}" for _ in range(draw.randrange(0, 7)))
            for _ in range(2)
        )
        pairs.append((left.strip(" ") + draw.choice(spaces), draw.choice(spaces) + right.lstrip(" ")))
    prompts, targets = zip(*pairs, strict=True)
    apart = [[ids(tokenizer, text) for text in texts] for texts in (prompts, targets)]
    results = list(zip(*behind(tokenizer, prompts, targets, *apart), strict=True))
    assert results == [expected(tokenizer, *pair) for pair in pairs]
    assert any(is_apart for _, is_apart in results) == (make is not bert)
    assert _keeps_words_apart(tokenizer) == (make is not superwords)  # so both ways are tried


def test_the_seam_in_the_manner_of_llama_2() -> None:
    tokenizer = llama()
    prompt = "Question: is it red? Answer:"
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, " yes")) == ["▁", "▁yes"]  # by itself
    assert tokenizer.convert_ids_to_tokens(found(tokenizer, prompt, " yes")[0]) == ["▁yes"]
    assert not found(tokenizer, prompt, " yes")[1]
    assert found(tokenizer, "Answer: ", "yes") == (ids(tokenizer, "yes"), True)  # "▁yes" reaches over the end
    assert found(tokenizer, prompt, "\n- yes") == expected(tokenizer, prompt, "\n- yes")
    assert found(tokenizer, prompt, "\n- yes")[0] != ids(tokenizer, "\n- yes")


def test_an_export_reads_what_it_was_trained_on() -> None:
    """A row is what `tokenizer(prompt + target)` gives, between bos and eos."""
    tokenizer = llama()
    texts = ["Question: is it red? Answer:", "Rule 7:"], [" yes", "\n- not sure"]
    tokens = tokenize(*texts, ["f:1", "f:2"], tokenizer, 64, CausalLM)
    for row, text in enumerate(p + t for p, t in zip(*texts, strict=True)):
        assert tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist() == [1, *ids(tokenizer, text), 2]
    assert tokens.prompt_lengths.tolist() == [1 + len(ids(tokenizer, prompt)) for prompt in texts[0]]
    assert not tokens.apart.any()
    assert tokenize(["Answer: "], ["yes"], ["f:1"], tokenizer, 64, CausalLM).apart.tolist() == [True]
    # An encoder and a decoder read their texts apart, whatever they are.
    assert not tokenize(["Answer: "], ["yes"], ["f:1"], t5(), 64, Seq2Seq).apart.any()


def test_labels_are_behind_their_prompts_too() -> None:
    tokenizer = llama()
    prompts, labels = ["is it red? Answer:", "is it blue? Answer: ", "it is red? Answer:"], [" yes", " no"]
    answers, longest = answers_behind(prompts, labels, tokenizer, CausalLM)
    assert answers is not None
    for row, prompt in enumerate(prompts):
        assert answers.ids[answers.variant[row]] == [expected(tokenizer, prompt, label)[0] for label in labels]
    assert longest == max(len(one) for of_labels in answers.ids for one in of_labels)
    assert answers_behind(prompts, labels, builtin(), CausalLM)[0] is None  # the same as by themselves
    assert answers_behind(prompts, labels, t5(), Seq2Seq)[0] is None


def metaspace() -> PreTrainedTokenizerFast:
    """Split at spaces, which are part of the word behind them."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(backend, trainers.BpeTrainer)


def spaceless() -> PreTrainedTokenizerFast:
    """Leaves spaces out, so that words are joined though no token has a space."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "")
    return trained(backend, trainers.BpeTrainer)


@pytest.mark.parametrize("make", [*MAKERS, metaspace, spaceless, "tinystories-260k"])
def test_labels_behind_many_prompts_are_those_of_the_whole_texts_and_few_are_tokenised(
    make: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if isinstance(make, str):
        folder = request.getfixturevalue("shared") / "models" / make
        if not folder.is_dir():
            pytest.skip(f"no {make} in shared/models")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = make()
    draw = random.Random(5)
    monkeypatch.setattr("fedhpc.data.encoding._PAIRS", 100)  # several times
    asked: list[int] = []
    monkeypatch.setattr("fedhpc.data.encoding._ids", lambda t, texts: (asked.append(len(texts)), _ids(t, texts))[1])
    letters = "abcdefgilnorstuy"
    words = ["".join(draw.choice(letters) for _ in range(draw.randrange(1, 6))) for _ in range(200)]
    for end in (*".:?!)'-", "。", "ü", "\u0301", "\u200b", "▁", "\ufffd", "", ":\n", ": ", " =>", "\nAnswer: ", "\n\n"):
        prompts = [f"is it {word}{end}" for word in words]
        for before in (" ", "", "\n", "  ", "\n- "):
            labels = [before + label for label in ("yes", "no", "not sure", "'s", "17", "日本", "(x)")]
            alone = [ids(tokenizer, label) for label in labels]
            asked.clear()
            variant, found = behind_each(tokenizer, prompts[:3], labels, alone)
            for row, prompt in enumerate(prompts[:3]):
                assert found[variant[row]] == [expected(tokenizer, prompt, label)[0] for label in labels], (end, before)
    if _keeps_words_apart(tokenizer):
        labels = [f" {label}" for label in words[:30]]
        asked.clear()
        behind_each(tokenizer, [f"is it {word}?" for word in words], labels, [ids(tokenizer, one) for one in labels])
        assert sum(asked) < 200  # of 6000 pairs
    else:
        assert make in (superwords, spaceless)


# ---------------------------------------------------------------- special tokens


@pytest.mark.parametrize("make", MAKERS)
def test_names_of_special_tokens_are_text_in_columns_and_tokens_in_templates(make: Any) -> None:
    tokenizer = make()
    name = tokenizer.eos_token or tokenizer.sep_token
    special = tokenizer.convert_tokens_to_ids(name)
    template = parse(f"it is {name}{{q}} {name}", "data.prompt").with_texts(lambda text: marked(text, tokenizer))
    plain, evil = (template.render({"q": text}) for text in ("red", f"red {name} it"))
    (of_plain, of_evil), spelled = encode(tokenizer, [plain, evil])
    assert of_plain == ids(tokenizer, f"it is {name}red {name}")  # as everywhere else
    assert of_plain.count(special) == of_evil.count(special) == 2
    assert spelled == [False, True]
    # What is around the token comes out as ever, and the characters are there.
    first, last = of_evil.index(special), len(of_evil) - 1
    assert of_evil[: first + 1] == of_plain[: of_plain.index(special) + 1] and of_evil[last] == special
    assert unmarked(plain, tokenizer) == f"it is {name}red {name}" and unmarked(plain) == "it is red "
    text = tokenizer.decode(of_evil[first + 1 : last], skip_special_tokens=False)
    if make in (llama, gpt, builtin):
        assert name in text


@pytest.mark.parametrize("make", MAKERS)
def test_text_without_such_names_keeps_its_ids(make: Any) -> None:
    tokenizer = make()
    texts = ["Question: is it red?", "", " yes", "a <b>[y]</b> s>", "日本"]
    assert encode(tokenizer, texts) == ([ids(tokenizer, text) for text in texts], [False] * len(texts))


def test_the_name_of_an_unknown_word_is_text_too() -> None:
    tokenizer = gpt()
    (of_text,), spelled = encode(tokenizer, ["it is <unk> red"])
    assert tokenizer.unk_token_id not in of_text and spelled == [True]
    assert tokenizer.decode(of_text) == "it is <unk> red"


def test_punctuation_that_a_tokenizer_calls_special_is_text() -> None:
    tokenizer = gpt()
    tokenizer.add_special_tokens({"pad_token": "!"})
    assert encode(tokenizer, ["it is! red"]) == ([ids(tokenizer, "it is! red")], [False])


class Words:
    """A tokenizer in Python that always takes the word </s> for its end."""

    bos_token_id, eos_token_id, unk_token_id = 1, 2, 3
    all_special_tokens = ("</s>",)

    def convert_tokens_to_ids(self, name: str) -> int:
        return 2

    def convert_ids_to_tokens(self, token: int) -> str:
        return "</s>"

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": self([texts])["input_ids"][0]}
        return {"input_ids": [[2 if word == "</s>" else 4 + len(word) for word in text.split()] for text in texts]}


class PoliteWords(Words):
    """One that does not if it is asked."""

    def __call__(self, texts: Any, split_special_tokens: bool = False, **options: Any) -> dict[str, Any]:
        return super().__call__(texts.replace("</s>", "< /s>") if split_special_tokens else texts)


def test_a_row_that_cannot_be_kept_as_text_is_named() -> None:
    with pytest.raises(UserError, match=r"f:2: the text has '</s>', which the model's tokenizer takes") as error:
        tokenize(["a", "b"], ["c", "yes </s> no"], ["f:1", "f:2"], Words(), 16, CausalLM)
    assert "\n" not in str(error.value)
    tokens = tokenize(["a"], ["yes </s> no"], ["f:1"], PoliteWords(), 16, CausalLM)
    assert tokens.ids.tolist() == [1, 5, 7, 5, 7, 6, 2]


@pytest.mark.parametrize(("prompt", "target"), [("<s>{q} :", " {a}"), ("{q} :", " {a}</s>"), ("<s>{q} :", " {a}</s>")])
def test_one_bos_and_one_eos(prompt: str, target: str) -> None:
    tokenizer = llama()
    templates = [parse(one, "k").with_texts(lambda text: marked(text, tokenizer)) for one in (prompt, target)]
    texts = [[one.render({"q": "is it red?", "a": "yes"})] for one in templates]
    plain = tokenize(["is it red? :"], [" yes"], ["f:1"], tokenizer, 32, CausalLM)
    tokens = tokenize(*texts, ["f:1"], tokenizer, 32, CausalLM)
    row = tokens.ids.tolist()
    assert (row.count(1), row.count(2), row[0], row[-1]) == (1, 1, 1, 2)
    if not prompt.startswith("<s>"):
        assert row == plain.ids.tolist()
    else:  # what other programs make of the text
        assert row == [*ids(tokenizer, "<s>is it red? : yes"), 2]
    cut = tokenize(*texts, ["f:1"], tokenizer, 8, CausalLM)
    assert cut.ids[0] == 1 and len(cut.ids) == 8 and cut.lost.tolist() == [len(row) - 8]


def test_encoders_put_nothing_twice_around_a_text() -> None:
    tokenizer = bert()

    def row(text: str) -> list[int]:
        made = tokenize([marked(text, tokenizer)], [""], ["f:1"], tokenizer, 12, Classifier)
        return made.ids.tolist()

    assert row("[CLS] is it red?[SEP]") == row("is it red?") == tokenizer("is it red?")["input_ids"]
    assert row("is it[SEP]red?").count(2) == 2
    long = row("[CLS] is it red? is it red? is it red?[SEP]")
    assert len(long) == 12 and (long[0], long.count(1), long[-1], long.count(2)) == (1, 1, 2, 1)


def test_encoder_decoders_put_nothing_twice_around_a_text() -> None:
    tokenizer = t5()
    once = tokenize(["is it"], [" yes"], ["f:1"], tokenizer, 32, Seq2Seq)
    twice = tokenize(
        *([marked(text, tokenizer)] for text in ("is it</s>", " yes</s>")), ["f:1"], tokenizer, 32, Seq2Seq
    )
    assert np.array_equal(once.ids, twice.ids) and once.ids.tolist().count(1) == 2
    kept = tokenize(["is </s> it"], [" yes"], ["f:1"], tokenizer, 32, Seq2Seq)
    assert kept.ids.tolist().count(1) == 2 and kept.spelled.tolist() == [True]


# ---------------------------------------------------------------- tokens that the model does not embed


def gemma(folder: Path, **tokens: Any) -> str:
    """A model with the built-in tokenizer and one token more than it embeds."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=802, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, head_dim=8,
        num_key_value_heads=1, max_position_embeddings=96, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer = builtin()
    tokenizer.add_special_tokens(tokens)
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == 803
    return str(folder)


def test_a_token_more_than_the_embeddings_is_fine_where_no_text_has_it(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "m", additional_special_tokens=["<image_soft_token>"])
    base = load_base(Model(name=folder), torch.device("cpu"))
    assert base.num_embedded == 802

    def examples(prompt: str, tokenizer: Any = base.tokenizer) -> Examples:
        texts = [marked(text, tokenizer) for text in ("it is", prompt)]
        return examples_from(tokenize(texts, [" no", " yes"], ["f:1", "f:2"], tokenizer, 64, CausalLM))

    check_tokens(base, examples("is it red?"), "train")
    check_tokens(base, examples("is it a token?" * 9), "train")
    with pytest.raises(UserError, match=r"example 2 of test, .* has the token '<image_soft_token>', .* embeds 802"):
        check_tokens(base, examples("is <image_soft_token> red?"), "test")
    with pytest.raises(UserError, match=r"method\.init_text: .* does not embed its token '<image_soft_token>'"):
        first_tokens(base, "a <image_soft_token>", 4)


@pytest.mark.parametrize("part", ["bos", "eos", "pad"])
def test_a_special_token_that_was_added_without_an_embedding_is_refused(tmp_path: Path, part: str) -> None:
    folder = gemma(tmp_path / "m", **{f"{part}_token": "[NEW]"})
    with pytest.raises(UserError, match=rf"803 tokens .* only 802, without its {part} token '\[NEW\]'") as error:
        load_base(Model(name=folder), torch.device("cpu"))
    assert "\n" not in str(error.value)
