"""The federation end to end: against numpy and PEFT, on any number of ranks, interrupted, and at scale."""

from __future__ import annotations

import json
import signal
import time
import tracemalloc
from collections import defaultdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pytest
import torch

from fedhpc import federation
from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.approaches.prepare import is_finished, prepare
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.placement import Placement
from fedhpc.ranks.round_progress import RoundProgress
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.report.__main__ import main as report_main
from fedhpc.results.checkpoint import save_checkpoint
from fedhpc.results.results_file import CLIENTS, EVENTS, ROUNDS, Results
from fedhpc.results.status import read_status
from fedhpc.results.unfinished import read_results
from fedhpc.training.block import Work, train_block
from fedhpc.training.schedule import batches
from tests import tiny
from tests.federations import Interrupted, federate, final, settings, table, tree, write_texts
from tests.ranks import Launcher, Ranks, run_ranks

# What depends on the machine, the moment or the number of ranks, by design.
UNSTABLE = {"rounds": ("seconds", "wire_bytes", "peak_memory"), "clients": ("worker",), "events": ()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


def same_results(one: Path, other: Path, tables: tuple[str, ...] = ("rounds", "clients", "events")) -> None:
    """Final payload, test metrics, texts and tables are the same bits, but for what cannot be."""
    same_bits(final(one), final(other))
    for name in tables:
        pair = [
            {n: c for n, c in table(where, name).items() if not n.startswith(UNSTABLE[name] or "-")}
            for where in (one, other)
        ]
        for column in pair[0]:
            np.testing.assert_array_equal(pair[0][column], pair[1][column], err_msg=f"/{name}/{column}")
    with h5py.File(one / "results.h5") as file:
        groups = [group for group in ("test", "samples", "eval_samples") if group in file]
    for group in groups:
        first, second = table(one, group), table(other, group)
        assert list(first) == list(second)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=f"/{group}/{name}")


# ---------------------------------------------------------------- against numpy


def by_hand(config: Config, task: Averaging) -> tuple[np.ndarray, np.ndarray]:
    """The first and the final payload (P,), float64: clients one at a time, then numpy."""
    dtype = task.payload_dtype
    theta = first = (
        task.method.payload.flatten({n: t.to(dtype) for n, t in task.method.initial().items()}).double().numpy()
    )
    mean, square = np.zeros_like(theta), np.full_like(theta, 1e-6)
    c, own = np.zeros_like(theta), defaultdict(lambda: np.zeros_like(theta))
    for t in range(1, config.federation.rounds + 1):
        start = torch.from_numpy(theta).to(dtype)[None]
        updates, counts, steps, changes = [], [], [], []
        for client in task.plan(t).training:
            work = Work(client, task.data.population.indices(client))
            pull = torch.from_numpy(c - own[client]).to(dtype)[None] if config.client.scaffold else None
            trained = tiny.train(
                task.base,
                task.method,
                task.objective,
                start,
                [work],
                task.data.train,
                config,
                t,
                task.rounds,
                corrections=pull,
            )
            update = trained.updates[0].double().numpy()
            if config.client.scaffold:
                after = own[client] - c + update / (trained.steps[0] * config.client.lr)
                changes.append(after - own[client])
                own[client] = after
            for transform in config.transforms:
                update = update * min(1.0, transform.norm / np.linalg.norm(update))
            if np.isfinite(update).all():
                updates.append(update)
                counts.append(1.0 if config.server.weighting == "uniform" else len(work.indices))
                steps.append(trained.steps[0])
        if config.server.aggregator == "median":
            g = np.median(updates, axis=0)
        elif config.server.aggregator == "fednova":
            p, a = np.array(counts) / sum(counts), np.array(steps)
            g = (p @ a) * sum(share * update / taken for share, update, taken in zip(p, updates, a, strict=True))
        else:
            g = np.average(updates, axis=0, weights=counts)
        c = c + sum(changes) / task.data.population.num_clients
        if config.server.optimizer == "adam":
            mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
            theta = theta - config.server.lr * mean / (np.sqrt(square) + 1e-3)
        else:
            theta = theta - config.server.lr * g
    return first, theta


def flat(tensors: dict[str, np.ndarray], task: Averaging) -> np.ndarray:
    """(P,), in the order of the payload: HDF5 sorts by name."""
    assert set(tensors) == set(task.method.payload.shapes)
    return np.concatenate([tensors[name].ravel() for name in task.method.payload.shapes])


VARIANTS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "uniform": {"server": {"weighting": "uniform"}},
    "dropout": {"federation": {"dropout": 0.4}},
    "server-lr": {"server": {"lr": 0.5}, "federation": {"rounds": 2}},
    "adam": {"server": {"optimizer": "adam", "lr": 0.05}, "federation": {"rounds": 3}},
    "median": {"server": {"aggregator": "median"}},
    "fednova": {
        "server": {"aggregator": "fednova"},
        "client": {"steps": None, "epochs": 1},
        "federation": {"rounds": 2},
    },
    "scaffold": {"client": {"scaffold": True}, "federation": {"rounds": 4, "cohort_size": 4, "dropout": 0.2}},
    "clip": {"transforms": [{"name": "clip", "norm": 0.05}]},
    "mlp": {"method": {"exchange": "mlp", "hidden_size": 16}},
    "materialised": {"method": {"exchange": "materialised", "hidden_size": 16}},
}


