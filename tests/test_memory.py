"""What memory there is, and what a base takes of it, without its weights."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
import transformers

from fedhpc import registry
from fedhpc.approaches.memory import WORKER_RANKS, Held, Room, fewest, table
from fedhpc.approaches.prepare import prepare, worker_ranks
from fedhpc.builtin import __file__ as BUILTIN
from fedhpc.config import Model, resolve
from fedhpc.main import main
from fedhpc.models.footprint import Footprint, footprint
from fedhpc.models.load import load_base
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.memory import of_machine, peak_resident
from fedhpc.ranks.placement import Placement
from fedhpc.ranks.transport.base import LoopbackTransport
from tests.federations import settings, tree, write_texts

HERE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_footprint_is_that_of_the_loaded_base() -> None:
    base = load_base(Model(), torch.device("cpu"))
    found = footprint(Model())
    assert found.total == sum(p.nbytes for p in base.model.parameters())
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in base.model.model.layers]
    assert (found.layers, found.largest_layer) == (sum(layers), max(layers))
    assert found.on_rank(1) == found.total
    assert found.on_rank(4) == found.outside + found.layers // 4 + 2 * found.largest_layer
    assert footprint(Model(dtype="bfloat16")).total * 2 == found.total


def test_a_large_base_needs_no_weights(tmp_path: Path) -> None:
    """Only config.json is there; tied embeddings count once."""
    config = transformers.Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = footprint(Model(name=str(tmp_path), dtype="bfloat16"))
    layer = 896 * (14 + 2 + 2) * 64 + (14 + 2 + 2) * 64 + 896 * 896 + 3 * 896 * 4864 + 2 * 896
    assert found.largest_layer == 2 * layer and found.layers == 48 * layer
    assert found.outside == 2 * (151_936 * 896 + 896)
    few = footprint(Model(name=str(tmp_path), dtype="bfloat16", quantize="4bit"))
    linear = layer - (14 + 2 + 2) * 64 - 2 * 896
    assert few.outside == found.outside and few.largest_layer == linear // 2 + linear // 16 + 2 * (layer - linear)


@pytest.mark.parametrize(
    ("environ", "files", "expected"),
    [
        ({}, {}, HERE),
        ({"SLURM_MEM_PER_NODE": "100"}, {}, 100 * 2**20),
        ({"SLURM_MEM_PER_NODE": "0"}, {}, HERE),
        ({"SLURM_MEM_PER_CPU": "50", "SLURM_CPUS_ON_NODE": "4"}, {}, 200 * 2**20),
        ({}, {"sys/fs/cgroup/a/memory.max": "5000000", "sys/fs/cgroup/a/b/memory.max": "max"}, 5_000_000),
        ({}, {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712"}, HERE),
        ({}, {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "6000000"}, 6_000_000),
    ],
)
def test_memory_of_the_machine(tmp_path: Path, environ: dict[str, str], files: dict[str, str], expected: int) -> None:
    of_v1 = any("limit_in_bytes" in name for name in files)
    files = {**files, "proc/self/cgroup": "3:cpu:/\n2:memory:/a" if of_v1 else "0::/a/b"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert of_machine(environ, tmp_path) == expected


def test_the_peak_is_of_this_process_alone() -> None:
    """Linux hands the peak of the process that starts another down to it, as getrusage has it."""
    said = "from fedhpc.ranks.memory import peak_resident; print(peak_resident())"
    small = int(subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout)
    assert 2**20 < small < peak_resident() / 2, "this process has torch, the other one has not"


def test_a_base_that_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path / "run", tree(write_texts(tmp_path)))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    size = footprint(config.model)
    monkeypatch.setattr("fedhpc.ranks.memory.of_machine", lambda: size.total - 1)
    monkeypatch.setattr("fedhpc.approaches.inputs.load_base", lambda *_, **__: pytest.fail("it is read"))
    capsys.readouterr()  # what the writing of the model said
    assert main([str(path), "--check"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "needs" in said[0] and "a rank" in said[0], said
    monkeypatch.setattr("fedhpc.ranks.memory.of_machine", lambda: footprint(Model()).on_rank(8))
    assert main([str(path), "--check", "model.name=builtin", "runtime.worker_ranks=auto"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; start 9 ranks or more with one rank on each machine: a server, and workers of 8"), line
    assert main([str(path), "--check", "model.name=builtin", "runtime.worker_ranks=auto", "method={name: full}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "; runtime.worker_ranks: 8 with one rank on each machine fits, with method.name full; else" in line, line


def test_the_fewest_ranks_that_leave_room() -> None:
    """Of 96 MiB in 12 layers and 4 outside: 1, 2, 3, 4, 6 and 12 ranks hold 100, 68, 52, 44, 36 and 28 MiB each."""
    mib = 2**20
    weights, sizes = Footprint(96 * mib, 8 * mib, 4 * mib), [1, 2, 3, 4, 6, 12]

    def of(there: int, gpus: bool = True, **given: Any) -> int:
        placement = Placement(("", *map(str, range(12)))) if gpus else Placement()
        room = Room.of(
            placement, range(1, 13), given.pop("nodes", []), [0 if gpus else there * mib, *[there * mib] * 12]
        )
        return fewest(replace(weights, **given), sizes, room)[0]

    assert [of(there) for there in (134, 133, 91, 90, 48, 47, 37, 1)] == [1, 2, 2, 3, 6, 12, 12, 12]
    # Without GPUs the ranks of a machine share its memory, and pages of a base that they all have whole.
    assert [of(there, gpus=False) for there in (1734, 1733, 134)] == [1, 2, 12]
    assert of(134, gpus=False, mapped=True) == 1
    assert of(134, gpus=False, nodes=[[rank] for rank in range(13)]) == 1


class Five(LoopbackTransport):
    """A rank of five that could form groups, with 40 MiB each."""

    forms_groups = True

    def __init__(self) -> None:
        super().__init__()
        self.world_size, self.rank = 5, 0

    def gather_json(self, value: Any) -> list[Any]:
        return [40 * 2**20] * 5


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [({}, 4), ({"method": {"name": "full"}}, 1), ({"server": {"aggregator": "fltrust"}}, 1), ({"mode": "local"}, 4)],
)
def test_auto_takes_one_where_no_more_can_be(changes: dict[str, Any], ranks: int) -> None:
    tree_of = {"model": {"dtype": "float64"}, "runtime": {"worker_ranks": "auto"}, "partition": {"name": "iid"}}
    config = resolve({**tree_of, **changes})
    chosen, (line,) = worker_ranks(config, Five(), Launch(), registry.approach(config.method.name).spreads(config))
    assert chosen == ranks and f"auto takes {ranks} (the base takes " in line and "each of 5 ranks, there are" in line


def cells(lines: list[str]) -> list[dict[str, str]]:
    """The rows of the table by the names of its columns."""
    start = next(i for i, line in enumerate(lines) if line.startswith("memory in MiB"))
    words = lines[start + 1].replace("a rank", "a_rank").replace("ranks that fit", "fits").split()
    rows = [line.split() for line in lines[start + 2 :] if len(line.split()) == len(words)]
    return [dict(zip(words, row, strict=True)) for row in rows]


def test_the_table() -> None:
    """Of 80 MiB in 8 layers and 20 outside: its parts add up, and of several ranks each has two layers more."""
    mib = 2**20
    weights, held = (
        Footprint(80 * mib, 10 * mib, 20 * mib),
        Held(3 * mib, 5 * mib, 7 * mib, 7 * mib, 100 * mib, 30 * mib),
    )
    apart = cells(table(weights, held, WORKER_RANKS, False, 500 * mib, True))
    assert [row["base"] for row in apart] == ["100.0", "80.0", "60.0", "50.0"]
    assert [row["a_rank"] for row in apart] == ["245.0", "225.0", "205.0", "195.0"]
    assert [row["server"] for row in apart] == ["214.0", "144.0", "144.0", "144.0"]
    assert [row["fits"] for row in apart] == ["2"] * 4
    (alone,) = cells(table(weights, held, [1], True, 250 * mib, False))
    assert (alone["a_rank"], alone["server"], alone["fits"]) == ("252.0", "-", "no")


@pytest.mark.parametrize(
    ("client", "vectors"),
    [
        ({"optimizer": "sgd"}, 2),  # parameters and gradients
        ({"optimizer": "sgd", "scaffold": True}, 3),  # and the corrections
        ({"optimizer": "adamw"}, 4),
        ({"optimizer": "adamw", "scaffold": True}, 6),  # and the sum of the gradients
    ],
)
def test_a_block_holds_what_its_clients_train_by(tmp_path: Path, client: dict[str, Any], vectors: int) -> None:
    raw = tree(write_texts(tmp_path), method={"name": "lora", "rank": 1024}, client={**client, "lr": 0.01})
    del raw["method"]["num_virtual_tokens"]
    task = prepare(settings(tmp_path / "run", raw), LoopbackTransport(), Launch(), False)
    plan = task.plan(1)
    task.rehearse(plan)
    row = cells(task.details(plan))[0]
    clients = max(len(block.clients) for block in plan.blocks)
    assert float(row["block"]) == pytest.approx(vectors * clients * task.method.payload.size * 4 / 2**20, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_forecast_is_what_a_run_takes(tmp_path: Path, method: str) -> None:
    """Within 15 %, on a base of 37 MiB with 151,936 tokens; a process each, whose memory nothing else has touched."""
    network = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=151_936, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None,
        )
    )  # fmt: skip
    network.save_pretrained(tmp_path / "model")
    tokenizer = Path(BUILTIN).parent / "base"
    transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(tmp_path / "model")
    folder = tmp_path / "run"
    words = [
        f"model.name={tmp_path / 'model'}", f"run.dir={folder}", f"method.name={method}", "federation.rounds=1",
        "federation.cohort_size=2", "client.steps=1", "runtime.device=cpu", "evaluation.max_examples=2",
        "evaluation.test_max_examples=2", "evaluation.samples=0", "evaluation.metrics=[loss]",
    ]  # fmt: skip
    run = [sys.executable, "-m", "fedhpc.main", *words]
    checked = subprocess.run([*run, "--check"], capture_output=True, text=True, check=True)
    said = float(cells(checked.stdout.splitlines())[0]["a_rank"].replace(",", ""))
    subprocess.run(run, capture_output=True, text=True, check=True)
    with h5py.File(folder / "results.h5") as file:
        taken = float(file["rounds/peak_memory_bytes"][1]) / 2**20
    assert 0.85 <= said / taken <= 1.15
