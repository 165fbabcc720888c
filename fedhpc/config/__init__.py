"""The configuration: one YAML file, typed, strict, resolved once and never edited.

schema has the keys, choices builds sections from what the user wrote, overrides puts the command line over the file,
check has what no single key can tell. Unknown keys and values are errors that name the nearest valid one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

from fedhpc import registry
from fedhpc.config import check
from fedhpc.config.choices import build, chosen
from fedhpc.config.nearest import section_hint
from fedhpc.config.overrides import PLACE, override, parse_overrides, typed
from fedhpc.config.schema import ALTERNATIVES, EMBEDDED, KEYS, LISTS, SECTIONS
from fedhpc.config.schema import QUANTIZATION as QUANTIZATION
from fedhpc.config.schema import Config as Config
from fedhpc.config.schema import Data as Data
from fedhpc.config.schema import Evaluation as Evaluation
from fedhpc.config.schema import Join as Join
from fedhpc.config.schema import Missing as Missing
from fedhpc.config.schema import Model as Model
from fedhpc.config.schema import Overlong as Overlong
from fedhpc.config.schema import TrainOn as TrainOn
from fedhpc.config.yaml import key_lines, parse_yaml, read_yaml
from fedhpc.errors import UserError, nearest
from fedhpc.registry import Section

S = TypeVar("S", bound=Section)

__all__ = [
    "EMBEDDED", "KEYS", "Config", "Data", "Evaluation", "Join", "Missing", "Model", "Overlong", "TrainOn", "changed",
    "load", "load_changed", "override", "parse_overrides", "parse_yaml", "plugins", "read_yaml", "resolve", "restore",
    "restore_stated", "section", "stated", "unread",
]  # fmt: skip


def load(path: str | Path | None, overrides: Sequence[str]) -> Config:
    """The configuration in the file `path` (None: the embedded default) with `section.key=value` overrides."""
    return load_changed(path, parse_overrides(overrides), PLACE)


def load_changed(path: str | Path | None, changes: Sequence[tuple[str, Any]], changed_where: str) -> Config:
    """Read the configuration in a file and change some keys; errors say that those were given in `changed_where`.

    What the embedded default says of keys that the chosen method does not read is left out (`resolve`).
    """
    source = Path(path) if path is not None else EMBEDDED
    where = (str(path) if path else "embedded default") + (f" and {changed_where}" if changes else "")
    tree = read_yaml(source)
    changes = typed(tree, changes, changed_where)
    given = {key: f"{source}:{line}" for key, line in key_lines(source).items()} if path is not None else {}
    return resolve(override(tree, changes, changed_where), where, given | _given(changes, changed_where))


def changed(config: Config, changes: Sequence[tuple[str, Any]], changed_where: str) -> Config:
    """A resolved configuration with some keys changed; keys that a new method does not read are left out."""
    tree = config.model_dump(mode="json")
    changes = typed(tree, changes, changed_where)
    raw = override(tree, changes, changed_where)
    return resolve(raw, "configuration", _given(changes, changed_where))


def resolve(raw: Mapping[str, Any], where: str = "configuration", given: Mapping[str, str] | None = None) -> Config:
    """Validate a raw tree. UserError with one line that names the key.

    given: the keys that a person gave for this run, as section.key, each with the place where it stands; default all
    of `raw`. Of those, every one must be read by somebody; of the others those that nobody reads are left out.
    Plugins are what their files say now.
    """
    registry.reread()
    with _placed(given or {}, where):
        config = _resolved(raw if given is None else check.without_unread(raw, given))
        check.refuse_unread(config, _keys(raw) if given is None else given)
        check.conflicts(config)
    return config


def restore(raw: Mapping[str, Any], where: str = "configuration") -> Config:
    """A configuration that a run has resolved before, as its file or rank 0 has it. UserError as `resolve`."""
    with _placed({}, where):
        config = _resolved(raw)
        check.conflicts(config)
    return config


def stated(config: Config) -> dict[str, Any]:
    """What other ranks need of a configuration, as JSON: its tree, and which sources its plugins have."""
    return {"config": config.model_dump(mode="json"), "plugins": plugins(config)}


def restore_stated(message: Mapping[str, Any]) -> Config:
    """The configuration of rank 0 on this rank. UserError where a plugin is missing here or has another source."""
    registry.reread()
    config = restore(message["config"])
    here = plugins(config)
    for which, digest in message["plugins"].items():
        if here.get(which) != digest:
            key, _, name = which.partition(" ")
            remedy = "give all hosts the same file"
            raise UserError(f"the plugin {name} has another source here than on rank 0", key=key, remedy=remedy)
    return config


def section(model: type[S], raw: Mapping[str, Any], label: str, where: str) -> S:
    """One section with the keys `raw`; label: what it is called. UserError with the key, and `where` it stands."""
    with _placed({}, where):
        return build(model, raw, label)


def plugins(config: Config) -> dict[str, str]:
    """The plugins that a configuration names, each with the sha256 of its source: {"method.name ./mine.py": ...}."""
    hashes = {
        f"{key} {name}": registry.source_hash(family, name, key)
        for key, family, name in chosen(config)
    }  # fmt: skip
    return {which: digest for which, digest in hashes.items() if digest is not None}


def unread(config: Config) -> list[str]:
    """The keys of a configuration, as section.key, that its method does not read: other values change nothing."""
    return [key for name in SECTIONS for key in check.unread_of(config, name)]


def _resolved(raw: Mapping[str, Any]) -> Config:
    for key, value in raw.items():
        if key not in KEYS:
            words = [str(word) for word in value] if isinstance(value, Mapping) else []
            raise UserError(f"unknown key '{key}'", key=str(key), remedy=section_hint(str(key), words))
    values: dict[str, Any] = {}
    for name, model in SECTIONS.items():
        if name not in LISTS:
            values[name] = check.completed(build(model, _mapping(raw, name), name))
    for name in LISTS:
        items = [] if raw.get(name) is None else raw[name]
        if not isinstance(items, list):
            raise UserError(f"{name} must be a list of names or of {{name: ...}}, got {items!r}", key=name)
        named = [{"name": item} if isinstance(item, str) else item for item in items]
        values[name] = tuple(build(SECTIONS[name], item, f"{name}[{i}]") for i, item in enumerate(named))
    values["mode"] = raw.get("mode", "federated")
    modes = list(get_args(Config.model_fields["mode"].annotation))
    if values["mode"] not in modes:
        raise UserError(
            f"mode: unknown value '{values['mode']}'", key="mode", remedy=nearest(str(values["mode"]), modes)
        )
    return Config.model_construct(**values)


def _mapping(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be a mapping of keys to values, got {value!r}", key=name)
    for one, other in [ALTERNATIVES[name]] if name in ALTERNATIVES else []:
        if value.get(one) is not None and value.get(other) is not None:
            key = f"{name}.{one}"
            raise UserError(f"{key} and {name}.{other} exclude each other", key=key, remedy="give one")
    return value


def _keys(tree: Any, prefix: str = "") -> dict[str, str]:
    """The keys of nested mappings, as section.key, each with an empty text: where it was given is not known."""
    keys: dict[str, str] = {}
    for key, value in tree.items() if isinstance(tree, Mapping) else []:
        keys |= {f"{prefix}{key}": "", **_keys(value, f"{prefix}{key}.")}
    return keys


def _given(changes: Sequence[tuple[str, Any]], where: str) -> dict[str, str]:
    """The keys that are changed, and those within them, each with the place where it was given."""
    return {f"{key}{rest}": where for key, value in changes for rest in ["", *_keys(value, ".")]}


@contextmanager
def _placed(given: Mapping[str, str], where: str) -> Iterator[None]:
    """Complete the errors inside this context that do not say where their key was given.

    given: for each key the file and line, or the command line. where: what to say for all other keys.
    """
    try:
        yield
    except UserError as error:
        if error.place:
            raise
        key = error.key.partition("[")[0]
        while key and key not in given:
            key = key.rpartition(".")[0]
        raise error.but(place=given.get(key) or where) from error.__cause__
