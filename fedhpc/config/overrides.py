"""Keys of the command line in place of those of the file: `section.key=value`.

A value is YAML, but for keys typed as text: what stands there is the text, also where YAML would make a mapping or a
number of it (`data.prompt={mr} :`). Quotes around all of it are taken off as in YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, get_args

from pydantic.fields import FieldInfo

from fedhpc import registry
from fedhpc.config.choices import is_section, named
from fedhpc.config.nearest import section_hint
from fedhpc.config.schema import ALTERNATIVES, COLUMNS, KEYS, SECTIONS, Data
from fedhpc.config.yaml import parse_yaml
from fedhpc.errors import UserError
from fedhpc.registry import Section, choice_of, flat_choices

PLACE = "command line"


class Written(str):
    """A value as it stands on the command line, before it is known what type its key has."""


def parse_overrides(texts: Sequence[str], where: str = PLACE) -> list[tuple[str, Any]]:
    """`section.key=value` as (section.key, `Written`). UserError where one is not of that form."""
    parsed = []
    for text in texts:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise UserError(f"'{text}' is not of the form section.key=value", place=where)
        parsed.append((key, Written(value)))
    return parsed


def typed(raw: Mapping[str, Any], changes: Sequence[tuple[str, Any]], where: str = PLACE) -> list[tuple[str, Any]]:
    """The changes to `raw` with each `Written` value read as its key has it. UserError for what is no YAML."""
    written = {key: value for key, value in changes if isinstance(value, Written)}

    def value_of(path: Sequence[str]) -> Any:
        """What a key will have, or None where that is nothing that can be told before the tree is checked."""
        key = ".".join(path)
        if key in written:
            return parse_yaml(written[key], f"{where}: {key}")
        node: Any = raw
        for part in path:
            node = node.get(part) if isinstance(node, Mapping) else None
        return dict(changes).get(key, node)

    read = []
    for key, value in changes:
        if isinstance(value, Written):
            section, *path = key.split(".")
            field = _field(SECTIONS[section], path, [section], value_of) if path and section in SECTIONS else None
            value = str(value) if _is_text(value, field) else parse_yaml(value, f"{where}: {key}")
        read.append((key, value))
    return read


def _is_text(written: str, field: FieldInfo | None) -> bool:
    """Whether what is written for a field is its text: not in quotes, nor null where there need not be a text."""
    if field is None or choice_of(field) is not None or field.annotation not in (str, str | None):
        return False
    stripped = written.strip()
    if field.annotation is not str and stripped in ("", "~", "null"):
        return False
    if len(stripped) < 2 or stripped[0] not in "'\"" or stripped[0] != stripped[-1]:
        return True
    try:
        return not isinstance(parse_yaml(written, ""), str)
    except UserError:  # a text that begins and ends with quotes which are its own
        return True


def _field(
    model: type[Section], path: Sequence[str], within: Sequence[str], value_of: Callable[[Sequence[str]], Any]
) -> FieldInfo | None:
    """The field that a key has in a section or in the options that it chooses; None where it has none.

    path: the key in the section, which is the key `within` itself. value_of: the value of a key of the whole tree.
    """
    models = [model]
    for key, family in flat_choices(model).items():
        name = value_of([*within, key])
        with suppress(UserError):  # a wrong name is told where the section is built
            models.append(registry.options(family, model.model_fields[key].default if name is None else name))
    key, *rest = path
    field = next((one.model_fields[key] for one in models if key in one.model_fields), None)
    if field is None or not rest:
        return field
    choice = choice_of(field)
    inner = [one for one in (field.annotation, *get_args(field.annotation)) if is_section(one)]
    if not inner:
        return None
    return _field(inner[0] if choice is None else named(choice), rest, [*within, key], value_of)


def override(raw: Mapping[str, Any], changes: Sequence[tuple[str, Any]], where: str = PLACE) -> dict[str, Any]:
    """`raw` with (section.key, value) put in; itself unchanged.

    A new choice drops the options of the old one, and another source the columns of a built-in task; of two
    alternatives the overriding one stays.
    """
    parsed = [(key.split("."), value) for key, value in typed(raw, changes, where)]
    raw = dict(raw)
    for path, value in parsed:
        raw = _made_ready(raw, path, value, where)
    for path, value in parsed:
        node = raw
        for depth, key in enumerate(path[:-1]):
            child = node.get(key)
            if child is not None and not isinstance(child, Mapping):
                raise _no_keys(path, depth + 1, where)
            node[key] = dict(child or {})
            node = node[key]
        node[path[-1]] = value
    return raw


def _made_ready(raw: dict[str, Any], path: list[str], value: Any, where: str) -> dict[str, Any]:
    """`raw` without what the new value of the key `path` replaces, itself apart."""
    key = ".".join(path)
    if "" in path:
        raise UserError(f"'{key}' is not of the form section.key", place=where)
    if path[0] not in KEYS:
        raise UserError(f"unknown key '{key}'", key=key, place=where, remedy=section_hint(path[0], path[1:]))
    section = raw.get(path[0]) or {}
    if len(path) == 1 or path[0] not in SECTIONS:
        return raw
    if not isinstance(section, Mapping):
        raise _no_keys(path, 1, where)
    if path == ["data", "source"]:
        old = section.get("source", Data.model_fields["source"].default)
        if old != value and str(old).startswith("builtin:"):  # no other source has its columns
            section = {key: other for key, other in section.items() if key not in COLUMNS}
    if len(path) == 2 and path[1] in flat_choices(SECTIONS[path[0]]):
        section = _without_old_options(section, SECTIONS[path[0]], path[1], value)
    if len(path) == 3 and path[2] == "name":  # a choice within a choice
        inner = section.get(path[1])
        if isinstance(inner, Mapping) and inner.get("name") != value:
            section = {**section, path[1]: {}}
    if len(path) == 2 and path[1] in ALTERNATIVES.get(path[0], ()):
        section = {key: other for key, other in section.items() if key not in ALTERNATIVES[path[0]]}
    return {**raw, path[0]: section} if section or path[0] in raw else raw


def _no_keys(path: list[str], depth: int, where: str) -> UserError:
    key = ".".join(path[:depth])
    return UserError(f"{key} has no keys, so not {'.'.join(path)}", key=key, place=where)


def _without_old_options(section: Mapping[str, Any], model: type[Section], key: str, new: Any) -> Mapping[str, Any]:
    field, family = model.model_fields[key], flat_choices(model)[key]
    old = section.get(key, None if field.is_required() else field.default)
    if old == new:
        return section
    try:
        dropped = set(registry.options(family, old).model_fields)
    except UserError:  # what is wrong with the old choice does not matter any more
        return section
    return {k: v for k, v in section.items() if k not in dropped}
