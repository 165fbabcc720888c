"""Modules that are imported on first use.

The configuration must be checked before torch is imported (seconds per process), yet a method and its options
live in one file. Such a file imports what it needs of torch from here, in one line:

    from fedhpc.lazy import Tensor, kernels, torch

Other heavy modules are bound with `lazy`; extras get an error that names them.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fedhpc.errors import UserError


class _LazyModule(ModuleType):
    def __init__(self, name: str, extra: str | None) -> None:
        super().__init__(name)
        self.__dict__["_extra"] = extra

    def __getattr__(self, attribute: str) -> Any:
        # Python asks every module for dunders while importing; only real uses may trigger the import.
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        try:
            module = importlib.import_module(self.__name__)
        except ModuleNotFoundError as error:
            if self._extra is None or not self.__name__.startswith(str(error.name)):
                raise
            raise UserError(f"this needs the package '{error.name}': pip install 'fedhpc[{self._extra}]'") from error
        value = getattr(module, attribute)
        self.__dict__[attribute] = value
        return value


def lazy(name: str, extra: str | None = None) -> Any:
    """The module `name`, imported at its first attribute access; `extra` names the pyproject extra that has it."""
    return _LazyModule(name, extra)


if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor

    from fedhpc import kernels as kernels
else:
    torch, kernels = lazy("torch"), lazy("fedhpc.kernels")
    Tensor = Any  # for annotations alone; torch.Tensor is the class
