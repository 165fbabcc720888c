"""A rank of fedhpc.main that fails at a chosen moment, for tests/test_failures.py; forked from a process that has
imported the heavy libraries, so that a run costs a second."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM  # noqa: F401  imported once, here

from fedhpc import federation, main  # noqa: F401
from fedhpc.approaches import prepare
from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.ranks import process
from fedhpc.ranks.liveness import Liveness  # noqa: F401
from fedhpc.ranks.transport import torch_dist
from fedhpc.results import files
from fedhpc.training import client_state


def _raise() -> None:
    raise ValueError("the sky fell")


def _allocate() -> None:
    torch.empty(2**52, dtype=torch.uint8)  # torch's own error


ACTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exception": _raise,
    "memory": _allocate,
}
# What is called at the moment, and at which call of it the rank fails: in the third or fourth round.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "start-up": (prepare, "prepare", 1),
    "local training": (Averaging, "local", 8),
    "collective": (torch_dist.TorchTransport, "_reduce_sum", 7),
    "server step": (Averaging, "step", 3),
    "checkpoint": (files, "to_disk", 30),
    "client state": (client_state, "save", 8),
}


def run(rank: int, environ: Mapping[str, str], arguments: Sequence[str], log: str, act: str, moment: str) -> None:
    """This process as `rank`: fedhpc.main with `arguments`, which fails with `act` at `moment` if that is given."""
    for number, path in ((1, f"{log}.out"), (2, f"{log}.err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environ)
    if act:
        owner, name, number = MOMENTS[moment]
        called, calls = getattr(owner, name), iter(range(1, 10**6))

        def failing(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                ACTS[act]()
            return called(*args, **kwargs)

        setattr(owner, name, failing)
    process.leave(main.main(arguments))
