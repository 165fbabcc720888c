"""Workers of several ranks: what is computed has the bits of ranks that hold the base whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file
from torch.distributed.fsdp import FSDPModule

from fedhpc import config as configuration
from fedhpc import objectives
from fedhpc.approaches.averaging.together import require_together
from fedhpc.errors import UserError
from fedhpc.main import main
from fedhpc.methods import make_method
from fedhpc.methods._weights import save_model
from fedhpc.models.load import BUILTIN
from fedhpc.models.sharding import shard
from fedhpc.ranks.failed_collective import TransportError, collective
from fedhpc.ranks.group import Agreed, Group
from tests import tiny
from tests.federations import table
from tests.ranks import REPOSITORY, Ranks, run_ranks
from tests.test_kill import GONE_WITHIN_S, HANGS_AFTER_S, STARTS_WITHIN_S, final, recorded, same_as, write

METHODS = ("prefix", "prompt", "lora", "adapter", "ia3")
PAIRS = [f"{model}/{method}" for model in ("llama", "gpt2", "qwen2", "bert", "t5") for method in METHODS]
PAIRS += ["llama/lora/offload"]
PAIRS += ["llama/lora-sb", "llama/lora-pissa", "llama/lora-eva", "qwen2/lora-dora"]  # these read weights of the base
# All ranks train one client: with tied weights, a head, a bias that one layer has and all layers use; frozen layers.
# And experts of which the rows of some ranks reach others.
FULL = ["llama/full", "gpt2/full-bias", "bert/full-last", "t5/full", "switch/full"]
MORE_FULL = ["gpt2/full", "bert/full", "qwen2/full", "bart/full"]


@pytest.mark.parametrize(
    ("ranks", "pairs"),
    [
        (3, [*PAIRS, *FULL]),
        pytest.param(4, [*PAIRS[::6], *FULL, *MORE_FULL], marks=pytest.mark.slow),
        pytest.param(5, PAIRS[::6], marks=pytest.mark.slow),
    ],
)
def test_ranks_that_hold_a_base_together_learn_the_same(ranks: int, pairs: list[str]) -> None:
    """The same bits; of full fine-tuning, where their rows are added up otherwise, the same within 1e-9."""
    [result] = run_ranks(1, ["-m", "tests.group_program", str(ranks), *pairs], timeout=300)
    assert result.code == 0, result
    lines = result.out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{pair}: True" for pair in pairs]
    assert all(int(line.split()[-2]) > 0 for line in lines)


def run(path: Path, *arguments: str) -> None:
    """The run to its end: in processes of its own where it is one of several ranks."""
    if "--ranks" not in arguments:
        assert main([str(path), *arguments]) == 0
        return
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "fedhpc.main", str(path), *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one rank."""
    folder = tmp_path_factory.mktemp("alone")
    run(write(folder, folder / "run", **CHANGES))
    return folder / "run"


# Clients of unequal size, texts that end early, per-client results: no rank takes as many passes as another.
CHANGES: dict[str, Any] = {
    "federation": {"rounds": 4},
    "partition": {"name": "quantity_skew", "alpha": 1.0},
    "client": {"epochs": 1, "steps": None},
    "evaluation": {"every": 1, "samples": 2, "client_fraction": 0.2, "max_new_tokens": 4},
}


@pytest.mark.slow
def test_two_workers_of_two_ranks_make_the_run_of_one_rank(alone: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tmp_path / "run", **CHANGES, runtime={"worker_ranks": 2})
    run(path, "--ranks", "5")
    ours = table(tmp_path / "run", "rounds")
    assert ours["idle_share"][0] == ours["gathered_bytes"][0] == 0
    assert all((ours["idle_share"][1:] > 0) & (ours["idle_share"][1:] < 1)) and all(ours["gathered_bytes"][1:] > 0)
    assert set(table(tmp_path / "run", "clients")["worker"]) == {-1, 1, 2, 3, 4}
    same_as(alone, tmp_path / "run")