@pytest.mark.parametrize(
    ("variant", "dtype"), [*((variant, "float64") for variant in VARIANTS), ("fedavg", "float32"), ("adam", "float32")]
)
def test_a_run_is_the_formula(tmp_path: Path, texts: Path, variant: str, dtype: str) -> None:
    """On two workers, in blocks, through the exact sum; by hand one client at a time."""
    config = settings(tmp_path, tree(texts, model={"dtype": dtype}, **VARIANTS[variant]))
    federate(config, ranks=3)
    task = prepare(config, LoopbackTransport(), Launch(), False)
    found = flat(final(tmp_path), task)
    assert found.dtype == dtype
    first, wanted = by_hand(config, task)
    moved = np.linalg.norm(wanted - first)
    assert moved > 1e-2
    assert np.linalg.norm(found - wanted) / moved < (1e-12 if dtype == "float64" else 1e-4)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 if dtype == "float64" else 1e-6)
    assert table(tmp_path, "rounds")["dropped"].sum() == {"dropout": 1, "scaffold": 3}.get(variant, 0)


# ---------------------------------------------------------------- any number of ranks


MODES: dict[str, dict[str, Any]] = {
    "federated": {"client": {"optimizer": "adamw", "lr": 0.05}},
    "dropout-adam": {"federation": {"dropout": 0.3}, "server": {"optimizer": "adam", "lr": 0.05}},
    "median": {
        "server": {"aggregator": "median"},
        "client": {"server_momentum": 0.3},
        "transforms": [{"name": "clip", "norm": 0.5}, {"name": "powersgd", "direction": "both"}],
    },
    "centralized": {"mode": "centralized", "client": {"optimizer": "adamw", "lr": 0.05}},
    "local": {"mode": "local", "client": {"optimizer": "adamw", "lr": 0.05}, "local": {"max_clients": 5}},
    "full": {"method": {"name": "full"}, "federation": {"cohort_size": 3}},
    "adapter": {
        "method": {"name": "adapter"},
        "client": {"optimizer": "adamw", "lr": 0.05, "moments": "both", "server_momentum": 0.3},
    },
    "last-layers": {"method": {"name": "full", "last_layers": 1}, "federation": {"cohort_size": 3}},
    "lora": {"method": {"name": "lora"}, "client": {"optimizer": "adamw", "lr": 0.05}},
    "held-out": {"evaluation": {"client_fraction": 0.2}},
    "scaffold": {"client": {"scaffold": True, "lr": 2.0}, "federation": {"dropout": 0.2}},
}


def mode(texts: Path, name: str, **changes: Any) -> dict[str, Any]:
    """One of MODES with two rounds, and changes on top."""
    merged = tree(texts, federation={"rounds": 2})
    for extra in (MODES[name], changes):
        for section, value in extra.items():
            if section == "method":
                merged[section] = value
            else:
                merged[section] = {**merged.get(section, {}), **value} if isinstance(value, dict) else value
    return merged


@pytest.mark.parametrize("counts", [(3,), pytest.param((2, 4, 5, 8), marks=pytest.mark.slow)], ids=["quick", "many"])
@pytest.mark.parametrize("name", MODES)
def test_the_number_of_ranks_does_not_change_a_bit(
    tmp_path: Path, texts: Path, name: str, counts: tuple[int, ...]
) -> None:
    raw = mode(texts, name, evaluation={"metrics": ["loss", "bleu"], "samples": 2})
    federate(settings(tmp_path / "1", raw))
    for ranks in counts:
        federate(settings(tmp_path / str(ranks), raw), ranks)
        same_results(tmp_path / "1", tmp_path / str(ranks))
        if name == "held-out":
            one, other = (table(tmp_path / n, "client_eval") for n in ("1", str(ranks)))
            same_bits(one, other)
            assert len(one["loss"]) == 8
            assert np.isfinite(one["loss"]).all()


