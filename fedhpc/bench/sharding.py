"""Measures steps on a base that two ranks hold between them: what gathering costs, and how much of it computing hides.

A step goes forward and back through the layers of a random Llama, in both ranks at once, each with tokens of its own:
with the base in one piece, with each layer gathered when it is needed, and with the next one on its way meanwhile. The
link is this machine's loopback, on which gathering takes processor time, or a slow one, on which it mostly waits. That
one is simulated: a layer is there when such a link would have brought it.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedhpc.bench.processes import LIMIT_S, forked, free_port
from fedhpc.bench.table import Part, Row, ratio
from fedhpc.ranks.group import Layer, Succession

_RANKS = 2  # that hold the base; one more is the server
_SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "vocab_size": 8}
_LAYERS, _TOKENS, _STEPS = 8, (64, 256), 2
_SLOW = 1e8  # bytes a second
_UNSHARDED, _LINKS, _ON_DEMAND, _AHEAD = "in one piece", ("loopback", "slow link"), "on demand", "ahead"
_OF_GPUS = {"NVLink": 3e11, "InfiniBand": 4e10}  # bytes a second
_OPERATIONS, _BF16 = 4e14, 2  # a second of an H100 in bfloat16; bytes of a weight


def parts(repeats: int, quick: bool) -> list[Part]:
    """All parts of this file. quick: with few tokens alone."""
    return [partial(_steps, repeats, _TOKENS[:1] if quick else _TOKENS, _LAYERS)]


class _Unknown(Succession):
    """Expects no layer: each is gathered when it is needed."""

    @property
    def expected(self) -> int:
        return -1


class _OverSlowLink:
    """A layer that a slow link brings. Waiting for it takes no processor time."""

    def __init__(self, layer: Layer) -> None:
        self._layer, self.size_bytes, self.parameters = layer, layer.size_bytes, layer.parameters
        self._began: float | None = None

    def prefetch(self) -> None:
        self._began = time.perf_counter()
        self._layer.prefetch()

    def unshard(self) -> None:
        began = time.perf_counter() if self._began is None else self._began
        self._layer.unshard()
        time.sleep(max(0.0, began + self.size_bytes * (1 - 1 / _RANKS) / _SLOW - time.perf_counter()))

    def reshard(self) -> None:
        self._began = None
        self._layer.reshard()


def _steps(repeats: int, tokens: Sequence[int], layers: int) -> Iterator[Row]:
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.set_num_threads(1)
    base = LlamaModel(LlamaConfig(**_SHAPE, num_hidden_layers=layers)).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        forked(1 + _RANKS, partial(_rank, base, free_port(), repeats, tokens, results), Path(folder, "why"))
        seconds, received, weights = json.loads(results.read_text())
    for length, of_way in zip(tokens, seconds, strict=True):
        for link in _LINKS:
            yield from _of_link(f"{length} tokens, {link}: ", *(of_way[way] for way in _ways(link)))
    formula = 2 * 4 * weights * (1 - 1 / _RANKS)
    note = f"{received / 1e6:.1f} MB; a layer in which a pass turns is whole already"
    yield Row("received in a step by a rank, over 2 s p (G - 1)/G", received / formula, 1.0, most=True, note=note)
    for link, speed in _OF_GPUS.items():
        # A token takes 4 operations for each weight.
        of_all = received / weights / (1 - 1 / _RANKS) * _BF16 / 4 * _OPERATIONS / (4 * speed)
        of_sizes = ", ".join(f"G = {size}: {of_all * (1 - 1 / size):,.0f}" for size in (4, 8))
        what = f"forecast, {link} of {speed / 1e9:.0f} GB/s: tokens of a forward that hide all gathers, G = 2"
        yield Row(what, of_all * (1 - 1 / 2), note=of_sizes)


def _of_link(what: str, *seconds: Sequence[Sequence[float]]) -> Iterator[Row]:
    """seconds: of each way and repeat: those of a step, and CPU seconds of a rank in it."""
    (unsharded, cpu), (on_demand, cpu_on_demand), (ahead, cpu_ahead) = (tuple(zip(*s, strict=True)) for s in seconds)
    middle = statistics.median
    yield Row(
        f"{what}time of a step, gathered on demand over in one piece", ratio(on_demand, unsharded),
        note=f"{middle(on_demand):.2f} s, CPU {middle(cpu_on_demand):.2f} s; in one piece {middle(unsharded):.2f} s, "
        f"CPU {middle(cpu):.2f} s",
    )  # fmt: skip
    note = (
        f"{middle(ahead):.2f} s, CPU {middle(cpu_ahead):.2f} s, {ratio(cpu_ahead, cpu_on_demand):.2f} of it on demand"
    )
    yield Row(f"{what}time of a step, gathered ahead over on demand", ratio(ahead, on_demand), note=note)
    hidden = (middle(on_demand) - middle(ahead)) / (middle(on_demand) - middle(unsharded))
    yield Row(f"{what}share of gathering that is hidden", hidden, unit="%")


def _ways(link: str) -> tuple[str, str, str]:
    return _UNSHARDED, f"{link}, {_ON_DEMAND}", f"{link}, {_AHEAD}"


def _rank(unsharded: Any, port: int, repeats: int, tokens: Sequence[int], results: Path, rank: int) -> None:
    """What one rank does; rank 0 writes down the results."""
    import torch

    from fedhpc.models.sharding import shard
    from fedhpc.ranks import memory
    from fedhpc.ranks.launch import Launch
    from fedhpc.ranks.topology import Topology
    from fedhpc.ranks.transport import open_transport

    memory.return_freed_memory()
    ranks = 1 + _RANKS
    transport = open_transport(Launch("torchrun", rank, ranks, rank, ranks, "127.0.0.1", port), "torch", LIMIT_S)
    transport.form_groups(Topology.of(ranks, _RANKS))
    group = transport.group
    assert group is not None
    weights = sum(p.numel() for p in unsharded.layers.parameters())
    sharded = copy.deepcopy(unsharded)
    shard(sharded.layers, group, torch.device("cpu"))
    over = {_LINKS[0]: group.layers, _LINKS[1]: [_OverSlowLink(layer) for layer in group.layers]}
    on_demand, ahead = _Unknown(), Succession()
    ways: dict[str, Any] = {_UNSHARDED: (unsharded, group.layers, on_demand)}
    for link, links_layers in over.items():
        _, *names = _ways(link)
        ways |= {name: (sharded, links_layers, s) for name, s in zip(names, (on_demand, ahead), strict=True)}

    def take(base: Any, length: int) -> None:
        states = torch.ones(1, length, base.config.hidden_size, requires_grad=True)
        base(inputs_embeds=states, use_cache=False).last_hidden_state.sum().backward()

    seconds: list[dict[str, list[Any]]] = []
    received = 0
    for length in tokens:
        seconds.append({name: [] for name in ways})
        for repeat in range(repeats + 1):  # the first warms up
            for name, (base, group.layers, group.succession) in ways.items():
                transport.barrier()
                before, began, cpu = transport.account, time.perf_counter(), time.process_time()
                for _ in range(_STEPS if rank else 0):
                    take(base, length)
                took = [(time.perf_counter() - began) / _STEPS, (time.process_time() - cpu) / _STEPS]
                if name == _ways(_LINKS[0])[1]:
                    received = transport.account.since(before).received_bytes // _STEPS
                if repeat:
                    seconds[-1][name].append(took)
    of_ranks = transport.gather_json([seconds, received])
    if of_ranks is not None:
        of_first, received = of_ranks[1]
        results.write_text(json.dumps([of_first, received, weights]))
    transport.close()