@pytest.mark.slow
def test_a_run_goes_on_with_larger_workers_and_a_killed_rank_ends_all(alone: Path, tmp_path: Path) -> None:
    run(write(tmp_path, tmp_path / "run", **{**CHANGES, "federation": {"rounds": 1}}))
    path = write(tmp_path, tmp_path / "run", **CHANGES, runtime={"worker_ranks": 2})
    with Ranks(3, ["-m", "fedhpc.main", str(path)], "forked") as running:
        running.wait_for("round 2/4", timeout=STARTS_WITHIN_S)
        running.rank_processes()[2].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        results = running.wait(HANGS_AFTER_S)
        took = time.monotonic() - killed
    assert took < GONE_WITHIN_S or os.getloadavg()[0] > 2 * (os.cpu_count() or 1), took
    assert results[0].code == 1 and "rank 2" in results[0].err, results
    assert recorded(tmp_path / "run") >= 2
    run(path, "--ranks", "4", "runtime.worker_ranks=3")
    shares = table(tmp_path / "run", "rounds")["idle_share"]
    assert all(shares[:2] == 0) and all(shares[2:] > 0)
    same_as(alone, tmp_path / "run")


@pytest.mark.slow
def test_the_server_reads_weights_for_its_export_once_all_have_ended_their_rounds(tmp_path: Path) -> None:
    words = ["method.name=lora", "method.rank=2", "method.aggregation=sb", "federation.rounds=1"]
    for name, ranks in {"alone": [], "group": ["--ranks", "3", "runtime.worker_ranks=2"]}.items():
        (tmp_path / name).mkdir()
        run(write(tmp_path / name, tmp_path / name / "run"), *ranks, *words)
    same_as(tmp_path / "alone" / "run", tmp_path / "group" / "run")


#: Table -> columns that are the same but for rounding.
COMPARED = {
    "rounds": ("train_loss", "eval_loss", "tokens", "update_norm"),
    "clients": ("loss_first", "loss_last", "steps", "tokens", "update_norm"),
}


@pytest.mark.slow
def test_full_fine_tuning_on_two_ranks_is_that_on_one(tmp_path: Path) -> None:
    """But for rounding; to the bit on more workers of as many ranks, and resumed."""
    changes: dict[str, Any] = {
        **CHANGES,
        "model": {"dtype": "float64"},
        "client": {
            **{"epochs": 1, "steps": None, "batch_size": 3, "optimizer": "adamw", "eps": 1e-5, "clip_norm": 0.5},
            "layer_lr_decay": 0.8,
        },
        "method": {"name": "full"},
    }

    def path(name: str, **more: Any) -> Path:
        written = write(tmp_path, tmp_path / name, **{**changes, **more})
        raw = yaml.safe_load(written.read_text())
        del raw["method"]["num_virtual_tokens"]
        written.write_text(yaml.safe_dump(raw))
        return written

    two = {"runtime": {"worker_ranks": 2}}
    run(path("alone"))
    run(path("together", **two), "--ranks", "3")
    run(path("resumed", **two, federation={"rounds": 2}), "--ranks", "3")
    run(path("resumed", **two), "--ranks", "5")
    same_as(tmp_path / "together", tmp_path / "resumed")
    assert len(set(table(tmp_path / "resumed", "clients")["worker"]) - {-1}) > 2
    one, other = final(tmp_path / "alone"), final(tmp_path / "together")
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=0, atol=1e-9 * np.linalg.norm(value), err_msg=name)
    for name in COMPARED:
        ours, theirs = table(tmp_path / "together", name), table(tmp_path / "alone", name)
        for column in COMPARED[name]:
            np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-9, err_msg=column)
    exports = [load_file(tmp_path / name / "adapter" / "model.safetensors") for name in ("alone", "together")]
    for name, value in exports[0].items():
        np.testing.assert_allclose(exports[1][name], value, rtol=0, atol=1e-9 * np.linalg.norm(value), err_msg=name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "centralized"}, "mode centralized keeps"),
        ({"client": {"scaffold": True, "optimizer": "sgd"}}, "client.scaffold keeps"),
        ({"client": {"moments": "both"}}, "client.moments needs"),
        ({"client": {"server_momentum": 0.5}}, "client.server_momentum needs"),
        ({"client": {"proximal": 0.1, "proximal_metric": "relative"}}, "client.proximal_metric relative needs"),
        (
            {"personalization": {"finetune_steps": 1}, "evaluation": {"client_fraction": 0.5}},
            "personalization keeps or trains",
        ),
        ({"client": {"packing": True}}, "client.packing is tried"),
        ({"objective": {"name": "kto"}, "data": {"desirable": "good"}}, "objective.name kto compares"),
        ({"objective": {"name": "dpo"}, "data": {"chosen": "a", "rejected": "b"}}, "objective.name dpo needs the base"),
        (
            {
                "federation": {"schedule": {"name": "buffered", "buffer_size": 2, "contribution": "model"}},
                "devices": {"name": "lognormal"},
            },
            "federation.schedule.contribution model",
        ),
    ],
)
def test_what_ranks_cannot_do_together_is_refused(changes: dict[str, Any], said: str) -> None:
    raw = {"method": {"name": "full"}, "partition": {"name": "iid"}, "runtime": {"worker_ranks": 2}}
    config = configuration.resolve({**raw, **changes})
    base = tiny.base("gpt2")
    method = make_method(config.method, base, 0, 20)
    with pytest.raises(
        UserError, match=r"runtime\.worker_ranks: method\.name full trains a client on 2 ranks"
    ) as error:
        require_together(config, method, objectives.of_config(config, type(base)))
    assert said in str(error.value) and str(error.value).endswith("; give 1, or leave that out")


