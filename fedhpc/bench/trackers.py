"""What trackers cost: CPU seconds of a round that is told, by what is installed.

    python -m fedhpc.bench.trackers

The round loop is not part of it: records like those of ten clients a round are told one after the other, each when the
one before has been taken. The libraries' imports and the first rounds are left out.
"""

from __future__ import annotations

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.results.following import Following
from fedhpc.results.progress import Progress
from fedhpc.results.record import RoundRecord, RunDescription
from fedhpc.results.results_file import CLIENTS, Results

ROUNDS, WARM_UP, COHORT = 100, 10, 10


def main() -> None:
    """Print a line for each tracker."""
    for name in registry.names("trackers"):
        package = registry.choice("trackers", name).package
        if find_spec(package) is None:
            print(f"{name}: not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            loop, all_of_it = measured(name, Path(folder))
        print(f"{name}: {1e3 * all_of_it:.1f} ms of CPU a round, {1e6 * loop:.0f} us of them in the round loop")


def measured(name: str, folder: Path) -> tuple[float, float]:
    """CPU seconds of a round: in the thread of the round loop, and in all threads and child processes."""
    config = configuration.resolve({"partition": {"name": "iid"}, "trackers": [name]})
    attributes = {"config": config.to_yaml(), "method": "prefix", "mode": "federated", "model": "builtin"}
    run = RunDescription(folder, ROUNDS, ["loss"], attributes, {}, {})
    following = Following(config.trackers, run, Results({}, ["loss"]), Progress(ROUNDS))
    loop = began = 0.0
    for round_ in range(ROUNDS + WARM_UP):
        if round_ == WARM_UP:
            loop, began = 0.0, _cpu_s()
        before = time.thread_time()
        following.round(_record(round_))
        loop += time.thread_time() - before
        while not following.idle:
            time.sleep(0.002)
    time.sleep(1.0)  # for the last one
    spent = _cpu_s() - began
    following.close()
    return loop / ROUNDS, spent / ROUNDS


def _record(round_: int) -> RoundRecord:
    generator = np.random.default_rng(round_)
    clients: dict[str, np.ndarray] = {}
    clients |= {name: generator.uniform(1, 9, COHORT).astype(column.dtype) for name, column in CLIENTS.items()}
    return RoundRecord(round_, train_loss=1.0 / (round_ + 1), metrics={"loss": 2.0}, clients=clients)


def _cpu_s() -> float:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


if __name__ == "__main__":
    main()
