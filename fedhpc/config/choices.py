"""Sections of the configuration are built from what the user wrote: the one place where names become choices.

A key that names a file of a family is marked with `Choice`. Three forms:
- a text: the options of the named file stand beside the key (`client: {optimizer: adamw, beta1: 0.9}`);
- a section or a list of them: each has its name and options inside (`method: {student: {name: lora, rank: 4}}`);
- a list of texts: names alone (`evaluation: {metrics: [loss, bleu]}`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeGuard, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from fedhpc import registry
from fedhpc.config.nearest import hint
from fedhpc.errors import UserError, nearest
from fedhpc.registry import Choice, Named, Section, choice_of, flat_choices

_UNION_MEMBER = re.compile(r"int|str|float|bool|list\[.*|literal\[.*|constrained-.*")  # as pydantic calls them
S = TypeVar("S", bound=Section)


def build(model: type[S], raw: Any, label: str) -> S:
    """The section `model` with the keys `raw`, and with the keys of the choices that it names.

    label: what the section is called, as in "client" or "method.student". UserError with the key.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{label} must be a mapping of keys to values, got {raw!r}", key=label)
    values = {str(key): value for key, value in raw.items()}
    options: list[type[Section]] = []
    for key, family in flat_choices(model).items():
        field = model.model_fields[key]
        name = values.get(key, None if field.is_required() else field.default)
        if name is None:
            valid = nearest("", registry.names(family))
            raise UserError(f"{label}.{key} is missing", key=f"{label}.{key}", remedy=valid)
        keys = registry.options(family, name, f"{label}.{key}")
        taken = set(keys.model_fields) & {
            *model.model_fields,
            *(one for other in options for one in other.model_fields),
        }
        if taken:
            raise UserError(f"{name} has the option {min(taken)}, which {label} has without it", key=f"{label}.{key}")
        options.append(keys)
        values[key] = name
    model = _joined(model, tuple(options))
    for key, field in model.model_fields.items():
        values |= _inner(field, key, values, f"{label}.{key}")
    try:
        return model(**values)
    except ValidationError as error:
        raise _readable(error, model, label) from None
    except Exception as error:  # of a plugin's own checks
        raise UserError(f"{type(error).__name__}: {error}", key=label) from error


def _joined(model: type[S], options: tuple[type[Section], ...]) -> type[S]:
    """The keys of a section and of its choices."""
    joined: type[S] = _of_classes(model, options)
    return joined


@cache
def _of_classes(model: type[Any], options: tuple[type[Section], ...]) -> type[Any]:
    """One class for each combination, so that equal configurations are equal."""
    with_keys = [one for one in dict.fromkeys(options) if one is not Section]
    if not with_keys:
        return model
    name = "+".join([model.__name__, *(one.__module__.rpartition(".")[2] for one in with_keys)])
    return create_model(name, __base__=(model, *with_keys))


@cache
def named(choice: Choice) -> type[Named]:
    """The section {name: ...} of a family."""
    made: type[Named] = create_model(
        choice.family, __base__=Named, name=(Annotated[str, Choice(choice.family)], choice.default or ...)
    )
    return made


def _inner(field: FieldInfo, key: str, values: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The value of a key that is a section itself, a list of sections or names of choices, built; else nothing."""
    value, choice, annotation = values.get(key), choice_of(field), field.annotation
    item = _item(annotation)
    if choice is not None and item is str:
        for name in value if isinstance(value, list) else []:
            registry.choice(choice.family, name, label)
    elif choice is not None and is_section(item):
        if value is not None and not isinstance(value, list):
            raise UserError(f"{label} must be a list of {{name: ...}}, got {value!r}", key=label)
        items = [{}] if value is None else value
        return {key: [build(named(choice), one, f"{label}[{i}]") for i, one in enumerate(items)]}
    elif choice is not None and annotation is not str:
        return {key: build(named(choice), {} if value is None else value, label)}
    elif is_section(item) and isinstance(value, list):
        return {key: [build(item, one, f"{label}[{i}]") for i, one in enumerate(value)]}
    elif annotation is not None and is_section(annotation):
        return {key: build(annotation, {} if value is None else value, label)}
    return {}


def _readable(error: ValidationError, model: type[Section], label: str) -> UserError:
    """What pydantic found first, in one line that names the key."""
    first, *others = error.errors()
    if first["type"] == "extra_forbidden":
        path = [str(part) for part in first["loc"]]
        key = ".".join([label, *path])
        remedy = hint(label.partition("[")[0], path[0], list(model.model_fields)) if len(path) == 1 else ""
        return UserError(f"unknown key '{key}'", key=key, remedy=remedy)
    if first["type"] == "missing":
        key = f"{label}.{first['loc'][0]}"
        return UserError(f"{key} is missing", key=key)
    location, messages = list(first["loc"]), [first["msg"]]
    if _UNION_MEMBER.fullmatch(str(location[-1])):  # none of several types fits: say all of them
        messages += [other["msg"] for other in others if list(other["loc"][:-1]) == location[:-1]]
        location.pop()
    problem = " or ".join(dict.fromkeys(text.removeprefix("Input should be ") for text in messages))
    if first["msg"].startswith("Input should be "):
        problem = f"must be {problem}"
    problem = problem.replace("a valid boolean", "true or false")
    if first["type"] == "string_pattern_mismatch":
        problem = "only letters, digits, spaces and . , + = - _ are allowed"
    if first["type"] in ("string_too_short", "too_short"):
        problem = "must not be empty"
    key = ".".join([label, *(str(part) for part in location if part != "[key]")])
    return UserError(f"{key}: {problem[0].lower()}{problem[1:]}, got {first['input']!r}", key=key)


def chosen(section: Section, label: str = "") -> Iterator[tuple[str, str, str]]:
    """All choices within a section, as (key, family, name): ("method.student.name", "methods", "lora")."""
    for key, value in section:  # not by attribute, which would look like somebody reading all keys
        choice = choice_of(type(section).model_fields[key])
        path = f"{label}.{key}" if label else key
        for i, one in enumerate(value) if isinstance(value, (list, tuple)) else [(-1, value)]:
            if isinstance(one, Section):
                yield from chosen(one, path if i < 0 else f"{path}[{i}]")
            elif choice is not None and isinstance(one, str):
                yield path, choice.family, one


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether a type is a section of the configuration."""
    # In Python 3.10 list[str] is an instance of type too.
    return isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, Section)


def _item(annotation: Any) -> Any:
    """X of list[X], also where None is another possibility; None of anything else."""
    for one in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]:
        if get_origin(one) is list:
            inner = get_args(one)[0]
            return get_args(inner)[0] if get_origin(inner) is Annotated else inner
    return None
