"""The dialect of YAML that configurations are written in: strict, so that nothing is read otherwise than it looks."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fedhpc.errors import UserError


class Loader(yaml.SafeLoader):
    """Strict YAML: no duplicate keys; only true and false are booleans; 1e-3 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012  as PyYAML declares it
        first: [(tag, regex) for tag, regex in resolvers if tag not in ("tag:yaml.org,2002:bool",
                                                                        "tag:yaml.org,2002:float",
                                                                        "tag:yaml.org,2002:int",
                                                                        "tag:yaml.org,2002:timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }  # fmt: skip

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                problem = "a mapping cannot be a key; quote a text that has braces"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                problem = f"the key '{key}' stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_NUMBER = "-+0123456789."
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list(_NUMBER))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list(_NUMBER),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. UserError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such configuration file") from None
    except IsADirectoryError:
        file = f"a YAML file, such as {path / 'config.yaml'}" if (path / "config.yaml").is_file() else "a YAML file"
        raise UserError(f"{path}: is a folder; give {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 text file: {error}") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of sections, got {type(tree).__name__}")
    return tree


def parse_yaml(text: str, where: str) -> Any:
    """The tree of a YAML text under the strict rules. UserError with `where` and the line."""
    try:
        return yaml.load(text, Loader=Loader)  # a SafeLoader with stricter rules
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {error}") from None


def key_lines(path: Path) -> dict[str, int]:
    """The line of each key of a YAML file that read_yaml has read: {"client.lr": 7, ...}."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{prefix}{key.value}"
                lines[name] = key.start_mark.line + 1
                walk(value, f"{name}.")

    walk(yaml.compose(path.read_text(encoding="utf-8"), Loader=Loader), "")
    return lines


def to_yaml(tree: Any) -> str:
    """A tree of mappings, lists and values as YAML text, in the order that it has."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)
