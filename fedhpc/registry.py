"""Names in the configuration are names of files: `method: {name: lora}` is fedhpc/methods/lora.py.

A family is a folder; every file in it that is not `base` or private is a choice, and defines one class derived from
the family's base class, whose nested class `Options` has the choice's keys. An approach is a folder of its own, whose
options.py is the choice. Adding a choice is adding one file.

That file may also be a user's own (a plugin). The name is then one of:
- a path that ends in `.py`, relative to the working directory: `./mine.py`;
- a dotted module: `pkg.module`;
- an entry point of the group `fedhpc.<family>` of an installed package.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import threading
import traceback
from dataclasses import dataclass
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, get_origin

from pydantic import BaseModel, ConfigDict, SerializeAsAny
from pydantic.fields import FieldInfo

from fedhpc.errors import UserError, nearest

ROOT = Path(__file__).parent

#: family -> its files, as patterns below the package; the part for * is the name of the choice.
FAMILIES = {
    "aggregators": ["server/aggregators/*.py"],
    "attacks": ["attacks/*.py"],
    "client_optimizers": ["training/optimizers/*.py"],
    "devices": ["participation/devices/*.py"],
    "methods": ["methods/*.py", "methods/*/__init__.py", "approaches/*/options.py"],
    "metrics": ["evaluation/metrics/*.py"],
    "objectives": ["objectives/*.py"],
    "partitioners": ["data/partitioners/*.py"],
    "preaggregators": ["server/preaggregators/*.py"],
    "privacy": ["privacy/*.py"],
    "proposers": ["approaches/prompt_search/proposers/*.py"],
    "schedules": ["participation/schedules/*.py"],
    "secure_protocols": ["secure/protocols/*.py"],
    "server_optimizers": ["server/optimizers/*.py"],
    "trackers": ["results/trackers/*.py"],
    "transforms": ["updates/transforms/*.py"],
}

#: family -> its base class, as module:class; imported when a choice is, so that nothing here depends on it.
BASES = {
    "aggregators": "fedhpc.server.aggregators.base:Aggregator",
    "attacks": "fedhpc.attacks.base:Attack",
    "client_optimizers": "fedhpc.training.optimizers.base:ClientOptimizer",
    "devices": "fedhpc.participation.devices.base:Devices",
    "methods": "fedhpc.methods.base:Method",
    "metrics": "fedhpc.evaluation.metrics.base:Metric",
    "objectives": "fedhpc.objectives.base:Objective",
    "partitioners": "fedhpc.data.partitioners.base:Partitioner",
    "preaggregators": "fedhpc.server.preaggregators.base:Preaggregator",
    "privacy": "fedhpc.privacy.base:Privacy",
    "proposers": "fedhpc.approaches.prompt_search.proposers.base:Proposer",
    "schedules": "fedhpc.participation.schedules.base:Schedule",
    "secure_protocols": "fedhpc.secure.protocols.base:Protocol",
    "server_optimizers": "fedhpc.server.optimizers.base:ServerOptimizer",
    "trackers": "fedhpc.results.trackers.base:Tracker",
    "transforms": "fedhpc.updates.transforms.base:Transform",
}

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_importing = threading.RLock()


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, nothing is edited after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    #: What of the configuration is read with these options, as section or section.key; None: anything may be.
    reads: ClassVar[frozenset[str] | None] = None

    @property
    def fixes_rounds(self) -> str:
        """Why federation.rounds of a run that began cannot change; empty where it can."""
        return ""

    def conflict(self, config: Any) -> str | None:
        """What in the whole configuration does not go with these options, in one line; None where all does."""
        return None


@dataclass(frozen=True)
class Choice:
    """Marks a key that names choices of a family.

    Annotated[str, Choice("transforms")]: the options of the choice stand beside the key. Annotated[list[str],
    Choice("metrics")]: names alone. Annotated[Chosen, Choice("methods", "lora")], or a list of such: `{name: ..., its
    options}`, with the name that is taken where none is given.
    """

    family: str
    default: str = ""


def choice_of(field: FieldInfo) -> Choice | None:
    """The family that a key chooses from, if it does."""
    return next((mark for mark in field.metadata if isinstance(mark, Choice)), None)


def flat_choices(model: type[Section]) -> dict[str, str]:
    """The keys of a section whose options stand beside them, each with its family."""
    marked = {key: choice_of(field) for key, field in model.model_fields.items() if field.annotation is str}
    return {key: choice.family for key, choice in marked.items() if choice is not None}


class Open(Section):
    """A section with keys of its own and, beside them, the options of the choices that it names."""

    if TYPE_CHECKING:

        def __getattr__(self, key: str) -> Any: ...


class Named(Open):
    """`{name: ..., its options}`: a choice within a section."""

    name: str


#: A key with a choice of its own; it is written out with the options of the choice.
Chosen = SerializeAsAny[Named]


# ---------------------------------------------------------------- the package's own choices


@cache
def files(family: str) -> dict[str, Path]:
    """The package's own choices of a family and their files, relative to the package, by name."""
    by_name = {}
    for pattern in FAMILIES[family]:
        for file in ROOT.glob(pattern):
            name = file.relative_to(ROOT).parts[len(Path(pattern.partition("*")[0]).parts)].removesuffix(".py")
            if not name.startswith("_") and name != "base":
                by_name[name] = file.relative_to(ROOT)
    return dict(sorted(by_name.items()))


