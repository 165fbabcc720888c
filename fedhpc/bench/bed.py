"""A test bed for bench --gpu: a base with random weights on a device, blocks and loops that train on it, their speed.

The base is in bfloat16, rows are random tokens, clients take four steps of plain SGD.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedhpc.bench.compute import clock, free, peak_bytes, reset_peak
from fedhpc.bench.workloads import LEARNING_RATE, W1, W2
from fedhpc.errors import UserError

STEPS = 4  # of a client
_ROWS = 1024  # how many different rows there are, which clients share
_ENOUGH_S = 1.0  # a measurement is not repeated once it has taken this long in all
_RISE = 1.02  # the next larger size is tried only if the last doubling was faster by this factor
METHODS: dict[str, Mapping[str, Any]] = {"prefix": W1.method, "lora": W2.method}


@dataclass(frozen=True)
class Sizes:
    """Which models and sizes are measured, and for how long."""

    models: Mapping[str, Callable[[], Any]]  # name -> its configuration of transformers
    cells: Sequence[tuple[int, int]]  # a client's batch and the tokens of a row, the most important first
    more: Sequence[tuple[int, int]] = ()  # cells that are measured where time is left in the end
    blocks: Sequence[int] = (1, 4, 16, 64, 256, 1024)  # clients, ascending
    bare: Sequence[int] = (16, 64, 256, 1024)  # batches of the loop without federation, ascending
    square: int = 8192  # side of the matrices whose product is the peak
    repeats: int = 3  # at most
    profiled: int = 16  # size of the block that is profiled, and whose products are grouped
    experts: int = 64  # whose products are grouped
    runs: str = "large"  # size of the base that whole runs train (workloads.py)


class Clock:
    """Says how many seconds a part has left. A part looks at it between two measurements; nothing interrupts it."""

    def __init__(self, seconds: float = math.inf, of_all: float = math.inf) -> None:
        """seconds: that the part has; of_all: that all parts have from now on."""
        now = time.monotonic()
        self._end, self._end_of_all = now + seconds, now + of_all

    def at_least(self, seconds: float) -> float:
        """The seconds that are left; where these are fewer than `seconds`, what all parts together have, up to them."""
        return max(self.left, min(seconds, self._end_of_all - time.monotonic()))

    @property
    def left(self) -> float:
        """Seconds that are left, below 0 once they are over."""
        return self._end - time.monotonic()

    @property
    def over(self) -> bool:
        return self.left <= 0


class Bed:
    """A base with random weights and a method on it, with blocks and loops that train them."""

    def __init__(self, model: str, method: str, device: Any, sizes: Sizes, **options: Any) -> None:
        """options: of the method, other than those of the workload."""
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from fedhpc import registry
        from fedhpc.methods._linear import features
        from fedhpc.models.causal_lm import CausalLM
        from fedhpc.objectives.language_modelling import LanguageModelling

        self.device, self.repeats, shape = device, sizes.repeats, sizes.models[model]()
        self.options = {**METHODS[method], **options}
        if method == "lora" and shape.model_type == "gpt2":
            self.options["targets"] = ["c_attn"]
        logging.set_verbosity_error()
        torch.manual_seed(0)
        with device:
            network = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa")
        network.requires_grad_(False).eval()
        self.base = CausalLM.of(
            network, SimpleNamespace(pad_token_id=0, bos_token_id=None, eos_token_id=None), device, model, model
        )
        self.objective = LanguageModelling()
        self.settings = self.config(1).method
        self.method = registry.choice("methods", method)(self.settings, self.base, 0)
        self.start = self.method.payload.flatten(self.method.initial()).unsqueeze(0)
        self.flops = 4 * sum(size[0] * size[1] for module in network.modules() if (size := features(module)))

    def config(self, batch: int) -> Any:
        """The configuration of clients that take `STEPS` steps of `batch` rows."""
        from fedhpc import config

        client = {"optimizer": "sgd", "lr": LEARNING_RATE, "batch_size": batch, "steps": STEPS}
        return config.resolve({"partition": {"name": "iid"}, "method": self.options, "client": client})

    def rows(self, length: int) -> np.ndarray:
        """Random tokens: int32 (_ROWS, length)."""
        draw = np.random.default_rng(length)
        return draw.integers(self.base.model.config.vocab_size, size=(_ROWS, length), dtype=np.int32)

    def block(self, clients: int, batch: int, length: int) -> Callable[[], object]:
        """A function that trains a block of `clients` clients."""
        from fedhpc.data.tokens import Tokens, examples_from
        from fedhpc.training.block import Work, train_block
        from fedhpc.training.local import LocalTraining

        ones, each = np.ones(_ROWS, np.int32), STEPS * batch
        examples = examples_from(Tokens(self.rows(length).ravel(), np.arange(_ROWS + 1) * length, ones))
        works = [Work(client, np.arange(client * each, client * each + each) % _ROWS) for client in range(clients)]
        local = LocalTraining.of(self.config(batch), 1, 1)
        return partial(train_block, self.base, self.method, self.objective, self.start, works, examples, local)

    def texts(self, batch: int, length: int) -> Any:
        """The tokens that a loop without federation trains on, as one client: int64 (1, STEPS * batch, length)."""
        import torch

        rows = np.arange(STEPS * batch) % _ROWS
        return torch.from_numpy(self.rows(length)[rows]).long().unsqueeze(0).to(self.device)

    def measured(self, run: Callable[[], object], tokens: int) -> tuple[float, int]:
        """Tokens per second of `run`, which trains `tokens` of them, and the bytes it takes beyond those in use."""
        seconds: list[float] = []
        now, before = clock(self.device), reset_peak(self.device)
        while len(seconds) < 2 or (len(seconds) <= self.repeats and sum(seconds[1:]) < _ENOUGH_S):
            began = now()
            run()
            seconds.append(now() - began)
        return tokens / statistics.median(seconds[1:]), peak_bytes(self.device) - before  # the first warms up

    def blocks(self, ks: Sequence[int], batch: int, length: int, until: Clock) -> Ladder:
        """Measure blocks of `ks` clients, ascending."""
        each = STEPS * batch * (length - 1)
        return ladder(ks, lambda k: self.measured(self.block(k, batch, length), k * each), self.device, until)

    def looped(self, loop: Callable[[Any, int], None], batches: Sequence[int], length: int, until: Clock) -> Ladder:
        """Measure `loop`, made by peft_loop, with batches of `batches` rows, ascending."""
        return ladder(
            batches,
            lambda b: self.measured(partial(loop, self.texts(b, length), b), STEPS * b * (length - 1)),
            self.device,
            until,
        )


@dataclass(frozen=True)
class Ladder:
    """Tokens per second and bytes for each size that was measured, and why no larger one was."""

    measured: Mapping[int, tuple[float, int]]
    end: str

    @property
    def best(self) -> int:
        """The size that is fastest."""
        return max(self.measured, key=lambda size: self.measured[size][0])

    @property
    def rate(self) -> float:
        """Tokens per second at the best size."""
        return self.measured[self.best][0]

    def __str__(self) -> str:
        rates = ", ".join(f"{size}: {rate:,.0f}" for size, (rate, _) in self.measured.items())
        return f"tokens/s {rates}{self.end and f'; {self.end}'}"


def ladder(sizes: Sequence[int], measure: Callable[[int], tuple[float, int]], device: Any, until: Clock) -> Ladder:
    """Measure ascending sizes until one does not fit in memory, is no faster, or the time is over.

    The first is measured in any case. UserError where it does not fit.
    """
    import torch

    measured: dict[int, tuple[float, int]] = {}
    end = ""
    for size in sizes:
        if measured and until.over:
            end = "then the time was over"
            break
        try:
            now = measure(size)
        except torch.OutOfMemoryError:
            end = f"{size} does not fit in memory"
        if end:  # outside the except block, where the exception no longer holds the tensors
            free(device)
            break
        best = max((rate for rate, _ in measured.values()), default=0.0)
        measured[size] = now
        if now[0] < _RISE * best:
            end = "no faster"
            break
    if not measured:
        raise UserError(end)
    return Ladder(measured, end)


def matrix_peak(device: Any, sizes: Sizes) -> float:
    """FLOP/s of the product of two large random bfloat16 matrices, the median of ten."""
    import torch

    left, right = (torch.randn(sizes.square, sizes.square, device=device, dtype=torch.bfloat16) for _ in "ab")
    now, seconds = clock(device), []
    for _ in range(13):
        began = now()
        left @ right
        seconds.append(now() - began)
    return 2 * sizes.square**3 / statistics.median(seconds[3:])
