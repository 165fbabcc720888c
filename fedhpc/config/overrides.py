"""Keys of the command line in place of those of the file: `section.key=value`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedhpc import registry
from fedhpc.config.nearest import section_hint
from fedhpc.config.schema import ALTERNATIVES, KEYS, SECTIONS
from fedhpc.config.yaml import parse_yaml
from fedhpc.errors import UserError
from fedhpc.registry import Section, flat_choices

PLACE = "command line"


def parse_overrides(texts: Sequence[str], where: str = PLACE) -> list[tuple[str, Any]]:
    """`section.key=value` as (section.key, value). UserError where one is not of that form."""
    parsed = []
    for text in texts:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise UserError(f"'{text}' is not of the form section.key=value", place=where)
        parsed.append((key, parse_yaml(value, f"{where}: {key}")))
    return parsed


def override(raw: Mapping[str, Any], changes: Sequence[tuple[str, Any]], where: str = PLACE) -> dict[str, Any]:
    """`raw` with (section.key, value) put in; itself unchanged.

    A new choice drops the options of the old one; of two alternatives the overriding one stays.
    """
    parsed = [(key.split("."), value) for key, value in changes]
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
