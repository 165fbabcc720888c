"""Every key of the configuration as text, for people to read."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Literal, get_args, get_origin

from fedhpc import registry
from fedhpc.config.choices import is_section
from fedhpc.config.schema import SECTIONS
from fedhpc.registry import Section, choice_of, flat_choices


def reference(sections: Collection[str] = ()) -> str:
    """Every key with its default and what it means, as `python -m fedhpc.config` prints it; of some sections or all."""
    lines = [] if sections else ["mode: federated    # federated | centralized | local"]
    for name, model in SECTIONS.items():
        if sections and name not in sections:
            continue
        lines += [f"{name}:", *_keys(model, "  ")]
        for key, family in flat_choices(model).items():
            for choice in registry.names(family):
                lines += [f"  # with {key}: {choice}", *_keys(registry.options(family, choice), "  ")]
        for key, field in model.model_fields.items():
            inner = choice_of(field)
            if inner is not None and inner.default:
                for choice in registry.names(inner.family):
                    options = _keys(registry.options(inner.family, choice), "    ")
                    lines += [f"  # with {key}.name: {choice}", *options] if options else []
    return "\n".join(lines)


def _keys(model: type[Section], indent: str) -> list[str]:
    """A line for each key of a section, and below it those of the sections within."""
    lines = []
    for name, field in model.model_fields.items():
        choice = choice_of(field)
        inner = (
            None
            if choice
            else next((a for a in (field.annotation, *get_args(field.annotation)) if is_section(a)), None)
        )
        if inner is not None:
            lines += [f"{indent}{name}:    # {field.description}", *_keys(inner, f"{indent}  ")]
            continue
        nested = choice is not None and choice.default
        stated = {"name": choice.default} if choice is not None and nested else field.default
        default = "(required)" if field.is_required() and not nested else json.dumps(stated)
        values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        listed = f" ({' | '.join(map(str, values))})" if values else ""
        lines.append(f"{indent}{name}: {default}    # {field.description}{listed}")
    return lines
