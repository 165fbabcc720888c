"""Going on from an adapter (method.from): the payload before the first round is the one that an adapter stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedhpc.errors import UserError
from fedhpc.methods._peft import adapter_config, adapter_tensors, read_json
from fedhpc.methods.base import Method, Tensors


@dataclass(frozen=True)
class WarmStart:
    """What an adapter's folder gives a method."""

    payload: Tensors
    digest: str  # sha256 of the adapter's tensors
    messages: Sequence[str]  # for the log

    @classmethod
    def of(cls, method: Method, source: str) -> WarmStart:
        """Read the folder `source`. UserError where it holds no adapter, or one that does not fit the method."""
        folder, base = Path(source).expanduser(), method.base
        try:
            config = adapter_config(folder)
            _require_same_classes(method, folder)
            tensors = adapter_tensors(folder, base) if "model_type" not in config else {}
            _require_finite(tensors)
            payload = method.imported(config, tensors)
        except UserError as error:
            raise error.but(key="method.from") if not error.key else error from None
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
        other = config.get("base_model_name_or_path")
        messages = [f"method.from: goes on from {folder}"]
        if other not in (None, base.source, base.name):
            messages.append(
                f"method.from: the adapter was trained on '{other}', and this base is '{base.source or base.name}'"
            )
        return cls(payload, digest.hexdigest(), messages)


def _require_finite(tensors: Tensors) -> None:
    """UserError for an adapter whose training diverged: every client that goes on from it would be rejected."""
    for name in sorted(tensors):
        if not torch.isfinite(tensors[name]).all():
            raise UserError(
                f"the adapter's {name} has values that are no finite numbers",
                remedy="give one whose training did not diverge",
            )


def _require_same_classes(method: Method, folder: Path) -> None:
    """UserError where the head in the adapter is of other classes than the base's."""
    theirs = read_json(folder / "config.json", missing_ok=True).get("id2label")
    ours = method.base.model.config.id2label
    if method.base.head and theirs and [*theirs.values()] != [*ours.values()]:
        raise UserError(
            f"the adapter tells apart {', '.join(theirs.values())}, and data.label has {', '.join(ours.values())}",
            remedy="take it out",
        )
