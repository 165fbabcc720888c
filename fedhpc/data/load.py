"""Loads the data of a run: reads its splits, tokenises them and divides the training data among the clients."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from fedhpc import config, registry
from fedhpc.data import sources
from fedhpc.data.chat_pairs import answers_in, chat_pairs, holds_chats
from fedhpc.data.chat_pairs import with_a_preference as chats_with_a_preference
from fedhpc.data.chat_template import ChatTemplate
from fedhpc.data.chat_tokens import Chat, Writer, cached_chats, chats_in, chats_of
from fedhpc.data.encoding import marked
from fedhpc.data.files import is_shard, numbered_beside
from fedhpc.data.labels import UNLABELLED, class_order, is_number, no_class
from fedhpc.data.pairs import common_beginnings, desirable_of, interleaved, with_a_preference
from fedhpc.data.partitioners.base import Int32, Int64
from fedhpc.data.partitioners.natural import Natural
from fedhpc.data.population import Population
from fedhpc.data.rows import Rendered, Rows
from fedhpc.data.sources import Table
from fedhpc.data.templates import Template, parse
from fedhpc.data.tokens import Answers, Examples, Tokens, Writing, answers_behind, cached_tokens, examples_from
from fedhpc.data.values import text
from fedhpc.errors import UserError
from fedhpc.rng import EVALUATION, generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What the data are for. test: nothing is trained, and rows have no owners. clients: nothing is trained, but clients
#: are evaluated on the training split.
Purpose = Literal["training", "test", "clients"]

HELD_OUT_SHARE = 0.05
HELD_OUT_MAX = 1000


class Public(Protocol):
    """Which rows form the public set, that the server and all clients see; None means: as in the section `data`."""

    @property
    def source(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def where(self) -> dict[str, list[str | int | float | bool]]: ...
    @property
    def where_not(self) -> dict[str, list[str | int | float | bool]]: ...
    @property
    def max_examples(self) -> int: ...


@dataclass(frozen=True)
class Data:
    """The tokenised splits of a run and its clients."""

    train: Examples
    validation: Examples
    test: Examples
    population: Population
    messages: list[str]  # for the log: what was decided while loading
    fingerprint: str  # hash of the content of all splits: a resumed run must find the same
    public: Examples | None = None  # the public set, of runs that have one

    @property
    def splits(self) -> dict[str, Examples]:
        """The examples of each split by its name, the public set among them."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test, "public": self.public}
        return {name: examples for name, examples in splits.items() if examples is not None}