def test_fedkseed_and_a_head_beside_biases_are_refused() -> None:
    for name, family in (("fedkseed", "gpt2"), ("full", "bert")):
        options = {"parameters": "bias"} if name == "full" else {}
        raw = {"method": {"name": name, **options}, "partition": {"name": "iid"}, "client": {"optimizer": "sgd"}}
        config = configuration.resolve({**raw, "runtime": {"worker_ranks": 2}})
        base = tiny.base(family)
        head = replace(base, head=("classifier",)) if name == "full" else base
        with pytest.raises(UserError, match=f"{name} with these options changes the weights of the base"):
            require_together(config, make_method(config.method, head, 0, 20), tiny.objective(base))


def test_a_model_is_saved_whole_by_a_rank_that_has_no_memory_of_a_layer(tmp_path: Path) -> None:
    base = replace(tiny.base("llama"), tokenizer=transformers.AutoTokenizer.from_pretrained(BUILTIN))
    layer = base.model.model.layers[0].self_attn.q_proj
    weight = layer.weight
    layer.weight = torch.nn.Parameter(weight.detach().to("meta"))
    layer.need = lambda: setattr(layer, "weight", weight)
    save_model(base, tmp_path / "model")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.model.state_dict().items())


class Broken(Group):
    """Ranks of which one is dead: whatever they do together fails as gloo's does."""

    process_group = None

    def broken(self, *_: Any) -> Any:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer\nframe 0")

    _agree = _send = _receive = gathered = reduced = add_up = broken


def test_a_gather_that_fails_is_a_symptom_and_no_fault_of_this_rank() -> None:
    """Liveness then names the rank that died; memory that ran out is this rank's own."""
    with pytest.raises(TransportError, match=r"^gathering a layer failed: Connection closed by peer$"):
        Broken(2, 0).need(0)
    with pytest.raises(torch.OutOfMemoryError), collective("gathering a layer"):
        raise torch.OutOfMemoryError


class Part:
    """A layer that writes down when it is gathered, and fails where more than two would be in memory."""

    size_bytes = 12

    def __init__(self, layers: list[Part], log: list[str]) -> None:
        self.whole = self.coming = False
        self._layers, self._log, self._name = layers, log, str(len(layers))

    def parameters(self) -> Sequence[torch.Tensor]:
        return []

    def prefetch(self) -> None:
        assert not self.whole and sum(layer.whole + layer.coming for layer in self._layers) <= 1
        self.coming = True
        self._log.append(f"{self._name} ahead")

    def unshard(self) -> None:
        if not self.coming:
            self._log.append(self._name)
        self.coming = False
        assert not any(layer.whole or layer.coming for layer in self._layers)  # as it arrives, and as it is used
        self.whole = True

    def reshard(self) -> None:
        self.whole = False


class Threads(Group):
    """A group of threads, of which the last may be the guest."""

    process_group = None
    _send = _receive = gathered = reduced = add_up = lambda self, *_: None

    def __init__(self, index: int, size: int, needs: list[int], meeting: threading.Barrier) -> None:
        super().__init__(size, index if index < size else None)
        self.log: list[str] = []
        self.parts: list[Part] = []
        for _ in range(5):
            self.parts.append(Part(self.parts, self.log))
            self.add(self.parts[-1])
        self._index, self._needs, self._meeting = index, needs, meeting

    def _agree(self, number: int) -> Agreed:
        self._needs[self._index] = number
        self._meeting.wait()
        agreed = Agreed(max(self._needs), self._needs[self.size] if len(self._needs) > self.size else -1)
        self._meeting.wait()
        return agreed


