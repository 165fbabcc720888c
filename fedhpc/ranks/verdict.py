"""How a user's mistake ends all ranks alike: rank 0 finds it for all of them, and of several runs its run is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fedhpc.errors import UserError
from fedhpc.ranks.transport.base import Transport

T = TypeVar("T")


class RefusedError(Exception):
    """Rank 0 found a mistake of the user's, which it reports; every rank ends with exit code 2."""


class RunError(UserError):
    """A mistake in one of several runs that share the processes: the others only end beside it."""

    def __init__(self, run: str, problem: str) -> None:
        """run: its name. problem: the line of the mistake."""
        super().__init__(problem, place=run)
        self.run = run


@contextmanager
def errors_of(run: str) -> Iterator[None]:
    """Name the run in front of a mistake that comes from within; `run` is empty where it has the processes alone.

    RunError in place of a UserError; a RefusedError stays one.
    """
    try:
        yield
    except (UserError, RefusedError) as error:
        if not run:
            raise
        if isinstance(error, UserError):
            raise RunError(run, str(error)) from error
        raise RefusedError(f"{run}: {error}") from error


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