def load_data(
    settings: config.Config,
    tokenizer: PreTrainedTokenizerBase,
    writing: Writing,
    write_cache: bool = True,
    public: Public | None = None,
    head: Sequence[str] = (),
    purpose: Purpose = "training",
) -> Data:
    """Read, tokenise and divide the data of a run.

    Where nothing is trained (`purpose`), no rows are held out: of train and test one stands for the other that is not
    there, and validation is the test.

    writing: how an example is written; data.target is used only where it has a target. write_cache: whether tokens are
    cached for the next run (`--check` writes nothing). public: the public set to read beside the splits. head: the
    classes of the model's own head, whose order the classes have that are the same. A UserError says what is wrong
    with the data, and in which file and line.
    """
    data = settings.data
    writer = _chat_writer(settings, tokenizer, writing)
    prompt = template(data.prompt if writer is None else "", "data.prompt", tokenizer)
    of_answers = _answers(data, tokenizer, writing) if writer is None else {"data.target": parse("", "data.target")}
    target, written = next(iter(of_answers.values())), of_answers | {"data.prompt": prompt}
    messages: list[str] = []
    try:
        tables, labelled, owner_names = _read_splits(
            settings, written, public, messages, not writing.has_target, purpose
        )
    except UserError as error:
        if data.chosen is None or error.key != "data.prompt":
            raise
        remedies = ['where both answers begin with their prompt, write data.prompt: ""', error.remedy]
        raise error.but(remedy="; ".join(filter(None, remedies))) from None
    label_names = _class_names(settings, tables, labelled, target, head, purpose, writing, messages)
    true_labels = ids_of(tables["train"], data.label, label_names)
    if data.label is not None and data.label_noise:
        if writing.has_target and data.label not in target.columns:
            raise UserError(f"data.label_noise: data.target must have {{{data.label}}}, or the noise changes no target")
        tables["train"] = _mislabelled(tables["train"], data.label, label_names, data.label_noise, settings.run.seed)

    is_paired = data.chosen is not None
    texts = {split: _texts(table, written) for split, table in tables.items() if writer is None}
    answers: dict[str, Answers | None] = {}
    room = 0  # for the longest answer: a row loses as much of its prompt for each label that it is asked about
    if label_names and target.columns == (data.label,):
        of_labels = [target.render({str(data.label): name}) for name in label_names]
        for split, (prompts, *_) in texts.items():
            answers[split], longest = answers_behind(prompts, of_labels, tokenizer, writing)
            room = max(room, longest)

    examples: dict[str, Examples] = {}
    for split, table in tables.items():
        train, is_tested = split == "train", split in ("validation", "test")
        asks = is_tested or (train and _clients_write(settings.evaluation, purpose))
        prompts, *of_answer = texts.get(split, [[]])  # of pairs the better answers and the worse ones
        chats = _chats(table, data) if writer is not None else []
        of_both: list[Tokens] = []
        for number, name in enumerate((split, f"{split} (data.rejected)") if is_paired else (split,)):
            if writer is None:
                tokens, message = cached_tokens(
                    prompts, of_answer[number], table.locations, tokenizer, data.max_length, writing, write_cache, room,
                    data.overlong,
                )  # fmt: skip
            else:
                tokens, message = cached_chats(chats[number], writer, asks and not number, write_cache)
            if message is not None and message not in messages:
                messages.append(message)
            messages += what_became_of(tokens, table, name, data.max_length)
            of_both.append(tokens)
        if is_paired:
            tokens = interleaved(of_both[0], of_both[1], tokenizer.bos_token_id)
        targets = of_answer[0] if of_answer else []
        of_split = answers.get(split)
        rows = rows_that_fit(tokens, table, split, data.max_length)
        if len(rows) < len(table.rows):
            if train and _is_natural(settings):
                owner_names = owners_with_enough(settings, table.select(rows), owner_names, messages)[1]
                stays = np.isin([*table.select(rows).rows.column(str(data.client))], owner_names)
                of_each = np.repeat(stays, 2 if is_paired else 1)
                rows, tokens = rows[stays], tokens.select(np.flatnonzero(of_each))
            table = table.select(rows)
            if writer is None:
                prompts, targets, *_ = _texts(table, written)
            else:
                chats = _chats(table, data)
            if of_split is not None:
                of_split = of_split._replace(variant=of_split.variant[rows])
            if train and true_labels is not None:
                true_labels = true_labels[rows]
        if writer is not None and asks:
            prompts = writer.question_texts(chats[0])
            targets = writer.answers(tokens)[:: 2 if is_paired else 1]
        examples[split] = examples_from(
            tokens,
            labels=ids_of(table, data.label if split in labelled else None, label_names),
            label_names=label_names,
            owners=ids_of(table, data.client, owner_names) if train and purpose != "test" else None,
            owner_names=owner_names if train else [],
            prompts=list(prompts) if is_tested else None,
            targets=list(targets) if is_tested else None,
            answers=of_split,
            spans=tokens.spans,
            ends=() if writer is None else writer.ends,
            paired=is_paired,
            desirable=None if data.desirable is None else desirable_of(table, data.desirable),
        )
        if train and asks:  # no part of the fingerprint
            examples[split] = replace(examples[split], prompts=list(prompts), targets=list(targets))
    single = settings.mode == "centralized" or purpose == "test"
    make = Population.single if single else Population.divided
    return Data(
        examples["train"],
        examples.get("validation", examples["test"]),
        examples["test"],
        make(settings, replace(examples["train"], labels=true_labels)),  # noise does not move examples
        messages,
        hashlib.sha256("".join(e.fingerprint for e in examples.values()).encode()).hexdigest(),
        examples.get("public"),
    )


def divided_again(data: Data, of: config.Config, settings: config.Config) -> Data | None:
    """The splits of the run `of`, divided among the clients of another one; None where that one may have other rows.

    For runs with the same `shared_settings`: they read the same data.
    """
    if of.partition != settings.partition and (_is_natural(of) or _is_natural(settings)):
        return None
    return replace(data, population=Population.divided(settings, data.train))


