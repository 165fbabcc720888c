"""Compressed updates and models: each compressor against its formula in numpy, its bytes, and whole federated runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pysz
import pytest
import torch
import zfpy

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.errors import UserError
from fedhpc.lazy import lazy
from fedhpc.rng import generator
from fedhpc.updates.downlink import Downlink
from fedhpc.updates.layout import Layout
from fedhpc.updates.pipeline import Pipeline, Sent
from fedhpc.updates.transforms._compressor import pack, unpack
from tests.federations import table
from tests.test_quadratic import (
    COHORT,
    ROUNDS,
    SIZE,
    START,
    STEPS,
    B,
    H,
    OneVector,
    agree,
    cohorts,
    federated,
    sgd,
    thetas,
)
from tests.test_seams import in_every_way

LAYOUT = Layout({"a": (40,), "b": (12, 3, 5), "c": (7,)})  # 227 numbers
TENSORS = np.split(np.arange(LAYOUT.size), np.cumsum(LAYOUT.sizes)[:-1])
CLIENTS = [4, 9]
NAMES = ["powersgd", "quantize", "sign", "sz", "topk", "zfp"]


def made(*sections: dict[str, Any]) -> list[Any]:
    """Transforms by their items of the list `transforms`."""
    config = configuration.resolve({"partition": {"name": "iid"}, "transforms": [*sections]})
    return [registry.choice("transforms", section.name)(section) for section in config.transforms]


def sent(
    transforms: list[Any], updates: np.ndarray, round_: int = 1, memory: dict[str, torch.Tensor] | None = None
) -> Sent:
    """What clients send of the updates (K, S)."""
    pipeline = Pipeline(transforms, 0, LAYOUT, torch.from_numpy(updates).dtype)
    clients = (CLIENTS * len(updates))[: len(updates)] if len(updates) <= 2 else list(range(len(updates)))
    if memory is None:
        memory = {key: torch.stack([pipeline.initial(key) for _ in clients]) for key in pipeline.keeps}
    raw = np.full(len(clients), updates.dtype.itemsize * LAYOUT.size)
    return pipeline.on_clients(torch.from_numpy(updates), round_, clients, memory, raw)


def values(dtype: Any = np.float64, rows: int = 2, seed: int = 0) -> np.ndarray:
    """Updates whose tensors are of different sizes, with zeros and equal numbers among them."""
    updates = np.random.default_rng(seed).normal(size=(rows, LAYOUT.size)) * np.repeat([1e-3, 1.0, 30.0], LAYOUT.sizes)
    updates[:, 3], updates[:, 50:53] = 0.0, -0.5
    return updates.astype(dtype)


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("bits", "chunk"), [(8, None), (4, None), (4, 32)])
def test_quantize(bits: int, chunk: int | None, dtype: Any) -> None:
    updates, levels = values(dtype), 2 ** (bits - 1) - 1
    result = sent(made({"name": "quantize", "bits": bits, "chunk": chunk}), updates)
    parts = TENSORS if chunk is None else np.split(np.arange(LAYOUT.size), range(chunk, LAYOUT.size, chunk))
    for row, client in enumerate(CLIENTS):
        draws, wanted = generator(0, "transforms.0.rounding", 1, client).random(LAYOUT.size), np.zeros(LAYOUT.size)
        for part in parts:
            exact = np.abs(updates[row, part].astype(np.float64))
            scale = np.float64(np.float32(exact.max()))
            scale = scale if scale >= exact.max() else np.float64(np.nextafter(np.float32(scale), np.float32(np.inf)))
            for i, size in zip(part, exact, strict=True):
                wanted[i] = np.sign(updates[row, i]) * np.floor(size / scale * levels + draws[i]) * scale / levels
        np.testing.assert_allclose(result.updates[row].numpy(), wanted.astype(dtype), rtol=1e-12, atol=0)
    codes = LAYOUT.size if bits == 8 else -(-LAYOUT.size // 2)
    assert result.bytes_up.tolist() == [codes + 4 * len(parts)] * 2


def test_quantize_is_right_in_the_mean() -> None:
    """Of 1,500 clients with the same update, within 5 standard errors, which follow from the formula."""
    count, levels = 1500, 7
    update = values(rows=1)[0]
    found = sent(made({"name": "quantize", "bits": 4}), np.tile(update, (count, 1))).updates.numpy()
    for part in TENSORS:
        step = np.abs(update[part]).max() / levels
        up = np.abs(update[part]) / step % 1
        error = step * np.sqrt(up * (1 - up) / count)
        # Scales have 32 bits.
        assert (np.abs(found[:, part].mean(axis=0) - update[part]) <= 5 * error + 1e-6 * step * levels).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sign(dtype: Any) -> None:
    updates = values(dtype)
    result = sent(made({"name": "sign"}), updates)
    for row in range(2):
        for part in TENSORS:
            exact = updates[row, part].astype(np.float64)
            wanted = np.where(exact < 0, -1, 1) * np.float32(np.abs(exact).sum() / len(part))
            np.testing.assert_allclose(result.updates[row, part].numpy(), wanted.astype(dtype), rtol=1e-12, atol=0)
    assert result.bytes_up.tolist() == [4 * 3 + -(-LAYOUT.size // 8)] * 2


@pytest.mark.parametrize(("fraction", "count", "bits"), [(0.001, 1, 8), (0.02, 5, 40), (0.3, 68, 227), (1.0, 227, 227)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_topk(fraction: float, count: int, bits: int, dtype: Any) -> None:
    """bits: 8 for each index below 227, or one for each of the coordinates."""
    updates = values(dtype)
    result = sent(made({"name": "topk", "fraction": fraction}), updates)
    for row in range(2):
        order = sorted(range(LAYOUT.size), key=lambda i: (-abs(updates[row, i]), i))[:count]
        wanted = np.zeros(LAYOUT.size, dtype)
        wanted[order] = updates[row, order]
        assert np.array_equal(result.updates[row].numpy(), wanted)
    assert result.bytes_up.tolist() == [-(-bits // 8) + count * updates.itemsize] * 2


def test_powersgd() -> None:
    """Two rounds of a client: the second begins with the right factor of the first. b is a matrix (12, 15)."""
    transforms, updates = made({"name": "powersgd", "rank": 2, "feedback": False}), values()
    basis = [generator(0, "transforms.0.basis.1", 1, client).standard_normal((15, 2)) for client in CLIENTS]  # tensor 1
    memory = None
    for round_ in (1, 2):
        updates = values(seed=round_)
        result = sent(transforms, updates, round_, memory)
        memory = result.tensors
        for row in range(2):
            matrix = updates[row, TENSORS[1]].reshape(12, 15)
            first, second = (matrix @ basis[row]).T  # Gram and Schmidt
            first = first / np.linalg.norm(first)
            second = second - first * (first @ second)
            left = np.stack([first, second / np.linalg.norm(second)], axis=1)
            found = result.updates[row].numpy()
            np.testing.assert_allclose(found[TENSORS[1]].reshape(12, 15), left @ left.T @ matrix, rtol=0, atol=1e-12)
            for part in (TENSORS[0], TENSORS[2]):
                assert np.array_equal(found[part], updates[row, part])
            basis[row] = matrix.T @ left
        assert result.bytes_up.tolist() == [8 * (40 + 2 * (12 + 15) + 7)] * 2


def test_powersgd_is_exact_for_matrices_of_its_rank() -> None:
    updates = values()
    for row in range(2):
        thin = np.random.default_rng(row).normal(size=(2, 15))
        updates[row, TENSORS[1]] = (np.random.default_rng(7).normal(size=(12, 2)) @ thin).ravel()
    found = sent(made({"name": "powersgd", "rank": 2}), updates).updates.numpy()
    np.testing.assert_allclose(found, updates, rtol=0, atol=1e-12)
    whole = sent(made({"name": "powersgd", "rank": 7}), values())  # 7 x (12 + 15) are more than 12 x 15 numbers
    assert np.array_equal(whole.updates.numpy(), values()) and whole.bytes_up.tolist() == [8 * LAYOUT.size] * 2


@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["sz", "zfp"])
def test_errors_are_bounded(name: str, dtype: Any, tolerance: float) -> None:
    updates = values(dtype)
    result = sent(made({"name": name, "tolerance": tolerance}), updates)
    for row in range(2):
        bound = tolerance * float(np.abs(updates[row]).max())
        assert np.abs(result.updates[row].numpy().astype(np.float64) - updates[row]).max() <= bound * (1 + 1e-6)
        if name == "zfp":
            stream = zfpy.compress_numpy(updates[row], tolerance=bound)
        else:
            wanted = pysz.szConfig()
            wanted.errorBoundMode, wanted.absErrorBound = pysz.szErrorBoundMode.ABS, bound
            stream = pysz.sz.compress(updates[row], wanted)[0].tobytes()
        assert result.bytes_up[row] == len(stream)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_arrive_as_zeros(name: str) -> None:
    zeros = np.zeros((1, LAYOUT.size), np.float32)
    assert not sent(made({"name": name}), zeros).updates.numpy().any()


def test_whole_numbers_are_packed_and_unpacked() -> None:
    for width in (1, 3, 8, 17, 40):
        codes = np.random.default_rng(width).integers(0, 2**width, 13, dtype=np.uint64)
        data = pack(codes, width)
        assert len(data) == -(-13 * width // 8) and np.array_equal(unpack(data, width, 13), codes)
        assert int.from_bytes(data, "big") >> (-13 * width % 8) == sum(
            int(c) << width * i for i, c in enumerate(codes[::-1])
        )


# ---------------------------------------------------------------- feedback, order


@pytest.mark.parametrize("name", NAMES)
def test_what_an_update_loses_is_in_the_next_one(name: str) -> None:
    """All that was sent and what is kept are all updates; without feedback nothing is kept."""
    transforms, memory, total = made({"name": name}), None, np.zeros((2, LAYOUT.size))
    for round_ in range(1, 4):
        result = sent(transforms, values(seed=round_), round_, memory)
        memory, total = result.tensors, total + result.updates.numpy()
    updates = sum(values(seed=round_) for round_ in range(1, 4))
    np.testing.assert_allclose(total + memory["transforms.0.residual"].numpy(), updates, rtol=0, atol=1e-12)
    assert Pipeline(made({"name": name, "feedback": False}), 0, LAYOUT, torch.float64).keeps == (
        ["transforms.0.basis"] if name == "powersgd" else []
    )


@pytest.mark.parametrize("name", ["quantize", "sign", "zfp", "sz"])
def test_behind_topk_the_numbers_that_are_kept_are_packed_alone(name: str) -> None:
    """As if those were all of the update; a tensor of which nothing is sent has no scale."""
    updates, topk = values(), {"name": "topk", "fraction": 0.02, "feedback": False}
    chosen = sent(made(topk), updates)
    result = sent(made(topk, {"name": name}), updates)
    where = chosen.updates[0].numpy() != 0
    assert where.sum() == 5 and not where[TENSORS[0]].any()
    found = result.updates[0].numpy()
    assert not found[~where].any() and found[where].any()
    index_bytes = 5  # of 8 bits each
    scales = 4 * len([part for part in TENSORS if where[part].any()])
    if name in ("quantize", "sign"):
        assert result.bytes_up[0] == index_bytes + scales + (5 if name == "quantize" else 1)
    else:
        bound = 0.01 * np.abs(updates[0]).max()
        assert np.abs(found[where] - updates[0, where]).max() <= bound
        assert result.bytes_up[0] - index_bytes > 0
    residual = result.tensors["transforms.1.residual"][0].numpy()
    np.testing.assert_allclose(found + residual, chosen.updates[0].numpy(), rtol=0, atol=1e-15)


def test_an_update_that_is_not_finite_stays_so() -> None:
    """So its client is rejected; the others of its block have what they have alone."""
    for name in NAMES:
        updates = values(np.float32)
        updates[0, 5] = np.inf
        found = sent(made({"name": name}), updates).updates.numpy()
        assert not np.isfinite(found[0]).all()
        assert np.array_equal(found[1], sent(made({"name": name}), values(np.float32)).updates[1].numpy())


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "topk behind": ([{"name": "quantize"}, {"name": "topk"}], {}, r"transforms\[1\]: topk comes after quantize.*; put"),
    "clip behind": (
        [{"name": "sign"}, {"name": "clip"}],
        {},
        r"clip comes after sign, which has packed .*; put clip in",
    ),
    "two of them": ([{"name": "quantize"}, {"name": "sign"}], {}, r"sign and quantize both pack the update; give one"),
    "two choices": ([{"name": "topk"}, {"name": "topk"}], {}, r"topk and topk both pack"),
    "matrices in part": ([{"name": "topk"}, {"name": "powersgd"}], {}, r"powersgd packs whole matrices, of which topk"),
    "a model of nobody": (
        [{"name": "sign", "direction": "down"}],
        {"mode": "centralized"},
        r"not with mode centralized",
    ),
    "bits": ([{"name": "quantize", "bits": 3}], {}, r"transforms\[0\]\.bits"),
    "chunk": ([{"name": "quantize", "chunk": 0}], {}, r"transforms\[0\]\.chunk"),
    "fraction": ([{"name": "topk", "fraction": 0}], {}, r"transforms\[0\]\.fraction"),
    "tolerance": ([{"name": "zfp", "tolerance": 1.0}], {}, r"transforms\[0\]\.tolerance"),
    "rank": ([{"name": "powersgd", "rank": 0}], {}, r"transforms\[0\]\.rank"),
    "direction": ([{"name": "sz", "direction": "sideways"}], {}, r"transforms\[0\]\.direction"),
    "another's option": ([{"name": "sign", "bits": 4}], {}, r"transforms\[0\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_defined_is_refused(name: str) -> None:
    transforms, others, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        configuration.resolve({"partition": {"name": "iid"}, "transforms": transforms, **others})


def test_each_way_has_an_order_of_its_own() -> None:
    """What packs updates does not stand in the way of what packs the model."""
    made({"name": "quantize"}, {"name": "topk", "direction": "down"}, {"name": "sign", "direction": "down"})
    with pytest.raises(UserError, match="both pack the update"):
        made({"name": "quantize", "direction": "both"}, {"name": "sign", "direction": "down"})


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedhpc.updates.transforms import zfp

    monkeypatch.setattr(zfp, "zfpy", lazy("zfpy_that_is_not_there", extra="compression"))
    with pytest.raises(UserError, match=r"pip install 'fedhpc\[compression\]'"):
        made({"name": "zfp"})


# ---------------------------------------------------------------- the model's way down


def test_clients_know_one_model_and_are_sent_what_they_missed() -> None:
    (quantize,) = made({"name": "quantize", "bits": 4, "direction": "down"})
    downlink, models = Downlink([quantize], 0, LAYOUT, torch.float64), [values(rows=1, seed=s)[0] for s in range(4)]
    memory = downlink.initial(torch.from_numpy(models[0]))
    known, each, whole = models[0], 4 * 3 + 114, 8 * LAYOUT.size
    # Client 3 misses two rounds, client 4 is new in the last.
    for round_, (cohort, wanted) in enumerate(
        [([3, 5], 2 * whole), ([5], each), ([5, 6], each + whole), ([3, 4, 5], 3 * each + whole + each)], 1
    ):
        if round_ == 3:  # as after a resume
            memory = {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in memory.items()}
        theta = torch.from_numpy(models[round_ - 1])
        found, size = downlink.send(theta, round_, cohort, memory)
        draws = generator(0, "downlink.0.rounding", round_).random(LAYOUT.size)
        for part in TENSORS:
            difference = models[round_ - 1][part] - known[part]
            scale = np.abs(difference).max()
            if scale:
                steps = np.floor(np.abs(difference) / scale * 7 + draws[part]) * scale / 7
                known = known.copy()
                known[part] += np.sign(difference) * steps
        np.testing.assert_allclose(found.numpy(), known, rtol=0, atol=1e-5)  # scales have 32 bits
        known = found.numpy()
        assert size == wanted


def test_no_client_is_sent_more_than_the_whole_model() -> None:
    (sz,) = made({"name": "sz", "tolerance": 1e-6, "direction": "down"})
    downlink = Downlink([sz], 0, LAYOUT, torch.float32)
    memory = downlink.initial(torch.zeros(LAYOUT.size))
    for round_, client in ((1, 7), (2, 8), (3, 8), (4, 8), (5, 7)):
        size = downlink.send(torch.from_numpy(values(np.float32, 1, round_)[0]), round_, [client], memory)[1]
    assert size == 4 * LAYOUT.size


# ---------------------------------------------------------------- runs

RUNS: dict[str, list[dict[str, Any]]] = {
    "both ways": [{"name": "quantize", "bits": 4, "direction": "both", "feedback": False}],
    "sign": [{"name": "clip", "norm": 9.0}, {"name": "sign"}, {"name": "zfp", "direction": "down"}],
    "topk": [{"name": "topk", "fraction": 0.4}, {"name": "quantize", "chunk": 2}, {"name": "sz", "direction": "down"}],
}


def objective(x: np.ndarray) -> float:
    """The mean of all clients' losses."""
    return float(np.mean([0.5 * (x - b) @ h @ (x - b) for h, b in zip(H, B, strict=True)]))


