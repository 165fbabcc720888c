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
_WHOLE, _LINKS, _NEEDED, _AHEAD = "in one piece", ("loopback", "slow link"), "when needed", "ahead"
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
        found = Path(folder, "found.json")
        forked(1 + _RANKS, partial(_rank, base, free_port(), repeats, tokens, found), Path(folder, "why"))
        seconds, received, weights = json.loads(found.read_text())
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
    (whole, whole_cpu), (needed, needed_cpu), (ahead, ahead_cpu) = (tuple(zip(*way, strict=True)) for way in seconds)
    median = statistics.median
    one_piece = f"{median(whole):.2f} s in one piece, CPU {median(whole_cpu):.2f} s"
    yield Row(
        f"{what}time of a step, gathered when needed over in one piece", ratio(needed, whole),
        note=f"{median(needed):.2f} s, CPU {median(needed_cpu):.2f} s; {one_piece}",
    )  # fmt: skip
    yield Row(
        f"{what}time of a step, gathered ahead over when needed", ratio(ahead, needed), 1.0, most=True,
        note=f"{median(ahead):.2f} s, CPU {median(ahead_cpu):.2f} s, which is {ratio(ahead_cpu, needed_cpu):.2f} times",
    )  # fmt: skip
    hidden = median((n - a) / (n - w) for w, n, a in zip(whole, needed, ahead, strict=True))
    yield Row(f"{what}share of gathering that is hidden", hidden, unit="%")


def _ways(link: str) -> tuple[str, str, str]:
    return _WHOLE, f"{link}, {_NEEDED}", f"{link}, {_AHEAD}"


def _rank(whole: Any, port: int, repeats: int, tokens: Sequence[int], found: Path, rank: int) -> None:
    """What one rank does; rank 0 writes down what was found."""
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
    weights = sum(p.numel() for p in whole.layers.parameters())
    spread = copy.deepcopy(whole)
    shard(spread.layers, group, torch.device("cpu"))
    over = {_LINKS[0]: group.layers, _LINKS[1]: [_OverSlowLink(layer) for layer in group.layers]}
    needed, ahead = _Unknown(), Succession()
    ways: dict[str, Any] = {_WHOLE: (whole, group.layers, needed)}
    for link, links_layers in over.items():
        _, *names = _ways(link)
        ways |= {name: (spread, links_layers, s) for name, s in zip(names, (needed, ahead), strict=True)}

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
    said = transport.gather_json([seconds, received])
    if said is not None:
        of_first, received = said[1]
        found.write_text(json.dumps([of_first, received, weights]))
    transport.close()
