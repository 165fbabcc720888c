"""Every key of the configuration, for people to read: as one text, and piece by piece for a page of its own."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

from fedhpc import registry
from fedhpc.config.choices import is_section
from fedhpc.config.schema import SECTIONS
from fedhpc.registry import Section, choice_of, flat_choices

MODE = "mode: federated    # federated | centralized | local"


@dataclass(frozen=True)
class Key:
    """A key of a section. `name` has a dot for each section around it; `default` is JSON, None of a section."""

    name: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Options:
    """The keys of a section (`choice` is empty), or those that one choice of a family adds to it.

    key: the key of the section that names the choice, such as `aggregator`, or `method.name` where the choice has its
    keys inside.
    """

    keys: list[Key]
    family: str = ""
    key: str = ""
    choice: str = ""


def options(section: str) -> Iterator[Options]:
    """A section's own keys first, then those of every choice that it can name."""
    model = SECTIONS[section]
    yield Options(list(_keys(model)))
    for key, family in flat_choices(model).items():
        for choice in registry.names(family):
            yield Options(list(_keys(registry.options(family, choice))), family, key, choice)
    for key, field in model.model_fields.items():
        inner = choice_of(field)
        if inner is not None and inner.default:
            for choice in registry.names(inner.family):
                keys = list(_keys(registry.options(inner.family, choice)))
                yield Options(keys, inner.family, f"{key}.name", choice)


def reference(sections: Collection[str] = ()) -> str:
    """Every key with its default and what it means, as `python -m fedhpc.config` prints it; of some sections or all."""
    lines = [] if sections else [MODE]
    for section in SECTIONS:
        if sections and section not in sections:
            continue
        lines.append(f"{section}:")
        for part in options(section):
            inside = part.key.endswith(".name")
            if part.choice and (part.keys or not inside):
                lines.append(f"  # with {part.key}: {part.choice}")
            lines += [_line(key, "    " if inside else "  ") for key in part.keys]
    return "\n".join(lines)


def _line(key: Key, indent: str) -> str:
    *around, name = key.name.split(".")
    default = "" if key.default is None else f" {key.default}"
    return f"{indent}{'  ' * len(around)}{name}:{default}    # {key.meaning}"


def _keys(model: type[Section], around: str = "") -> Iterator[Key]:
    """The keys of a section, each followed by those of the section within it, if it is one."""
    for name, field in model.model_fields.items():
        choice = choice_of(field)
        inner = (
            None
            if choice
            else next((a for a in (field.annotation, *get_args(field.annotation)) if is_section(a)), None)
        )
        if inner is not None:
            yield Key(around + name, None, str(field.description))
            yield from _keys(inner, f"{around}{name}.")
            continue
        nested = choice is not None and choice.default
        stated = {"name": choice.default} if choice is not None and nested else field.default
        default = "(required)" if field.is_required() and not nested else json.dumps(stated)
        values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        listed = f" ({' | '.join(map(str, values))})" if values else ""
        yield Key(around + name, default, f"{field.description}{listed}")
