"""Lets transformers know which module has which class from a cache, in place of reading all of its models.

At every import transformers reads the 1,700 files of its models, and does so twice: half a second of processor time,
and more where many nodes read them from one file system. What that tells is written to a file, as bytecode is
(`$FEDHPC_CACHE/imports`, default `~/.cache/fedhpc/imports`), named by a hash of the names, sizes and times of what was
read: where a file changes, all are read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from fedhpc.data.tokens import cache_dir
from fedhpc.errors import UserError
from fedhpc.results.files import atomic_write

_READING, _FUNCTION = "transformers.utils.import_utils", "define_import_structure"  # the module that reads, and how
_FORMAT = 2  # of the file: a line with the SHA-256 of the rest, and JSON
#: For each set of packages that are needed: the classes of every module.
Structure = dict[frozenset[str], dict[str, set[str]]]


@contextmanager
def cached(write: bool) -> Iterator[None]:
    """Import transformers in here without reading its models, where the cache has what they would tell.

    write: whether the cache is filled where it has not. Once transformers is imported this changes nothing.
    """
    finder = _Finder(write)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder, Loader):
    """Imports the module of transformers that reads models, and lets a `Reader` stand before its function."""

    def __init__(self, write: bool) -> None:
        self.write = write
        self.loader: Any = None  # of the module

    def find_spec(self, fullname: str, path: Any, target: object = None) -> ModuleSpec | None:
        """The module's own, with this loader; None for all others."""
        spec = PathFinder.find_spec(fullname, path) if fullname == _READING else None
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As its own loader does."""
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run it, and look at the cache before it reads."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if read := getattr(module, _FUNCTION, None):
            program = Path(str(module.__file__))
            setattr(module, _FUNCTION, Reader(read, program, program.parents[1] / "models", self.write).structure)


class Reader:
    """Tells which module has which class, as `read` does, but for all of `models` from the cache, if it is there."""

    def __init__(self, read: Callable[..., Structure], program: Path, models: Path, write: bool) -> None:
        """program: the file that has `read`. models: a folder. write: whether the cache is filled."""
        self.read, self.program, self.models, self.write = read, program, models, write
        self.known: Structure | None = None

    def structure(self, module_path: str | Path, prefix: str | None = None, *more: Any, **others: Any) -> Structure:
        """The modules of a folder, or of that of a file, with their classes. prefix: what their names begin with."""
        if more or others or Path(module_path) not in (self.models, self.models / "__init__.py"):
            return self.read(module_path, prefix, *more, **others)
        if self.known is None:
            self.known = self._from_cache()
        start = "" if prefix is None else f"{prefix}."
        return {
            needed: {f"{start}{name}": set(classes) for name, classes in modules.items()}
            for needed, modules in self.known.items()
        }

    def _from_cache(self) -> Structure:
        """The modules of all models with their classes, read where the cache has none."""
        try:
            file = cache_dir().with_name("imports") / f"{self._content()}.json"
        except (OSError, RuntimeError):  # a link to nowhere among the files; nobody's home is known
            return self.read(self.models)
        with suppress(OSError, ValueError):
            return _parsed(file.read_bytes())
        structure = self.read(self.models)
        if self.write:
            stored = [
                (sorted(needed), {name: sorted(classes) for name, classes in modules.items()})
                for needed, modules in structure.items()
            ]
            with suppress(OSError, UserError):  # it is read again then
                file.parent.mkdir(parents=True, exist_ok=True)
                body = json.dumps(stored).encode()
                atomic_write(file, b"%s\n%s" % (_sum(body), body))
        return structure

    def _content(self) -> str:
        """A hash of the names, sizes and times of all files of models, and of the one that reads them."""
        digest = hashlib.sha256(f"{_FORMAT} {_state(self.program.stat())}".encode())
        folders = [str(self.models)]
        for folder in folders:  # grows while it is read
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir() and entry.name != "__pycache__":
                        folders.append(entry.path)
                    elif entry.name.endswith(".py"):
                        digest.update(f"{os.path.relpath(entry.path, self.models)} {_state(entry.stat())}\n".encode())
        return digest.hexdigest()[:32]


def _parsed(content: bytes) -> Structure:
    """What a file of the cache tells; ValueError where it is damaged."""
    stated, _, body = content.partition(b"\n")
    if stated != _sum(body):
        raise ValueError("the file is not as it was written")
    return {
        frozenset(needed): {name: set(classes) for name, classes in modules.items()}
        for needed, modules in json.loads(body)
    }


def _sum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _state(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns}"
