"""Speed, as ratios measured in one run on one machine.

    python -m fedhpc.bench [--repeats 5] [--quick] [--json]
    python -m fedhpc.bench --scale [--quick] [--json]

The workload is a small Llama with random weights and random tokens (16 clients a round, 32 sequences of 48 tokens
each, batch 4, prefix of 16 virtual tokens, SGD): the arithmetic of a federated round without anything to learn.
Everything that is compared runs interleaved in the same process, on one thread; figures are medians over the
repeats. On a CPU they are of CPU seconds, which a busy machine disturbs least; on a GPU of wall seconds.

--scale: what a round costs beside local training, which is next to nothing there, against the number of ranks, the
cohort and the population; over gloo, on CPU ranks that share this machine's cores, so only the ratios mean anything.
A row is printed as soon as it is measured; a rank that fails, or SIGTERM, ends it with one line and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from multiprocessing import connection
from pathlib import Path
from typing import Any

from fedhpc.errors import UserError

CLIENTS, SEQUENCES, LENGTH, BATCH, VIRTUAL = 16, 32, 48, 4, 16
BLOCKS = (1, 2, 4, 8, 16)
BARE_BATCHES = (4, 16, 64)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedhpc.bench", description="speed ratios of fedhpc")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats; medians are shown (5)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the clients and 3 repeats")
    parser.add_argument("--scale", action="store_true", help="rounds against ranks, cohort and population instead")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table, with --scale one object per row")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.scale:
        signal.signal(signal.SIGTERM, _interrupted)
        try:
            for number, row in enumerate(scale(options.quick)):
                print(json.dumps(row) if options.json else _table(row, heading=number == 0), flush=True)
        except UserError as error:
            print(f"fedhpc: error: {error}", file=sys.stderr)
            return 1
        return 0
    clients, repeats = (CLIENTS // 4, 3) if options.quick else (CLIENTS, options.repeats)
    figures = {
        **machine(),
        **compute(clients, repeats),
        **memory(clients),
        **padding(),
        **whole_program(3 if options.quick else 6),
    }
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        _print(figures)
    return 0


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import platform

    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def compute(clients: int, repeats: int) -> dict[str, float]:
    """Federated training in blocks of K against PEFT's loop: tokens per second, and memory per client."""
    import torch

    torch.set_num_threads(1)
    base, method, examples, config, start = _workload(clients)
    works = _works(clients)

    def federated(k: int) -> None:
        from fedhpc.training.block import train_block

        for begin in range(0, clients, k):
            train_block(base, method, start, works[begin : begin + k], examples, config, 1, 1)

    peft_loop = _peft_loop(base, method, examples, start)
    blocks = [k for k in BLOCKS if k <= clients]
    runs: dict[str, Callable[[], None]] = {f"block_{k}": partial(federated, k) for k in blocks}
    runs["peft_sequential"] = partial(peft_loop, clients, BATCH, True)
    runs |= {f"bare_batch_{b}": partial(peft_loop, clients, b, False) for b in BARE_BATCHES}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, call in runs.items():
            spent = _timed(call)
            if repeat:  # the first is the warm-up
                seconds[name].append(spent)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = clients * SEQUENCES * (LENGTH - 1)
    best_block = min(blocks, key=lambda k: median[f"block_{k}"])
    best_bare = min(median[f"bare_batch_{b}"] for b in BARE_BATCHES)
    figures = {f"tokens_per_s_{name}": tokens / value for name, value in median.items()}
    figures |= {f"block_gain_{k}": median["block_1"] / median[f"block_{k}"] for k in blocks}
    figures["best_block"] = best_block
    figures["federated_over_peft_sequential"] = median["peft_sequential"] / median[f"block_{best_block}"]
    figures["federated_over_bare_best_batch"] = best_bare / median[f"block_{best_block}"]
    return figures