@pytest.mark.parametrize("name", RUNS)
def test_runs_have_the_same_bits_on_any_ranks_and_when_resumed_and_learn(name: str, tmp_path: Path) -> None:
    def unchanged(approach: Averaging) -> None:
        pass

    found = in_every_way(tmp_path, unchanged, transforms=RUNS[name])
    best = np.linalg.solve(H.sum(axis=0), np.einsum("npq,nq->p", H, B))
    gap = objective(START) - objective(best)
    assert objective(found[-1]) - objective(best) < 0.5 * gap
    one, other = (table(tmp_path / way, "rounds") for way in ("1", "resumed"))
    for column in ("bytes_up", "bytes_down"):
        assert np.array_equal(one[column], other[column])


def test_updates_that_are_sent_as_factors_are_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA's exact sum: what would be packed is not what a client sends."""
    monkeypatch.setattr(OneVector, "numbers_sent", lambda method, client, round_: SIZE - 1)
    with pytest.raises(UserError, match=r"sends other numbers than its payload's.*; take out what packs"):
        federated(tmp_path, transforms=[{"name": "quantize"}])
    federated(tmp_path, transforms=[{"name": "quantize", "direction": "down"}], federation={"rounds": 1})


def test_a_round_is_what_the_papers_say(tmp_path: Path) -> None:
    """8 bits both ways, with feedback: FedAvg with uniform weights from the model that clients know."""
    transforms = [{"name": "quantize", "direction": "both"}]
    federated(tmp_path, transforms=transforms, server={"weighting": "uniform"})
    found = thetas(federated(tmp_path / "again", transforms=transforms, server={"weighting": "uniform"}))

    def eight_bits(value: np.ndarray, *keys: Any) -> np.ndarray:
        scale = np.float64(np.float32(np.abs(value).max()))
        if scale < np.abs(value).max():
            scale = np.float64(np.nextafter(np.float32(scale), np.float32(np.inf)))
        steps = np.floor(np.abs(value) / max(scale, 1e-300) * 127 + generator(0, *keys).random(SIZE))
        return np.sign(value) * steps * scale / 127

    x, known, residuals, wanted = START, START, np.zeros((len(STEPS), SIZE)), []
    for round_, group in enumerate(cohorts(tmp_path), 1):
        known = known + eight_bits(x - known, "downlink.0.rounding", round_)
        total = np.zeros(SIZE)
        for i in group:
            update = known - sgd(i, known, STEPS[i]) + residuals[i]
            arrived = eight_bits(update, "transforms.0.rounding", round_, i)
            residuals[i], total = update - arrived, total + arrived / len(group)
        x = x - total
        wanted.append(x)
    agree(found, wanted, START)
    rounds = table(tmp_path, "rounds")
    assert (rounds["bytes_up"][1:] == COHORT * (SIZE + 4)).all() and len(rounds["bytes_up"]) == ROUNDS + 1
    last: dict[int, int] = {}
    for round_, group in enumerate(cohorts(tmp_path), 1):
        missed = [min(8 * SIZE, 9 * (round_ - last[i])) if i in last else 8 * SIZE for i in group]
        assert rounds["bytes_down"][round_] == sum(missed)
        last.update(dict.fromkeys(group, round_))
