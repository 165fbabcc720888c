"""Measures steps of DP-SGD: beside the same steps without privacy, and beside Opacus on the same model and batch.

One client with 16 examples, all of which are in every step: sampling with probability 1, so that all three do the same
work. Opacus (Yousefpour et al. 2021, arXiv 2109.12298) is PEFT's model in a GradSampleModule with a DPOptimizer, whose
rows appear where it can be imported.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedhpc.bench import workloads
from fedhpc.bench.compute import Trainer, clock, peak_bytes, peft_model, reset_peak
from fedhpc.bench.table import Part, Row, interleaved, ratio, skipped
from fedhpc.bench.workloads import LEARNING_RATE, W1, W1_BIG, W2, W2_BIG, Workload
from fedhpc.errors import UserError

_BATCH = 16
_STEPS = 4
_CLIP, _NOISE = 1.0, 1.0
_SLOWER, _FASTER, _MEMORY = 1.3, 1.5, 0.6


def parts(repeats: int, quick: bool) -> list[Part]:
    """All parts of this file."""
    chosen = (W1, W2) if quick else (W1, W2, W1_BIG, W2_BIG)
    return [part for workload in chosen for part in (partial(_speed, workload, repeats), partial(_memory, workload))]


def _speed(workload: Workload, repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(workload, Path(folder))
        runs: dict[str, Callable[[], None]] = {"plain": steps.plain, "private": steps.private, "halves": steps.halves}
        if find_spec("opacus"):
            runs["Opacus"] = steps.opacus()
        seconds = interleaved(runs, repeats, clock(steps.trainer.base.device))
    shown = ", ".join(f"{name} {1000 * statistics.median(s) / _STEPS:.1f} ms" for name, s in seconds.items())
    over = f"{workload.name}: a private step over Opacus, throughput"
    return [
        Row(
            f"{workload.name}: a private step over a plain one, time", ratio(seconds["private"], seconds["plain"]),
            _SLOWER, most=True, note=shown,
        ),
        Row(
            f"{workload.name}: a private step in two forwards over a plain one, time",
            ratio(seconds["halves"], seconds["plain"]), _SLOWER, most=True,
        ),
        Row(over, ratio(seconds["Opacus"], seconds["private"]), _FASTER)
        if "Opacus" in seconds
        else skipped(over, "there is no opacus to import"),
    ]  # fmt: skip


def _memory(workload: Workload) -> list[Row]:
    what = f"{workload.name}: memory of private steps beyond the loaded base, over Opacus"
    if not find_spec("opacus"):
        return [skipped(what, "there is no opacus to import")]
    taken = {}
    for name in ("private", "halves", "opacus"):
        call = f"from fedhpc.bench import private; print(private.taken_bytes({workload.name!r}, {name!r}))"
        done = subprocess.run([sys.executable, "-c", call], check=False, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"a process that measures memory ended with {done.returncode}: {done.stderr[-500:]}")
        taken[name] = int(done.stdout.split()[-1])
    note = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in taken.items())
    return [
        Row(what, taken["private"] / taken["opacus"], _MEMORY, most=True, note=note),
        Row(f"{what}, in two forwards", taken["halves"] / taken["opacus"], _MEMORY, most=True),
    ]


def taken_bytes(workload: str, what: str) -> int:
    """The peak memory of private steps (what = "private", "halves" or "opacus"), once base and data are loaded.

    Call it in a new process: memory that was freed before would not be counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(next(w for w in workloads.ALL if w.name == workload), Path(folder))
        step = steps.opacus() if what == "opacus" else getattr(steps, what)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else steps could use, uncounted, what was freed while loading
        before = reset_peak(steps.trainer.base.device)
        for _ in range(2):
            step()
        return peak_bytes(steps.trainer.base.device) - before


class Steps:
    """A few steps of one client, with and without privacy."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        from fedhpc.training.block import Work
        from fedhpc.training.example_privacy import ExamplePrivacy
        from fedhpc.training.local import LocalTraining

        self.trainer = Trainer(workload, folder, 1)
        approach = self.trainer.approach
        local = LocalTraining.of(approach.config, 1, 1)
        self._plain = replace(local, batch_size=_BATCH, steps=_STEPS, epochs=None)
        self._private = replace(self._plain, privacy=ExamplePrivacy(_CLIP, _NOISE))
        self._work = Work(0, approach.data.population.indices(0)[:_BATCH])
        self._start = approach.initial_payload().unsqueeze(0)

    def plain(self) -> None:
        """Take the steps without privacy."""
        self._train(self._plain)

    def private(self) -> None:
        """Take the steps of DP-SGD."""
        self._train(self._private)

    def halves(self) -> None:
        """Take them with half of the examples in a forward (client.micro_batch)."""
        self._train(replace(self._private, micro_batch=_BATCH // 2))

    def _train(self, local: Any) -> None:
        from fedhpc.training.block import train_block

        a = self.trainer.approach
        train_block(a.base, a.method, a.objective, self._start, [self._work], a.data.train, local)

    def opacus(self) -> Callable[[], None]:
        """Opacus on a copy of the same base, with the same sort of parameters: takes the steps when it is called."""
        import numpy as np
        import torch
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        warnings.filterwarnings("ignore", category=UserWarning, message="Full backward hook")
        warnings.filterwarnings("ignore", category=FutureWarning)
        approach = self.trainer.approach
        train, device = approach.data.train, self.trainer.base.device
        texts = torch.from_numpy(np.stack([train.tokens(int(row)) for row in self._work.indices])).long().to(device)
        adapted = peft_model(copy.deepcopy(self.trainer.base.model), approach.config.method).train()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        model = GradSampleModule(adapted, loss_reduction="mean")
        optimizer = DPOptimizer(
            torch.optim.SGD(trained, lr=LEARNING_RATE), noise_multiplier=_NOISE, max_grad_norm=_CLIP,
            expected_batch_size=_BATCH,
        )  # fmt: skip

        def take() -> None:
            for _ in range(_STEPS):
                optimizer.zero_grad()
                model(input_ids=texts, labels=texts).loss.backward()
                optimizer.step()

        return take
