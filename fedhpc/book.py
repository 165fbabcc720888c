"""Rank 0's record of a run: results.h5 and the checkpoint, written in the order that loses nothing."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from fedhpc import registry
from fedhpc.approaches.base import Approach
from fedhpc.evaluation.evaluate import Outcome
from fedhpc.results import run_directory
from fedhpc.results.results_file import Results
from fedhpc.server.state import State
from fedhpc.training import client_state


class Book:
    """Rank 0's record of the run: results.h5 and the checkpoint, written in the order that loses nothing."""

    def __init__(self, approach: Approach, results: Results) -> None:
        self.approach, self.results = approach, results
        self._started = time.perf_counter()
        self._before = float(results.attributes.get("wall_seconds", 0.0))
        self._written_at, self._write_s = -float("inf"), 0.0

    def initial(self, outcome: Outcome | None) -> None:
        """Row 0: the evaluated initial state."""
        metrics = outcome.metrics if outcome else {}
        self.results.add_round({"round": 0, **{f"eval_{name}": value for name, value in metrics.items()}})

    def save(self, state: State, round_: int, complete: bool = False) -> None:
        """Checkpoint, then results.h5. The rows that the file lacks are in the checkpoint."""
        directory = self.approach.config.run_dir
        meta_rows, arrays = self.results.pending()
        meta = {
            "round": round_,
            "block_size": self.approach.block_size,
            "fingerprint_data": self.approach.data.fingerprint,
            "fingerprint_model": self.approach.fingerprint,
            "rows": meta_rows,
        }
        rows = {f"rows/{name}": array for name, array in arrays.items()}
        run_directory.save_checkpoint(directory, {**state.tensors(), **rows}, meta)
        # Only now is what it no longer names of no use.
        for client in state.renewed:
            client_state.prune(directory, client, state.versions[client])
        state.renewed.clear()
        now = time.perf_counter()
        # Writing takes longer as the run grows; at most a twentieth of the time goes into it.
        if complete or round_ == 0 or now - self._written_at > 20 * self._write_s:
            self.results.attributes["wall_seconds"] = self._before + now - self._started
            self.results.write(directory / "results.h5", complete)
            self._written_at = time.perf_counter()
            self._write_s = self._written_at - now
        run_directory.write_status(directory, "running", round_)


def attributes(approach: Approach, world_size: int, transport: str) -> dict[str, Any]:
    """The root attributes of results.h5 that describe a run."""
    config, device = approach.config, approach.base.device
    return {
        "config": config.to_yaml(),
        "method": config.method.name,
        "mode": config.mode,
        "model": config.model.name,
        "seed": config.run.seed,
        "world_size": world_size,
        "transport": transport,
        # A server on the CPU sees the workers' GPUs, or at least knows of them.
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else approach.placement.trains_on,
        "block_size": approach.block_size,
        **approach.attributes(),
        "fingerprint_data": approach.data.fingerprint,
        "fingerprint_model": approach.fingerprint,
    }


def new_results(approach: Approach, world_size: int, transport: str) -> Results:
    """Empty results with the attributes and the partition of a run."""
    metrics = [registry.short_name(name) for name in approach.config.evaluation.metrics]
    results = Results(attributes(approach, world_size, transport), metrics)
    population, train = approach.data.population, approach.data.train
    if population.assignment is not None:
        indices, offsets = population.assignment
        counts = population.label_counts(train) if train.labels is not None else None
        names = train.label_names if counts is not None else None
        results.set_partition(np.diff(offsets), counts, names, indices, offsets)
    return results
