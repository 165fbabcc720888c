"""Measures robust rules on 100 updates of a million parameters: a server and two workers beside ByzFL.

ByzFL (Gonzalez et al. 2025, arXiv 2505.24802) has all updates in one process, as float32 tensors, with as many threads
as the machine has cores. Its rows appear where it can be imported. Both get the same updates, and their results are
compared too.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fedhpc.bench.processes import LIMIT_S, forked, free_port
from fedhpc.bench.table import Part, Row, interleaved, ratio, skipped

CLIENTS, PARAMETERS, RANKS = 100, 10**6, 3
_BYZANTINE = 0.2
_FASTER = 2.0
_MEMORY = 2 * PARAMETERS * 8 + 100 * 10**6

#: The section `server` of each rule, and ByzFL's aggregator of the same meaning.
RULES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "geometric_median": ({"iterations": 3, "smoothing": 0.1}, "GeometricMedian", {"nu": 0.1, "T": 3}),
    "krum": ({"byzantine": _BYZANTINE}, "Krum", {"f": int(_BYZANTINE * CLIENTS)}),
    "trimmed_mean": ({"byzantine": _BYZANTINE}, "TrMean", {"f": int(_BYZANTINE * CLIENTS)}),
}


def parts(repeats: int, quick: bool) -> list[Part]:
    """All parts of this file; quick: a tenth of the parameters."""
    return [partial(_rule, name, repeats, PARAMETERS // 10 if quick else PARAMETERS) for name in RULES]


def _rule(name: str, repeats: int, parameters: int) -> list[Row]:
    measured = measure(name, repeats, parameters)
    what = f"{name}, {CLIENTS} clients of {parameters:,} parameters on {RANKS} ranks"
    ours = statistics.median(measured["fedhpc"])
    memory = Row(f"{what}: memory of rank 0", measured["memory"] / 1e6, _MEMORY / 1e6, most=True, unit="MB")
    if "ByzFL" not in measured:
        return [
            skipped(f"{what}: ByzFL's time over fedhpc's", f"{missing()}; fedhpc {ours:.2f} s"),
            memory,
        ]
    peer = statistics.median(measured["ByzFL"])
    note = f"fedhpc {ours:.2f} s, ByzFL {peer:.2f} s; results differ by {measured['difference']:.0e}"
    speed = ratio(measured["ByzFL"], measured["fedhpc"])
    return [Row(f"{what}: ByzFL's time over fedhpc's", speed, _FASTER, note=note), memory]


def missing() -> str:
    """Why ByzFL cannot be imported; empty where it can be."""
    try:
        import byzfl  # noqa: F401
    except ImportError as error:
        return f"byzfl: {error}"
    return ""


def measure(name: str, repeats: int, parameters: int) -> dict[str, Any]:
    """Seconds of each repeat, how much memory rank 0 took, and the largest relative difference of the results."""
    import numpy as np
    import torch

    from fedhpc import config as configuration
    from fedhpc.bench.compute import peak_bytes, reset_peak
    from fedhpc.ranks.launch import Launch
    from fedhpc.ranks.transport import open_transport
    from fedhpc.server.aggregation import Aggregation
    from fedhpc.updates.cohort import Cohort
    from fedhpc.updates.layout import Layout

    options, peer, peer_options = RULES[name]
    raw = {"partition": {"name": "iid"}, "server": {"aggregator": name, **options}}
    aggregation = Aggregation(configuration.resolve(raw).server, 0, CLIENTS)
    layout, shares, port = Layout({"all": (parameters,)}), np.full(CLIENTS, 1 / CLIENTS), free_port()

    def update(client: int) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng(client).standard_normal(parameters, dtype=np.float32))

    def work(rank: int, folder: Path) -> None:
        cpu = torch.device("cpu")
        torch.set_num_threads(1)
        clients = np.arange(CLIENTS)[rank - 1 :: RANKS - 1] if rank else np.arange(0)
        mine = torch.stack([update(client) for client in clients]) if rank else torch.empty(0, parameters)
        launch = Launch("torchrun", rank, RANKS, rank, RANKS, "127.0.0.1", port)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with open_transport(launch, "torch", LIMIT_S) as transport:
            result = torch.empty(0)

            def ours() -> None:
                nonlocal result
                transport.barrier()
                cohort = Cohort(transport, layout, range(CLIENTS), shares, clients, mine)
                result = aggregation.combine(cohort, 1)
                transport.barrier()

            before = reset_peak(cpu)
            ours()
            measured: dict[str, Any] = {"memory": peak_bytes(cpu) - before}
            runs: dict[str, Callable[[], None]] = {"fedhpc": ours}
            if not missing():
                alone = _peer(peer, peer_options, update, measured) if not rank else None

                def theirs() -> None:
                    if alone is not None:
                        alone()
                    transport.barrier()

                runs["ByzFL"] = theirs
            measured |= interleaved(runs, repeats, time.perf_counter)
            if not rank:
                if "result" in measured:
                    other = measured.pop("result").double()
                    measured["difference"] = float((result - other).abs().max() / other.abs().max())
                Path(folder, "rank-0.json").write_text(json.dumps(measured))

    with tempfile.TemporaryDirectory() as folder:
        forked(RANKS, lambda rank: work(rank, Path(folder)), Path(folder, "why"))
        measured: dict[str, Any] = json.loads(Path(folder, "rank-0.json").read_text())
    return measured


def _peer(
    name: str, options: dict[str, Any], update: Callable[[int], Any], measured: dict[str, Any]
) -> Callable[[], None]:
    """ByzFL's aggregator on all updates; its result is put into `measured`."""
    import byzfl
    import torch

    updates, rule = torch.stack([update(client) for client in range(CLIENTS)]), getattr(byzfl, name)(**options)

    def run() -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        measured["result"] = rule(updates)
        torch.set_num_threads(1)

    return run