def spawn(ranks: int, config: Config, launcher: Launcher, folder: Path) -> None:
    """The run as a person starts it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "start.yaml").write_text(config.to_yaml())
    for result in run_ranks(ranks, ["-m", "fedhpc.main", str(folder / "start.yaml")], launcher, timeout=300):
        assert result.code == 0, result.err
        assert result.err == ""


def test_two_processes_and_one_give_the_same_bits(tmp_path: Path, texts: Path) -> None:
    raw = mode(texts, "federated", model={"name": "builtin"}, evaluation={"metrics": ["loss", "bleu"], "samples": 2})
    federate(settings(tmp_path / "1", raw))
    spawn(2, settings(tmp_path / "2", raw), "env", tmp_path)
    same_results(tmp_path / "1", tmp_path / "2")
    with h5py.File(tmp_path / "2" / "results.h5") as file:
        assert (file.attrs["world_size"], file.attrs["transport"]) == (2, "gloo")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "launcher"),
    [(1, "forked"), (4, "forked"), (8, "forked"), (2, "torchrun"), (1, "mpiexec"), (3, "mpiexec")],
)
def test_processes_under_any_launcher_give_the_same_bits(
    tmp_path: Path, texts: Path, ranks: int, launcher: Launcher
) -> None:
    raw = mode(texts, "federated", model={"name": "builtin"}, evaluation={"metrics": ["loss", "bleu"], "samples": 2})
    federate(settings(tmp_path / "in process", raw))
    spawn(ranks, settings(tmp_path / "spawned", raw), launcher, tmp_path)
    same_results(tmp_path / "in process", tmp_path / "spawned")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher"), [("centralized", "forked"), ("local", "mpiexec"), ("median", "forked"), ("full", "forked")]
)
def test_processes_in_every_mode_give_the_same_bits(tmp_path: Path, texts: Path, name: str, launcher: Launcher) -> None:
    raw = mode(texts, name)
    federate(settings(tmp_path / "in process", raw))
    spawn(3, settings(tmp_path / "spawned", raw), launcher, tmp_path)
    same_results(tmp_path / "in process", tmp_path / "spawned")


# ---------------------------------------------------------------- interrupted and resumed


@pytest.mark.parametrize("name", ["dropout-adam", "centralized", "local"])
def test_an_extended_run_equals_one_of_that_length(tmp_path: Path, texts: Path, name: str) -> None:
    raw = mode(texts, name, federation={"rounds": 4})
    federate(settings(tmp_path / "whole", raw))
    federate(settings(tmp_path / "extended", mode(texts, name, federation={"rounds": 2})), ranks=2)
    for client in tmp_path.glob("extended/clients/*"):  # as killed ranks leave them
        (client / ".2.safetensors.1.fedhpc-tmp").write_text("half a fi")
    federate(settings(tmp_path / "extended", raw), ranks=3)
    same_results(tmp_path / "whole", tmp_path / "extended", ("rounds", "clients"))
    assert list(table(tmp_path / "extended", "events")["kind"]) == ["resumed"]
    assert not list(tmp_path.rglob("*.fedhpc-tmp"))


@pytest.mark.parametrize(
    ("name", "every"),
    [("federated", 1), ("dropout-adam", 2), ("centralized", 2), ("local", 1), ("scaffold", 1), ("scaffold", 2)],
)
def test_a_run_stopped_anywhere_and_resumed_equals_one_that_was_not(
    tmp_path: Path, texts: Path, name: str, every: int
) -> None:
    """Stopped again and again, on other numbers of ranks, at collectives spread over the run."""
    raw = mode(texts, name, federation={"rounds": 4}, checkpoint={"every": every})
    whole = federate(settings(tmp_path / "whole", raw), ranks=2)
    config = settings(tmp_path / "stopped", raw)
    for share, ranks in ((0.1, 2), (0.35, 3), (0.3, 1), (0.15, 2)):
        with pytest.raises(Interrupted):
            federate(config, ranks, stop_at=max(1, int(share * whole)))
    federate(config, ranks=3)
    same_results(tmp_path / "whole", tmp_path / "stopped", ("rounds", "clients"))


def test_a_paused_run_goes_on_with_the_same_bits(tmp_path: Path, texts: Path) -> None:
    """Between two checkpoints too, with the learning rates of the whole run and what clients keep."""
    raw = mode(texts, "scaffold", federation={"rounds": 4}, checkpoint={"every": 3})
    raw["client"] = {**raw["client"], "schedule": "cosine"}
    federate(settings(tmp_path / "whole", raw), ranks=2)
    config = settings(tmp_path / "paused", raw)
    for until, ranks, reached in ((1, 2, 1), (2, 3, 2), (1, 1, 2)):
        federate(config, ranks, until=until)
        status = read_status(config.run_dir)
        assert status is not None
        assert (status.state, status.round, status.reason) == ("preempted", reached, f"paused after round {reached}")
        assert not (config.run_dir / "adapter").exists() and read_results(config.run_dir).num_rounds == reached
        with h5py.File(config.run_dir / "results.h5") as file:  # whatever the last writing took
            assert len(file["rounds/round"]) == 1 + reached and not file.attrs["complete"]
    federate(config, until=4)
    same_results(tmp_path / "whole", tmp_path / "paused", ("rounds", "clients"))
    assert read_status(config.run_dir).state == "complete"  # type: ignore[union-attr]


METHODS: dict[str, dict[str, Any]] = {
    "prefix-mlp": {"name": "prefix", "num_virtual_tokens": 3, "exchange": "mlp", "hidden_size": 8},
    "prefix-materialised": {"name": "prefix", "num_virtual_tokens": 3, "exchange": "materialised", "hidden_size": 8},
    "prompt": {"name": "prompt", "num_virtual_tokens": 3},
    "p_tuning": {"name": "p_tuning", "num_virtual_tokens": 3},
    "lora": {"name": "lora"},
    "ia3": {"name": "ia3"},
    "adapter": {"name": "adapter"},
    "full": {"name": "full"},
    "last-layers": {"name": "full", "last_layers": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_same_bits_on_any_ranks_and_resumed(tmp_path: Path, texts: Path, method: str) -> None:
    """FedKSeed and the other rules of LoRA have tests of their own."""
    client = {"optimizer": "adamw", "lr": 0.05}
    raw = tree(texts, method=METHODS[method], client=client, federation={"rounds": 3, "cohort_size": 3})
    raw["method"] = METHODS[method]
    collectives = federate(settings(tmp_path / "1", raw))
    for ranks in (2, 3, 4):
        collectives = federate(settings(tmp_path / str(ranks), raw), ranks)
        same_results(tmp_path / "1", tmp_path / str(ranks))
    stopped = settings(tmp_path / "stopped", raw)
    for share, ranks in ((0.4, 4), (0.45, 2)):
        with pytest.raises(Interrupted):
            federate(stopped, ranks, stop_at=int(share * collectives))
    federate(stopped, ranks=3)
    same_results(tmp_path / "1", tmp_path / "stopped", ("rounds", "clients"))
    assert set(table(tmp_path / "stopped", "events")["kind"]) == {"resumed"}


def test_no_rank_removes_what_the_checkpoint_still_needs(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow disk: workers without anything to wait for must not run ahead of the checkpoint."""
    save, done = save_checkpoint, [0]

    def slowly(directory: Path, tensors: Any, meta: Any) -> None:
        time.sleep(0.3)
        if done[-1]:
            kept = {file.parent.name for file in directory.glob(f"clients/*/{done[-1]}.safetensors")}
            assert len(kept) == 5, f"round {done[-1]} cannot be resumed"
        save(directory, tensors, meta)
        done.append(meta["round"])

    monkeypatch.setattr("fedhpc.results.recorder.save_checkpoint", slowly)
    raw = mode(texts, "local", federation={"rounds": 6}, evaluation={"every": 100})
    federate(settings(tmp_path, raw), ranks=3)
    assert done == [0, 0, 1, 2, 3, 4, 4]


