"""The contract of every transport, run by each rank: `python contract_transport.py CHOICE NAME [DEVICE]`."""

from __future__ import annotations

import os
import sys

import torch

from fedhpc.ranks.launch import detect
from fedhpc.ranks.transport import Transport, base, open_transport


def raises(kind: type[Exception], call, *args: object) -> None:
    try:
        call(*args)
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def check_broadcast(t: Transport, device: str) -> None:
    for dtype in base.MOVABLE:
        for shape in [(), (7,), (3, 5), (0,), (100_003,)]:
            want = (torch.arange(torch.Size(shape).numel()).reshape(shape) % 251).to(device, dtype)
            got = want.clone() if t.rank == 0 else torch.zeros_like(want)
            before = t.wire_bytes
            t.broadcast(got)
            assert torch.equal(got, want), (dtype, shape)
            assert t.wire_bytes - before == (got.nbytes if t.world_size > 1 else 0)


def check_reduce(t: Transport, device: str) -> None:
    total = t.world_size * (t.world_size + 1) // 2
    for dtype in base.REDUCIBLE:
        for size in (0, 1, 1000):
            got = torch.full((size,), t.rank + 1, dtype=dtype, device=device)
            before = t.wire_bytes
            t.reduce_sum(got)
            assert t.rank != 0 or torch.equal(got.cpu(), torch.full((size,), total, dtype=dtype))
            assert t.wire_bytes - before == (got.nbytes if t.world_size > 1 else 0)
            got = torch.arange(size).sub(t.rank).to(device, dtype)
            t.all_reduce_max(got)
            assert torch.equal(got.cpu(), torch.arange(size).to(dtype))
    # One unit in 2^62: a detour through float64 would lose it.
    near = 2**62 // t.world_size
    got = torch.tensor([near + t.rank, -near - t.rank, 2**62 - 1 if t.rank == 0 else 1], device=device)
    t.reduce_sum(got)
    if t.rank == 0:
        extra = sum(range(t.world_size))
        assert got[:2].tolist() == [near * t.world_size + extra, -near * t.world_size - extra]
        assert int(got[2]) == 2**62 - 1 + t.world_size - 1


def check_all_to_all(t: Transport, device: str) -> None:
    def values(source: int, target: int, dtype: torch.dtype) -> torch.Tensor:
        size = (source * 3 + target * 2) % 5 * 1000  # some are empty
        return (torch.arange(size) % 97 + source * 10 + target).to(device, dtype)

    for dtype in base.MOVABLE:
        send = [values(t.rank, j, dtype) for j in range(t.world_size)]
        want = [values(j, t.rank, dtype) for j in range(t.world_size)]
        got = [torch.zeros_like(tensor) for tensor in want]
        before = t.wire_bytes
        t.all_to_all(send, got)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), dtype
        crossed = sum(x.nbytes for j in range(t.world_size) if j != t.rank for x in (send[j], want[j]))
        assert t.wire_bytes - before == crossed


def check_json(t: Transport) -> None:
    value = {"text": "é\n", "list": [1, 2.5, None, True], "pi": 0.1 + 0.2, "big": 2**62}
    assert t.broadcast_json(value if t.rank == 0 else None) == value
    gathered = t.gather_json({"rank": t.rank, "filler": "x" * t.rank * 10_000})
    if t.rank == 0:
        assert gathered is not None and [item["rank"] for item in gathered] == list(range(t.world_size))
    else:
        assert gathered is None
    nan = t.broadcast_json(float("nan") if t.rank == 0 else 0)
    assert nan != nan
    before = t.wire_bytes
    t.broadcast_json("abcd" if t.rank == 0 else None)
    assert t.wire_bytes - before == (8 + len('"abcd"') if t.world_size > 1 else 0)


def check_bounds(t: Transport) -> None:
    too_long = "x" * (base.JSON_LIMIT_BYTES + 1)
    raises(ValueError, t.broadcast_json, too_long if t.rank == 0 else None)  # on every rank
    raises(ValueError, t.gather_json, too_long if t.rank == t.world_size - 1 else "")
    raises(TypeError, t.broadcast, torch.zeros(2, dtype=torch.complex64))
    raises(TypeError, t.reduce_sum, torch.zeros(2, dtype=torch.bfloat16))
    raises(ValueError, t.broadcast, torch.zeros(4, 4).t())
    raises(ValueError, t.broadcast, torch.zeros(4, requires_grad=True))
    raises(ValueError, t.all_to_all, [], [])


def check_many_small(t: Transport) -> None:
    """Results do not leak from one collective into the next."""
    for i in range(50):
        got = torch.tensor([i * 10 if t.rank == 0 else -1])
        t.broadcast(got)
        assert int(got) == i * 10
        t.reduce_sum(got)
        assert t.rank != 0 or int(got) == i * 10 * t.world_size


def run_all(t: Transport, device: str = "cpu") -> None:
    for check in (check_broadcast, check_reduce, check_all_to_all):
        check(t, device)
        t.barrier()
    for check in (check_json, check_bounds, check_many_small):
        check(t)
        t.barrier()
    assert isinstance(t.wire_bytes, int)


def main() -> None:
    choice, name, device = [*sys.argv[1:], "cpu"][:3]
    torch.set_num_threads(1)
    with open_transport(detect(os.environ), choice, timeout_s=60) as t:
        assert t.name == name, t.name
        run_all(t, device)
        # One write, so that lines of several ranks on one pipe stay whole.
        os.write(1, f"contract kept by rank {t.rank} of {t.world_size}\n".encode())


if __name__ == "__main__":
    main()
