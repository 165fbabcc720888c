"""Secure aggregation: the masked sum is the plain one to the bit, the server sees masked numbers alone, and the parts
of the protocol do what their sources say."""

from __future__ import annotations

import hashlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc.approaches.prepare import prepare
from fedhpc.bench import secure
from fedhpc.errors import UserError
from fedhpc.lazy import lazy
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport, Transport
from fedhpc.registry import choice, names, options
from fedhpc.secure import primitives, shamir
from fedhpc.secure.masked_sum import Masking
from fedhpc.secure.protocols.base import Protocol, two_thirds
from fedhpc.secure.protocols.pairwise import Pairwise
from fedhpc.secure.protocols.sparse import CORRUPT, DROPPING, enough_neighbours
from fedhpc.updates import cohort as cohorts
from fedhpc.updates.cohort import Cohort
from fedhpc.updates.exact_sum import FixedGrid
from fedhpc.updates.layout import Layout
from tests.federations import (
    Interrupted,
    ThreadTransport,
    federate,
    final,
    on_threads,
    settings,
    table,
    tree,
    write_texts,
)

LAYOUT = Layout({"a": (1500,), "b": (3, 5)})
PLANNED = [7, 3, 11, 5, 2, 13, 8, 4]
UPDATES = 3 * torch.randn(len(PLANNED), LAYOUT.size, generator=torch.Generator().manual_seed(0))
WEIGHTS = np.random.default_rng(1).random(len(PLANNED)) / len(PLANNED)


def protocol(name: str, **given: Any) -> Protocol:
    made: Protocol = choice("secure_protocols", name)(options("secure_protocols", name)(**given))
    return made


def summed(ranks: int, accepted: list[int], masked_by: Protocol | None) -> tuple[torch.Tensor, Masking | None]:
    """sum_i w_i g_i of some of the planned clients, dealt out to the ranks, on rank 0."""
    order = np.random.default_rng(ranks).permutation(np.array(accepted, dtype=np.int64))

    def one(transport: Transport) -> tuple[torch.Tensor, Masking | None]:
        mine = order[transport.rank :: ranks]
        masking = None if masked_by is None else Masking(masked_by, 5, 2, PLANNED)
        shares, updates = np.full(len(PLANNED), 1 / len(PLANNED)), UPDATES[torch.from_numpy(mine)]
        cohort = Cohort(transport, LAYOUT, PLANNED, shares, mine, updates, masking=masking)
        weights = dict(zip(PLANNED, WEIGHTS, strict=True))
        return cohort.weighted_sum(np.array([weights[client] for client in cohort.clients])), masking

    total, masking = on_threads(ranks, one)[0]
    return total, masking


# ---------------------------------------------------------------- the sum


@pytest.mark.parametrize(
    ("name", "given", "dropped"),
    [
        ("pairwise", {}, []),
        ("pairwise", {}, [1, 6]),  # 6 of 8 are needed
        ("pairwise", {"threshold": 3}, [0, 1, 2, 3, 7]),
        ("sparse", {"neighbours": 4}, [2]),
        ("sparse", {"neighbours": 4, "threshold": 2}, [0, 3]),
        ("sparse", {}, [4]),
    ],
)
def test_the_masked_sum_has_the_bits_of_the_plain_one_on_any_number_of_ranks(
    name: str, given: dict[str, Any], dropped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohorts, "_CHUNK", 512)  # so that there are several exchanges
    accepted = [i for i in range(len(PLANNED)) if i not in dropped]
    plain, _ = summed(1, accepted, None)
    for ranks in (1, 2, 3):
        total, masking = summed(ranks, accepted, protocol(name, **given))
        assert torch.equal(total, plain)
        assert masking is not None
        assert (masking.bytes_up, masking.bytes_down) == masking.expected_bytes(
            [PLANNED[i] for i in accepted], LAYOUT.size
        )


@pytest.mark.parametrize(
    ("name", "given", "accepted", "why"),
    [
        ("pairwise", {}, range(5), "5 of 8 clients that hold shares of a mask completed, and 6 are needed"),
        ("pairwise", {"threshold": 2}, range(2), "2 of the 3 clients whose sum tells nobody another's update"),
        ("pairwise", {}, range(0), "0 of the 3 clients whose sum tells nobody another's update"),
        ("sparse", {"neighbours": 4}, range(4), "of 5 clients that hold shares of a mask completed, and 4 are needed"),
    ],
)
def test_beyond_the_threshold_there_is_no_sum(name: str, given: dict[str, Any], accepted: range, why: str) -> None:
    for ranks in (1, 3):
        total, masking = summed(ranks, list(accepted), protocol(name, **given))
        assert masking is not None and why in masking.shortfall([PLANNED[i] for i in accepted])
        assert not total.any()
        keys, told = masking.expected_bytes([], LAYOUT.size)  # sent before anybody is gone
        assert (masking.bytes_up, masking.bytes_down) == (keys + 8 * LAYOUT.size * len(accepted), told)


