"""Measures block training on one GPU: `python -m fedhpc.bench --gpu`.

Bases have random weights in bfloat16, rows are random tokens, and clients train a prefix of 16 or LoRA of rank 8 with
plain SGD. Times are wall seconds, taken once the GPU has done its work, and medians of repeats, one measurement after
another. Tokens are supervised ones. A frozen base needs 4 FLOPs a token for each weight of its linear layers: 2 in the
forward pass and 2 for the gradient of the layer's input. The products inside attention are not counted.

GPUs are lent by the minute, so the parts come in the order of their worth, in stages that have a share of the minutes.
A rehearsal is the same on a CPU with tiny models: it shows that every part works, and its figures mean nothing.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fedhpc.bench.bed import METHODS, STEPS, Bed, Clock, Ladder, Sizes, matrix_peak
from fedhpc.bench.compute import clock, free, peft_loop
from fedhpc.bench.table import Part, Row, skipped
from fedhpc.errors import UserError, nearest

MINUTES = 12.0
_COHORTS = (16, 64, 256)  # sizes for which block_size `auto` is measured

#: A part of the schedule: it looks at its clock between two measurements.
Timed = Callable[[Clock], Iterator[Row]]


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config()  # the small one: 12 layers of 768, 124 million parameters


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip


def _tiny_gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)


def _tiny_llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip


MODELS = {"gpt2": _gpt2, "llama": _llama}
_MORE = [(4, 64), (4, 256)] + [(batch, length) for batch in (16, 1) for length in (128, 64, 256, 512)]
FULL = Sizes(MODELS, [(4, 128), (4, 512)], [*_MORE, (64, 64), (64, 128)])
QUICK = Sizes({"gpt2": _gpt2}, [(4, 128)])
REHEARSAL = Sizes(
    {"gpt2": _tiny_gpt2, "llama": _tiny_llama}, [(2, 8)], [(1, 6)],
    blocks=(1, 2), bare=(2,), square=64, profiled=2, experts=3, runs="small",
)  # fmt: skip


def stages(device: Any, sizes: Sizes) -> list[tuple[float, dict[str, Timed]]]:
    """All parts by name, in stages: the share of the time that a stage has at most, and its parts.

    The last stage has all the time that is left.
    """
    from fedhpc.bench import gpu_grouped, gpu_runs

    both = [(model, method) for model in sizes.models for method in METHODS]
    run = {"size": sizes.runs, "device": "auto" if device.type == "cuda" else device.type}

    def each(topic: str, part: Callable[..., Iterator[Row]], models: Sequence[str] = ()) -> dict[str, Timed]:
        chosen = [(model, method) for model, method in both if not models or model in models]
        return {f"{topic}-{model}-{method}": partial(part, model, method, device, sizes) for model, method in chosen}

    def runs(topic: str, part: Callable[..., Iterator[Row]]) -> dict[str, Timed]:
        return {f"{topic}-{method}": partial(part, method, **run) for method in METHODS}

    def scarce(device: Any, size: str, until: Clock) -> Iterator[Row]:
        if device.type == "cpu":
            return iter([skipped("block_size auto with too little memory", "only a GPU's memory can be limited")])
        return gpu_runs.scarce(device, size)

    more = replace(sizes, cells=sizes.more)
    return [
        (2 / 12, {"peak": partial(peak, device, sizes), "tests": gpu_runs.tests, **runs("bits", gpu_runs.bits)}),
        (5 / 12, {**each("grid", grid), **each("compiled", compiled, ["gpt2"])}),
        (2 / 12, {**each("auto", auto), "scarce": partial(scarce, device, sizes.runs),
                  "grouped": partial(gpu_grouped.grouped, device, sizes)}),
        (1 / 12, each("profile", profile)),
        (1.0, {
            **runs("quantized", gpu_runs.quantized),
            **{f"more-{model}-{method}": partial(grid, model, method, device, more) for model, method in both},
            **each("compiled", compiled, ["llama"]), **runs("programs", gpu_runs.programs),
        }),
    ]  # fmt: skip


def parts(only: str, quick: bool, repeats: int, minutes: float = MINUTES, rehearsal: bool = False) -> list[Part]:
    """All parts of the bench of a GPU, or those that `only` names: "grid" includes "grid-gpt2-lora"."""
    import torch

    from fedhpc.models.imports import transformers

    if not rehearsal and not torch.cuda.is_available():
        raise UserError(
            "--gpu: torch sees no NVIDIA GPU here; this measures one and nothing else (--rehearsal: on the CPU, tiny)"
        )
    transformers()  # as a run imports it, before PEFT does
    device = torch.device("cpu") if rehearsal else torch.device("cuda", 0)
    sizes = replace(REHEARSAL if rehearsal else QUICK if quick else FULL, repeats=repeats)
    planned = stages(device, sizes)
    known = [name for _, stage in planned for name in stage]
    wanted = only.split(",") if only else known
    for name in wanted:
        if not any(f"{part}-".startswith(f"{name}-") for part in known):
            raise UserError(f"--only: there is no part '{name}'; {nearest(name, known)}")
    chosen = [
        (share, {part: run for part, run in stage.items() if any(f"{part}-".startswith(f"{w}-") for w in wanted)})
        for share, stage in planned
    ]
    schedule = Schedule(60 * minutes, [(share, list(stage)) for share, stage in chosen])
    return [partial(guarded, name, run, device, schedule) for _, stage in chosen for name, run in stage.items()]


class Schedule:
    """Deals out the time: that of a stage goes in equal shares to those of its parts that have not begun."""

    def __init__(self, seconds: float, planned: Sequence[tuple[float, Sequence[str]]]) -> None:
        """planned: the share of `seconds` that each stage has at most, and the names of its parts."""
        self._seconds, self._end = seconds, time.monotonic() + seconds
        self._stages = [(share, list(names)) for share, names in planned]
        self._ends: dict[int, float] = {}

    def begin(self, name: str) -> Clock:
        """The clock of the part that begins now."""
        number, (share, waiting) = next((n, s) for n, s in enumerate(self._stages) if name in s[1])
        now = time.monotonic()
        end = self._ends.setdefault(number, min(self._end, now + share * self._seconds))
        left = max(0.0, (end - now) / len(waiting))
        waiting.remove(name)
        return Clock(left, self._end - now)


def guarded(name: str, part: Timed, device: Any, schedule: Schedule) -> Iterator[Row]:
    """The rows of a part. Any failure becomes a UserError, so that the other parts go on; memory is freed before."""
    until = schedule.begin(name)
    if until.over:
        yield skipped(name, "no time was left for it")
        return
    free(device)
    try:
        yield from part(until)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise UserError(f"{name}: {type(error).__name__}: {error}") from error


def peak(device: Any, sizes: Sizes, until: Clock) -> Iterator[Row]:
    """The most FLOP/s that the GPU reaches, and its software versions."""
    import torch

    driver = "not known: there is no nvidia-smi"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    note = f"driver {driver}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    what = f"bf16 matrix peak, {sizes.square} x {sizes.square}"
    yield Row(what, matrix_peak(device, sizes) / 1e12, unit="TFLOP/s", note=note)


def grid(model: str, method: str, device: Any, sizes: Sizes, until: Clock) -> Iterator[Row]:
    """Compare blocks with one client, PEFT's loop client by client, the bare loop at its best batch, and the peak."""
    bed = Bed(model, method, device, sizes)
    loop, flops = peft_loop(bed.base.model, bed.settings), matrix_peak(device, sizes)
    bare: dict[int, Ladder] = {}
    for number, (batch, length) in enumerate(sizes.cells):
        what = f"{model} {method}, batch {batch}, {length} tokens"
        if until.over:
            left = len(sizes.cells) - number
            yield skipped(f"{what} and the {left - 1} cells after it", "its time was over")
            return
        # Two thirds of what is left for this cell are for its blocks, the rest is for what they are compared with.
        each = until.left / (len(sizes.cells) - number)
        blocks = bed.blocks(sizes.blocks, batch, length, Clock(each * 2 / 3))
        turn = bed.looped(loop, [batch], length, until)
        bare[length] = bare.get(length) or bed.looped(loop, sizes.bare, length, Clock(each / 3))
        k, aimed = blocks.best, batch == 4 and length <= 256
        yield Row(f"{what}: block of {k} over one client", blocks.rate / blocks.measured[1][0], 3.0 if aimed else None,
                  note=str(blocks))  # fmt: skip
        yield Row(f"{what}: its share of the matrix peak", blocks.rate * bed.flops / flops, unit="%",
                  note=f"{blocks.measured[k][1] / 2**30:.1f} GiB beyond the base")  # fmt: skip
        yield Row(f"{what}: over PEFT's loop, client by client", blocks.rate / turn.rate, note=str(turn))
        yield Row(f"{what}: over the bare loop at its best batch", blocks.rate / bare[length].rate,
                  0.85 if aimed else None, note=str(bare[length]))  # fmt: skip