def names(family: str) -> list[str]:
    """The names of a family's choices: the package's own, then those of entry points of installed packages."""
    return [*files(family), *(name for name in _installed(family) if name not in files(family))]


def load(family: str, name: str, key: str = "name") -> ModuleType:
    """The module of one choice, which may be a plugin.

    UserError with the valid names where there is none, or with what is wrong with the plugin.
    """
    if is_plugin(family, name, key):
        return _plugin(family, name, key)
    parts = files(family)[name].with_suffix("").parts
    return importlib.import_module(".".join(["fedhpc", *parts]).removesuffix(".__init__"))


def choice(family: str, name: str, key: str = "name") -> type[Any]:
    """The class of one choice: the one in its file that derives from the family's base class.

    Of the methods that are approaches of their own it is the class of their approach. UserError as `load`.
    """
    if family == "methods" and is_approach(name):
        return approach(name)
    module = load(family, name, key)
    entry = _installed(family).get(name)
    if entry is not None and entry.attr:
        cls = getattr(module, entry.attr, None)
        base = _base(BASES[family])
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise UserError(f"{name} (entry point {entry.value}) is no class derived from {base.__name__}", key=key)
        return cls
    cls = _class(BASES[family], module, name, key)
    if is_plugin(family, name, key):
        _refuse_incomplete(cls, name, key)
    return cls


def is_approach(method: Any) -> bool:
    """Whether the name of a method is that of an approach of its own, and not of parameters that are averaged."""
    file = files("methods").get(method) if isinstance(method, str) else None
    return file is not None and file.parts[0] == "approaches"


def approach(method: str) -> type[Any]:
    """The class of approaches/ that runs a method: of its own folder, else the averaging of what it trains."""
    folder = files("methods")[method].parent.name if is_approach(method) else "averaging"
    module = importlib.import_module(f"fedhpc.approaches.{folder}.approach")
    return _class("fedhpc.approaches.base:Approach", module, method, "method.name")


def options(family: str, name: str, key: str = "name") -> type[Section]:
    """The keys of one choice in the configuration."""
    module = load(family, name, key)
    # Those of an approach stand apart from its class, so that they load without torch.
    holder = module if family == "methods" and is_approach(name) else choice(family, name, key)
    cls: type[Section] = getattr(holder, "Options", Section)
    if not (isinstance(cls, type) and issubclass(cls, Section)):
        raise UserError(f"Options of {name} is no class derived from fedhpc.registry.Section", key=key)
    return cls


def _base(path: str) -> type:
    module, _, name = path.partition(":")
    cls: type = getattr(importlib.import_module(module), name)
    return cls


def _class(base_path: str, module: ModuleType, choice_name: str, key: str) -> type[Any]:
    """The one public class of a module, or of a package's modules, that derives from a base class."""
    base = _base(base_path)
    classes = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and get_origin(value) is None  # in Python 3.10 NDArray[np.int64] is an instance of type too
        and issubclass(value, base)
        and f"{value.__module__}.".startswith(f"{module.__name__}.")
        and not value.__name__.startswith("_")
    }
    if not classes:
        raise UserError(
            f"{choice_name} has no class derived from {base.__module__}.{base.__name__}", key=key, remedy="define one"
        )
    if len(set(classes.values())) > 1:
        raise UserError(
            f"{choice_name} has several classes derived from {base.__name__} ({', '.join(classes)})",
            key=key,
            remedy="keep one, or let the names of the others begin with _",
        )
    return next(iter(classes.values()))


def _refuse_incomplete(cls: type[Any], name: str, key: str) -> None:
    """UserError where the class of a plugin lacks a method, or an attribute that its base only declares."""
    declared = {
        name
        for base in cls.__mro__
        for name, kind in vars(base).get("__annotations__", {}).items()
        if "ClassVar" in str(kind)
    }
    missing = sorted({*getattr(cls, "__abstractmethods__", ()), *(name for name in declared if not hasattr(cls, name))})
    if missing:
        raise UserError(f"the class {cls.__name__} of {name} lacks {', '.join(missing)}", key=key)


