"""Which GPU every rank works on, for machines that are not here."""

from __future__ import annotations

import pytest
import torch

from fedhpc import config as configuration
from fedhpc.approaches.prepare import assign_devices
from fedhpc.errors import UserError
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.placement import Placement, assign_gpus
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError

EIGHT = [f"a{i}" for i in range(8)]
OTHER = [f"b{i}" for i in range(8)]
NONE: list[str] = []


@pytest.mark.parametrize(
    ("visible", "server", "gpus", "apart", "said"),
    [
        # One process is server and worker.
        ([EIGHT[:1]], "auto", ["a0"], False, "1 GPU"),
        ([EIGHT], "cpu", ["a0"], False, "1 GPU (7 more GPUs are not used: start more ranks)"),
        ([NONE] * 3, "auto", [], False, "cpu"),
        ([NONE] * 3, "cpu", [], False, "cpu"),
        # 8 GPUs: a rank each leaves one for the server, which evaluates on it; one more rank leaves none.
        ([EIGHT] * 8, "auto", [*["a7"], *EIGHT[:7]], True, "7 GPUs, the server on a GPU of its own"),
        ([EIGHT] * 9, "auto", ["", *EIGHT], False, "8 GPUs, the server on the CPU"),
        ([EIGHT] * 9, "shared", ["a0", *EIGHT], False, "8 GPUs, the server sharing one of them"),
        ([EIGHT] * 8, "shared", [*["a7"], *EIGHT[:7]], True, "7 GPUs, the server on a GPU of its own"),
        ([EIGHT] * 8, "own", [*["a7"], *EIGHT[:7]], True, "7 GPUs, the server on a GPU of its own"),
        (
            [EIGHT] * 8,
            "cpu",
            ["", *EIGHT[:7]],
            False,
            "7 GPUs, the server on the CPU (1 more GPU is not used: start more ranks)",
        ),
        (
            [EIGHT] * 9,
            "own",
            ["a7", *EIGHT[:7], "a0"],
            False,
            "7 GPUs, the server on a GPU of its own (8 workers share them: 8 ranks would be one each)",
        ),
        (
            [EIGHT[:2]] * 5,
            "auto",
            ["", "a0", "a1", "a0", "a1"],
            False,
            "2 GPUs, the server on the CPU (4 workers share them: 3 ranks would be one each)",
        ),
        ([EIGHT[:1]] * 2, "auto", ["", "a0"], False, "1 GPU, the server on the CPU"),
        # As slurm/job.sh starts them: one rank more on the first of two nodes.
        ([EIGHT] * 9 + [OTHER] * 8, "auto", ["", *EIGHT, *OTHER], False, "16 GPUs, the server on the CPU"),
        (
            [EIGHT] * 8 + [OTHER] * 8,
            "auto",
            ["a7", *EIGHT[:7], *OTHER],
            True,
            "15 GPUs, the server on a GPU of its own",
        ),
        # A server on a node without GPUs.
        ([NONE] + [EIGHT] * 8, "auto", ["", *EIGHT], False, "8 GPUs, the server on the CPU"),
        # Slurm may show every task its own GPU alone.
        ([[gpu] for gpu in EIGHT], "auto", EIGHT, True, "7 GPUs, the server on a GPU of its own"),
        ([["a0"], *([gpu] for gpu in EIGHT)], "auto", ["", *EIGHT], False, "8 GPUs, the server on the CPU"),
    ],
)
def test_place(visible: list[list[str]], server: str, gpus: list[str], apart: bool, said: str) -> None:
    placement = assign_gpus(visible, server)
    assert list(placement.gpus) == gpus
    assert placement.one_gpu_each == apart
    assert placement.describe() == said


@pytest.mark.parametrize(
    ("visible", "server", "words"),
    [
        ([NONE, EIGHT, NONE, EIGHT], "auto", r"ranks \[2\] see no GPU"),
        ([NONE] * 3, "own", "own needs GPUs"),
        ([NONE] * 3, "shared", "shared needs GPUs"),
        ([NONE, EIGHT], "own", "rank 0 sees no GPU"),
        ([NONE, EIGHT], "shared", "rank 0 sees no GPU"),
        ([EIGHT[:1]] * 2, "own", r"ranks \[1\] see no other GPU"),
    ],
)
def test_what_cannot_be(visible: list[list[str]], server: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        assign_gpus(visible, server)


def test_a_quantised_base_is_never_on_the_cpu() -> None:
    assert assign_gpus([EIGHT] * 9, "auto", quantized=True).gpus == ("a0", *EIGHT)
    assert assign_gpus([EIGHT] * 8, "auto", quantized=True).one_gpu_each
    for visible, server in (([EIGHT] * 9, "cpu"), ([NONE] + [EIGHT] * 8, "auto")):
        with pytest.raises(UserError, match="quantised base"):
            assign_gpus(visible, server, quantized=True)


def test_a_server_that_trains_shares_a_gpu_rather_than_use_the_cpu() -> None:
    assert assign_gpus([EIGHT] * 9, "auto").gpus == ("", *EIGHT)
    assert assign_gpus([EIGHT] * 9, "auto", server_trains=True).gpus == ("a0", *EIGHT)
    assert assign_gpus([EIGHT] * 9, "cpu", server_trains=True).gpus == ("", *EIGHT)


def test_a_server_on_the_cpu_does_not_evaluate_for_workers_on_gpus() -> None:
    assert assign_gpus([EIGHT] * 9, "auto").evaluators(9) == tuple(range(1, 9))
    assert (
        assign_gpus([EIGHT] * 9, "shared").evaluators(9)
        == assign_gpus([NONE] * 9, "auto").evaluators(9)
        == tuple(range(9))
    )
    assert Placement().evaluators(3) == (0, 1, 2)


def test_ranks_agree_on_it_or_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedhpc.approaches.prepare.device_of", lambda launch: torch.device("cpu"))
    config = configuration.load(None, [])
    launch = assign_devices(config, LoopbackTransport(), Launch(), ["a0", "a1"])
    assert launch.placement == Placement(("a0",), 2)
    assert assign_devices(config, LoopbackTransport(), Launch(), []).placement == Placement()
    config = configuration.load(None, ["runtime.server=own"])
    with pytest.raises(RefusedError, match=r"runtime\.server: own needs GPUs"):
        assign_devices(config, LoopbackTransport(), Launch(), [])