def test_a_lost_round_leaves_nothing_behind(tmp_path: Path, texts: Path) -> None:
    """Files of clients from rounds that the checkpoint does not hold are not read, whatever is in them."""
    raw = mode(texts, "scaffold", federation={"rounds": 5, "cohort_size": 3}, checkpoint={"every": 2})
    federate(settings(tmp_path / "whole", raw))
    config = settings(tmp_path / "stopped", raw)
    shorter = {**raw, "federation": {**raw["federation"], "rounds": 2}}
    federate(settings(tmp_path / "stopped", shorter), ranks=2)
    for client in range(8):
        for round_ in (3, 4, 5):
            lost = tmp_path / "stopped" / "clients" / str(client) / f"{round_}.safetensors"
            lost.parent.mkdir(exist_ok=True)
            lost.write_bytes(b"of another course of events")
    federate(config, ranks=2)
    same_results(tmp_path / "whole", tmp_path / "stopped", ("rounds", "clients"))


def test_a_state_that_is_lost_or_damaged_is_said(tmp_path: Path, texts: Path) -> None:
    raw = mode(texts, "scaffold", federation={"rounds": 2, "cohort_size": 8, "dropout": 0.0})
    longer = {**raw, "federation": {**raw["federation"], "rounds": 3}}
    federate(settings(tmp_path, raw))
    (file,) = (tmp_path / "clients" / "5").glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(UserError, match=r"5/2\.safetensors: the state of client 5 .*checksum.*--fresh"):
        federate(settings(tmp_path, longer), ranks=2)
    file.unlink()
    with pytest.raises(UserError, match=r"5/2\.safetensors: the state of client 5 .*--fresh"):
        federate(settings(tmp_path, longer), ranks=2)
    file.write_bytes(content)
    federate(settings(tmp_path, longer))
    assert [f.name for f in (tmp_path / "clients" / "5").iterdir()] == ["3.safetensors"]


def test_an_extension_stopped_at_once_is_not_taken_for_finished(tmp_path: Path, texts: Path) -> None:
    federate(settings(tmp_path, mode(texts, "federated")))
    longer = settings(tmp_path, mode(texts, "federated", federation={"rounds": 3}))
    with pytest.raises(Interrupted):
        federate(longer, stop_at=8)
    assert not is_finished(longer, LoopbackTransport(), False)
    federate(longer, ranks=2)
    assert len(table(tmp_path, "rounds")["round"]) == 4
    assert is_finished(longer, LoopbackTransport(), False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher", "number", "rank"),
    [
        ("dropout-adam", "forked", signal.SIGTERM, 1),
        ("local", "mpiexec", signal.SIGTERM, 1),
        ("centralized", "forked", signal.SIGKILL, 0),
        ("local", "forked", signal.SIGKILL, 1),
    ],
)
def test_ended_by_a_signal_and_the_same_command_again(
    tmp_path: Path, texts: Path, name: str, launcher: Launcher, number: signal.Signals, rank: int
) -> None:
    raw = mode(texts, name, federation={"rounds": 12}, client={"steps": 8})
    federate(settings(tmp_path / "whole", raw))
    config = settings(tmp_path / "stopped", raw)
    (tmp_path / "start.yaml").write_text(config.to_yaml())
    with Ranks(2, ["-m", "fedhpc.main", str(tmp_path / "start.yaml")], launcher) as running:
        running.wait_for("round 2/")
        running.rank_processes()[rank].send_signal(number)
        codes = {result.code for result in running.wait(60)}
    assert codes == ({75} if number == signal.SIGTERM else {1, -9})
    state = json.loads((tmp_path / "stopped" / "status.json").read_text())["state"]
    assert state == ("preempted" if number == signal.SIGTERM else "failed")
    spawn(3, config, launcher, tmp_path)
    same_results(tmp_path / "whole", tmp_path / "stopped", ("rounds", "clients"))


@pytest.mark.slow
def test_a_mistake_that_shows_on_a_worker_is_a_failure_of_the_run(tmp_path: Path, texts: Path) -> None:
    """Not one of the command, although a person can mend it: files were written."""
    config = settings(
        tmp_path / "run", mode(texts, "local", client={"optimizer": "sgd", "lr": 1e30, "weight_decay": 1.0, "steps": 4})
    )
    (tmp_path / "start.yaml").write_text(config.to_yaml())
    results = run_ranks(2, ["-m", "fedhpc.main", str(tmp_path / "start.yaml")], "forked")
    assert [result.code for result in results] == [1, 1]
    assert results[0].err.count("\n") == 1
    assert "training diverged in round 1" in results[0].err
    assert results[1].err == ""
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["round"]) == ("failed", 0)
    assert "lower client.lr" in status["reason"]


