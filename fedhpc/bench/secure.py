"""Measures secure aggregation: what a client computes and sends, beside Flower's SecAgg+ on the same graph and payload.

One client of a cohort that nobody leaves, with 100,000 numbers to send; what its neighbours send it is real. Flower's
client is its `secaggplus_mod` (Beutel et al. 2020, arXiv 2007.14390), called with the messages of its four stages, as
long as its protocol buffers are. Its rows appear where it can be imported.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from fedhpc import registry
from fedhpc.bench.table import Part, Row, skipped
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.secure.client import Client
from fedhpc.secure.masked_sum import Masking
from fedhpc.secure.protocols.base import Protocol

_NUMBERS = 100_000
_COHORTS = (16, 64, 128)
_QUANTIZATION, _MODULUS = 2**22, 2**32  # Flower's defaults


@dataclass(frozen=True)
class Cost:
    """What one sum costs a client, its training and the download apart."""

    seconds: float  # of the processor
    bytes_up: int
    bytes_down: int

    @property
    def beside(self) -> int:
        """Bytes both ways without the masked update, which both send as integers of 8 bytes."""
        return self.bytes_up + self.bytes_down - 8 * _NUMBERS


def parts(repeats: int, quick: bool) -> list[Part]:
    """All parts of this file."""
    cohorts = _COHORTS[:1] if quick else _COHORTS
    return [partial(_of_cohort, count, name, repeats) for count in cohorts for name in ("pairwise", "sparse")]


def _of_cohort(count: int, name: str, repeats: int) -> list[Row]:
    protocol: Protocol = registry.choice("secure_protocols", name)(registry.options("secure_protocols", name)())
    masking = Masking(protocol, 0, 1, range(count))
    near, threshold = masking.neighbours[0], masking.thresholds[0]
    if name == "sparse" and len(near) == count - 1:
        return []  # the same as pairwise
    what = f"{count} clients, {len(near)} neighbours: "
    ours = _median(repeats, lambda: _client(masking))
    shown = f"{1000 * ours.seconds:.1f} ms, {ours.bytes_up:,} bytes up, {ours.bytes_down:,} down"
    gone = count // 16
    seconds = statistics.median(_server(masking, gone) for _ in range(repeats))
    server = Row(f"{what}the server, {gone} of them gone", 1000 * seconds, unit="ms")
    if find_spec("flwr") is None:
        return [
            server,
            Row(f"{what}a client", 1000 * ours.seconds, unit="ms", note=shown),
            skipped(what, "there is no flwr"),
        ]
    theirs = _median(1 if count > 16 else repeats, lambda: _flower(count, len(near) + 1, threshold))
    beside = f"{1000 * theirs.seconds:.0f} ms, {theirs.bytes_up:,} bytes up, {theirs.bytes_down:,} down"
    note = f"{shown}; Flower {beside}"
    return [
        server,
        Row(f"{what}Flower's time over ours, of a client", theirs.seconds / ours.seconds, 1.0, note=note),
        Row(f"{what}Flower's bytes over ours, the masked numbers apart", theirs.beside / ours.beside, 1.0),
    ]


def _median(repeats: int, measure: Callable[[], Cost]) -> Cost:
    costs = [measure() for _ in range(repeats)]
    return Cost(statistics.median(c.seconds for c in costs), costs[0].bytes_up, costs[0].bytes_down)


def _client(masking: Masking) -> Cost:
    """Client 0 of a sum, from its keys to its answer."""
    near = masking.neighbours[0]
    others = {
        number: masking.client(number) for number in {0, *near, *(o for n in near for o in masking.neighbours[n])}
    }
    adverts = {number: other.advertise() for number, other in others.items()}

    def told(number: int) -> bytes:
        return b"".join(adverts[one] for one in masking.neighbours[number])

    def sealed_for_0(number: int, client: Client) -> bytes:
        each, position = client.share(told(number)), masking.neighbours[number].index(0)
        size = len(each) // len(masking.neighbours[number])
        return each[size * position : size * (position + 1)]

    received = b"".join(sealed_for_0(number, others[number]) for number in near)
    values, asked = np.zeros(_NUMBERS, dtype=np.int64), bytes([1] * len(near))
    began = time.process_time()
    client = masking.client(0)
    sent = [client.advertise(), client.share(told(0))]
    client.hold(received)
    client.mask(values, 0)
    sent += [values.tobytes(), client.answer(asked)]
    seconds = time.process_time() - began
    return Cost(seconds, sum(map(len, sent)), len(told(0)) + len(received) + len(asked))


def _server(masking: Masking, gone: int) -> float:
    """Seconds of the processor to unmask a sum of zeros that the first `gone` clients did not add to."""
    count = len(masking.neighbours)
    transport, uploaded = LoopbackTransport(), range(gone, count)
    masks = masking.begin(transport, uploaded, [transport.rank] * len(uploaded), _NUMBERS)
    total = np.zeros(_NUMBERS, dtype=np.int64)
    for client in uploaded:
        masks.hide(client, total, 0)
    began = time.process_time()
    masks.recover()
    masks.lift(total, 0)
    seconds = time.process_time() - began
    assert not total.any(), "the masks of a sum of zeros were not all taken out"
    return seconds


def _flower(count: int, holders: int, threshold: int) -> Cost:
    """Flower's client in the four stages of its protocol; what the server would send it is made here.

    count: clients of the cohort. holders: the client and its neighbours. threshold: how many recover a secret.
    """
    # The module has all that is needed by its own imports; the package has a function of the module's name.
    peer: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    record_bytes: Any = importlib.import_module("flwr.common.serde").config_record_to_proto
    typing: Any = importlib.import_module("flwr.common.typing")
    number, *others = (2**62 + i for i in range(holders))
    context = peer.Context(run_id=1, node_id=number, node_config={}, state=peer.RecordDict(), run_config={})
    update = importlib.import_module("flwr.common").ndarrays_to_parameters([np.zeros(_NUMBERS, dtype=np.float32)])
    trained = typing.FitRes(typing.Status(typing.Code.OK, ""), update, 100, {})
    records = peer.compat.fitres_to_recorddict(trained, True)
    identity: Any = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    identity.task_id = identity.run_id = identity.node_id = 1  # without them it makes no messages
    seconds, up, down = 0.0, 0, 0

    def stage(name: str, told: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal seconds, up, down
        configs = peer.ConfigRecord({**told, "stage": name})
        down += record_bytes(configs).ByteSize()
        content = peer.RecordDict({peer.RECORD_KEY_CONFIGS: configs})
        message = peer.Message(content, dst_node_id=number, message_type="train", group_id="1")
        began = time.process_time()
        reply = peer.secaggplus_mod(message, context, lambda asked, _: peer.Message(records, reply_to=asked))
        seconds += time.process_time() - began
        answer: Mapping[str, Any] = reply.content.config_records[peer.RECORD_KEY_CONFIGS]
        up += record_bytes(answer).ByteSize()
        return answer

    keys = stage("setup", {
        "sample_num": count, "share_num": holders, "threshold": threshold, "clipping_range": 8.0,
        "target_range": _QUANTIZATION, "mod_range": _MODULUS, "max_weight": 1000.0,
    })  # fmt: skip
    pairs = {one: (peer.generate_key_pairs(), peer.generate_key_pairs()) for one in others}
    public = {str(one): [peer.public_key_to_bytes(key) for _, key in both] for one, both in pairs.items()}
    stage("share_keys", {str(number): [keys["pk1"], keys["pk2"]], **public})
    seal = peer.bytes_to_public_key(keys["pk2"])
    # A share of each secret stands for all of that size.
    shares = [peer.create_shares(s, 2, 3)[0] for s in (bytes(32), peer.private_key_to_bytes(pairs[others[0]][0][0]))]
    sealed = [
        peer.encrypt(
            peer.generate_shared_key(pairs[one][1][0], seal),
            peer.share_keys_plaintext_concat(one, number, *shares),
        )
        for one in others
    ]
    stage("collect_masked_vectors", {"ctxts": sealed, "srcs": others})
    stage("unmask", {"active_nids": [number, *others], "dead_nids": []})
    return Cost(seconds, up, down)
