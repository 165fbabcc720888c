"""One rank under liveness, for the tests: `python liveness_rank.py SCENARIO TIMEOUT_S STATUS_FILE`.

Prints "ready", then does what SCENARIO says of its rank; all others block in a collective.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import torch

from fedhpc.ranks.launch import detect
from fedhpc.ranks.liveness import Liveness
from fedhpc.ranks.transport import Transport, TransportError, open_transport


def say(text: str) -> None:
    # One write, so that lines of several ranks on one pipe stay whole.
    os.write(1, f"{text}\n".encode())


def collective(transport: Transport, rounds: int = 1) -> None:
    for _ in range(rounds):
        tensor = torch.ones(1000, dtype=torch.int64)
        transport.reduce_sum(tensor)
        transport.broadcast(tensor)
        assert int(tensor[0]) == transport.world_size


def act(scenario: str, transport: Transport, timeout_s: float) -> None:
    rank = transport.rank
    if scenario == "clean":
        collective(transport, rounds=20)
    elif scenario == "long_work":
        time.sleep(3 * timeout_s if rank == 1 else 0)
        collective(transport)
    elif scenario == "uneven_end":
        time.sleep(2 if rank == 0 else 0)  # the others are done and wait in stop()
    elif scenario == "hold_lock":
        if rank == 1:
            # PyDLL keeps Python's lock, like the import of a large extension module.
            ctypes.PyDLL(None).usleep(int(0.6e6 * timeout_s))
        collective(transport)
    elif scenario == "raise" and rank == 1:
        raise ValueError("the model does not fit")
    elif scenario == "raise_on_0" and rank == 0:
        raise ValueError("the disk is full")
    elif scenario == "sleep_on_last" and rank == transport.world_size - 1:
        time.sleep(600)
    else:
        collective(transport, rounds=10**9)


def main() -> None:
    scenario, timeout, status = sys.argv[1:]
    launch = detect(os.environ)
    torch.set_num_threads(1)
    transport = open_transport(launch, "auto", timeout_s=60)

    def on_exit(code: int, reason: str, run: str) -> None:
        with Path(status).open("a") as file:
            file.write(f"{transport.rank} {code} {reason}\n")

    liveness = Liveness(transport, launch, float(timeout), on_exit)
    liveness.start()
    say("ready")
    transport.barrier()
    try:
        act(scenario, transport, float(timeout))
    except Exception as error:
        liveness.fail(1, str(error), symptom=isinstance(error, TransportError))
    liveness.stop()
    transport.close()
    say("done")


if __name__ == "__main__":
    main()