def memory(clients: int) -> dict[str, float]:
    """Peak memory of a process that trains one block, per client beyond the first: activations and state."""
    peaks = {}
    for k in (1, clients):
        call = f"from fedhpc import bench; print(bench.peak_bytes({k}))"
        output = subprocess.run([sys.executable, "-c", call], check=True, capture_output=True, text=True).stdout
        peaks[k] = int(output)
    return {"bytes_per_extra_client": (peaks[clients] - peaks[1]) / (clients - 1)}


def peak_bytes(clients: int) -> int:
    """Train one block of `clients` in this process; its peak memory (on a GPU: of the device)."""
    import torch

    from fedhpc.federation import peak_memory
    from fedhpc.training.block import train_block

    torch.set_num_threads(1)
    base, method, examples, config, start = _workload(clients)
    train_block(base, method, start, _works(clients), examples, config, 1, 1)
    return peak_memory(base.device)


def padding() -> dict[str, float]:
    """Share of padding among the input tokens of the built-in task: rows as they come, and as fedhpc cuts them."""
    import numpy as np

    from fedhpc import config as configuration
    from fedhpc import data
    from fedhpc.models import load_kind, load_tokenizer
    from fedhpc.training.block import _FORWARD_COST_TOKENS, cut_by_length

    config = configuration.load(None, [])
    train = data.load_data(config, load_tokenizer(config.model), load_kind(config.model), write_cache=False).train
    lengths = train.lengths - 1
    rng, plain, cut, real = np.random.default_rng(0), 0, 0, 0
    for _ in range(200):
        rows = rng.choice(len(lengths), 64, replace=False)
        real += int(lengths[rows].sum())
        plain += sum(int(part.max()) * len(part) for part in np.split(lengths[rows], 8))
        ordered = np.sort(lengths[rows])
        bounds = cut_by_length(ordered, _FORWARD_COST_TOKENS["cpu"])
        cut += sum(int(ordered[b - 1]) * (b - a) for a, b in pairwise(bounds))
    return {"padding_8_rows_as_they_come": 1 - real / plain, "padding_block_of_64_rows": 1 - real / cut}


def whole_program(rounds: int) -> dict[str, float]:
    """The embedded default in one process: seconds to the first round, and the share of rounds outside training."""
    import h5py

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedhpc.main", f"run.dir={folder}/run", f"federation.rounds={rounds}"]
        began = time.time()
        with subprocess.Popen([*command, "evaluation.metrics=[loss]"], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first_round = next(time.time() for line in process.stdout if line.startswith("round 1/")) - began
            process.stdout.read()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} left with {process.returncode}")
        with h5py.File(Path(folder) / "run" / "results.h5") as file:
            columns = {name: column[1:] for name, column in file["rounds"].items()}
    training, evaluating = columns["seconds_local"].sum(), columns["seconds_eval"].sum()
    return {
        "share_outside_training": float(1 - training / (columns["seconds"].sum() - evaluating)),
        "share_evaluation": float(evaluating / columns["seconds"].sum()),
        "seconds_start_to_first_step": float(first_round - columns["seconds"][0]),
    }


_SCALED = {"ranks": 4, "cohort": 32, "population": 10_000, "parameters": 2**13, "aggregator": "mean"}


_LIMIT_S = 900.0  # that one setting may take
_PARTING_S = 10.0  # that its ranks may take to end once one of them has failed


