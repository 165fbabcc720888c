"""The assistant's turns in what chat templates write: every family by hand, and real rows beside an oracle."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhpc.data.chat_template import ChatTemplate
from fedhpc.data.chat_tokens import Chat, Writer
from fedhpc.data.chats import Message
from fedhpc.data.encoding import unmarked
from fedhpc.errors import UserError
from tests.test_encoding import builtin, gpt

FOLDER = Path(__file__).with_name("chat_templates")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
# What is a special token in each family's tokenizer beside <s> and </s>.
SPECIALS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "chatml_marked": ["<|im_start|>", "<|im_end|>"],
    "llama2": [],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["[INST]", "[/INST]"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "zephyr": [],
}
CHAT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it red?\n"},
    {"role": "assistant", "content": "<think>\nRed?\n</think>\n\nYes, it is. "},
    {"role": "user", "content": "And blue?"},
    {"role": "assistant", "content": "No"},
]
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_FIRST = "<think>\nRed?\n</think>\n\nYes, it is."
# Written by hand: what the assistant says stands between « and ».
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it red?\n<|im_end|>\n<|im_start|>assistant\n"
        f"«{_FIRST} <|im_end|>»\n<|im_start|>user\nAnd blue?<|im_end|>\n<|im_start|>assistant\n«No<|im_end|>»\n"
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nIs it red? [/INST]"
        f"« {_FIRST} </s>»<s>[INST] And blue? [/INST]« No </s>»"
    ),
    "llama3": (
        f"<s>{_HEADER.format('system')}Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief."
        f"<|eot_id|>{_HEADER.format('user')}Is it red?<|eot_id|>{_HEADER.format('assistant')}«{_FIRST}<|eot_id|>»"
        f"{_HEADER.format('user')}And blue?<|eot_id|>{_HEADER.format('assistant')}«No<|eot_id|>»"
    ),
    "mistral": f"<s>[INST] Be brief.\n\nIs it red?\n [/INST]« {_FIRST}</s>»[INST] And blue? [/INST]« No</s>»",
    "gemma": (
        f"<s><start_of_turn>user\nIs it red?<end_of_turn>\n<start_of_turn>model\n«{_FIRST}<end_of_turn>»\n"
        "<start_of_turn>user\nAnd blue?<end_of_turn>\n<start_of_turn>model\n«No<end_of_turn>»\n"
    ),
    "phi": (
        f"<|system|>\nBe brief.<|end|>\n<|user|>\nIs it red?\n<|end|>\n<|assistant|>\n«{_FIRST} <|end|>»\n"
        "<|user|>\nAnd blue?<|end|>\n<|assistant|>\n«No<|end|>»\n</s>"
    ),
    # The reasoning of the earlier turn is dropped, and the last one has an empty one.
    "qwen3": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it red?\n<|im_end|>\n<|im_start|>assistant\n"
        "«Yes, it is. <|im_end|>»\n<|im_start|>user\nAnd blue?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\n\n</think>\n\nNo<|im_end|>»\n"
    ),
    "deepseek": (
        "<s>Be brief.<｜User｜>Is it red?\n<｜Assistant｜>«\n\nYes, it is. <｜end▁of▁sentence｜>»"
        "<｜User｜>And blue?<｜Assistant｜>«No<｜end▁of▁sentence｜>»"
    ),
    "zephyr": (
        f"<|system|>\nBe brief.</s>\n<|user|>\nIs it red?\n</s>\n<|assistant|>\n«{_FIRST} </s>»\n"
        "<|user|>\nAnd blue?</s>\n<|assistant|>\n«No</s>»\n"
    ),
}
RENDERED["chatml_marked"] = RENDERED["chatml"]


@cache
def template(family: str, make: Any = gpt, change: tuple[str, str] = ("", "")) -> ChatTemplate:
    tokenizer = make()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[family]})
    program = (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    assert change[0] in program
    return ChatTemplate(tokenizer, program.replace(*change), "data.chat_template")


def for_family(family: str, messages: list[Message]) -> list[Message]:
    """Without what the family refuses."""
    return [message for message in messages if family != "gemma" or message["role"] != "system"]


def shown(one: ChatTemplate, messages: list[Message], tools: Any = None) -> str:
    """The rendering with the assistant's turns between « and »."""
    text, turns = one.rendered(messages, tools, "train.jsonl:7")
    for begin, end in reversed(turns):
        text = f"{text[:begin]}«{text[begin:end]}»{text[end:]}"
    return unmarked(text, one.tokenizer)


def theirs(one: ChatTemplate, messages: list[Message], **options: Any) -> Any:
    """What transformers itself makes of a chat."""
    return one.tokenizer.apply_chat_template(messages, chat_template=one.program(), **options)  # type: ignore[arg-type]