def compiled(model: str, method: str, device: Any, sizes: Sizes, until: Clock) -> Iterator[Row]:
    """Compare blocks with PEFT's loop under torch.compile; only in the first cell, since it compiles for a minute."""
    bed, (batch, length) = Bed(model, method, device, sizes), sizes.cells[0]
    texts, now = bed.texts(batch, length), clock(device)
    loop = peft_loop(bed.base.model, bed.settings, compiled=True)
    began = now()
    loop(texts, batch)
    seconds = now() - began
    turn, blocks = bed.looped(loop, [batch], length, until), bed.blocks(sizes.blocks, batch, length, until)
    what = f"{model} {method}, batch {batch}, {length} tokens"
    note = f"{turn}, its first {STEPS} steps {seconds:.0f} s; block {blocks.best} {blocks.rate:,.0f}"
    yield Row(f"{what}: over PEFT's loop compiled, client by client", blocks.rate / turn.rate, note=note)


def auto(model: str, method: str, device: Any, sizes: Sizes, until: Clock) -> Iterator[Row]:
    """Compare the block size that `auto` chooses with the fastest one up to the cohort's size, in the first cell."""
    from fedhpc.participation.blocks import most_together, resolve_block_size

    bed, (batch, length) = Bed(model, method, device, sizes), sizes.cells[0]
    tried = bed.blocks(sizes.blocks, batch, length, until)
    for cohort in _COHORTS:
        config = bed.config(batch)
        k = min(cohort, most_together(config, resolve_block_size(config, cohort, device.type), device.type))
        best = Ladder({size: speed for size, speed in tried.measured.items() if size <= cohort}, "")
        rate = tried.measured[k][0] if k in tried.measured else bed.blocks([k], batch, length, until).rate
        what = f"{model} {method}, batch {batch}, {length} tokens: block_size auto for a cohort of {cohort}, {k}"
        yield Row(f"{what}, over the best, {best.best}", rate / best.rate, 0.9, note=str(best))


