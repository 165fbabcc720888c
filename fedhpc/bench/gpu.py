"""Measures block training on one GPU: `python -m fedhpc.bench --gpu`.

Bases have random weights in bfloat16, rows are random tokens, and clients train a prefix of 16 or LoRA of rank 8 with
plain SGD. Times are wall seconds, taken once the GPU has done its work, and medians of repeats, one measurement after
another. Tokens are supervised ones. A frozen base needs 4 FLOPs a token for each weight of its linear layers: 2 in the
forward pass and 2 for the gradient of the layer's input. The products inside attention are not counted.

A part is a function of the device and the sizes, so that tests can run all of them on a CPU.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fedhpc.bench.bed import METHODS, STEPS, Bed, Ladder, Sizes, matrix_peak
from fedhpc.bench.compute import clock, free, peft_loop
from fedhpc.bench.table import Part, Row, skipped
from fedhpc.errors import UserError, nearest

_COHORTS = (16, 64, 256)  # sizes for which block_size `auto` is measured


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config()  # the small one: 12 layers of 768, 124 million parameters


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip


MODELS = {"gpt2": _gpt2, "llama": _llama}
_CELLS = [(4, 128), (4, 64), (4, 256), (4, 512)]
_CELLS += [(batch, length) for batch in (16, 1) for length in (128, 64, 256, 512)] + [(64, 64), (64, 128)]
FULL, QUICK = Sizes(MODELS, _CELLS), Sizes({"gpt2": _gpt2}, _CELLS[:1])


def parts(only: str, quick: bool, repeats: int) -> list[Part]:
    """All parts of this file and of gpu_runs.py, or those that `only` names: "grid" includes "grid-gpt2-lora"."""
    import torch

    from fedhpc.bench import gpu_runs

    if not torch.cuda.is_available():
        raise UserError("--gpu: torch sees no NVIDIA GPU here; this measures one and nothing else")
    device, sizes = torch.device("cuda", 0), replace(QUICK if quick else FULL, repeats=repeats)
    both = [(model, method) for model in sizes.models for method in METHODS]
    known: dict[str, Part] = {"peak": partial(peak, device, sizes)}
    for topic, part in {"profile": profile, "grid": grid, "compiled": compiled, "auto": auto}.items():
        known |= {f"{topic}-{model}-{method}": partial(part, model, method, device, sizes) for model, method in both}
    known["scarce"] = partial(gpu_runs.scarce, device)
    for topic, run in {"programs": gpu_runs.programs, "bits": gpu_runs.bits}.items():
        known |= {f"{topic}-{method}": partial(run, method) for method in METHODS}
    chosen: dict[str, Part] = {}
    for name in only.split(",") if only else known:
        named = {part: known[part] for part in known if f"{part}-".startswith(f"{name}-")}
        if not named:
            raise UserError(f"--only: there is no part '{name}'; {nearest(name, list(known))}")
        chosen |= named
    return [partial(guarded, name, part, device) for name, part in chosen.items()]


def guarded(name: str, part: Part, device: Any) -> Iterator[Row]:
    """The rows of a part. Any failure becomes a UserError, so that the other parts go on; memory is freed before."""
    free(device)
    try:
        yield from part()
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise UserError(f"{name}: {type(error).__name__}: {error}") from error


def peak(device: Any, sizes: Sizes) -> Iterator[Row]:
    """The most FLOP/s that the GPU reaches, and its software versions."""
    import torch

    driver = "not known: there is no nvidia-smi"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    note = f"driver {driver}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    what = f"bf16 matrix peak, {sizes.square} x {sizes.square}"
    yield Row(what, matrix_peak(device, sizes) / 1e12, unit="TFLOP/s", note=note)


def grid(model: str, method: str, device: Any, sizes: Sizes) -> Iterator[Row]:
    """Compare blocks with one client, PEFT's loop client by client, the bare loop at its best batch, and the peak."""
    began, bed = time.monotonic(), Bed(model, method, device, sizes)
    loop, flops = peft_loop(bed.base.model, bed.settings), matrix_peak(device, sizes)
    bare: dict[int, Ladder] = {}
    for number, (batch, length) in enumerate(sizes.cells):
        what = f"{model} {method}, batch {batch}, {length} tokens"
        if time.monotonic() - began > sizes.seconds:
            left = len(sizes.cells) - number
            yield skipped(f"{what} and the {left - 1} cells after it", f"{sizes.seconds:.0f} s were over")
            return
        blocks, turn = bed.blocks(sizes.blocks, batch, length), bed.looped(loop, [batch], length)
        bare[length] = bare.get(length) or bed.looped(loop, sizes.bare, length)
        k, aimed = blocks.best, batch == 4 and length <= 256
        yield Row(f"{what}: block of {k} over one client", blocks.rate / blocks.measured[1][0], 3.0 if aimed else None,
                  note=str(blocks))  # fmt: skip
        yield Row(f"{what}: its share of the matrix peak", blocks.rate * bed.flops / flops, unit="%",
                  note=f"{blocks.measured[k][1] / 2**30:.1f} GiB beyond the base")  # fmt: skip
        yield Row(f"{what}: over PEFT's loop, client by client", blocks.rate / turn.rate, note=str(turn))
        yield Row(f"{what}: over the bare loop at its best batch", blocks.rate / bare[length].rate,
                  0.85 if aimed else None, note=str(bare[length]))  # fmt: skip


def compiled(model: str, method: str, device: Any, sizes: Sizes) -> Iterator[Row]:
    """Compare blocks with PEFT's loop under torch.compile; only in the first cell, since it compiles for a minute."""
    bed, (batch, length) = Bed(model, method, device, sizes), sizes.cells[0]
    texts, now = bed.texts(batch, length), clock(device)
    loop = peft_loop(bed.base.model, bed.settings, compiled=True)
    began = now()
    loop(texts, batch)
    seconds = now() - began
    turn, blocks = bed.looped(loop, [batch], length), bed.blocks(sizes.blocks, batch, length)
    what = f"{model} {method}, batch {batch}, {length} tokens"
    note = f"{turn}, its first {STEPS} steps {seconds:.0f} s; block {blocks.best} {blocks.rate:,.0f}"
    yield Row(f"{what}: over PEFT's loop compiled, client by client", blocks.rate / turn.rate, note=note)


def auto(model: str, method: str, device: Any, sizes: Sizes) -> Iterator[Row]:
    """Compare the block size that `auto` chooses with the fastest one up to the cohort's size, in the first cell."""
    from fedhpc.participation.blocks import most_together, resolve_block_size

    bed, (batch, length) = Bed(model, method, device, sizes), sizes.cells[0]
    tried = bed.blocks(sizes.blocks, batch, length)
    for cohort in _COHORTS:
        config = bed.config(batch)
        k = min(cohort, most_together(config, resolve_block_size(config, cohort, device.type), device.type))
        best = Ladder({size: speed for size, speed in tried.measured.items() if size <= cohort}, "")
        rate = tried.measured[k][0] if k in tried.measured else bed.blocks([k], batch, length).rate
        what = f"{model} {method}, batch {batch}, {length} tokens: block_size auto for a cohort of {cohort}, {k}"
        yield Row(f"{what}, over the best, {best.best}", rate / best.rate, 0.9, note=str(best))


def profile(model: str, method: str, device: Any, sizes: Sizes) -> Iterator[Row]:
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