def scale(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per setting, one thing changed at a time. Medians over rounds, of seconds and of rank 0's CPU seconds;
    wire bytes of the busiest rank, and rank 0's memory beyond what it had before the first round.

    UserError where a rank fails or a setting takes longer than 15 minutes; none of its ranks is left then.
    """
    settings: list[dict[str, Any]] = [{"ranks": n} for n in ((2, 4) if quick else (2, 4, 8, 16, 32))]
    settings += [{"cohort": n} for n in ((8, 32) if quick else (8, 32, 128, 512))]
    settings += [{"population": n} for n in ((100, 10**6) if quick else (100, 10**3, 10**4, 10**5, 10**6))]
    large = [] if quick else [(8, "mean"), (64, "mean"), (8, "median"), (64, "median")]
    settings += [{"ranks": 3, "cohort": n, "parameters": 2**20, "aggregator": rule} for n, rule in large]
    for changed in settings:
        setting = {**_SCALED, **changed}
        try:
            found = _scaled(setting, 4 if quick else 10)
        except UserError as error:
            about = ", ".join(f"{name} {value}" for name, value in setting.items())
            raise UserError(f"bench --scale at {about}: {error}") from error
        yield {**setting, **found}


def _interrupted(*_: object) -> None:
    raise UserError("ended by SIGTERM")


def _scaled(setting: dict[str, Any], rounds: int) -> dict[str, float]:
    import h5py
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from fedhpc import config as configuration
    from fedhpc import federation
    from fedhpc.liveness import Liveness
    from fedhpc.models import BUILTIN
    from fedhpc.runtime import Launch
    from fedhpc.transport import TransportError, open_transport

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(BUILTIN)
        tokenizer.save_pretrained(f"{folder}/model")
        shape = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=16384,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(shape).save_pretrained(f"{folder}/model")
        config = configuration.resolve(
            {
                "run": {"dir": f"{folder}/run"},
                "model": {"name": f"{folder}/model"},
                "partition": {"name": "virtual", "num_clients": setting["population"], "examples_per_client": 4},
                "method": {"name": "prefix", "num_virtual_tokens": setting["parameters"] // 128, "init": "random"},
                "federation": {"rounds": rounds, "cohort_size": setting["cohort"]},
                "client": {"optimizer": "sgd", "lr": 0.1, "steps": 1, "batch_size": 1},
                "server": {"aggregator": setting["aggregator"]},
                "evaluation": {"every": rounds, "max_examples": 1, "samples": 0, "metrics": ["loss"]},
            }
        )
        ranks, port = setting["ranks"], _free_port()
        why = Path(folder, "why")

        def on_exit(_: int, reason: str) -> None:
            why.write_text(reason)

        def work(rank: int) -> None:
            launch = Launch("torchrun", rank, ranks, rank, ranks, 0, "127.0.0.1", port)
            spent, memory = [], []

            def on_round(_: int) -> None:
                spent.append(time.process_time())
                memory.append(federation.peak_memory(torch.device("cpu")))

            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            with open_transport(launch, "torch", _LIMIT_S) as transport:
                liveness = Liveness(transport, launch, _LIMIT_S, on_exit)  # a rank that dies takes the others along
                liveness.start()
                try:
                    approach = federation.prepare(config, transport, launch, write_cache=True)
                    federation.run(approach, transport, False, on_round)
                except Exception as error:
                    reason = f"rank 0: {error!r}" if rank == 0 else repr(error)  # the others are named by liveness
                    liveness.fail(1, reason, symptom=isinstance(error, TransportError))
                liveness.stop()
            if memory[1:]:  # rank 0 alone is told of every round
                cpu = statistics.median(b - a for a, b in pairwise(spent[1:]))
                found = {"cpu_s_of_rank_0": cpu, "memory_of_rank_0": memory[-1] - memory[0]}
                Path(folder, "rank-0.json").write_text(json.dumps(found))

        _forked(ranks, work, why)
        found: dict[str, float] = json.loads(Path(folder, "rank-0.json").read_text())
        with h5py.File(Path(folder) / "run" / "results.h5") as file:
            columns = {name: column[2:] for name, column in file["rounds"].items()}
    outside = columns["seconds"] - columns["seconds_local"] - columns["seconds_eval"]
    wire = {"wire_bytes": int(statistics.median(columns["wire_bytes"]))}
    return {"seconds_outside_training": float(statistics.median(outside)), **found, **wire}


def _forked(ranks: int, work: Callable[[int], None], why: Path) -> None:
    """work(rank) in a process per rank; they share what this one has imported.

    UserError where one of them fails, or together they take too long; none is left then. why: a file in which they may
    have said what ended them.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(ranks)]
    deadline, failure = time.monotonic() + _LIMIT_S, ""
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: rank for rank, process in enumerate(processes)}
        while running:
            ended = connection.wait(running, max(0.0, deadline - time.monotonic()))
            if not ended:
                failure = failure or f"{len(running)} of {ranks} ranks still ran after {_LIMIT_S:.0f} s"
                break
            for rank in [running.pop(sentinel) for sentinel in ended]:  # type: ignore[arg-type]
                processes[rank].join()
                code = processes[rank].exitcode
                if code and not failure:
                    failure = f"rank {rank} " + (f"was killed by signal {-code}" if code < 0 else f"left with {code}")
                    deadline = time.monotonic() + _PARTING_S
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    if failure:
        raise UserError(f"{failure}: {why.read_text()}" if why.exists() else failure)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _table(row: dict[str, Any], heading: bool) -> str:
    """A line of a table of Markdown, after its heading if that is asked for."""

    def shown(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    lines = [list(row), ["---"] * len(row)] if heading else []
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, [shown(value) for value in row.values()]])