def _class_names(
    settings: config.Config,
    tables: Mapping[str, Table],
    labelled: AbstractSet[str],
    target: Template,
    head: Sequence[str],
    purpose: Purpose,
    writing: Writing,
    messages: list[str],
) -> list[str]:
    """The classes of data.label, in order; none without it. What a person should know of them is added to `messages`.

    labelled: the splits whose labels are there. head, purpose: as in `load_data`.
    """
    label = settings.data.label
    if label is None:
        return []
    names = {name for split in tables if split in labelled for name in tables[split].rows.column(label)}
    classes = list(head) if purpose != "training" and names <= set(head) else class_order(names, head)
    amounts = [name for name in classes if "." in name and is_number(name)]
    if amounts and not writing.has_target:
        messages.append(
            f"data.label: each of {len(classes)} values is a class of its own, also numbers like {amounts[0]}; amounts "
            "are not predicted here"
        )
    if not writing.has_target or label in target.columns:
        trained = set(tables["train"].rows.column(label))
        for split in (split for split in tables if split in labelled):
            others = [name for name in tables[split].rows.column(label) if name not in trained]
            if others:
                messages.append(
                    f"data.label: {len(others)} of {len(tables[split].rows)} rows of {split} have a label that no "
                    f"training row has, like '{others[0]}'"
                )
    if without_rows := [name for name in classes if name not in names]:
        messages.append(f"data.label: no row is {', '.join(without_rows)}, which stays a class as the model has it")
    return classes


def _clients_write(evaluation: config.Evaluation, purpose: Purpose) -> bool:
    """Whether texts are generated for the clients' own examples, or what is held out of them."""
    needs = {registry.choice("metrics", name).needs for name in evaluation.metrics_of_test}
    evaluated = purpose == "clients" or (purpose == "training" and evaluation.client_fraction > 0)
    return evaluated and "texts" in needs


def _chat_writer(settings: config.Config, tokenizer: PreTrainedTokenizerBase, writing: Writing) -> Writer | None:
    """How the chats of a run become tokens; None where its examples are prompts and targets."""
    data = settings.data
    if data.messages is None and not holds_chats(data):
        for key in ("tools", "chat_template"):
            if getattr(data, key) is not None:
                raise UserError(f"data.{key} is of chats, and data.chosen holds texts", remedy="take it out")
        return None
    if data.messages is None and data.prompt not in ("", type(data).model_fields["prompt"].default):
        raise UserError(
            "data.prompt is of texts, and data.chosen holds chats",
            remedy="name the column with the chat in front of the answers as data.messages, or take it out",
        )
    if writing.task != "causal_lm":
        key = "data.messages" if data.chosen is None else "data.chosen"
        raise UserError(
            f"chats are for decoder-only language models, and '{settings.model.name}' is used for {writing.task}",
            key=key, remedy="write data.prompt and data.target, or choose another model",
        )  # fmt: skip
    chat_template = ChatTemplate.load(tokenizer, data.chat_template)
    return Writer(tokenizer, chat_template, data.train_on, data.max_length, data.overlong)


def _chats(table: Table, data: config.Data) -> Sequence[Sequence[Chat]]:
    """The chats of a table; of pairs the better ones and the worse ones."""
    return [chats_of(table)] if data.chosen is None else chat_pairs(table)


def _answers(data: config.Data, tokenizer: PreTrainedTokenizerBase, writing: Writing) -> dict[str, Template]:
    """The templates of what a model is to write, by their keys: the target, or the better and the worse of two."""
    if data.chosen is None or data.rejected is None:
        return {"data.target": template(data.target if writing.has_target else "", "data.target", tokenizer)}
    columns_or_templates = {"data.chosen": data.chosen, "data.rejected": data.rejected}
    return {
        key: template(one if "{" in one else f"{{{one}}}", key, tokenizer) for key, one in columns_or_templates.items()
    }


def _texts(table: Table, written: Mapping[str, Template]) -> Sequence[Sequence[str]]:
    """The prompts of a table, its targets, and of pairs the worse answers too. written: the templates by their keys."""
    prompts = Rendered(written["data.prompt"], table.rows)
    answers = [Rendered(one, table.rows) for key, one in written.items() if key != "data.prompt"]
    if len(answers) == 2 and written["data.prompt"].texts == ("",):
        return common_beginnings(table, *answers)
    return [prompts, *answers]


