"""Measures how the cost of a round beside local training grows with ranks, cohort and population.

Local training is next to nothing here. Ranks run on CPU over gloo and share this machine's cores, so only the ratios
mean anything.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedhpc.bench.processes import LIMIT_S, forked, free_port
from fedhpc.errors import UserError

_SCALED = {"ranks": 4, "cohort": 32, "population": 10_000, "parameters": 2**13, "aggregator": "mean"}


def scale(quick: bool = False) -> Iterator[dict[str, Any]]:
    """Measure one setting after the other, each with one thing changed: a row for each.

    Rows have the median seconds of a round, rank 0's CPU seconds, the wire bytes of all ranks, and rank 0's
    memory beyond what it had before the first round. UserError where a rank fails or a setting takes longer than
    15 minutes; all of its ranks are ended then.
    """
    settings: list[dict[str, Any]] = [{"ranks": n} for n in ((2, 4) if quick else (2, 4, 8, 16, 32))]
    settings += [{"cohort": n} for n in ((8, 32) if quick else (8, 32, 128, 512))]
    settings += [{"population": n} for n in ((100, 10**6) if quick else (100, 10**3, 10**4, 10**5, 10**6))]
    if not quick:  # what rank 0 spends on a client and on a rank
        settings += [{"ranks": n, "cohort": c, "parameters": 2**10} for c in (1000, 10_000) for n in (2, 32)]
    large = [] if quick else [(8, "mean"), (64, "mean"), (8, "median"), (64, "median")]
    settings += [{"ranks": 3, "cohort": n, "parameters": 2**20, "aggregator": rule} for n, rule in large]
    for changed in settings:
        setting = {**_SCALED, **changed}
        try:
            costs = _scaled(setting, 4 if quick else 10)
        except UserError as error:
            words = ", ".join(f"{name} {value}" for name, value in setting.items())
            raise UserError(f"bench --scale at {words}: {error}") from error
        yield {**setting, **costs}


def _scaled(setting: dict[str, Any], rounds: int) -> dict[str, float]:
    import h5py
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from fedhpc import config as configuration
    from fedhpc import federation
    from fedhpc.approaches.prepare import prepare
    from fedhpc.models.load import BUILTIN
    from fedhpc.ranks.devices import peak_memory
    from fedhpc.ranks.launch import Launch
    from fedhpc.ranks.liveness import Liveness
    from fedhpc.ranks.transport import TransportError, open_transport

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
        ranks, port = setting["ranks"], free_port()
        why = Path(folder, "why")

        def on_exit(_: int, reason: str, run: str) -> None:
            why.write_text(reason)

        def work(rank: int) -> None:
            launch = Launch("torchrun", rank, ranks, rank, ranks, "127.0.0.1", port)
            cpu_seconds, memory = [], []

            def on_round(_: int) -> None:
                cpu_seconds.append(time.process_time())
                memory.append(peak_memory(torch.device("cpu")))

            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            with open_transport(launch, "torch", LIMIT_S) as transport:
                liveness = Liveness(transport, launch, LIMIT_S, on_exit)  # ends the other ranks when one dies
                liveness.start()
                try:
                    approach = prepare(config, transport, launch, write_cache=True)
                    federation.run(approach, transport, False, on_round)
                except Exception as error:
                    reason = repr(error) if rank else f"rank 0: {error!r}"  # liveness names other ranks
                    liveness.fail(1, reason, symptom=isinstance(error, TransportError))
                liveness.stop()
            if memory[1:]:  # on rank 0, for which alone on_round is called
                cpu = statistics.median(b - a for a, b in pairwise(cpu_seconds[1:]))
                costs = {"cpu_s_of_rank_0": cpu, "memory_of_rank_0": memory[-1] - memory[0]}
                Path(folder, "rank-0.json").write_text(json.dumps(costs))

        forked(ranks, work, why)
        costs: dict[str, float] = json.loads(Path(folder, "rank-0.json").read_text())
        with h5py.File(Path(folder) / "run" / "results.h5") as file:
            columns = {name: column[2:] for name, column in file["rounds"].items()}
    outside = columns["seconds"] - columns["seconds_local"] - columns["seconds_eval"]
    wire = {"wire_bytes": int(statistics.median(columns["wire_bytes"]))}
    return {"seconds_outside_training": float(statistics.median(outside)), **costs, **wire}


def markdown(row: dict[str, Any], heading: bool) -> str:
    """The row as a line of a Markdown table, with `heading` after the heading of the table."""

    def shown(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    lines = [list(row), ["---"] * len(row)] if heading else []
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, [shown(value) for value in row.values()]])
