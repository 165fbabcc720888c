"""Loads the data of retrieval: the training split holds passages, which the clients own; the others hold questions.

`data.prompt` and `data.target` are templates over the questions' columns, and `data.where` and `data.where_not` choose
among the questions. A question whose target column holds a list has one reference for each item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedhpc import config, registry
from fedhpc.data import sources
from fedhpc.data.labels import class_order
from fedhpc.data.load import Data, ids_of, owners_with_enough, rows_that_fit, template, what_became_of
from fedhpc.data.partitioners.natural import Natural
from fedhpc.data.population import Population
from fedhpc.data.sources import Source, Table
from fedhpc.data.templates import Template, parse
from fedhpc.data.tokens import Examples, Join, Row, Writing, cached_tokens, examples_from
from fedhpc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Corpus(Data):
    """Passages (`train`) and questions (`validation` and `test`, which are the same)."""

    passages: list[str]  # the rendered rows of `train`
    queries: list[str]  # for each row of `test`: the text that is searched for
    gold: list[int] | None  # for each row of `test`: `number_of` the text of the right passage


@dataclass(frozen=True)
class Columns:
    """Which columns retrieval reads beside those that `data` names; keys of the section `method`."""

    passage: str  # template over the passages' columns
    passage_id: str  # column of the passages
    query: str | None  # template over the questions' columns; None: data.prompt
    gold: str | None  # column of the questions that names the right passage by its passage_id


def number_of(text: str) -> int:
    """63 bits of a hash of a text, which identify it on whichever client it is."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def load_passages(
    settings: config.Config, columns: Columns, tokenizer: PreTrainedTokenizerBase, writing: Writing, write_cache: bool
) -> Corpus:
    """Read passages and questions and divide the passages among clients. UserError where something is wrong."""
    data, messages = settings.data, list[str]()
    source = sources.open_source(data)
    render = parse(columns.passage, "method.passage")
    prompt = template(data.prompt, "data.prompt", tokenizer)
    target = template(data.target, "data.target", tokenizer)
    query = parse(data.prompt, "data.prompt") if columns.query is None else parse(columns.query, "method.query")

    owner = {} if data.client is None else {data.client: "data.client"}
    named = {columns.passage_id: "method.passage_id"} if columns.gold is not None else {}
    label = {} if data.label is None else {data.label: "data.label"}
    wanted = {**dict.fromkeys(render.columns, "method.passage"), **named, **label, **owner}
    table = sources.read_table(source, _name_of(source, data, "train"), wanted, missing=data.missing)
    natural = issubclass(registry.choice("partitioners", settings.partition.name), Natural)
    if natural:
        sources.refuse(table, table.without(str(data.client)), str(data.client), "data.client")
    owner_names = sorted({row[data.client] for row in table.rows}) if data.client is not None else []
    texts_by_id = _by_id(table, render, columns.passage_id) if columns.gold is not None else {}
    if natural:
        table, owner_names = owners_with_enough(settings, table, owner_names, messages)
    passages = [render.render(row) for row in table.rows]
    label_names: list[str] = []
    if data.label is not None:
        sources.refuse(table, table.missing(data.label), data.label, "data.label")
        label_names = class_order(row[data.label] for row in table.rows)
    tokens, message = cached_tokens(
        passages, [""] * len(passages), table.locations, tokenizer, data.max_length, _Passage(), write_cache
    )
    messages += [message] if message else []
    train = examples_from(
        tokens,
        labels=ids_of(table, data.label, label_names),
        label_names=label_names,
        owners=ids_of(table, data.client, owner_names),
        owner_names=owner_names,
        prompts=passages,
        targets=passages,
    )

    asked = {
        **dict.fromkeys(target.columns, "data.target"),
        **dict.fromkeys(query.columns, "method.query"),
        **dict.fromkeys(prompt.columns, "data.prompt"),
        **dict.fromkeys([*data.where, *data.where_not], "data.where"),
        **({} if columns.gold is None else {columns.gold: "method.gold"}),
    }
    name = _name_of(source, data, "test")
    read = sources.read_table(source, name, asked, references=target.columns, missing=data.missing)
    questions = sources.filtered(read, data)
    questions, test, lines = _examples(questions, prompt, target, tokenizer, data, writing, write_cache)
    messages += [line for line in lines if line not in messages]
    make = Population.single if settings.mode == "centralized" else Population.divided
    return Corpus(
        train,
        test,
        test,
        make(settings, train),
        messages,
        hashlib.sha256((train.fingerprint + test.fingerprint).encode()).hexdigest(),
        passages=passages,
        queries=[query.render(row) for row in questions.rows],
        gold=None
        if columns.gold is None
        else [_gold(questions, i, columns.gold, texts_by_id) for i in range(len(test))],
    )


def _name_of(source: Source, data: config.Data, split: str) -> str:
    """What the source calls a split."""
    name = getattr(data, split)
    name_in_source = sources.find_split(source, name)
    if name_in_source is None:
        content = "passages" if split == "train" else "questions"
        raise UserError(
            f"data.{split}: '{data.source}' has no split or file '{name}' with {content}; it has: "
            f"{sources.contents(source)}"
        )
    return name_in_source


def _by_id(table: Table, render: Template, column: str) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for row, location in zip(table.rows, table.locations, strict=True):
        number = number_of(render.render(row))
        if numbers.setdefault(row[column], number) != number:
            raise UserError(
                f"{location}: method.passage_id: two passages with different texts are called '{row[column]}'"
            )
    return numbers


def _gold(questions: Table, row: int, column: str, numbers: Mapping[str, int]) -> int:
    name = questions.rows[row][column]
    if name not in numbers:
        raise UserError(f"{questions.locations[row]}: method.gold: there is no passage '{name}' in data.train")
    return numbers[name]


def _examples(
    table: Table, prompt: Template, target: Template, tokenizer: Any, data: config.Data, writing: Writing, write: bool
) -> tuple[Table, Examples, list[str]]:
    """The questions that fit, their examples, and what to say about them."""
    prompts, targets = ([one.render(row) for row in table.rows] for one in (prompt, target))
    tokens, message = cached_tokens(
        prompts, targets, table.locations, tokenizer, data.max_length, writing, write, overlong=data.overlong
    )
    lines = ([message] if message else []) + what_became_of(tokens, table, "test", data.max_length)
    rows = rows_that_fit(tokens, table, "test", data.max_length)
    prompts, targets = [prompts[row] for row in rows], [targets[row] for row in rows]
    return table.select(rows), examples_from(tokens, prompts=prompts, targets=targets), lines


@dataclass(frozen=True)
class _Passage:
    """Writes a passage as its own tokens, without a target."""

    task: str = "passage"
    has_target: bool = False
    one_text: bool = False

    def join(self, tokenizer: Any, max_length: int, room: int = 0, truncate: bool = False) -> Join:
        return lambda prompt, target, location: Row(prompt, [], 0, len(prompt))
