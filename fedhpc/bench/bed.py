"""A base with random weights on a device, what trains on it, and how that is measured: bench --gpu.

The base is in bfloat16, rows are random tokens, clients take four steps of plain SGD.
"""

from __future__ import annotations

import statistics
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
_ROWS = 1024  # different ones, which clients share
_ENOUGH_S = 1.0  # of one thing measured: then it is not repeated
_RISE = 1.02  # by which twice as many must be faster for more to be tried
METHODS: dict[str, Mapping[str, Any]] = {"prefix": W1.method, "lora": W2.method}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    models: Mapping[str, Callable[[], Any]]  # name -> its configuration, of transformers
    cells: Sequence[tuple[int, int]]  # a client's batch and the tokens of a row, the most important first
    blocks: Sequence[int] = tuple(2**n for n in range(11))  # clients, ascending
    bare: Sequence[int] = tuple(2**n for n in range(4, 12))  # batches of the loop without federation, ascending
    square: int = 8192  # side of the matrices whose product is the peak
    repeats: int = 3  # at most
    seconds: float = 180.0  # that a part of the grid may take before it leaves cells out
    profiled: int = 16  # clients of the block that is profiled


class Bed:
    """A random base, a method on it, and what trains with them."""

    def __init__(self, model: str, method: str, device: Any, sizes: Sizes) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from fedhpc import registry
        from fedhpc.kinds.causal_lm import KIND
        from fedhpc.methods._linear import features
        from fedhpc.models import Base

        self.device, self.repeats, shape = device, sizes.repeats, sizes.models[model]()
        self.options = dict(METHODS[method])
        if method == "lora" and shape.model_type == "gpt2":
            self.options["targets"] = ["c_attn"]
        torch.manual_seed(0)
        with device:
            network = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa")
        network.requires_grad_(False).eval()
        self.base = Base(
            network, SimpleNamespace(pad_token_id=0), device, model, model, **vars(KIND.sizes(shape)), kind=KIND
        )
        self.settings = self.config(1).method
        self.method = registry.load("methods", method).METHOD(self.settings, self.base, 0)
        self.start = self.method.payload.flatten(self.method.initial()).unsqueeze(0)
        self.flops = 4 * sum(size[0] * size[1] for module in network.modules() if (size := features(module)))

    def config(self, batch: int) -> Any:
        """Of clients that take `STEPS` steps of `batch` rows."""
        from fedhpc import config

        client = {"optimizer": "sgd", "lr": LEARNING_RATE, "batch_size": batch, "steps": STEPS}
        return config.resolve({"partition": {"name": "iid"}, "method": self.options, "client": client})

    def rows(self, length: int) -> np.ndarray:
        """Random tokens: int32 (_ROWS, length)."""
        draw = np.random.default_rng(length)
        return draw.integers(self.base.model.config.vocab_size, size=(_ROWS, length), dtype=np.int32)

    def block(self, clients: int, batch: int, length: int) -> Callable[[], object]:
        """A block of so many clients, which trains when it is called."""
        from fedhpc.data.tokens import Tokens, examples_from
        from fedhpc.training.block import Work, train_block

        ones, each = np.ones(_ROWS, np.int32), STEPS * batch
        examples = examples_from(Tokens(self.rows(length).ravel(), np.arange(_ROWS + 1) * length, ones))
        works = [Work(client, np.arange(client * each, client * each + each) % _ROWS) for client in range(clients)]
        return partial(train_block, self.base, self.method, self.start, works, examples, self.config(batch), 1, 1)

    def texts(self, batch: int, length: int) -> Any:
        """What the loops train on, as one client: int64 (1, STEPS * batch, length)."""
        import torch

        rows = np.arange(STEPS * batch) % _ROWS
        return torch.from_numpy(self.rows(length)[rows]).long().unsqueeze(0).to(self.device)

    def measured(self, run: Callable[[], object], tokens: int) -> tuple[float, int]:
        """Tokens per second of `run`, which trains so many, and the bytes that it takes beyond what is there."""
        seconds: list[float] = []
        now, before = clock(self.device), reset_peak(self.device)
        while len(seconds) < 2 or (len(seconds) <= self.repeats and sum(seconds[1:]) < _ENOUGH_S):
            began = now()
            run()
            seconds.append(now() - began)
        return tokens / statistics.median(seconds[1:]), peak_bytes(self.device) - before  # the first warms up

    def blocks(self, ks: Sequence[int], batch: int, length: int) -> Ladder:
        """Blocks of so many clients."""
        each = STEPS * batch * (length - 1)
        return ladder(ks, lambda k: self.measured(self.block(k, batch, length), k * each), self.device)

    def looped(self, loop: Callable[[Any, int], None], batches: Sequence[int], length: int) -> Ladder:
        """`loop`, of peft_loop, with batches of so many rows."""
        return ladder(
            batches,
            lambda b: self.measured(partial(loop, self.texts(b, length), b), STEPS * b * (length - 1)),
            self.device,
        )


@dataclass(frozen=True)
class Ladder:
    """Tokens per second and bytes for each size, and why there is no larger one."""

    found: Mapping[int, tuple[float, int]]
    end: str

    @property
    def best(self) -> int:
        """The size that is fastest."""
        return max(self.found, key=lambda size: self.found[size][0])

    @property
    def rate(self) -> float:
        """Tokens per second at the best size."""
        return self.found[self.best][0]

    def __str__(self) -> str:
        rates = ", ".join(f"{size}: {rate:,.0f}" for size, (rate, _) in self.found.items())
        return f"tokens/s {rates}{self.end and f'; {self.end}'}"


def ladder(sizes: Sequence[int], measure: Callable[[int], tuple[float, int]], device: Any) -> Ladder:
    """`measure` of ascending sizes until memory ends or it gets no faster. UserError where none fits."""
    import torch

    found: dict[int, tuple[float, int]] = {}
    end = ""
    for size in sizes:
        try:
            now = measure(size)
        except torch.OutOfMemoryError:
            end = f"{size} does not fit in memory"
        if end:  # by now nothing holds on to what was computed
            free(device)
            break
        best = max((rate for rate, _ in found.values()), default=0.0)
        found[size] = now
        if now[0] < _RISE * best:
            end = "no faster"
            break
    if not found:
        raise UserError(end)
    return Ladder(found, end)


def matrix_peak(device: Any, sizes: Sizes) -> float:
    """FLOP/s of a product of large bfloat16 matrices of random numbers, the median of ten."""
    import torch

    left, right = (torch.randn(sizes.square, sizes.square, device=device, dtype=torch.bfloat16) for _ in "ab")
    now, seconds = clock(device), []
    for _ in range(13):
        began = now()
        left @ right
        seconds.append(now() - began)
    return 2 * sizes.square**3 / statistics.median(seconds[3:])
