"""The words of the package: names that say nothing are not bound, and docstrings say something."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fedhpc

PACKAGE = Path(fedhpc.__file__).parent

# Words that stood for an index, a rank, a result, a message, ... in turn. Say which: index, row, line, results.
FORBIDDEN = frozenset(
    ["found", "own", "kept", "said", "place", "places", "slot", "slots", "back", "about", "whole", "away"]
)
# A UserError says in `place` where the mistake is: a file and line, or the command line.
ALLOWED = {("errors.py", "place")}


# How a docstring must not begin: it sends the reader elsewhere, or needs its owner to be understood.
_NO_SENTENCE = re.compile(r"(See|Those|That|Of (the|what|all|every))\b")
# Not plain English: say how many, who is to do what, which number is not finite.
PHRASES = ("so many", "a person can mend", "what is not finite", "holds likely")


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
    """Line and text of every docstring that sends the reader elsewhere, needs its owner, or has under three words."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text is not None and (len(text.split()) < 3 or _NO_SENTENCE.match(text)):
                yield getattr(node, "lineno", 1), text


@cache
def files() -> dict[str, ast.Module]:
    """Every module of the package by its path in it."""
    return {
        file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(PACKAGE.rglob("*.py"))
    }


def test_names_say_what_they_are() -> None:
    hits = [
        f"{file}:{line}: {name}"
        for file, tree in files().items()
        for line, name in bound(tree)
        if FORBIDDEN & set(name.split("_")) and (file, name) not in ALLOWED
    ]
    assert hits == [], "call it what it is: an index, a row, a rank, a location, lines, results, ..."


def test_sentences_are_plain() -> None:
    texts = {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    assert [f"{file}: {phrase}" for file, text in texts.items() for phrase in PHRASES if phrase in text] == []


def test_docstrings_say_something() -> None:
    hits = [f"{file}:{line}: {text}" for file, tree in files().items() for line, text in empty_docstrings(tree)]
    assert hits == [], "an overriding method that adds nothing needs no docstring"


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
