"""Names in the configuration are names of files: `method: {name: lora}` is fedhpc/methods/lora.py.

A family is a folder; every file in it that is not `base` or private is a choice. An approach is a folder of its own,
whose options.py is the choice. Each has a class `Options` (its keys in the configuration) and what its family asks
for. Adding a choice is adding one file.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from fedhpc.errors import UserError, nearest

ROOT = Path(__file__).parent

#: family -> its files, as patterns below the package; the part for * is the name of the choice.
FAMILIES = {
    "aggregators": ["server/aggregators/*.py"],
    "client_optimizers": ["training/optimizers/*.py"],
    "kinds": ["kinds/*.py"],
    "methods": ["methods/*.py", "approaches/*/options.py"],
    "metrics": ["evaluation/metrics/*.py"],
    "partitioners": ["data/partitioners/*.py"],
    "proposers": ["approaches/prompt_search/proposers/*.py"],
    "server_optimizers": ["server/optimizers/*.py"],
    "transforms": ["updates/transforms/*.py"],
}


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, nothing is edited after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    #: Why federation.rounds of a run that began cannot change; empty where it can.
    fixes_rounds: ClassVar[str] = ""

    def conflict(self, config: Any) -> str | None:
        """What in the whole configuration does not go with these options, in one line; None where all does."""
        return None


@dataclass(frozen=True)
class Choice:
    """Marks a key whose value is `{name: ..., its options}` of a family: Annotated[Any, Choice("methods", "lora")]."""

    family: str
    default: str


def files(family: str) -> dict[str, Path]:
    """The choices of a family and their files, relative to the package, by name."""
    found = {}
    for pattern in FAMILIES[family]:
        for file in ROOT.glob(pattern):
            name = file.relative_to(ROOT).parts[len(Path(pattern.partition("*")[0]).parts)].removesuffix(".py")
            if not name.startswith("_") and name != "base":
                found[name] = file.relative_to(ROOT)
    return dict(sorted(found.items()))


def names(family: str) -> list[str]:
    """The choices of a family, e.g. names("methods") or names("partitioners")."""
    return list(files(family))


def load(family: str, name: str, key: str = "name") -> ModuleType:
    """The module of one choice; UserError with the valid names where there is none."""
    valid = files(family)
    if not isinstance(name, str) or name not in valid:
        raise UserError(f"{key}: unknown value '{name}'; {nearest(str(name), list(valid))}")
    return importlib.import_module(".".join(["fedhpc", *valid[name].with_suffix("").parts]))


def approach(method: ModuleType) -> Any:
    """The class of approaches/ that runs a method; most methods say what is averaged, the others name what they do."""
    name = getattr(method, "APPROACH", "averaging")
    return importlib.import_module(f"fedhpc.approaches.{name}.approach").APPROACH


def options(family: str, name: str, key: str = "name") -> type[Section]:
    """The `Options` class of one choice."""
    cls: type[Section] = load(family, name, key).Options
    return cls