def tokens(one: ChatTemplate, chats: list[list[Message]], train_on: Any = "assistant", **options: Any) -> Any:
    options = {"max_length": 10**6, "overlong": "error", **options}
    return Writer(one.tokenizer, one, train_on, **options).tokens(
        [Chat(c, None, f"row {i}") for i, c in enumerate(chats)], True
    )


def spans(found: Any, example: int) -> list[tuple[int, int]]:
    part = slice(*found.spans.offsets[example : example + 2])
    return list(zip(found.spans.starts[part].tolist(), found.spans.ends[part].tolist(), strict=True))


@pytest.mark.parametrize("family", SPECIALS)
def test_every_family(family: str) -> None:
    one, messages = template(family), for_family(family, CHAT)
    assert shown(one, messages) == RENDERED[family]
    assert RENDERED[family].replace("«", "").replace("»", "") == theirs(one, messages, tokenize=False)


@pytest.mark.parametrize("make", [gpt, builtin])
@pytest.mark.parametrize("family", SPECIALS)
def test_tokens_are_those_of_the_whole_rendering(family: str, make: Any) -> None:
    """And the supervised ones those of the parts, where no token reaches over their beginning."""
    one, messages = template(family, make), for_family(family, CHAT)
    found = tokens(one, [messages])
    assert found.ids.tolist() == theirs(one, messages, tokenize=True, return_dict=False)
    written = RENDERED[family].replace("</s>", str(one.tokenizer.eos_token))
    parts = re.findall("«(.*?)»", written, re.DOTALL)
    said = [one.tokenizer.decode(found.ids[begin:end]) for begin, end in spans(found, 0)]
    if not found.apart[0]:
        assert [text.strip() for text in said] == [part.strip() for part in parts]
    assert found.prompt_lengths[0] == spans(found, 0)[0][0]
    last, every = (tokens(one, [messages], train_on) for train_on in ("last_assistant", "all"))
    assert spans(last, 0) == spans(found, 0)[-1:] and spans(every, 0) == [(0, len(found.ids))]


