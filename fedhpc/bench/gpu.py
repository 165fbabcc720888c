"""Block training on one GPU: `python -m fedhpc.bench --gpu`.

Bases with random weights in bfloat16, rows of random tokens, plain SGD; a prefix of 16, or LoRA of rank 8. Wall
seconds, each taken once the GPU has done its work; medians of repeats, one thing after another. Tokens are supervised
ones.
A frozen base needs 4 FLOPs a token for each weight of its linear layers, 2 forward and 2 for the gradient of what goes
in; attention's own products are not counted.

A part is a function of the device and of the sizes, so that tests run all of them on a CPU.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from fedhpc.bench.compute import clock, free, peak_bytes, peft_loop, reset_peak
from fedhpc.bench.table import Part, Row, skipped
from fedhpc.bench.workloads import LEARNING_RATE, W1, W2
from fedhpc.errors import UserError, nearest

_STEPS = 4  # of a client
_ROWS = 1024  # different ones, which clients share
_ENOUGH_S = 1.0  # of one thing measured: then it is not repeated
_RISE = 1.02  # by which twice as many must be faster for more to be tried


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config()  # the small one: 12 layers of 768, 124 million parameters


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip


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


MODELS = {"gpt2": _gpt2, "llama": _llama}
_CELLS = [(4, 128), (4, 64), (4, 256), (4, 512)]
_CELLS += [(batch, length) for batch in (16, 1) for length in (128, 64, 256, 512)] + [(64, 64), (64, 128)]
FULL, QUICK = Sizes(MODELS, _CELLS), Sizes({"gpt2": _gpt2}, _CELLS[:1])
METHODS: dict[str, Mapping[str, Any]] = {"prefix": W1.method, "lora": W2.method}


def parts(only: str, quick: bool, repeats: int) -> list[Part]:
    """All figures of this file and of gpu_programs.py, or those that `only` names: "grid" is "grid-gpt2-lora" too."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("--gpu: torch sees no NVIDIA GPU here; this measures one and nothing else")
    device, sizes = torch.device("cuda", 0), replace(QUICK if quick else FULL, repeats=repeats)
    both = [(model, method) for model in sizes.models for method in METHODS]
    found: dict[str, Part] = {"peak": partial(peak, device, sizes)}
    for kind, part in {"profile": profile, "grid": grid, "compiled": compiled}.items():
        found |= {f"{kind}-{model}-{method}": partial(part, model, method, device, sizes) for model, method in both}
    chosen: dict[str, Part] = {}
    for name in only.split(",") if only else found:
        named = {part: found[part] for part in found if f"{part}-".startswith(f"{name}-")}
        if not named:
            raise UserError(f"--only: there is no part '{name}'; {nearest(name, list(found))}")
        chosen |= named
    return [partial(_guarded, name, part, device) for name, part in chosen.items()]


def _guarded(name: str, part: Part, device: Any) -> Iterator[Row]:
    """The rows of a part, whose failure of any kind is a UserError: the other parts go on, with all memory."""
    free(device)
    try:
        yield from part()
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise UserError(f"{name}: {type(error).__name__}: {error}") from error


