"""Imports transformers without what it would import unasked."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar

from fedhpc.models import import_structure

_Function = TypeVar("_Function", bound=Callable[..., Any])

# What transformers imports where it is installed: for the losses of object detection, assisted generation, templates
# of chats.
_UNASKED = ("scipy", "sklearn", "jinja2")
_DYNAMO = "torch._dynamo"
_ALONE = "torch._dynamo._trace_wrapped_higher_order_op"  # which transformers makes masks with
#: What models of transformers import, which would import torch's compiler.
_OF_MODELS = ("transformers.modeling_utils", "transformers.masking_utils", "transformers.generation.utils")


@cache
def transformers() -> Any:
    """transformers, without what it would import unasked: a fifth of its time, and 34 MB in every process."""
    absent = [name for name in _UNASKED if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(absent))  # None tells Python that there is no such module
    try:
        # transformers imports torchao, and PEFT bitsandbytes, which log what they cannot use.
        for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
            logging.getLogger(name).setLevel(logging.ERROR)
        import transformers
        from transformers.utils import is_scipy_available, is_sklearn_available

        for remembers in (is_scipy_available, is_sklearn_available):  # most of its modules are imported later
            remembers()
        _import_jinja_when_asked()
    finally:
        for name in absent:
            del modules[name]
    return transformers


def _import_jinja_when_asked() -> None:
    """Let the first template of a chat that transformers renders import jinja2, which is hidden now.

    Its module about such templates looks for jinja2 once, when it is imported, and asks `is_jinja_available` again
    before it compiles one.
    """
    from transformers.utils import chat_template_utils, import_utils

    def look_again() -> bool:
        import_utils.is_jinja_available.cache_clear()
        importlib.reload(chat_template_utils)  # in place: functions that others have imported see its new names
        return bool(import_utils.is_jinja_available())

    if getattr(chat_template_utils, "jinja2", None) is None:
        chat_template_utils.is_jinja_available = look_again


def transformers_for_a_run(spread: bool = False, write_cache: bool = False) -> None:
    """Import transformers with its models, but not torch's compiler, tensors over many ranks, and their algebra.

    A run uses none of them, unless its base is spread over ranks; they take 66 MB, and 1.2 of the 4.2 s of all imports.
    For a process in which nothing else uses transformers: it can no longer divide a model among ranks there.
    write_cache: whether a file may tell the next start which module has which class.
    """
    with import_structure.cached(write_cache):
        transformers()
    if spread:
        return
    from transformers import utils

    for module in (utils, utils.import_utils):
        module.is_torch_distributed_available = _no
    with without_compiler():
        for name in _OF_MODELS:
            importlib.import_module(name)


def _no() -> bool:
    return False


@contextmanager
def without_compiler() -> Iterator[None]:
    """Let functions be marked for torch's compiler, or called behind such a mark, without importing it.

    Where it is there already nothing changes.
    """
    import torch

    if _DYNAMO in sys.modules:
        yield
        return
    spec = find_spec(_DYNAMO)
    assert spec is not None
    stand_in = _Dynamo(_DYNAMO)
    stand_in.__spec__, stand_in.__path__ = spec, list(spec.submodule_search_locations or ())
    finder = _FinderOfParts(stand_in)
    sys.modules[_DYNAMO] = stand_in
    torch._dynamo = stand_in
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        stand_in.leave()


def import_bitsandbytes() -> None:
    """Import bitsandbytes with none of its functions compiled: 4 s and 118 MB less in every process.

    It marks some for torch's compiler, and takes them as they are where a machine has no compiler for C++. So weights
    would be rounded by other code on one machine than on the next.
    """
    torch: Any = importlib.import_module("torch")
    compiler = torch.compile
    with without_compiler():
        torch.compile = _as_it_is
        try:
            importlib.import_module("bitsandbytes")
        finally:
            torch.compile = compiler


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """A function that is not compiled, or what makes it of one."""
    return _as_it_is if function is None else function


class _FinderOfParts(MetaPathFinder, Loader):
    """Imports torch's compiler where a module of it is asked for, but for the one that does without the others."""

    def __init__(self, stand_in: _Dynamo) -> None:
        self.stand_in = stand_in
        self.asked: tuple[ModuleType, ModuleSpec | None] | None = None  # what the import of the compiler has imported

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """None: another finder has to look for it. Else a module that is there since the compiler is."""
        if not fullname.startswith(f"{_DYNAMO}.") or fullname == _ALONE or not self.stand_in.leave():
            return None
        importlib.import_module(_DYNAMO)
        if fullname not in sys.modules:
            return None
        module = sys.modules.pop(fullname)  # else Python would import it once more; it puts back what is created
        self.asked = module, module.__spec__
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module that is there."""
        assert self.asked is not None
        return self.asked[0]

    def exec_module(self, module: ModuleType) -> None:
        """Give it back how it was found; it has run."""
        assert self.asked is not None
        module.__spec__ = self.asked[1]


class _Dynamo(ModuleType):
    """Stands in for torch's compiler where functions are marked for it; for all else the compiler is imported."""

    @staticmethod
    def disable(
        function: Callable[..., Any] | None = None, recursive: bool = True, **options: Any
    ) -> Callable[..., Any]:
        """Mark a function that the compiler leaves out, if it is ever imported."""
        if function is None:
            return partial(_Dynamo.disable, recursive=recursive, **options)

        @wraps(function)
        def called(*args: Any, **named: Any) -> Any:
            compiler = sys.modules.get(_DYNAMO)
            if compiler is None or isinstance(compiler, _Dynamo):
                return function(*args, **named)
            return compiler.disable(function, recursive, **options)(*args, **named)

        return called

    @staticmethod
    def allow_in_graph(function: _Function) -> _Function:
        """Mark a function that is compiled as it stands, which only makes it quicker."""
        return function

    assume_constant_result = allow_in_graph

    def leave(self) -> bool:
        """Let the compiler be imported from now on. Whether it could not be before."""
        import torch

        if sys.modules.get(_DYNAMO) is not self:
            return False
        del sys.modules[_DYNAMO]
        delattr(torch, "_dynamo")
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks every module for some while importing
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(_DYNAMO), name)
