"""The words of the package: names that say nothing are not bound, and docstrings say something.

A folder that is not done yet has an allowance. It may only be lowered.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedhpc

PACKAGE = Path(fedhpc.__file__).parent

# Words that stood for an index, a rank, a result, a message, ... in turn. Say which: index, row, line, results.
FORBIDDEN = frozenset(
    ["found", "own", "kept", "said", "place", "places", "slot", "slots", "back", "about", "whole", "away"]
)

NAMES_ALLOWED: dict[str, int] = {
    "": 3,
    "approaches": 2,
    "approaches/distillation": 14,
    "approaches/rag": 15,
    "approaches/scoring": 3,
    "updates": 10,
}

DOCSTRINGS_ALLOWED: dict[str, int] = {
    "approaches/averaging": 9,
    "approaches/distillation": 11,
    "approaches/fedbpt": 1,
    "approaches/prompt_search": 1,
    "approaches/rag": 13,
}


def bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every variable, argument, attribute, function and class that a module binds."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def empty_docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring that sends the reader elsewhere or has fewer than three words."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text is not None and (len(text.split()) < 3 or text.startswith("See ")):
                yield getattr(node, "lineno", 1), text


def folder(file: Path) -> str:
    """The folder of a file, of the approaches the second too: "report", "approaches/rag", "" for the package itself."""
    parts = file.relative_to(PACKAGE).parts[:-1]
    return "/".join(parts[: 2 if parts[:1] == ("approaches",) else 1])


def over(allowed: dict[str, int], hits: list[tuple[str, str]]) -> list[str]:
    """The lines of the folders that have more than is allowed."""
    counts = Counter(name for name, _ in hits)
    return [line for name, line in hits if counts[name] > allowed.get(name, 0)]


def files() -> list[tuple[Path, ast.Module]]:
    """Every module of the package."""
    return [(file, ast.parse(file.read_text(encoding="utf-8"))) for file in sorted(PACKAGE.rglob("*.py"))]


def test_names_say_what_they_are() -> None:
    hits = [
        (folder(file), f"{file.relative_to(PACKAGE)}:{line}: {name}")
        for file, tree in files()
        for line, name in bound(tree)
        if FORBIDDEN & set(name.split("_"))
    ]
    assert over(NAMES_ALLOWED, hits) == []


def test_docstrings_say_something() -> None:
    hits = [
        (folder(file), f"{file.relative_to(PACKAGE)}:{line}: {text}")
        for file, tree in files()
        for line, text in empty_docstrings(tree)
    ]
    assert over(DOCSTRINGS_ALLOWED, hits) == []


@pytest.mark.parametrize(
    ("code", "names", "docstrings"),
    [
        ("def f(found): 'See g.'", ["f", "found"], ["See g."]),
        ("class A:\n 'A pair of numbers.'\n def f(self): self.own_rows = 1", ["A", "f", "self", "own_rows"], []),
        ("import numpy as kept\nfor place, (x, _) in []: pass", ["kept", "_", "place", "x"], []),
    ],
)
def test_what_is_counted(code: str, names: list[str], docstrings: list[str]) -> None:
    tree = ast.parse(code)
    assert sorted(name for _, name in bound(tree)) == sorted(names)
    assert [text for _, text in empty_docstrings(tree)] == docstrings