def act_in_threads(size: int, act: Callable[[Threads], None], guest: bool = False) -> list[Threads]:
    """Let all members of a group, and its guest, act at the same time."""
    needs = [-1] * (size + guest)
    meeting = threading.Barrier(len(needs), timeout=30)
    groups = [Threads(index, size, needs, meeting) for index in range(len(needs))]
    with ThreadPoolExecutor(len(groups)) as pool:
        list(pool.map(act, groups))
    return groups


def test_the_next_layer_is_gathered_while_one_computes() -> None:
    """In training from the second step on, in evaluation from the third batch on, when it has seen how they go on."""

    def act(group: Threads) -> None:
        for phase in (["train"] * 3, ["evaluate"] * 3):
            for what in phase:
                group.log.append(what)
                for number in [0, 1, 2, 3, 4, *([3, 2, 1, 0] if what == "train" else [])]:
                    group.need(number)
                    assert group.parts[number].whole
            group.serve()
            assert not any(part.whole or part.coming for part in group.parts)

    (group,) = act_in_threads(1, act)
    there, back = ["2 ahead", "3 ahead", "4 ahead"], ["3 ahead", "2 ahead", "1 ahead", "0 ahead"]
    assert group.log == [
        *("train", "0", "1", "2", "3", "4", "3", "2", "1", "0"),
        *("train", "1", *there, *back, "1 ahead"),
        *("train", *there, *back, "1 ahead"),
        *("evaluate", "0", "1 ahead", *there, "3 ahead"),  # as in training
        *("evaluate", "0", "1", *there, "0 ahead"),
        *("evaluate", "1 ahead", *there, "0 ahead"),
    ]


@pytest.mark.parametrize(("size", "guest"), [(2, True), (3, False), (4, True)])
def test_ranks_gather_the_same_layers_in_the_same_order(size: int, guest: bool) -> None:
    """Whatever each of them computes: passes of any sort, that end anywhere, of other numbers in each rank."""

    def act(group: Threads) -> None:
        draw = np.random.default_rng(len(group.log) + (size if group.member is None else group.member))
        for _ in range(6):
            for _ in range(draw.integers(0, 6)):
                last, until = draw.integers(1, 5), draw.integers(0, 5)
                for number in [*range(last + 1), *range(last - 1, until, -1)]:
                    group.need(number)
                    assert group.parts[number].whole
            group.serve()
            assert not any(part.whole or part.coming for part in group.parts)

    groups = act_in_threads(size, act, guest)
    assert all(group.log == groups[0].log for group in groups[:size])
    gathers = len(groups[0].log)
    assert gathers > 100 and sum("ahead" in line for line in groups[0].log) > gathers / 4
    assert {group.account.received_bytes for group in groups[:size]} == {gathers * (12 - 12 // size)}
    assert not guest or not any("ahead" in line for line in groups[size].log)


def test_a_torch_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "set_custom_all_gather")
    with pytest.raises(
        UserError, match=r"^runtime\.worker_ranks: torch 2\S* cannot .*; install a newer one, or give 1$"
    ):
        shard([], Broken(2, 0), torch.device("cpu"))


def refusal(arguments: Sequence[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert main([*arguments]) == 2
    return capfd.readouterr().err.strip()


@pytest.mark.parametrize(
    ("arguments", "place", "said"),
    [
        (
            ["--ranks", "4", "runtime.worker_ranks=2"],
            "",
            "runtime.worker_ranks: 4 ranks are a server and 3 others, which do not divide into workers of 2; start 3, "
            "5, 7, ... ranks, or give 1 or 3",
        ),
        (
            ["runtime.worker_ranks=2"],
            "",
            "runtime.worker_ranks: one rank alone is no worker of 2; start 3, 5, 7, ... ranks, or give 1",
        ),
        (
            ["runtime.worker_ranks=2", "runtime.transport=mpi"],
            "command line: ",
            "runtime.worker_ranks: the ranks of a worker gather layers with torch.distributed, not over MPI; use "
            "runtime.transport torch, or give 1",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    arguments: list[str], place: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert refusal([*arguments, f"run.dir={tmp_path}/run"], capfd) == f"fedhpc: error: {place}{said}"
    assert not (tmp_path / "run").exists()