def test_the_server_holds_masked_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a client on each of three workers: what rank 0 gets of each says nothing of its update."""
    planned, seen = [4, 9, 2], []
    reduce, exchange = ThreadTransport._reduce_sum, ThreadTransport._exchange

    def watched_reduce(self: ThreadTransport, tensor: torch.Tensor) -> None:
        if self.rank:
            seen.append(tensor.clone())
        reduce(self, tensor)

    def watched_exchange(self: ThreadTransport, send: dict[int, torch.Tensor], receive: Any) -> None:
        seen.extend(sent.clone() for to, sent in send.items() if to == 0)
        exchange(self, send, receive)

    monkeypatch.setattr(ThreadTransport, "_reduce_sum", watched_reduce)
    monkeypatch.setattr(ThreadTransport, "_exchange", watched_exchange)

    def correlations(masked_by: Protocol | None) -> list[float]:
        """How what reached rank 0 in the size of an update goes with each update, all pairs."""
        seen.clear()

        def one(transport: Transport) -> torch.Tensor:
            mine = np.arange(3)[transport.rank - 1 : transport.rank] if transport.rank else np.arange(0)
            masking = None if masked_by is None else Masking(masked_by, 0, 1, planned)
            shares, rows = np.full(3, 1 / 3), UPDATES[torch.from_numpy(mine)]
            return Cohort(transport, LAYOUT, planned, shares, mine, rows, masking=masking).weighted_sum(shares)

        on_threads(4, one)
        vectors = [tensor.double() for tensor in seen if tensor.numel() == LAYOUT.size]
        assert len(vectors) == 3
        assert not any(torch.equal(tensor, row) for tensor in seen for row in UPDATES[:3])
        return [
            abs(float(torch.corrcoef(torch.stack(pair))[0, 1]))
            for pair in itertools.product(vectors, UPDATES[:3].double())
        ]

    assert sorted(correlations(None))[-3] > 0.99  # so that the test would see an upload
    assert max(correlations(protocol("pairwise"))) < 0.15  # 1515 numbers without relation: 0.026 is one deviation


def test_noise_comes_on_top_of_the_unmasked_sum() -> None:
    """With the fixed grid and the noise of client-level privacy."""

    def noisy(masking: Masking | None) -> torch.Tensor:
        everyone, shares = np.arange(len(PLANNED)), np.full(len(PLANNED), 1.0)
        cohort = Cohort(LoopbackTransport(), LAYOUT, PLANNED, shares, everyone, UPDATES, masking=masking)
        return cohort.weighted_sum(shares, FixedGrid(-20, torch.arange))

    assert torch.equal(noisy(Masking(protocol("pairwise"), 0, 1, PLANNED)), noisy(None))


def test_masks_cancel_and_no_two_sums_share_one() -> None:
    masking = Masking(protocol("sparse", neighbours=4), 0, 1, PLANNED)
    masks = [masking.begin(LoopbackTransport(), PLANNED, [0] * len(PLANNED), 1000) for _ in range(2)]
    totals = []
    for one in masks:
        hidden = np.zeros((len(PLANNED), 1000), dtype=np.int64)
        for client, row in zip(PLANNED, hidden, strict=True):
            one.hide(client, row, 0)
        assert len(np.unique(hidden)) == hidden.size
        total = hidden.sum(axis=0)
        totals.append(total.copy())
        one.recover()
        one.lift(total, 0)
        assert not total.any()
    assert not np.isin(totals[0], totals[1]).any()


def test_a_share_that_was_changed_on_the_way_is_noticed() -> None:
    masking = Masking(protocol("pairwise"), 0, 1, PLANNED[:4])
    a, b = masking.client(0), masking.client(1)
    adverts = [masking.client(number).advertise() for number in range(4)]
    a.share(b"".join(adverts[number] for number in a.neighbours))
    sealed = bytearray(b.share(b"".join(adverts[number] for number in b.neighbours)))
    sealed[0] ^= 1
    with pytest.raises(Exception, match=r"^$") as raised:
        a.hold(bytes(sealed))
    assert type(raised.value).__name__ == "InvalidTag"


# ---------------------------------------------------------------- what it is made of


def test_shares_are_values_of_a_polynomial_and_any_t_recover_the_secret() -> None:
    secret, coefficients = bytes(range(200, 232)), [2**255 + 9, 3]
    number = int.from_bytes(secret, "big")
    shares = dict(zip(range(1, 6), shamir.split(secret, coefficients, range(1, 6)), strict=True))
    assert [int.from_bytes(share, "big") for share in shares.values()] == [
        (number + coefficients[0] * x + coefficients[1] * x * x) % shamir.PRIME for x in range(1, 6)
    ]
    for few in itertools.permutations(shares, 3):
        assert shamir.recover({x: shares[x] for x in few}) == secret
    # Two shares go with any secret: with each there is a polynomial of degree 2 through it and both of them.
    for other in (0, 1, number):
        xs = (0, 1, 4)
        points = [other, *(int.from_bytes(shares[x], "big") for x in xs[1:])]
        third = sum(
            y * np.prod([(3 - k) * pow(j - k, -1, shamir.PRIME) for k in xs if k != j], dtype=object)
            for j, y in zip(xs, points, strict=True)
        ) % shamir.PRIME  # fmt: skip
        found = {x: shares[x] for x in xs[1:]} | {3: int(third).to_bytes(33, "big")}
        assert int.from_bytes(shamir.recover(found), "big") == other


def test_the_prime_is_the_first_above_all_secrets() -> None:
    def passes(n: int) -> bool:
        return all(pow(base, n - 1, n) == 1 for base in (2, 3, 5, 7, 11, 13))

    assert [n for n in range(2**256 + 1, shamir.PRIME + 1, 2) if passes(n)] == [shamir.PRIME]


def test_known_answers_of_the_primitives() -> None:
    # RFC 7748, section 6.1.
    alice, bob = (bytes.fromhex(key) for key in (
        "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
        "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
    ))  # fmt: skip
    public = [primitives.public_key(key) for key in (alice, bob)]
    assert public[0].hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert public[1].hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    secret = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    wanted = hashlib.sha256(secret + b"masks").digest()
    assert primitives.agree(alice, public[1], b"masks") == primitives.agree(bob, public[0], b"masks") == wanted
    # FIPS 197, appendix C.3: the block of a counter is its encryption.
    numbers = np.zeros(2, dtype=np.int64)
    primitives.add_stream(numbers, bytes(range(32)), 2 * 0x00112233445566778899AABBCCDDEEFF, 1)
    assert numbers.astype("<i8").tobytes().hex() == "8ea2b7ca516745bfeafc49904b496089"
    key = b"k" * 32
    assert primitives.unseal(key, 3, 5, primitives.seal(key, 3, 5, b"shares")) == b"shares"


def test_a_stream_can_be_entered_anywhere_and_wraps_around() -> None:
    whole = np.zeros(150_000, dtype=np.int64)
    primitives.add_stream(whole, b"k" * 32, 0, 1)
    part = np.zeros(70_000, dtype=np.int64)
    primitives.add_stream(part, b"k" * 32, 80_000, 1)
    assert (part == whole[80_000:]).all()
    assert abs(whole.astype(float).mean()) < 5 * 2**64 / np.sqrt(12 * len(whole))
    largest = np.full(1000, 2**63 - 1)
    primitives.add_stream(largest, b"k" * 32, 0, 1)
    assert (largest < 0).any()
    primitives.add_stream(largest, b"k" * 32, 0, -1)
    assert (largest == 2**63 - 1).all()


@pytest.mark.parametrize("name", [name for name in names("secure_protocols") if name != "none"])
def test_in_every_protocol_neighbours_know_each_other_and_some_of_the_holders_are_enough(name: str) -> None:
    for count in (3, 8, 64):
        one = protocol(name)
        one.require(count, count)
        masking = Masking(one, 0, 1, range(count))  # it refuses a graph with arrows
        assert all(near for near in masking.neighbours)
        assert all(2 <= t <= len(near) + 1 for t, near in zip(masking.thresholds, masking.neighbours, strict=True))
        again = [Masking(one, 0, round_, range(count)).neighbours for round_ in (1, 2)]
        assert again[0] == masking.neighbours and (again[1] == again[0]) == (len(masking.neighbours[0]) == count - 1)


def test_the_graph_of_a_round_is_made_once(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, graph = [], Pairwise.graph
    monkeypatch.setattr(Pairwise, "graph", lambda self, *args: made.append(1) or graph(self, *args))
    raw = {**raw_of(texts, secure={"name": "pairwise"}), "federation": {"rounds": 3, "cohort_size": 6}}
    federate(settings(tmp_path, raw))
    assert len(made) == 3


def test_a_graph_with_arrows_is_refused() -> None:
    class Arrows(Pairwise):
        def graph(self, count: int, generator: np.random.Generator) -> list[list[int]]:
            return [[(client + 1) % count] for client in range(count)]

    with pytest.raises(UserError, match="a neighbour that it is no neighbour of"):
        Masking(Arrows(Pairwise.Options()), 0, 1, PLANNED)


@pytest.mark.parametrize("count", [5, 40, 64, 300])
def test_a_sparse_graph_is_a_ring_of_neighbours(count: int) -> None:
    k = min(6, count - 1)
    graph = protocol("sparse", neighbours=6).graph(count, np.random.default_rng(0))
    assert all(len(near) == k and near == sorted(near) and one not in near for one, near in enumerate(graph))
    assert all(one in graph[other] for one, near in enumerate(graph) for other in near)
    reached, new = {0}, {0}
    while new:
        new = {other for one in new for other in graph[one]} - reached
        reached |= new
    assert len(reached) == count
    again = protocol("sparse", neighbours=6).graph(count, np.random.default_rng(1))
    assert (graph == again) == (k == count - 1)


def test_the_number_of_neighbours_is_the_smallest_that_keeps_the_promises() -> None:
    from scipy.stats import hypergeom

    def keeps(k: int, n: int) -> bool:
        t = two_thirds(k + 1)
        caught = n * hypergeom.sf(t - 1, n - 1, int(np.ceil(CORRUPT * n)), k)
        lost = n * hypergeom.sf(k - t, n - 1, int(np.ceil(DROPPING * n)), k)
        return bool(max(caught, n * 0.25 ** (k // 2)) <= 2**-40 and lost <= 2**-30)

    for n in (64, 128, 1000, 10_000):
        k = enough_neighbours(n)
        assert k < n - 1 and keeps(k, n) and not keeps(k - 2, n)
    for few in (10, 16):
        assert enough_neighbours(few) == few - 1
        graphs = [protocol(name).graph(few, np.random.default_rng(0)) for name in ("sparse", "pairwise")]
        assert graphs[0] == graphs[1]


def test_a_client_of_the_benchmark_sends_what_the_protocol_says() -> None:
    (server, row, _), nothing = (part() for part in secure.parts(1, quick=True))
    up, down = 64 + 15 * 82 + 16 * 33 + 8 * 100_000, 15 * (64 + 82 + 1)
    assert (
        server.measured > 0
        and row.measured > 0
        and row.note.endswith(f"{up:,} bytes up, {down:,} down")
        and nothing == []
    )


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def raw_of(texts: Path, **changes: Any) -> dict[str, Any]:
    federation = {"rounds": 4, "cohort_size": 6, "dropout": 0.3}
    evaluation = {"every": 4, "max_examples": 4, "test_max_examples": 4}
    return tree(texts, federation=federation, client={"steps": 1}, evaluation=evaluation, **changes)


def test_a_run_is_the_plain_one_but_for_its_bytes_and_void_rounds(texts: Path, tmp_path: Path) -> None:
    """With drop-outs, on one and three ranks, interrupted or not."""
    secure = {"secure": {"name": "pairwise", "threshold": 4}}
    runs = [tmp_path / name for name in ("one", "three", "resumed")]
    collectives = federate(settings(runs[0], raw_of(texts, **secure)))
    federate(settings(runs[1], raw_of(texts, **secure)), ranks=3)
    with pytest.raises(Interrupted):
        federate(settings(runs[2], raw_of(texts, **secure)), stop_at=collectives * 2 // 3)
    federate(settings(runs[2], raw_of(texts, **secure)), ranks=2)
    payload = final(runs[0])
    for run in runs[1:]:
        assert all(np.array_equal(final(run)[name], payload[name]) for name in payload)
    rounds = table(runs[0], "rounds")
    completed = rounds["completed"][1:]
    assert 3 in completed and (completed >= 4).any() and (completed < 6).any()
    assert ((rounds["update_norm"][1:] == 0) == (completed < 4)).all()
    events = table(runs[0], "events")
    voids = [m for kind, m in zip(events["kind"], events["message"], strict=True) if kind == "void"]
    assert len(voids) == (completed < 4).sum()
    assert "3 of 6 clients that hold shares of a mask completed, and 4 are needed to recover it" in voids
    # The same rounds without masks, void where these are.
    plain = tmp_path / "plain"
    changes = raw_of(texts)
    changes["federation"]["min_cohort"] = 4
    federate(settings(plain, changes))
    assert all(np.array_equal(final(plain)[name], payload[name]) for name in payload)
    # 64 bytes of keys, 82 a sealed share, of six clients with five neighbours each; an int64 a number, and 33 a share
    # where the sum is unmasked.
    numbers = sum(tensor.size for tensor in payload.values())
    wanted = [6 * (64 + 5 * 82) + n * 8 * numbers + (n * 6 * 33 if n >= 4 else 0) for n in completed]
    assert rounds["bytes_up"][1:].tolist() == wanted
    told = table(plain, "rounds")["bytes_down"][1:] + 6 * 5 * (64 + 82)
    assert (rounds["bytes_down"][1:] == told + np.where(completed >= 4, 5 * completed, 0)).all()


def test_a_sparse_graph_gives_the_same_run(texts: Path, tmp_path: Path) -> None:
    changes = {"secure": {"name": "sparse", "neighbours": 4, "threshold": 2}, "transforms": [{"name": "clip"}]}
    raw = {**raw_of(texts, **changes), "federation": {"rounds": 1, "cohort_size": 6}}
    federate(settings(tmp_path / "masked", raw), ranks=3)
    federate(settings(tmp_path / "plain", {**raw, "secure": {"name": "none"}}))
    masked, plain = final(tmp_path / "masked"), final(tmp_path / "plain")
    assert all(np.array_equal(masked[name], plain[name]) for name in plain)


def test_several_sums_of_a_round_are_masked_and_counted(texts: Path, tmp_path: Path) -> None:
    """With adaptive clipping of client-level privacy, whose noisy count is a sum of its own."""
    privacy = {"name": "client", "sampling": "fixed", "accountant": "rdp", "clip_norm": 1.0, "noise_multiplier": 0.5}
    raw = {
        **raw_of(
            texts, privacy={**privacy, "delta": 0.1, "adaptive": {"quantile": 0.5}}, server={"weighting": "uniform"}
        ),
        "federation": {"rounds": 2, "cohort_size": 6},
    }
    for name in ("none", "pairwise"):
        federate(settings(tmp_path / name, {**raw, "secure": {"name": name}}), ranks=2)
    masked, plain = final(tmp_path / "pairwise"), final(tmp_path / "none")
    assert all(np.array_equal(masked[name], plain[name]) for name in plain)
    numbers = sum(tensor.size for tensor in plain.values()) + 1
    wanted = 2 * 6 * (64 + 5 * 82 + 6 * 33) + 6 * 8 * numbers
    assert (table(tmp_path / "pairwise", "rounds")["bytes_up"][1:] == wanted).all()


@pytest.mark.parametrize("secure", [{"name": "pairwise"}, {"name": "sparse", "neighbours": 4}])
def test_keys_and_shares_take_virtual_time(secure: dict[str, Any], texts: Path, tmp_path: Path) -> None:
    devices = {"name": "lognormal", "up_bytes_per_s": 1e4, "down_bytes_per_s": 1e4}
    raw = {**raw_of(texts, secure=secure, devices=devices), "federation": {"rounds": 1, "cohort_size": 6}}
    raw["federation"]["schedule"] = {"over_selection": 1.1}  # 7 clients
    config = settings(tmp_path, raw)
    approach = prepare(config, LoopbackTransport(), Launch(), write_cache=False)
    plan = approach.plan(1)
    assert len(plan.cohort) == 7 and len(plan.training) == 6
    everybody = replace(plan, late=frozenset())
    down, up = (sum(both) for both in zip(*map(approach._traffic, plan.cohort), strict=True))
    assert (down, up) == (approach.bytes_down(everybody), approach.bytes_up(everybody))


@pytest.mark.parametrize(("name", "given"), [("pairwise", {}), ("sparse", {"neighbours": 4})])
def test_how_often_rounds_are_void_is_what_a_plain_count_says(name: str, given: dict[str, Any]) -> None:
    masking = Masking(protocol(name, **given), 0, 1, range(12))
    draws = np.random.default_rng(5)
    rounds = [[client for client in range(12) if draws.random() >= 0.2][:11] for _ in range(3000)]
    plain = sum(bool(masking.shortfall(uploaded)) for uploaded in rounds) / len(rounds)
    assert 0.05 < plain < 0.95 and abs(masking.chance_of_void(0.2, 11) - plain) < 0.1
    assert masking.chance_of_void(0.0, 12) == 0 and masking.chance_of_void(0.95, 12) > 0.99


def test_a_check_says_how_often_rounds_will_be_void(texts: Path, tmp_path: Path) -> None:
    raw = {**raw_of(texts, secure={"name": "pairwise"}), "federation": {"cohort_size": 6, "dropout": 0.9}}
    approach = prepare(settings(tmp_path, raw), LoopbackTransport(), Launch(), write_cache=False)
    (line,) = [line for line in approach.details(approach.plan(1)) if line.startswith("secure")]
    assert line.endswith("with federation.dropout 0.9 about 100% of the rounds are void")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"secure": {"name": "pairwise", "threshold": 1}}, "secure.threshold: must be greater than or equal to 2"),
        ({"secure": {"name": "pairwise", "threshold": 7}}, "secure.threshold is 7, but 6 clients of a cohort hold"),
        ({"secure": {"name": "sparse", "neighbours": 6}}, "secure.neighbours is 6, but a client of a cohort of 6 has"),
        ({"secure": {"name": "sparse", "neighbours": 3}}, "secure.neighbours: must be a multiple of 2"),
        ({"secure": {"name": "sparse", "neighbours": 2, "threshold": 4}}, "but 3 clients of a cohort hold shares"),
        ({"secure": {"name": "pairwise", "neighbours": 4}}, "unknown key 'secure.neighbours'"),
        ({"federation": {"cohort_size": 2}}, "federation.cohort_size: with secure aggregation the sum of 2 updates"),
        ({"server": {"aggregator": "median"}}, "and aggregator median asks for more"),
        ({"server": {"aggregator": "krum"}}, "and aggregator krum asks for more"),
        ({"server": {"aggregator": "fedexp"}}, "and aggregator fedexp asks for more"),
        ({"server": {"preaggregator": {"name": "bucketing"}}}, "secure.name pairwise lets nobody mix single updates"),
        ({"client": {"optimizer": "sgd", "scaffold": True}}, "client.scaffold: secure.name pairwise masks the updates"),
        ({"attack": {"name": "alie"}}, "secure.name pairwise hides what honest clients send, which attack.name alie"),
        ({"transforms": [{"name": "sign"}]}, "transforms: sign packs an update in fewer bytes"),
        ({"mode": "centralized"}, "with mode centralized they send nothing"),
        ({"method": {"name": "fedbpt"}}, "secure.name: method.name fedbpt does not read it"),
    ],
)
def test_what_cannot_be_masked_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    raw = {"secure": {"name": "pairwise"}, "federation": {"cohort_size": 6}, "partition": {"name": "iid"}, **changes}
    with pytest.raises(UserError) as raised:
        configuration.resolve(raw)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "given"), [("pairwise", {}), ("sparse", {"neighbours": 8})])
def test_a_cohort_of_which_too_few_are_awaited_is_refused(name: str, given: dict[str, Any]) -> None:
    protocol(name, **given).require(12, 10)
    with pytest.raises(UserError, match=r"a round awaits 8 of 15 clients, and a mask can be recovered by (11|7) of"):
        protocol(name, **given).require(15, 8)
    protocol(name, threshold=4, **given).require(15, 8)


def test_a_rule_that_sees_single_updates_gets_none() -> None:
    masking = Masking(protocol("pairwise"), 0, 1, PLANNED)
    everyone, shares = np.arange(len(PLANNED)), np.full(len(PLANNED), 1.0)
    cohort = Cohort(LoopbackTransport(), LAYOUT, PLANNED, shares, everyone, UPDATES, masking=masking)
    for verb in (cohort.gram, lambda: cohort.by_coordinate(lambda values: values[0])):
        with pytest.raises(UserError, match="more of the updates than weighted sums"):
            verb()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("cryptography.hazmat.primitives.asymmetric")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    monkeypatch.setattr(primitives, "_x25519", lazy("cryptography.hazmat.primitives.asymmetric.x25519", "secure"))
    with pytest.raises(UserError, match=r"pip install 'fedhpc\[secure\]'"):
        primitives.require()