def _workload(clients: int) -> tuple[Any, Any, Any, Any, Any]:
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedhpc import config as configuration
    from fedhpc.data.tokens import Tokens, examples_from
    from fedhpc.kinds.causal_lm import KIND
    from fedhpc.methods import prefix
    from fedhpc.models import Base

    torch.manual_seed(1234)
    shape = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=344,
        vocab_size=2048,
        max_position_embeddings=256,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LlamaForCausalLM(shape).eval().requires_grad_(False).to(device)
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    base = Base(model, tokenizer, device, "random", "random", 4, 4, 32, 128, KIND)
    ids = np.random.default_rng(0).integers(3, 2048, clients * SEQUENCES * LENGTH).astype(np.int32)
    count = clients * SEQUENCES
    examples = examples_from(Tokens(ids, np.arange(count + 1) * LENGTH, np.ones(count, dtype=np.int32)))
    config = configuration.resolve(
        {"partition": {"name": "iid"}, "client": {"optimizer": "sgd", "lr": 0.5, "batch_size": BATCH}}
    )
    options = prefix.Options.model_validate({"num_virtual_tokens": VIRTUAL, "init": "random"})
    method = prefix.METHOD(options, base, 0)
    return base, method, examples, config, method.payload.flatten(method.initial()).unsqueeze(0)


def _works(clients: int) -> list[Any]:
    import numpy as np

    from fedhpc.training.block import Work

    return [Work(c, np.arange(c * SEQUENCES, (c + 1) * SEQUENCES)) for c in range(clients)]


def _peft_loop(base: Any, method: Any, examples: Any, start: Any) -> Callable[[int, int, bool], None]:
    """What a user would write with PEFT: one model; every client in turn, or all the data as one."""
    import copy

    import torch
    from peft import PrefixTuningConfig, get_peft_model

    model = get_peft_model(
        copy.deepcopy(base.model), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    )
    prefix = model.prompt_encoder["default"].embedding.weight
    ids = torch.from_numpy(examples.ids.reshape(-1, LENGTH)).long().to(base.device)

    def loop(clients: int, batch: int, in_turn: bool) -> None:
        parts = ids[: clients * SEQUENCES].split(SEQUENCES if in_turn else clients * SEQUENCES)
        for part in parts:
            with torch.no_grad():
                prefix.copy_(start[0].view_as(prefix))
            optimizer = torch.optim.SGD([prefix], lr=0.5)
            for rows in part.split(batch):
                loss = model(input_ids=rows, labels=rows).loss
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

    return loop


def _timed(call: Callable[[], None]) -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    call()
    return time.process_time() - began


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="fedhpc bench", show_header=False)
    for name, value in figures.items():
        shown = f"{value:,.3f}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"
        table.add_row(name, value if isinstance(value, str) else shown)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