def template(written: str, key: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Parse a template whose own words may name special tokens; what stands in columns never does."""
    return parse(written, key).with_texts(lambda words: marked(words, tokenizer))


def rows_that_fit(tokens: Tokens, table: Table, split: str, max_length: int) -> Int64:
    """Which rows of a split have become examples, int64 (n,). UserError where none has."""
    if tokens.overlong is None or not tokens.overlong.any():
        return np.arange(len(table.rows))
    rows = np.flatnonzero(tokens.overlong == 0)
    if not len(rows):
        of_chats = tokens.spans is not None
        what, nor = ("the turns to learn do", "nor do those") if of_chats else ("the target does", "nor does that")
        count, most, least = len(table.rows), tokens.overlong.max(), tokens.overlong.min()
        others = f"{nor} of any other of {count} rows" if count > 1 else "and there is no other row"
        enough = f"{most} is enough for all of them, {least} for the shortest" if count > 1 else f"{most} is enough"
        raise UserError(
            f"{table.locations[0]}: {what} not fit in data.max_length {max_length}, {others} of {split}; {enough}"
        )
    return rows


def what_became_of(tokens: Tokens, table: Table, split: str, max_length: int) -> list[str]:
    """For the log: how many texts of a split do not fit, were tokenised in two pieces, or look like special tokens."""
    count, messages = len(tokens.prompt_lengths), []
    of_chats = tokens.spans is not None
    targets, templates = ("turns", "the template") if of_chats else ("targets", "data.prompt and data.target")
    if tokens.overlong is not None and (left_out := np.flatnonzero(tokens.overlong)).size:
        messages.append(
            f"data.overlong: {len(left_out)} of {len(tokens.overlong)} rows of {split} are left out, like "
            f"{table.locations[left_out[0]]}, because their {targets} do not fit in data.max_length {max_length}; "
            f"{tokens.overlong.max()} is enough for all of them"
        )
    if tokens.cut is not None and tokens.cut.any():
        messages.append(
            f"data.overlong: {np.count_nonzero(tokens.cut)} of {count} rows of {split} lose "
            f"{tokens.cut.sum(dtype=np.int64)} tokens at the ends of their {targets}"
        )
    if tokens.lost is not None and tokens.needed is not None and tokens.lost.any():
        messages.append(
            f"data: {np.count_nonzero(tokens.lost)} of {count} rows of {split} lose {tokens.lost.sum(dtype=np.int64)} "
            f"tokens of their prompts; the longest has {tokens.needed.max()} tokens, data.max_length is {max_length}"
        )
    if tokens.apart is not None and tokens.apart.any() and of_chats:
        messages.append(
            f"data: in {tokens.apart.sum()} of {count} rows of {split} a token reaches over the beginning of an "
            "assistant's turn; it counts as a part of the turn"
        )
    elif tokens.apart is not None and tokens.apart.any():
        messages.append(
            f"data: in {tokens.apart.sum()} of {count} rows of {split} prompt and target are tokenised apart, because "
            "in one text a token would reach over the end of the prompt; a space between them belongs to data.target"
        )
    if tokens.spelled is not None and tokens.spelled.any():
        messages.append(
            f"data: {tokens.spelled.sum()} of {count} rows of {split} have the name of a special token, which is "
            f"text there; only {templates} can name special tokens"
        )
    return messages


def _read_splits(
    settings: config.Config,
    written: Mapping[str, Template],
    public: Public | None,
    messages: list[str],
    is_classifier: bool,
    purpose: Purpose,
) -> tuple[dict[str, Table], set[str], list[str]]:
    """The rows of train, validation, test and the public set, which of these have labels, and the owners' names.

    Owners are those of training rows. written: all templates, by their keys.
    """
    data = settings.data
    of_answers = {key: one for key, one in written.items() if key != "data.prompt"}
    has_label = any(data.label in one.columns for one in of_answers.values())
    answers = data.label if is_classifier or has_label else None  # the column that they are in
    natural = _is_natural(settings) and purpose != "test"
    source = sources.with_join(sources.open_source(data), data.join)
    templates = {column: key for key, one in written.items() for column in one.columns}
    columns = dict(templates)
    if data.desirable is not None:
        columns[data.desirable] = "data.desirable"
    if data.label is not None:
        columns[data.label] = "data.label"
    shared = dict(columns)
    columns |= {**dict.fromkeys(data.where_not, "data.where_not"), **dict.fromkeys(data.where, "data.where")}
    owner = {} if data.client is None or purpose == "test" else {data.client: "data.client"}
    of_target = written["data.target"].columns if "data.target" in written else ()
    references = [column for column in of_target if column != data.label]  # a class is no list
    structured = chats_in(data) if data.messages is not None else {}
    if data.chosen is not None and "data.rejected" not in written:  # pairs of chats
        structured = chats_in(data) | answers_in(data)
    tables: dict[str, Table] = {}
    unseen = [
        (key, column, value)
        for key in ("where", "where_not")
        for column, values in getattr(data, key).items()
        for value in dict.fromkeys(map(text, values))
        if value
    ]
    absent: dict[str, str] = {}  # split -> why it is not there
    unlabelled: set[str] = set()  # splits that are there without the labels
    owner_names: list[str] = []
    # All are found before one is read: a column of CSV is of one kind in all of them.
    in_source = {split: sources.find_split(source, getattr(data, split)) for split in ("train", "validation", "test")}
    trains = purpose == "training"
    if not trains:
        if in_source["test"] is None and data.test == "test" and in_source["train"] is not None:
            messages.append(
                f"data: '{data.source}' has no test split of its own: all of its rows are tested, also those that a "
                "run on the same data was trained on"
            )
        in_source = _without_training(in_source, data)
    if public is not None and public.source is None:
        sources.find_split(source, public.split or "train")
    for split, name_in_source in in_source.items():
        name = getattr(data, split)
        if name_in_source is None and (name != split or split == "train"):
            raise UserError(
                f"data.{split}: '{data.source}' has no split or file '{name}'; it has: {sources.contents(source)}"
            )
        # `train: dev` must not make dev the default validation split too.
        is_train = trains and split != "train" and name == split and name_in_source == tables["train"].name
        if name_in_source is None or is_train:
            absent[split] = f"no {split} split of its own"
            continue
        # Those whose labels are hidden may have no column for them.
        optional = data.label if split != "train" else None
        wanted = {**columns, **(owner if split == "train" else {})}
        table = sources.read_table(source, name_in_source, wanted, optional, references, data.missing, structured)
        if split == "train" and owner:
            # Owners whose rows are all filtered out stay clients, without data.
            names_ = set(table.rows.column(str(data.client)))
            owner_names = sorted(name for name in names_ if name or not natural)
        unseen = [one for one in unseen if one[2] not in table.rows.column(one[1])]
        tables[split] = sources.filtered(table, data)
        if data.chosen is not None:
            table = tables[split]
            of_texts = "data.rejected" in written
            tables[split], line = with_a_preference(table, of_answers) if of_texts else chats_with_a_preference(table)
            messages += [] if line is None else [line]
        reason = "" if split == "train" or data.label is None else _hidden(tables, split, data.label)
        if reason and answers is None:
            unlabelled.add(split)
        elif reason:
            if name != split or not trains:
                raise UserError(f"data.{split}: {reason}; name a split that has labels, or leave data.{split} out")
            others = split == "test" and "validation" in tables
            way_out = f"data.{split}=validation tests on that" if others else f"data.{split} can name another split"
            absent[split] = f"no labels in its {split} split ({reason}; {way_out})"
            del tables[split]
        if is_shard(Path(name_in_source)):
            messages.append(
                f"data.{split}: {name_in_source} is one of several files; the others are not read (the folder as "
                "data.source, and the name in front of the number, read all)"
            )
        elif Path(data.source).is_dir() and (beside := numbered_beside(Path(name_in_source))):
            messages.append(
                f"data.{split}: {name_in_source} is the split; {', '.join(beside[:4])}{', ...' * (len(beside) > 4)} "
                "beside it, with a number, is not read"
            )
    messages += [f"data.{key}: no row has '{value}' in the column '{column}'" for key, column, value in unseen]
    for split, reason in absent.items():
        tables["train"], tables[split] = _hold_out(tables["train"], split)
        messages.append(
            f"data: '{data.source}' has {reason}; {len(tables[split].rows)} rows are held out of the training data "
            f"for it, {len(tables['train'].rows)} are left"
        )
    if public is not None:
        tables["train"], tables["public"] = _public_rows(settings, public, source, shared, tables, messages)
        if data.label is not None and _hidden(tables, "public", data.label):
            unlabelled.add("public")
    labelled = set() if data.label is None else tables.keys() - unlabelled
    if answers is not None:
        messages += _check_unlabelled(tables, answers)
    messages += _check_missing(data, natural, templates, tables, labelled)
    if natural:
        tables["train"], owner_names = owners_with_enough(settings, tables["train"], owner_names, messages)
    tables = {split: tables[split] for split in ("train", "validation", "test", "public") if split in tables}
    return tables, labelled, owner_names


def _without_training(in_source: dict[str, str | None], data: config.Data) -> dict[str, str | None]:
    """Which splits are read where nothing is trained: the test, and the data of clients, which may be the same."""
    train, test = in_source["train"], in_source["test"]
    return {
        "train": test if train is None and data.train == "train" else train,
        "test": train if test is None and data.test == "test" else test,
    }


def _is_natural(settings: config.Config) -> bool:
    """Whether the clients are the owners that the data names."""
    return issubclass(registry.choice("partitioners", settings.partition.name), Natural)


def _hidden(tables: Mapping[str, Table], split: str, label: str) -> str:
    """Why no row of a split has a label, as in data sets whose test labels are hidden; empty where one has."""
    table, unlabelled = tables[split], no_class(set(tables["train"].rows.column(label)))
    missing = set(table.missing(label))
    if not all(name in unlabelled or number in missing for number, name in enumerate(table.rows.column(label))):
        return ""
    values = " or ".join(sorted({name or "empty" for name in table.rows.column(label)}))
    return f"'{label}' is {values} in all {len(table.rows)} rows"


def _check_unlabelled(tables: Mapping[str, Table], label: str) -> list[str]:
    """UserError where a row has no label, or -1 in its place. For the log: where that is a class instead."""
    train = Counter(tables["train"].rows.column(label))
    way_out = f"data.where_not: {{{label}: [{UNLABELLED}]}}"
    for table in tables.values():
        sources.refuse(table, table.missing(label), label, "data.label")
        rows = [number for number, name in enumerate(table.rows.column(label)) if name == UNLABELLED]
        if rows and UNLABELLED in no_class(set(train)):
            raise UserError(
                f"{_at(table, rows)} {UNLABELLED} in the column '{label}', which stands for no label: leave such rows "
                f"out with {way_out}",
                key="data.label",
            )
    count = train[UNLABELLED]
    note = f"data.label: {UNLABELLED} is a class, in {count} of {train.total()} training rows; {way_out} leaves it out"
    return [note] if count else []


def _check_missing(
    data: config.Data,
    natural: bool,
    columns: Mapping[str, str],
    tables: Mapping[str, Table],
    labelled: AbstractSet[str],
) -> list[str]:
    """UserError where a row has no label or no owner. For the log: where a template has an empty text instead."""
    lines = []
    for split, table in tables.items():
        if natural and split == "train":
            sources.refuse(table, table.without(str(data.client)), str(data.client), "data.client")
        if data.label is not None and split in labelled:
            sources.refuse(table, table.missing(data.label), data.label, "data.label")
            empty = table.without(data.label)
            lines += [f"data.label: {_at(table, empty)} the empty text, which is a class of its own"] if empty else []
        for column, key in columns.items():
            rows = table.missing(column) if column != data.label else []
            lines += [f"{key}: {_at(table, rows)} no '{column}' (null), which is an empty text there"] if rows else []
    return lines


def _at(table: Table, rows: Sequence[int]) -> str:
    more = f" and {len(rows) - 1} more of {len(table.rows)} rows have" if len(rows) > 1 else " has"
    return f"{table.locations[rows[0]]}{more}"


def _public_rows(
    settings: config.Config,
    public: Public,
    source: sources.Source,
    columns: dict[str, str],
    tables: dict[str, Table],
    messages: list[str],
) -> tuple[Table, Table]:
    """Separate the public set from the training rows: returns (training rows, public rows).

    A sample of rows is the same for every `run.seed`.
    """
    train, draw = tables["train"], generator(EVALUATION, "public")
    if public.source is None and public.split is None and not public.where and not public.where_not:
        if public.max_examples >= len(train.rows):
            raise UserError(
                f"method.public.max_examples: {public.max_examples} of {len(train.rows)} training rows leave none to "
                "the clients; lower it, or name a public set of its own (method.public.source or .split)"
            )
        order = draw.permutation(len(train.rows))
        parts = [train.select(np.sort(part)) for part in np.split(order, [public.max_examples])]
        messages.append(f"data: {public.max_examples} rows are taken out of the training data for the public set")
        return parts[1], parts[0]
    public_filters = {"where": public.where, "where_not": public.where_not}
    of_public = {"source": public.source, "subset": None, "streaming": False, "client_from": "column"}
    data = settings.data.model_copy(update={**public_filters, **(of_public if public.source is not None else {})})
    if public.source is not None:
        try:
            source = sources.with_join(sources.open_source(data), data.join)
        except UserError as error:
            raise (error.but(key="method.public.source") if error.key == "data.source" else error) from error
    name = public.split or "train"
    name_in_source = sources.find_split(source, name)
    if name_in_source is None:
        raise UserError(
            f"method.public.split: '{data.source}' has no split or file '{name}'; it has: {sources.contents(source)}"
        )
    filters = {column: f"method.public.{key}" for key, columns in public_filters.items() for column in columns}
    references = [column for column, key in columns.items() if key == "data.target" and column != data.label]
    wanted = {**columns, **filters}
    table = sources.read_table(source, name_in_source, wanted, references=references, missing=data.missing)
    table = sources.filtered(table, data, "method.public")
    for split, other in tables.items():
        both = set(table.locations) & set(other.locations)
        if both:
            raise UserError(
                f"method.public: {len(both)} of its {len(table.rows)} rows are in {split} too, like {min(both)}; "
                "keep them apart with method.public.where and data.where_not, or name another split"
            )
    if len(table.rows) > public.max_examples:
        table = table.select(np.sort(draw.choice(len(table.rows), public.max_examples, replace=False)))
    return train, table


def _mislabelled(table: Table, label: str, names: list[str], noise: float, seed: int) -> Table:
    """Give each row, with probability `noise`, another class; all other classes are equally likely.

    A row that is mislabelled at a small `noise` has the same wrong label at a larger one.
    """
    if len(names) < 2:
        raise UserError(f"data.label_noise: there is no other class, data.label '{label}' has {len(names)}")
    rng = generator(seed, "label_noise")
    mislabelled = rng.random(len(table.rows)) < noise
    shifts = rng.integers(1, len(names), len(table.rows))
    position = {name: number for number, name in enumerate(names)}
    noisy = zip(table.rows, mislabelled.tolist(), shifts.tolist(), strict=True)
    rows = (
        [*{**row, label: names[(position[row[label]] + shift) % len(names)]}.values()] if wrong else [*row.values()]
        for row, wrong, shift in noisy
    )
    return replace(table, rows=Rows.of(table.rows.columns, rows))


def _hold_out(table: Table, split: str) -> tuple[Table, Table]:
    """Take a fixed sample out of the training rows for a missing split: returns (rows left, rows taken)."""
    count = min(max(int(len(table.rows) * HELD_OUT_SHARE), 1), HELD_OUT_MAX)
    if count >= len(table.rows):
        raise UserError(f"{table.name}: too few rows to hold some out for the missing {split} split; add one")
    order = generator(EVALUATION, f"hold_out:{split}").permutation(len(table.rows))
    return table.select(np.sort(order[count:])), table.select(np.sort(order[:count]))


def owners_with_enough(
    settings: config.Config, table: Table, owner_names: list[str], messages: list[str]
) -> tuple[Table, list[str]]:
    """Leave out the owners with fewer than `partition.min_examples` rows: the rows and names of the others."""
    column, minimum = str(settings.data.client), settings.partition.min_examples
    counts = dict.fromkeys(owner_names, 0)
    for name in table.rows.column(column):
        counts[name] += 1
    remaining = [name for name in owner_names if counts[name] >= minimum]
    if not remaining:
        raise UserError(
            f"partition.min_examples: no owner has {minimum} examples; the largest has {max(counts.values())}"
        )
    if len(remaining) < len(owner_names):
        rows = [number for number, name in enumerate(table.rows.column(column)) if counts[name] >= minimum]
        messages.append(
            f"data: {len(owner_names) - len(remaining)} of {len(owner_names)} owners have fewer than {minimum} "
            f"examples and are left out, with {len(table.rows) - len(rows)} rows"
        )
        table = table.select(rows)
    empty = sum(counts[name] == 0 for name in remaining)
    if empty:
        messages.append(
            f"data: {empty} of {len(remaining)} owners have no examples left and will be rejected when sampled; "
            "partition.min_examples=1 leaves them out"
        )
    return table, remaining


def ids_of(table: Table, column: str | None, names: list[str]) -> Int32 | None:
    """The position in `names` of every row's value, int32[n]; None where there is no such column."""
    if column is None:
        return None
    position = {name: number for number, name in enumerate(names)}
    return np.fromiter((position[name] for name in table.rows.column(column)), np.int32, len(table.rows))
