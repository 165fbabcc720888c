"""Collectives that fail: a symptom, as of another rank's death, and no fault of the rank that meets it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from fedhpc.lazy import torch


class TransportError(RuntimeError):
    """A collective failed, usually because another rank died: this is a symptom, rarely the cause."""


@contextlib.contextmanager
def collective(name: str) -> Iterator[None]:
    """Around what only waits for other ranks: its errors become TransportError, but for memory that ran out."""
    try:
        yield
    except (TransportError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        # Gloo's messages begin with the name of its source file in brackets.
        text = re.sub(r"^\[[^]]*\] *", "", str(error).partition("\n")[0])
        raise TransportError(f"{name} failed: {text}") from error
