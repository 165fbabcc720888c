"""Measures local training in one process: blocks of K clients compared with three other ways to train.

These are the same clients one after another, the loop that one would write with PEFT, and that loop without federation
at its fastest batch size. All run in this process on one thread, on the GPU where there is one. Seconds are CPU
seconds, on a GPU wall seconds.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fedhpc.bench import workloads
from fedhpc.bench.table import Part, Row, interleaved, ratio, skipped
from fedhpc.bench.workloads import BATCH, COHORT, LENGTH, W1, W1_BIG, W2, W2_BIG, W3, Workload
from fedhpc.config import Config
from fedhpc.errors import UserError

_CLIENTS = COHORT // 2  # one worker's share of a round
_BLOCKS = (1, 4, 8)
_BARE_BATCHES = (4, 16, 64)
_STEPS = {"small": 4, "big": 2, "large": 2}  # of a client; a few are enough, since every step costs the same


def parts(repeats: int, quick: bool) -> list[Part]:
    """All parts of this file."""
    chosen = (W1, W2) if quick else (W1, W2, W1_BIG, W2_BIG)
    loops = [partial(_against_loops, workload, repeats) for workload in chosen]
    return [*loops, _compiled, partial(_for_workers, repeats), _padding, _memory]


def _against_loops(workload: Workload, repeats: int) -> list[Row]:
    import numpy as np
    import torch

    with tempfile.TemporaryDirectory() as folder:
        works = {k: Trainer(workload, Path(folder), k) for k in _BLOCKS}
        work = works[1]
        train, sequences = work.approach.data.train, work.approach.config.client.steps * BATCH
        rows = np.concatenate([work.approach.data.population.indices(c)[:sequences] for c in work.clients])
        texts = torch.from_numpy(np.stack([train.tokens(int(row)) for row in rows])).long().to(work.base.device)
        loop = peft_loop(work.base.model, work.approach.config.method)
        runs: dict[str, Callable[[], None]] = {f"block {k}": work.train for k, work in works.items()}
        runs["in turn"] = partial(loop, texts.view(_CLIENTS, sequences, -1), BATCH)
        runs |= {f"bare {b}": partial(loop, texts.unsqueeze(0), b) for b in _BARE_BATCHES}
        seconds = interleaved(runs, repeats, clock(works[1].base.device))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    block = min((f"block {k}" for k in _BLOCKS), key=lambda name: median[name])
    bare = min((f"bare {b}" for b in _BARE_BATCHES), key=lambda name: median[name])
    gpu = works[1].base.device.type == "cuda"
    tokens = _CLIENTS * _STEPS[workload.size] * BATCH * (LENGTH - 1)
    gains = {k: ratio(seconds["block 1"], seconds[f"block {k}"]) for k in _BLOCKS[1:]}
    wanted = 3.0 if gpu else 1.5 if workload.size == "small" else 1.0
    return [
        Row(
            f"{workload.name}: federated over the bare loop at its best batch, tokens/s",
            ratio(seconds[bare], seconds[block]),
            0.85 if gpu else 0.95,
            note=f"{block} {tokens / median[block]:,.0f}/s, {bare} {tokens / median[bare]:,.0f}/s",
        ),
        Row(
            f"{workload.name}: federated over PEFT's loop, client by client", ratio(seconds["in turn"], seconds[block])
        ),
        *(
            Row(
                f"{workload.name}: block of {k} over one after another",
                gain,
                wanted if gain == max(gains.values()) else 1.0,
            )
            for k, gain in gains.items()
        ),
    ]


def _compiled() -> list[Row]:
    """The row that says why nothing is compared under torch.compile."""
    return [skipped("block over one after another, compiled", "fedhpc does not use torch.compile")]


def _for_workers(repeats: int) -> Iterator[Row]:
    """Compare blocks for the two workers that there are with those for eight, the default: all clients of a round."""
    from fedhpc import config as configuration

    default = "built-in data"
    for what in (default, W3.name):
        title = f"{what}, cohort of 10: blocks for 8 workers over blocks for 2"
        if what != default and (why := W3.absent()):
            yield skipped(title, why)
            continue
        with tempfile.TemporaryDirectory() as folder:
            configs = {}
            for workers in (8, 2):
                runtime = {"device": "cpu", "block_size": "auto", "workers": workers}
                if what == default:
                    given = [f"runtime.{key}={value}" for key, value in runtime.items()]
                    given += [f"run.dir={folder}/run", "federation.cohort_size=10"]
                    configs[workers] = configuration.load(None, given)
                else:
                    path = workloads.write(W3, Path(folder), 1, federation={"cohort_size": 10}, runtime=runtime)
                    configs[workers] = workloads.read(path)
            rounds = {str(workers): _round_of(config) for workers, config in configs.items()}
            seconds = interleaved(rounds, repeats, time.process_time)
        yield Row(title, ratio(seconds["8"], seconds["2"]), 1.3, note=f"{statistics.median(seconds['2']):.2f} s")


def _round_of(config: Config) -> Callable[[], None]:
    """A function that trains the blocks of the first round, as many as there are, in this process."""
    import torch

    from fedhpc.approaches.prepare import prepare
    from fedhpc.ranks import memory
    from fedhpc.ranks.launch import Launch
    from fedhpc.ranks.transport.base import LoopbackTransport

    torch.set_num_threads(1)
    memory.keep_freed_memory()
    transport = LoopbackTransport()
    approach: Any = prepare(config, transport, Launch(), write_cache=False)
    plan = approach.plan(1)
    down = approach.download(transport, approach.initial_state(), plan)

    def train() -> None:
        for block in plan.blocks:
            approach.local(plan, block.clients, down)

    return train


def _padding() -> list[Row]:
    what = "W3: padding among input tokens"
    if why := W3.absent():
        return [skipped(what, why)]
    from fedhpc.training.block import Work, train_block
    from fedhpc.training.local import LocalTraining

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(W3, Path(folder), _CLIENTS)
        approach, start = trainer.approach, trainer.approach.initial_payload().unsqueeze(0)
        works = [Work(client, approach.data.population.indices(client)) for client in trainer.clients]
        local, examples = LocalTraining.of(approach.config, 1, 1), approach.data.train
        trained = train_block(approach.base, approach.method, approach.objective, start, works, examples, local)
    return [Row(what, trained.padded_tokens / trained.input_tokens, 0.10, most=True, unit="%")]


class Trainer:
    """Trains one worker's share of a round, in blocks of `k` clients (or "auto"), as the round loop does."""

    def __init__(self, workload: Workload, folder: Path, k: int | str, **changes: Any) -> None:
        import torch

        from fedhpc.approaches.prepare import assign_devices, prepare
        from fedhpc.ranks import memory
        from fedhpc.ranks.devices import visible_gpus
        from fedhpc.ranks.launch import Launch
        from fedhpc.ranks.transport.base import LoopbackTransport

        torch.set_num_threads(1)
        memory.keep_freed_memory()  # as every rank does; the loops for comparison run in this process and profit too
        steps = {"steps": _STEPS[workload.size], "epochs": None} if workload.size else {}
        device = {"device": "auto", "block_size": k}
        config = workloads.read(workloads.write(workload, folder, 1, client=steps, runtime=device, **changes))
        transport, launch = LoopbackTransport(), Launch()
        launch = assign_devices(config, transport, launch, visible_gpus(config))
        self.approach: Any = prepare(config, transport, launch, write_cache=False)
        self.base = self.approach.base
        self.plan = self.approach.plan(1)
        self.down = self.approach.download(transport, self.approach.initial_state(), self.plan)
        self.clients, self.k = self.plan.cohort[:_CLIENTS], self.approach.block_size

    def train(self) -> None:
        """Train all clients, in blocks of k."""
        for begin in range(0, len(self.clients), self.k):
            self.approach.local(self.plan, self.clients[begin : begin + self.k], self.down)

    def train_once(self) -> None:
        """Train the first block."""
        self.approach.local(self.plan, self.clients[: self.k], self.down)


