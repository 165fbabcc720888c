"""Lets rank 0 do something for all ranks, so that a user's mistake that it finds ends all of them alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fedhpc.errors import UserError
from fedhpc.ranks.transport.base import Transport

T = TypeVar("T")


class RefusedError(Exception):
    """Rank 0 found a mistake of the user's, which it reports; every rank ends with exit code 2."""


def on_server(transport: Transport, step: Callable[[], T]) -> T:
    """Call `step` on rank 0 and return its result, which JSON must be able to carry, on every rank.

    A UserError of `step` becomes a RefusedError on all of them.
    """
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