# ---------------------------------------------------------------- against PEFT


def peft_loop(config: Config, folder: Path, start: np.ndarray) -> np.ndarray:
    """Prefix-tuning as with transformers and PEFT alone, on one client's data, from the texts on: (n, width)."""
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    peft = get_peft_model(
        model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.method.num_virtual_tokens)
    ).double()
    (prefix,) = [p for p in peft.parameters() if p.requires_grad]
    with torch.no_grad():
        prefix.copy_(torch.from_numpy(start))
    texts = [json.loads(line) for line in (Path(config.data.source) / "train.jsonl").read_text().splitlines()]
    c = config.client
    rule = (torch.optim.SGD if c.optimizer == "sgd" else torch.optim.AdamW)([prefix], lr=c.lr, weight_decay=0.0)
    for picked in batches(len(texts), c, config.run.seed, 1, 0):
        ids, labels = [], []
        for row in (texts[i] for i in picked):
            prompt = tokenizer(f"{row['mr']} :", add_special_tokens=False).input_ids
            target = tokenizer(f" {row['ref']}", add_special_tokens=False).input_ids
            ids.append(torch.tensor([tokenizer.bos_token_id, *prompt, *target, tokenizer.eos_token_id]))
            labels.append(torch.tensor([-100] * (1 + len(prompt)) + [*target, tokenizer.eos_token_id]))
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        logits = peft(input_ids=padded, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
        rule.zero_grad()
        loss.backward()
        rule.step()
    return prefix.detach().numpy()


@pytest.mark.parametrize("client", [{"optimizer": "sgd", "lr": 20.0}, {"optimizer": "adamw", "lr": 0.1}])
def test_one_client_is_training_with_peft(tmp_path: Path, texts: Path, client: dict[str, Any]) -> None:
    """From the file with the texts to /final."""
    raw = tree(
        texts,
        model={"dtype": "float64"},
        federation={"cohort_size": 1},
        method={"init": "random"},
        client={**client, "batch_size": 16, "steps": 5},
    )
    config = settings(tmp_path / "run", {**raw, "partition": {"name": "iid", "num_clients": 1}})
    federate(config)
    still = settings(tmp_path / "still", {**raw, "partition": {"name": "iid", "num_clients": 1}, "client": {"lr": 0.0}})
    federate(still)
    start = final(tmp_path / "still")["prompt_embeddings"]
    found = final(tmp_path / "run")["prompt_embeddings"]
    wanted = peft_loop(config, texts / "model", start)
    moved = np.linalg.norm(wanted - start)
    assert moved > 0.1
    assert np.linalg.norm(found - wanted) / moved < 1e-9


# ---------------------------------------------------------------- traffic and scale


def test_the_column_of_the_wire_is_the_sum_over_all_ranks(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the largest, and not rank 0's alone: each rank's own count of each round."""
    counted: dict[int, dict[int, int]] = {}
    opened, closed = federation.open_round, federation.close_round

    def opening(approach: Any, transport: Any, state: Any, round_: int) -> Any:
        counted.setdefault(round_, {})[transport.rank] = -transport.wire_bytes
        return opened(approach, transport, state, round_)

    def closing(approach: Any, transport: Any, state: Any, round_: Any) -> Any:
        record = closed(approach, transport, state, round_)
        counted[round_.plan.round][transport.rank] += transport.wire_bytes
        return record

    monkeypatch.setattr(federation, "open_round", opening)
    monkeypatch.setattr(federation, "close_round", closing)
    federate(settings(tmp_path, tree(texts, federation={"rounds": 2, "dropout": 0.0})), ranks=3)
    for round_, total in enumerate(table(tmp_path, "rounds")["wire_bytes"][1:], start=1):
        of_ranks = counted[round_]
        assert len(of_ranks) == 3 and total == sum(of_ranks.values()) > max(of_ranks.values())


@pytest.mark.parametrize("name", ["federated", "centralized", "local", "scaffold"])
def test_traffic_is_within_its_bound(tmp_path: Path, texts: Path, name: str) -> None:
    """In float64, where it is tightest, with a payload that outweighs what is constant."""
    wires = {}
    exchanges = name in ("federated", "scaffold")
    client = {"steps": 1, "batch_size": 1, "scaffold": name == "scaffold", "optimizer": "sgd"}
    for ranks in (1, 2, 3):
        for cohort in (3, 8) if exchanges else (8,):
            run_dir = tmp_path / f"{ranks} {cohort}"
            raw = mode(
                texts, name, model={"dtype": "float64"}, federation={"rounds": 1, "cohort_size": cohort, "dropout": 0.0}
            )
            raw |= {"method": {"name": "prefix", "num_virtual_tokens": 200}, "client": client}
            federate(settings(run_dir, raw), ranks)
            found = table(run_dir, "rounds")
            payload = 200 * 64 * (2 if name == "scaffold" else 1)
            assert final(run_dir)["prompt_embeddings"].shape[-2:] == (200, 64)
            each = found["wire_bytes"] / ranks
            wires[ranks, cohort] = each[1]
            assert (found["wire_bytes"][1:] > 0).all() == (ranks > 1)
            assert (each <= 16 * payload + 2**16 + 128 * found["cohort_size"]).all()
            if exchanges:
                assert list(found["bytes_down"]) == list(found["bytes_up"]) == [0, 8 * payload * cohort]
    if exchanges:
        assert wires[2, 8] - wires[2, 3] <= 5 * 128
        assert wires[3, 8] - wires[3, 3] <= 5 * 128


@pytest.mark.parametrize("scaffold", [False, True])
def test_a_million_virtual_clients_cost_what_a_thousand_cost(tmp_path: Path, texts: Path, scaffold: bool) -> None:
    peaks, sizes, wires = [], [], []
    for clients in (1_000, 1_000, 1_000_000):  # the first one warms up
        run_dir = tmp_path / str(len(peaks))
        raw = {
            **tree(texts, federation={"rounds": 2, "cohort_size": 4}, client={"scaffold": scaffold}),
            "partition": {"name": "virtual", "num_clients": clients},
        }
        tracemalloc.start()
        federate(settings(run_dir, raw), ranks=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert table(run_dir, "partition") == {}
        assert (table(run_dir, "clients")["client_id"] < clients).all()
        wires.append(table(run_dir, "rounds")["wire_bytes"].tolist())
        sizes.append((run_dir / "results.h5").stat().st_size)
        kept = {int(folder.name) for folder in run_dir.glob("clients/*")}
        assert kept == (set(table(run_dir, "clients")["client_id"].tolist()) if scaffold else set())
    assert max(table(tmp_path / "2", "clients")["client_id"]) > 1_000
    assert wires[1] == wires[2]
    assert abs(sizes[2] - sizes[1]) < 4096
    assert abs(peaks[2] - peaks[1]) < 2**20


# ---------------------------------------------------------------- rejected clients and void rounds


@pytest.fixture
def unequal(tmp_path: Path, texts: Path) -> dict[str, Any]:
    """Owners with 3, 4, 9 and no examples; at this rate whoever takes a second step overflows."""
    folder = tmp_path / "unequal"
    folder.mkdir()
    lines = (texts / "train.jsonl").read_text().splitlines()
    owners = ["few"] * 3 + ["many"] * 9 + ["nothing"] * 2 + ["some"] * 4
    made = [
        {**json.loads(line), "client": owner, "kept": "no" if owner == "nothing" else "yes"}
        for line, owner in zip(lines, owners, strict=False)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    for split in ("validation", "test"):
        rest = [{**json.loads(line), "kept": "yes"} for line in (texts / f"{split}.jsonl").read_text().splitlines()]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rest))
    return tree(
        texts,
        data={"source": str(folder), "where": {"kept": ["yes"]}, "label": None},
        federation={"rounds": 1, "cohort_size": 4},
        client={"lr": 1e30, "weight_decay": 1.0, "batch_size": 4, "steps": None, "epochs": 1},
        transforms=[{"name": "clip", "norm": 0.1}],
    ) | {"partition": {"name": "natural"}}


@pytest.mark.parametrize("aggregator", ["mean", "median", "fednova"])
def test_a_client_that_overflows_or_has_no_data_is_rejected(
    tmp_path: Path, unequal: dict[str, Any], aggregator: str
) -> None:
    config = settings(tmp_path / "run", {**unequal, "server": {"aggregator": aggregator}})
    federate(config, ranks=3)
    clients = pandas.DataFrame(table(tmp_path / "run", "clients")).set_index("client_id").sort_index()
    assert list(clients["num_examples"]) == [3, 9, 0, 4]
    assert list(clients["status"]) == [0, 2, 2, 0]
    assert list(clients["worker"] > 0) == [True, True, False, True]
    assert np.isnan(clients["update_norm"][1]) and np.isnan(clients["loss_last"][1])
    found = {name: column[-1] for name, column in table(tmp_path / "run", "rounds").items()}
    assert (found["cohort_size"], found["completed"], found["dropped"], found["rejected"]) == (4, 2, 0, 2)
    # The loss of a round is that of the clients that it is made of.
    used = clients[clients["status"] == 0]
    assert found["tokens"] == clients["tokens"].sum()
    assert found["train_loss"] == pytest.approx((used["loss_first"] * used["tokens"]).sum() / used["tokens"].sum())
    events = table(tmp_path / "run", "events")
    assert list(events["kind"]) == ["note", "rejected", "rejected"]
    assert events["message"][0].startswith("data: 1 of 4 owners have no examples left")
    assert sorted(events["message"][1:]) == [
        "client 1 (many): its update is not finite",
        "client 2 (nothing): it has no training examples",
    ]
    task = prepare(config, LoopbackTransport(), Launch(), False)
    np.testing.assert_allclose(flat(final(tmp_path / "run"), task), by_hand(config, task)[1], rtol=0, atol=1e-6)


def test_a_round_with_too_few_clients_changes_nothing(tmp_path: Path, unequal: dict[str, Any]) -> None:
    raw = {**unequal, "federation": {"rounds": 2, "cohort_size": 4, "min_cohort": 3}}
    federate(settings(tmp_path / "void", raw), ranks=2)
    federate(
        settings(tmp_path / "still", {**raw, "client": {"lr": 0.0}, "federation": {"rounds": 1, "cohort_size": 4}})
    )
    same_bits(final(tmp_path / "void"), final(tmp_path / "still"))
    found = table(tmp_path / "void", "rounds")
    assert list(found["update_norm"]) == [0, 0, 0]
    assert len(set(found["eval_loss"])) == 1
    events = table(tmp_path / "void", "events")
    assert list(events["message"][events["kind"] == "void"]) == ["2 of 3 needed clients completed"] * 2


# ---------------------------------------------------------------- results.h5


def test_the_results_of_a_run(tmp_path: Path, texts: Path) -> None:
    """What DESIGN section 3 promises to readers with h5py and pandas alone."""
    raw = tree(
        texts,
        run={"name": "contract", "seed": 3},
        federation={"rounds": 3, "dropout": 0.3},
        evaluation={
            **{"every": 2, "metrics": ["loss", "bleu"], "test_metrics": ["loss", "rouge_l"]},
            **{"samples": 3, "client_fraction": 0.2, "max_examples": 5},
        },
    )
    config = settings(tmp_path, raw)
    federate(config, ranks=2)
    with h5py.File(tmp_path / "results.h5") as file:
        about = dict(file.attrs)
        wanted = {"format": "fedhpc-run", "method": "prefix", "mode": "federated", "seed": 3, "world_size": 2}
        assert {name: about[name] for name in wanted} == wanted
        assert about["complete"]
        assert (about["device"], about["transport"], about["block_size"]) == ("cpu", "threads", 2)
        assert about["config"] == config.to_yaml() == (tmp_path / "config.yaml").read_text()
        assert {"format_version", "fedhpc_version", "model", "created_utc", "torch_version"} <= set(about)
        assert set(file) == {
            "rounds",
            "clients",
            "partition",
            "test",
            "base",
            "client_eval",
            "client_summary",
            "samples",
            "eval_samples",
            "final",
            "tables",
            "events",
        }
        assert set(file["test"]) == set(file["base"]) == {"loss", "rouge_l"}
        page = (Path(__file__).parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
        datasets: list[str] = []
        file.visit(datasets.append)
        for name in datasets:
            if isinstance(file[name], h5py.Dataset) and not name.startswith("final/"):
                assert file[name].attrs["description"], name
                *_, group, column = name.split("/")
                known = (f"`{column}`", f"`{group}`", f"/{column}`", "<metric>" if group in ("test", "base") else "-")
                assert any(text in page for text in known) or column.startswith(("eval_", "seconds_", "loss_")), name
        units = {"loss": "examples", "rouge_l": "prompts"}
        for group in ("test", "base"):
            for metric, unit in units.items():
                value, notes = file[group][metric][()], file[group][metric].attrs
                assert (notes["n"], notes["unit"]) == (notes["of"], unit)  # the whole split
                assert notes["low"] <= value <= notes["high"] and notes["low"] < notes["high"]
        notes = {column: file["rounds"][column].attrs for column in ("eval_loss", "eval_bleu")}
        assert (notes["eval_loss"]["n"], notes["eval_loss"]["unit"]) == (5, "examples")
        assert (notes["eval_bleu"]["n"], notes["eval_bleu"]["unit"]) == (3, "prompts")  # all there are
        assert notes["eval_loss"]["of"] == 10 and notes["eval_bleu"]["of"] == 3
    found = pandas.DataFrame(table(tmp_path, "rounds"))  # raises where columns are not equally long
    assert set(found) == {*ROUNDS, "block_occupancy", "eval_bleu"}
    assert list(found["round"]) == [0, 1, 2, 3]
    assert list(found["train_loss"].isna()) == [True, False, False, False]
    assert list(found["eval_loss"].isna()) == list(found["eval_bleu"].isna()) == [False, True, False, False]
    assert list(found["cohort_size"]) == [0, 6, 6, 6]
    assert (found["completed"] + found["dropped"] + found["rejected"] == found["cohort_size"]).all()
    assert found["dropped"].sum() > 0
    payload = final(tmp_path)["prompt_embeddings"].size
    assert list(found["bytes_down"]) == [0, *[24 * payload] * 3]
    assert list(found["bytes_up"]) == list(4 * payload * found["completed"])
    parts = found[["seconds_broadcast", "seconds_local", "seconds_reduce", "seconds_server", "seconds_eval"]]
    assert (parts >= 0).all(axis=None)
    assert (parts.sum(axis=1) <= found["seconds"] + 1e-3).all()
    assert (found["peak_memory_bytes"][1:] > 2**20).all()
    clients = pandas.DataFrame(table(tmp_path, "clients"))
    assert set(clients) == set(CLIENTS)
    assert len(clients) == 18
    per_round = clients.groupby("round")
    assert list(per_round["tokens"].sum()) == list(found["tokens"][1:])
    assert list(per_round["status"].agg(lambda s: (s == 1).sum())) == list(found["dropped"][1:])
    dropped = clients[clients["status"] == 1]
    assert dropped["loss_first"].isna().all()
    assert (dropped["worker"] == -1).all()
    assert (clients["steps"] == np.where(clients["status"] == 1, 0, 2)).all()
    assert set(table(tmp_path, "events")) == set(EVENTS)
    partition = table(tmp_path, "partition")
    assert len(partition["num_examples"]) == 8
    assert sorted(partition["indices"]) == list(range(90))
    assert list(np.diff(partition["offsets"])) == list(partition["num_examples"])
    assert list(partition["label_counts"].sum(axis=1)) == list(partition["num_examples"])
    samples = table(tmp_path, "samples")
    assert {name: len(column) for name, column in samples.items()} == {"prompt": 3, "references": 3, "text": 3}
    assert all(isinstance(json.loads(text), list) for text in samples["references"])


def test_local_results_have_a_client_axis(tmp_path: Path, texts: Path) -> None:
    federate(settings(tmp_path, mode(texts, "local")), ranks=2)
    trained = sorted(set(table(tmp_path, "clients")["client_id"]))
    assert len(trained) == 5
    assert final(tmp_path)["prompt_embeddings"].shape[0] == 5
    assert sorted(int(folder.name) for folder in (tmp_path / "adapter").iterdir()) == trained


@pytest.mark.parametrize("name", ["federated", "local"])
def test_a_round_counts_its_clients_while_they_train(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    parts: dict[int, list[float]] = defaultdict(list)

    def add(self: RoundProgress, clients: float) -> None:
        parts[self.round].append(clients)

    monkeypatch.setattr(RoundProgress, "add", add)
    raw = mode(texts, name) if name == "local" else tree(texts, federation={"rounds": 2, "dropout": 0.3})
    federate(settings(tmp_path, raw))
    clients = pandas.DataFrame(table(tmp_path, "clients"))
    trained = clients[clients["status"] == 0].groupby("round").size()
    assert len(trained) > 1 or name == "local"
    for round_, count in trained.items():
        assert sum(parts[round_]) == pytest.approx(count) and len(parts[round_]) > 1


def test_natural_clients_are_called_by_their_names(tmp_path: Path, texts: Path) -> None:
    """In results.h5, the reports' CSV and beside local adapters; the numbers stay."""
    raw = tree(texts, evaluation={"client_fraction": 0.2}) | {"mode": "local", "partition": {"name": "natural"}}
    federate(settings(tmp_path / "run", raw), ranks=2)
    names = table(tmp_path / "run", "partition")["client_names"]
    rows = [json.loads(line) for line in (texts / "train.jsonl").read_text().splitlines()]
    assert list(names) == sorted({row["client"] for row in rows})
    for group in ("clients", "client_eval"):
        columns = table(tmp_path / "run", group)
        assert list(columns["client_name"]) == [names[i] for i in columns["client_id"]] and len(columns["client_id"])
    assert json.loads((tmp_path / "run" / "adapter" / "clients.json").read_text()) == {
        str(i): name for i, name in enumerate(names)
    }
    assert report_main([str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0
    written = pandas.read_csv(tmp_path / "report" / "clients.csv")
    assert list(written["client_name"]) == [names[i] for i in written["client_id"]]
    again = Results.read(tmp_path / "run" / "results.h5")
    (tmp_path / "again.h5").write_bytes(again.image(complete=True))
    with h5py.File(tmp_path / "again.h5") as file:
        assert list(file["clients/client_name"].asstr()) == list(table(tmp_path / "run", "clients")["client_name"])


# ---------------------------------------------------------------- what a GPU takes


def crowded(monkeypatch: pytest.MonkeyPatch, fits: int) -> list[int]:
    """Let blocks of more than `fits` clients run out of memory; the sizes that were tried."""
    tried: list[int] = []

    def train(base: Any, method: Any, objective: Any, start: Any, works: Any, *about: Any, **more: Any) -> Any:
        tried.append(len(works))
        if len(works) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_block(base, method, objective, start, works, *about, **more)

    monkeypatch.setattr("fedhpc.approaches.averaging.local.train_block", train)
    return tried


@pytest.mark.parametrize("client", [{}, {"scaffold": True, "optimizer": "sgd", "lr": 2.0}])
def test_a_block_without_memory_is_halved_for_good(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], client: Any
) -> None:
    changes = {"client": client, "federation": {"rounds": 2, "cohort_size": 5}, "runtime": {"block_size": 5}}
    federate(settings(tmp_path / "whole", tree(texts, **changes)))
    tried = crowded(monkeypatch, 2)
    federate(settings(tmp_path / "halved", tree(texts, **changes)))
    assert tried == [5, 3, 2, 1, 2, 2, 1, 2]
    told = "rank 0: its memory is enough for 2 clients at a time; larger blocks train in parts"
    events = table(tmp_path / "halved", "events")
    assert list(events["message"][events["kind"] == "memory"]) == [told]  # once, whatever the rounds
    assert capsys.readouterr().out.count(told) == 1
    whole, halved = final(tmp_path / "whole"), final(tmp_path / "halved")
    for name in whole:
        np.testing.assert_allclose(halved[name], whole[name], rtol=0, atol=1e-6)


def test_a_client_that_fits_nowhere_is_named(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crowded(monkeypatch, 0)
    with pytest.raises(UserError, match=r"one example of client \d+ takes more memory .* data.max_length"):
        federate(settings(tmp_path, tree(texts)))


def test_blocks_of_one_gpu_train_together(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"federation": {"rounds": 2, "cohort_size": 5}, "runtime": {"block_size": "auto"}}
    federate(settings(tmp_path / "apart", tree(texts, **changes)))
    monkeypatch.setattr(Placement, "trains_on", "cuda")
    monkeypatch.setattr(Placement, "describe", lambda self: "1 GPU")
    tried = crowded(monkeypatch, 5)
    federate(settings(tmp_path / "together", tree(texts, **changes)))
    assert tried == [5, 5]
    apart, together = final(tmp_path / "apart"), final(tmp_path / "together")
    for name in apart:
        np.testing.assert_allclose(together[name], apart[name], rtol=0, atol=1e-6)