def peft_model(model: Any, options: Any) -> Any:
    """`model` in PEFT, with the `options` of prefix or lora."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    peft: Any = (
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.num_virtual_tokens)
        if options.name == "prefix"
        else LoraConfig(
            task_type="CAUSAL_LM",
            r=options.rank,
            lora_alpha=options.alpha,
            target_modules=options.targets,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a flag of transformers that has a new name
        return get_peft_model(model, peft)


def peft_loop(model: Any, options: Any, compiled: bool = False) -> Callable[[Any, int], None]:
    """Make the training loop that one would write with PEFT, on a copy of `model` with the `options` of prefix or lora.

    loop(texts, batch) trains every client in turn, each from the same initial parameters. texts: int64 (clients,
    sequences, length); with all sequences as one client, it is a loop without federation. compiled: torch.compile
    compiles the model at the first call.
    """
    import copy

    import torch

    adapted = peft_model(copy.deepcopy(model), options)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    forward = torch.compile(adapted) if compiled else adapted

    def loop(texts: Any, batch: int) -> None:
        for rows in texts:
            with torch.no_grad():
                for parameter, value in zip(trained, start, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.SGD(trained, lr=workloads.LEARNING_RATE)
            for step in rows.split(batch):
                loss = forward(input_ids=step, labels=step).loss
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

    return loop


def clock(device: Any) -> Callable[[], float]:
    """A clock: CPU seconds of this process, or for a GPU wall seconds after waiting for its work."""
    if device.type != "cuda":
        return time.process_time
    import torch

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


_RANK = 64  # of LoRA, so that there are many parameters and few activations


def _memory() -> list[Row]:
    """Measure the memory of a block beyond that of its rows, forward and backward, on the base alone."""
    taken = {}
    for what in ("block", "base"):
        call = f"from fedhpc.bench import compute; print(*compute.taken_bytes({what!r}))"
        done = subprocess.run([sys.executable, "-c", call], check=False, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"a process that measures memory ended with {done.returncode}: {done.stderr[-500:]}")
        taken[what], size = map(int, done.stdout.split()[-2:])
    row = Row(
        "memory of a worker beyond base and activations",
        (taken["block"] - taken["base"]) / 1e6,
        (16 * size * _CLIENTS + 50e6) / 1e6,
        most=True,
        unit="MB",
        note=f"16 bytes x P = {size:,} x K = {_CLIENTS}, and 50 MB; activations {taken['base'] / 1e6:.0f} MB",
    )
    return [row]


def taken_bytes(what: str) -> tuple[int, int]:
    """The peak memory of training a block (what = "block"), or of its rows on the base alone ("base"); and P.

    Call it in a new process: memory that was freed before would not be counted.
    """
    import torch

    from fedhpc.models.causal_lm import CausalLM

    with tempfile.TemporaryDirectory() as folder:
        work = Trainer(W2, Path(folder), _CLIENTS, method={"rank": _RANK})
        base, train = work.base, work.approach.data.train
        rows = work.approach.data.population.indices(work.clients[0])[:1].repeat(_CLIENTS * BATCH)
        assert isinstance(base, CausalLM)
        batch = base.batch(train, rows)

        def alone() -> None:
            inputs = base.model.get_input_embeddings()(batch.ids).detach().requires_grad_()
            hidden = base.model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            logits = base.model.get_output_embeddings()(hidden.flatten(0, 1))
            torch.nn.functional.cross_entropy(logits, batch.targets).backward()

        before = reset_peak(base.device)
        for _ in range(2):
            work.train() if what == "block" else alone()
        return peak_bytes(base.device) - before, work.approach.method.payload.size


def reset_peak(device: Any) -> int:
    """Begin to count the peak anew; returns the bytes that are in use now."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM begins anew
    return peak_bytes(device)


def peak_bytes(device: Any) -> int:
    """The most bytes in use since `reset_peak`: allocated on a GPU, otherwise resident in memory."""
    from fedhpc.ranks.devices import peak_memory

    return peak_memory(device)


def free(device: Any) -> None:
    """Free the memory of unreachable objects, also that which a GPU's allocator holds back."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def limit_memory(device: Any, size: int | None) -> None:
    """Let this process use only `size` bytes of a GPU; all of them with None."""
    import torch

    share = 1.0 if size is None else size / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(share, device)