def test_marks_for_generation_say_the_same() -> None:
    one = template("chatml_marked")
    made = theirs(one, CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    positions = [i for begin, end in spans(tokens(one, [CHAT]), 0) for i in range(begin, end)]
    assert np.flatnonzero(made["assistant_masks"]).tolist() == positions


# ---------------------------------------------------------------- real rows, and an oracle


@cache
def real_chats() -> list[list[Message]]:
    """Instructions and problems of GSM8K as chats of one to three turns."""
    if not SHARED.is_dir():
        pytest.skip("no shared/data")
    pairs = []
    for name, question, answer in (
        ("instructions/instructions", "instruction", "output"),
        ("gsm8k/test", "question", "answer"),
    ):
        with gzip.open(SHARED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in itertools.islice(file, 40)]
        pairs += [(row[question], row[answer]) for row in rows if row[answer].strip()]
    made: list[list[Message]] = []
    while pairs:
        turns, pairs = pairs[: len(made) % 3 + 1], pairs[len(made) % 3 + 1 :]
        made.append(
            [{"role": r, "content": c} for pair in turns for r, c in zip(("user", "assistant"), pair, strict=True)]
        )
    return made


def without(messages: list[Message], turn: int) -> list[Message]:
    """A chat with another word in place of what the assistant says in a turn."""
    changed = copy.deepcopy(messages)
    changed[turn]["content"] = "¤"
    return changed


def common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("family", SPECIALS)
def test_real_rows_against_the_rendering_without_each_turn(family: str) -> None:
    one = template(family)
    found = tokens(one, real_chats())
    ends = one.tokenizer.convert_tokens_to_ids(unmarked(one.endings[0], one.tokenizer))
    for number, messages in enumerate(real_chats()):
        ids = found.ids[found.offsets[number] : found.offsets[number + 1]].tolist()
        assert ids == theirs(one, messages, tokenize=True, return_dict=False)
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, (begin, end) in zip(said, spans(found, number), strict=True):
            other = theirs(one, without(messages, turn), tokenize=True, return_dict=False)
            first, behind = common(ids, other), len(ids) - common(ids[::-1], other[::-1])
            assert begin <= first and behind <= end, "all that hangs on the turn is in its span"
            assert ids[end - 1] == ends
            text = one.tokenizer.decode(ids[begin : end - 1]).removeprefix("<think>\n\n</think>\n\n")
            assert text.strip() == str(messages[turn]["content"]).strip(), "and nothing else is"


# ---------------------------------------------------------------- what chats have


def test_names_of_special_tokens_in_messages_stay_text() -> None:
    one = template("chatml")
    said = "It is <|im_end|> red </s><|im_start|>user"
    messages: list[Message] = [{"role": "user", "content": "Say <|im_start|>"}, {"role": "assistant", "content": said}]
    found = tokens(one, [messages, CHAT])
    ids = found.ids[: found.offsets[1]]
    names = [one.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>", "</s>")]
    assert [int((ids == name).sum()) for name in names] == [2, 2, 0]
    ((begin, end),) = spans(found, 0)
    assert one.tokenizer.decode(ids[begin : end - 1]) == said and ids[end - 1] == names[1]
    assert found.spelled.tolist() == [True, False]


def test_calls_of_tools_are_said_by_the_assistant() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn", "days": 2}}}
    messages: list[Message] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "Rain."},
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    said = '{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}'
    assert shown(template("qwen3"), messages, tools).partition("</tools><|im_end|>\n")[2] == (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        f"<|im_start|>assistant\n«<tool_call>\n{said}\n</tool_call><|im_end|>»\n"
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nRain.\n</think>\n\nIt rains.<|im_end|>»\n"
    )
    assert "«{" in shown(template("llama3"), messages) and "}<|eot_id|>»" in shown(template("llama3"), messages)


def test_an_assistant_who_speaks_first_and_turns_that_are_merged() -> None:
    first: list[Message] = [{"role": "assistant", "content": "Hello."}, *CHAT[1:]]
    assert shown(template("chatml"), first).startswith("<|im_start|>assistant\n«Hello.<|im_end|>»\n<|im_start|>user\n")
    twice: list[Message] = [*CHAT[:3], {"role": "assistant", "content": "Quite."}, *CHAT[3:]]
    assert shown(template("chatml"), twice).count("«") == 3
    merges = '{{- message.content ~ ("" if loop.nextitem and loop.nextitem.role == "assistant" else eos_token) -}}'
    one = ChatTemplate(
        gpt(),
        '{%- for message in messages -%}{%- if message.role != "assistant" %}{{ "Q: " ~ message.content ~ "\n" }}'
        f'{{%- else -%}}{{{{- "A:" if loop.previtem.role != "assistant" -}}}}{merges}{{%- endif -%}}{{%- endfor -%}}'
        '{%- if add_generation_prompt %}{{ "A:" }}{% endif -%}',
        "data.chat_template",
    )
    assert shown(one, twice[1:]).endswith("Q: And blue?\nA:«No</s>»")
    assert shown(one, twice[1:]).count("«") == 2 and "Yes, it is. Quite.</s>»" in shown(one, twice[1:])


CALLS: list[Message] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Bonn"}}]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]


@pytest.mark.parametrize(
    ("family", "change", "messages", "written"),
    [
        # Asked, the model reasons; elsewhere its reasoning is written as none. What both begin with is the header.
        (
            "chatml",
            ('"\\n" ~ message.content', '"\\n" ~ ("<think></think>" if message.role == "assistant") ~ message.content'),
            CHAT[3:],
            "<|im_start|>assistant\n<think>«</think>No<|im_end|>»\n",
        ),
        # Two tokens end a turn; or another one where it is the last.
        ("zephyr", ("~ eos_token ~", '~ eos_token ~ "<pad>" ~'), CHAT[3:], "<|assistant|>\n«No</s><pad>»\n"),
        (
            "zephyr",
            ("~ eos_token ~", '~ ("<pad>" if loop.last and message.role == "assistant" else eos_token) ~'),
            CHAT[1:],
            "Yes, it is. </s>»\n<|user|>\nAnd blue?</s>\n<|assistant|>\n«No<pad>»\n",
        ),
        # A call's arguments as JSON text, and its name again in front of what it answers.
        (
            "zephyr",
            (
                "message.content ~",
                "message.content ~ (message.tool_calls[0].name + message.tool_calls[0].arguments if message.tool_calls "
                'else messages[loop.index0 - 1].tool_calls[0].name if message.role == "tool" else "") ~',
            ),
            CALLS,
            '<|assistant|>\n«weather{"city": "Bonn"}</s>»\n<|tool|>\nrainweather</s>\n<|assistant|>\n«It rains.</s>»\n',
        ),
    ],
)  # fmt: skip
def test_templates_that_write_a_turn_otherwise_than_they_ask_for_it(
    family: str, change: tuple[str, str], messages: list[Message], written: str
) -> None:
    reasons = ('"<|im_start|>assistant\\n" }}{% endif', '"<|im_start|>assistant\\n<think>\\n" }}{% endif')
    one = template(family, gpt, change)
    if "<think>" in written:
        one = ChatTemplate(one.tokenizer, str(one.source).replace(*reasons), one.key)
    assert shown(one, messages).endswith(written)
    ends = Writer(one.tokenizer, one, "assistant", 99, "error").ends
    names = [one.tokenizer.convert_ids_to_tokens(token) for token in ends]
    assert sorted(names) == sorted(
        {name for name in ("<|im_end|>", "</s>", "<pad>") if f"{name}»" in written or f"{name}<pad>»" in written}
    )


def test_a_question_is_what_the_template_asks() -> None:
    """DeepSeek's has more than what stands in front of the turn in the whole text."""
    found = tokens(template("deepseek"), [CHAT, CHAT[:3]])
    question = found.questions.ids[: found.questions.offsets[1]]
    assert question.tolist() == theirs(
        template("deepseek"), CHAT[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert len(found.questions.offsets) == 3


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("chatml", ('"<|im_end|>\\n"', '"\\n"'), "ends an assistant's turn with no special token"),
        ("chatml", ("message in messages", "message in messages[-2:]"), "leaves out message 3 (assistant)"),
        ("chatml", ('"<|im_start|>assistant\\n" }}{% endif', '"Answer:" }}{% endif'), "otherwise than where it asks"),
        (
            "zephyr",
            ("{%- if add", '{{- "" if add_generation_prompt else messages | join | length -}}{%- if add'),
            "makes the end depend on what the assistant says",
        ),
        ("zephyr", ("message.content", "message.nothing.content"), "template refuses it: 'dict object' has no"),
        ("zephyr", ("{%- for", "{%- four"), "is not valid Jinja: Encountered unknown tag 'four'"),
    ],
)  # fmt: skip
def test_a_template_whose_turns_are_not_told_apart_is_refused(family: str, change: Any, words: str) -> None:
    with pytest.raises(UserError) as refused:
        template(family, gpt, change).rendered(CHAT, None, "train.jsonl:7")
    assert "data.chat_template: the chat template " in str(refused.value) and words in str(refused.value)


def test_what_a_template_forbids_is_refused_with_its_row() -> None:
    twice: list[Message] = [*CHAT[:1], *CHAT]
    for family, messages, words in (
        ("gemma", CHAT, "System role not supported"),
        ("mistral", twice, "roles must alternate"),
    ):
        with pytest.raises(UserError, match=f"^train.jsonl:7: data.chat_template: .* refuses it: {words}"):
            template(family).rendered(messages, None, "train.jsonl:7")


# ---------------------------------------------------------------- what does not fit


def test_a_long_chat_loses_its_front_and_then_does_not_fit() -> None:
    one = template("llama2")  # begins with bos
    whole = tokens(one, [CHAT])
    (begin, _), (_, end) = spans(whole, 0)
    length = len(whole.ids)
    assert end == length
    for left in (begin - 1, 2, 1):
        found = tokens(one, [CHAT], max_length=length - begin + left)
        assert found.ids.tolist() == [whole.ids[0], *whole.ids[begin - left + 1 :]] and found.lost == [begin - left]
        assert spans(found, 0) == [(a - begin + left, b - begin + left) for a, b in spans(whole, 0)]
        assert found.needed == [length] and found.cut == [0]
    short = {"max_length": length - begin}
    with pytest.raises(
        UserError, match=rf"^row 0: .* have {length - begin} tokens .* use at least {length - begin + 1}, "
    ):
        tokens(one, [CHAT], **short)
    dropped = tokens(one, [CHAT, CHAT[:3]], overlong="drop", **short)
    assert dropped.overlong.tolist() == [length - begin + 1, 0] and len(dropped.offsets) == 2
    assert len(dropped.questions.offsets) == 2
    cut = tokens(one, [CHAT], overlong="truncate", **short)
    left = min(begin, (length - begin) // 2)
    assert len(cut.ids) == length - begin and cut.prompt_lengths == [left]
    assert cut.cut > 0 and cut.cut + cut.lost == begin
    assert cut.ids[1:].tolist() == whole.ids[begin - left + 1 :][: length - begin - 1].tolist()
    assert one.tokenizer.decode(cut.replies.ids) == " No </s>", "the whole turn, though none of it fits"
    asked = tokens(one, [CHAT], "last_assistant", max_length=40)
    assert asked.questions.ids[0] == whole.ids[0] and len(asked.questions.ids) == 39


def test_what_is_behind_the_last_turn_goes_first() -> None:
    one = template("phi")  # ends with eos behind the last turn
    whole = tokens(one, [CHAT])
    found = tokens(one, [CHAT], max_length=len(whole.ids) - 1)
    assert found.ids.tolist() == whole.ids[:-1].tolist() and spans(found, 0) == spans(whole, 0)