# ---- what is measured with


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
        """Of clients that take `_STEPS` steps of `batch` rows."""
        from fedhpc import config

        client = {"optimizer": "sgd", "lr": LEARNING_RATE, "batch_size": batch, "steps": _STEPS}
        return config.resolve({"partition": {"name": "iid"}, "method": self.options, "client": client})

    def rows(self, length: int) -> np.ndarray:
        """Random tokens: int32 (_ROWS, length)."""
        draw = np.random.default_rng(length)
        return draw.integers(self.base.model.config.vocab_size, size=(_ROWS, length), dtype=np.int32)

    def block(self, clients: int, batch: int, length: int) -> Callable[[], object]:
        """A block of so many clients, which trains when it is called."""
        from fedhpc.data.tokens import Tokens, examples_from
        from fedhpc.training.block import Work, train_block

        ones, each = np.ones(_ROWS, np.int32), _STEPS * batch
        examples = examples_from(Tokens(self.rows(length).ravel(), np.arange(_ROWS + 1) * length, ones))
        works = [Work(client, np.arange(client * each, client * each + each) % _ROWS) for client in range(clients)]
        return partial(train_block, self.base, self.method, self.start, works, examples, self.config(batch), 1, 1)

    def texts(self, batch: int, length: int) -> Any:
        """What the loops train on, as one client: int64 (1, _STEPS * batch, length)."""
        import torch

        rows = np.arange(_STEPS * batch) % _ROWS
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
        each = _STEPS * batch * (length - 1)
        return ladder(ks, lambda k: self.measured(self.block(k, batch, length), k * each), self.device)

    def looped(self, loop: Callable[[Any, int], None], batches: Sequence[int], length: int) -> Ladder:
        """`loop`, of peft_loop, with batches of so many rows."""
        return ladder(
            batches,
            lambda b: self.measured(partial(loop, self.texts(b, length), b), _STEPS * b * (length - 1)),
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


# ---- the parts


def peak(device: Any, sizes: Sizes) -> Iterator[Row]:
    """What the GPU does at most, and what runs on it."""
    import torch

    driver = "not known: there is no nvidia-smi"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    note = f"driver {driver}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    what = f"bf16 matrix peak, {sizes.square} x {sizes.square}"
    yield Row(what, matrix_peak(device, sizes) / 1e12, unit="TFLOP/s", note=note)


def grid(model: str, method: str, device: Any, sizes: Sizes) -> Iterator[Row]:
    """Blocks against one client, PEFT's loop client by client, the bare loop at its best batch, and the peak."""
    began, bed = time.monotonic(), Bed(model, method, device, sizes)
    loop, flops = peft_loop(bed.base.model, bed.settings), matrix_peak(device, sizes)
    bare: dict[int, Ladder] = {}
    for done, (batch, length) in enumerate(sizes.cells):
        what = f"{model} {method}, batch {batch}, {length} tokens"
        if time.monotonic() - began > sizes.seconds:
            left = len(sizes.cells) - done
            yield skipped(f"{what} and the {left - 1} cells after it", f"{sizes.seconds:.0f} s were over")
            return
        blocks, turn = bed.blocks(sizes.blocks, batch, length), bed.looped(loop, [batch], length)
        bare[length] = bare.get(length) or bed.looped(loop, sizes.bare, length)
        k, aimed = blocks.best, batch == 4 and length <= 256
        yield Row(f"{what}: block of {k} over one client", blocks.rate / blocks.found[1][0], 3.0 if aimed else None,
                  note=str(blocks))  # fmt: skip
        yield Row(f"{what}: its share of the matrix peak", blocks.rate * bed.flops / flops, unit="%",
                  note=f"{blocks.found[k][1] / 2**30:.1f} GiB beyond the base")  # fmt: skip
        yield Row(f"{what}: over PEFT's loop, client by client", blocks.rate / turn.rate, note=str(turn))
        yield Row(f"{what}: over the bare loop at its best batch", blocks.rate / bare[length].rate,
                  0.85 if aimed else None, note=str(bare[length]))  # fmt: skip


def compiled(model: str, method: str, device: Any, sizes: Sizes) -> Iterator[Row]:
    """Blocks against PEFT's loop under torch.compile, in the first cell alone: it compiles for a minute."""
    bed, (batch, length) = Bed(model, method, device, sizes), sizes.cells[0]
    texts, now = bed.texts(batch, length), clock(device)
    loop = peft_loop(bed.base.model, bed.settings, compiled=True)
    began = now()
    loop(texts, batch)
    seconds = now() - began
    turn, blocks = bed.looped(loop, [batch], length), bed.blocks(sizes.blocks, batch, length)
    what = f"{model} {method}, batch {batch}, {length} tokens"
    note = f"{turn}, its first {_STEPS} steps {seconds:.0f} s; block {blocks.best} {blocks.rate:,.0f}"
    yield Row(f"{what}: over PEFT's loop compiled, client by client", blocks.rate / turn.rate, note=note)


def profile(model: str, method: str, device: Any, sizes: Sizes) -> Iterator[Row]:
    """Where the time of a block's steps goes, in the first cell."""
    import torch

    bed, (batch, length), k = Bed(model, method, device, sizes), sizes.cells[0], sizes.profiled
    run, now = bed.block(k, batch, length), clock(device)
    seconds = k * _STEPS * batch * (length - 1) / bed.measured(run, k * _STEPS * batch * (length - 1))[0]
    kind = device.type.upper()
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profiler:
        run()
        now()
    events = [event for event in profiler.events() if event.device_type.name == kind]
    spans = [(event.time_range.start, event.time_range.end, event.name) for event in events]
    what = f"{model} {method}, block of {k}, batch {batch}, {length} tokens"
    yield from timeline(what, spans, seconds)


def timeline(what: str, spans: Sequence[tuple[float, float, str]], seconds: float) -> Iterator[Row]:
    """Rows about kernels, (begin, end, name) in microseconds, of a block that takes `seconds` without a profiler."""
    gaps, busy, reached = [], 0.0, min(begin for begin, _, _ in spans)
    for begin, end, _ in sorted(spans):
        if begin > reached:
            gaps.append(begin - reached)
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    yield Row(f"{what}: kernels and copies a step", len(spans) / _STEPS)
    yield Row(f"{what}: GPU busy", busy / 1e6 / seconds, unit="%", note=f"of {seconds / _STEPS * 1e3:.2f} ms a step")
    note = f"{len(gaps)} of them, the longest {max(gaps, default=0) / 1e3:.2f} ms"
    yield Row(f"{what}: gaps under the profiler", sum(gaps) / (sum(gaps) + busy), unit="%", note=note)
    names: dict[str, list[float]] = {}
    for begin, end, name in spans:
        names.setdefault(name, []).append(end - begin)
    total = sum(map(sum, names.values()))
    for name, took in sorted(names.items(), key=lambda item: -sum(item[1]))[:10]:
        note = f"{len(took) / _STEPS:.4g} a step, {statistics.mean(took):.1f} us each"
        yield Row(f"{what}: {' '.join(name.split())[:70].replace('|', '/')}", sum(took) / total, unit="%", note=note)