def short_name(name: str) -> str:
    """A choice's name in tables and columns: of a plugin the name of its file, without folders."""
    return Path(name).stem if name.endswith(".py") else name.rpartition(".")[2]


# ---------------------------------------------------------------- plugins


def is_plugin(family: str, name: Any, key: str = "name") -> bool:
    """Whether a name says a file outside the package; UserError where it says nothing that is valid."""
    if isinstance(name, str):
        installed = _installed(family)
        if name in files(family):
            if name in installed:
                raise UserError(
                    f"'{name}' is a choice of fedhpc and an entry point of {_origin(installed[name])} too",
                    key=key,
                    remedy=f"rename that one, or name its module: {installed[name].module}",
                )
            return False
        if name in installed or name.endswith(".py") or _MODULE.fullmatch(name):
            return True
    hint = nearest(str(name), names(family))
    if isinstance(name, str) and name and Path(f"{name}.py").is_file():
        hint = f"a file of your own is './{name}.py'; {hint}"
    raise UserError(f"unknown value '{name}'", key=key, remedy=hint)


def source_hash(family: str, name: str, key: str = "name") -> str | None:
    """sha256 of the file of a plugin, by which a resumed run knows that it is the same; None for fedhpc's own."""
    if not is_plugin(family, name, key):
        return None
    if name.endswith(".py"):
        _plugin(family, name, key)
        return _in_use(Path(name), key).digest
    file = _plugin(family, name, key).__file__
    return hashlib.sha256(_read(Path(file), key)).hexdigest() if file else "no file"


def _plugin(family: str, name: str, key: str) -> ModuleType:
    entry = _installed(family).get(name)
    try:
        with _importing:
            if entry is not None:
                return importlib.import_module(entry.module)
            if name.endswith(".py"):
                return _in_use(Path(name), key).module
            here = os.getcwd()  # as python -m has it; a console script has the folder of the script instead
            if here not in sys.path and "" not in sys.path:
                sys.path.append(here)
            return importlib.import_module(name)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if entry is None and not name.endswith(".py") and f"{name}.".startswith(f"{error.name}."):
            hint = nearest(name, names(family))
            raise UserError(f"there is no module '{name}'", key=key, remedy=hint) from None
        raise UserError(f"{name} cannot be imported: {error}{_line(error)}", key=key) from error
    except (Exception, SystemExit) as error:
        detail = error.msg if isinstance(error, SyntaxError) else error
        why = f"{type(error).__name__}: {detail}{_line(error)}"
        raise UserError(f"{name} cannot be imported: {why}", key=key) from error


class _File(NamedTuple):
    module: ModuleType
    digest: str  # sha256 of what it was made from


_files_in_use: dict[Path, _File] = {}


def reread() -> None:
    """From here on a plugin is what its file says now.

    Until then it stays what it was, so a run that is going on is not changed by who edits it.
    """
    with _importing:
        _files_in_use.clear()


def _in_use(path: Path, key: str) -> _File:
    file = path.resolve()
    if file not in _files_in_use:
        source = _read(path, key)
        _files_in_use[file] = _File(_from_file(path, source), hashlib.sha256(source).hexdigest())
    return _files_in_use[file]


class _Uncached(SourceFileLoader):
    """Compiles the file anew: cached byte code may be that of an earlier version of the same second and size."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _from_file(path: Path, source: bytes) -> ModuleType:
    """The module of a file with this content, imported once for each."""
    name = f"fedhpc_plugin_{hashlib.sha256(source + str(path.resolve()).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_Uncached(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no file '{path}' in {Path.cwd()}", key=key) from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}", key=key) from None


def _line(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})" if error.lineno else ""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _installed(family: str) -> dict[str, EntryPoint]:
    """The entry points of a family by name."""
    return _entries(tuple(sys.path))[family]


@cache
def _entries(path: tuple[str, ...]) -> dict[str, dict[str, EntryPoint]]:
    """All families' entry points; they depend on where Python looks for packages. UserError where two share a name."""
    families: dict[str, dict[str, EntryPoint]] = {family: {} for family in FAMILIES}
    all_entries = entry_points()
    for family, entries in families.items():
        for entry in all_entries.select(group=f"fedhpc.{family}"):
            other = entries.setdefault(entry.name, entry)
            if other.value != entry.value:
                raise UserError(
                    f"the entry point {entry.name} of fedhpc.{family} is declared by {_origin(other)} and by "
                    f"{_origin(entry)}: uninstall one of them"
                )
    return families


def _origin(entry: EntryPoint) -> str:
    return str(entry.dist.name) if entry.dist is not None else entry.value