def profile(model: str, method: str, device: Any, sizes: Sizes, until: Clock) -> Iterator[Row]:
    """Profile where the time of a block's steps goes, in the first cell."""
    import torch

    bed, (batch, length), k = Bed(model, method, device, sizes), sizes.cells[0], sizes.profiled
    run, now = bed.block(k, batch, length), clock(device)
    seconds = k * STEPS * batch * (length - 1) / bed.measured(run, k * STEPS * batch * (length - 1))[0]
    activity = device.type.upper()
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, activity)]) as profiler:
        run()
        now()
    events = [event for event in profiler.events() if event.device_type.name == activity]
    spans = [(event.time_range.start, event.time_range.end, event.name) for event in events]
    what = f"{model} {method}, block of {k}, batch {batch}, {length} tokens"
    if not spans:
        raise UserError(f"{what}: torch's profiler saw no kernel")
    yield from timeline(what, spans, seconds)


def timeline(what: str, spans: Sequence[tuple[float, float, str]], seconds: float) -> Iterator[Row]:
    """Rows about the kernels of a block that takes `seconds` without a profiler.

    spans: (begin, end, name) of each kernel, in microseconds.
    """
    gaps, busy, reached = [], 0.0, min(begin for begin, _, _ in spans)
    for begin, end, _ in sorted(spans):
        if begin > reached:
            gaps.append(begin - reached)
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    yield Row(f"{what}: kernels and copies a step", len(spans) / STEPS)
    yield Row(f"{what}: GPU busy", busy / 1e6 / seconds, unit="%", note=f"of {seconds / STEPS * 1e3:.2f} ms a step")
    note = f"{len(gaps)} of them, the longest {max(gaps, default=0) / 1e3:.2f} ms"
    yield Row(f"{what}: gaps under the profiler", sum(gaps) / (sum(gaps) + busy), unit="%", note=note)
    names: dict[str, list[float]] = {}
    for begin, end, name in spans:
        names.setdefault(name, []).append(end - begin)
    total = sum(map(sum, names.values()))
    for name, took in sorted(names.items(), key=lambda item: -sum(item[1]))[:10]:
        note = f"{len(took) / STEPS:.4g} a step, {statistics.mean(took):.1f} us each"
        yield Row(f"{what}: {' '.join(name.split())[:70].replace('|', '/')}", sum(took) / total, unit="%", note=note)
