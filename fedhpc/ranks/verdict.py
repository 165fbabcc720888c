"""Rank 0 does something for all ranks, and a mistake that it meets there ends all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fedhpc.errors import UserError
from fedhpc.ranks.transport.base import Transport

T = TypeVar("T")


class RefusedError(Exception):
    """Rank 0 found a mistake that a person can mend; it says so, and every rank leaves with 2."""


def on_server(transport: Transport, step: Callable[[], T]) -> T:
    """The JSON-able result of `step` on rank 0, on every rank; its UserError ends all of them with RefusedError."""
    verdict: dict[str, Any] = {}
    if transport.rank == 0:
        try:
            verdict = {"value": step()}
        except UserError as error:
            verdict = {"error": str(error)}
    verdict = transport.broadcast_json(verdict)
    if "error" in verdict:
        raise RefusedError(verdict["error"])
    value: T = verdict["value"]
    return value
