"""LoRA's dropout and its federated variants, each against its formula."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhpc import config as configuration
from fedhpc.approaches.prepare import prepare
from fedhpc.errors import UserError
from fedhpc.methods import with_head
from fedhpc.methods.lora import Lora
from fedhpc.methods.lora.term import Dropout
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.rng import bits, torch_seed
from fedhpc.training.schedule import batches
from tests import tiny
from tests.federations import Interrupted, federate, final, table, tree, write_texts
from tests.federations import settings as run_settings
from tests.test_block import relative, settings, start_of, works
from tests.test_export import loss_of, rows_of
from tests.test_federation import by_hand, flat, same_results
from tests.test_methods import in_peft, make, warm

FAMILIES = ["llama", "gpt2"]  # grouped queries and tied embeddings; Conv1D


def lora(base: Any, **options: Any) -> Lora:
    method = make("lora", base, **options)
    assert isinstance(method, Lora)
    return method


# ---------------------------------------------------------------- dropout


def test_draws_are_those_of_splitmix64() -> None:
    # The first outputs of the generator that begins at 1234567, as its published test vectors have them.
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = bits(torch.tensor([1234567]), torch.arange(5))
    assert [int(v) % 2**64 for v in found] == wanted


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_share_of_dropped_inputs(p: float) -> None:
    keys = bits(torch.tensor(5), torch.arange(40))
    kept = Dropout(keys, p).keeps(50, 32)
    assert abs(float((~kept).double().mean()) - p) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    # No two rows, positions or features share their draws.
    for dim in range(3):
        same = (kept.movedim(dim, 0)[1:] == kept.movedim(dim, 0)[:-1]).double().mean()
        assert abs(float(same) - (p * p + (1 - p) ** 2)) < 0.02
    # A row's draws do not depend on the others nor on padding.
    assert torch.equal(Dropout(keys[3:5], p).keeps(20, 32), kept[3:5, :20])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_with_dropout_equals_its_clients_alone(family: str) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method, plain = lora(base, dropout=0.3), lora(base)
    start, group = warm(method, torch.float64), works(5)
    together = tiny.train(base, method, tiny.objective(base), start, group, data, config, 2, 3).updates
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), start, [work], data, config, 2, 3).updates[0]
        assert float((together[i] - alone).norm() / alone.norm()) < 1e-9
    without = tiny.train(base, plain, tiny.objective(base), start, group, data, config, 2, 3).updates
    assert float((together - without).norm() / without.norm()) > 1e-2
    another_round = tiny.train(base, method, tiny.objective(base), start, group, data, config, 3, 3).updates
    assert float((together - another_round).norm() / together.norm()) > 1e-2


def train_in_peft(
    model: Any, named: dict[str, Any], config: Any, data: Any, work: Any, before_step: Callable[[int, int, int], None]
) -> None:
    """PEFT's model trained by torch.optim on the batches of `work`; before_step(step, rows, width) goes first."""
    c = config.client
    rule: Any = (
        torch.optim.SGD(named.values(), lr=c.lr)
        if c.optimizer == "sgd"
        else torch.optim.AdamW(named.values(), lr=c.lr, weight_decay=0.0)
    )
    for s, picked in enumerate(batches(len(work.indices), c, 0, 1, work.client_id)):
        chosen = work.indices[picked]
        rows = [torch.from_numpy(data.tokens(int(i)).astype(np.int64)) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        prompt = torch.from_numpy(data.prompt_lengths[chosen].astype(np.int64))
        supervised = (torch.arange(ids.shape[1]) >= prompt[:, None]) & real
        before_step(s, *ids.shape)
        logits = model(input_ids=ids, attention_mask=real.long()).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        rule.zero_grad()
        losses[supervised[:, 1:].flatten()].mean().backward()
        rule.step()


class Injected(torch.nn.Module):
    """A dropout whose mask is given."""

    mask: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask[:, : x.shape[1]]


def injects(model: Any, share: float, client: int) -> Callable[[int, int, int], None]:
    """What gives PEFT's model our own masks of a client before each of its steps."""
    adapted = [m for m in model.modules() if hasattr(m, "lora_dropout")]
    dropouts = [Injected() for _ in adapted]
    for module, dropout in zip(adapted, dropouts, strict=True):
        module.lora_dropout["default"] = dropout
    key = torch.tensor(torch_seed(0, "noise", 1, client))

    def inject(step: int, rows: int, width: int) -> None:
        of_rows = bits(key, torch.arange(rows) + (step << 32))
        for number, dropout in enumerate(dropouts):
            keys = bits(of_rows, torch.tensor(number))
            dropout.mask = Dropout(keys, share).keeps(width, 32).double() / (1 - share)

    assert adapted
    return inject


@pytest.mark.parametrize("client", [{"optimizer": "sgd", "lr": 0.2}, {"optimizer": "adamw", "lr": 0.02}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_same_masks_peft_trains_alike(family: str, client: dict[str, Any]) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(**client)
    method = lora(base, dropout=0.3)
    start, work = warm(method, torch.float64), works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]

    model, named = in_peft("lora", base, method)
    with torch.no_grad():
        for name, value in method.payload.views(start[0]).items():
            named[name].copy_(value)
    train_in_peft(model, named, config, data, work, injects(model, 0.3, work.client_id))
    wanted = method.payload.flatten({n: p.detach() for n, p in named.items()})
    assert relative(found, wanted, start[0]) < 1e-9


def test_evaluation_drops_nothing() -> None:
    base = tiny.base("llama")
    method, plain = lora(base, dropout=0.5), lora(base)
    views = method.payload.views(warm(method, torch.float64))
    ids, rows = torch.randint(3, tiny.VOCABULARY, (2, 9)), torch.zeros(2, dtype=torch.int64)
    logits = []
    for one in (method, plain):
        with torch.no_grad(), one.attach(views, views, rows):
            logits.append(base.model(input_ids=ids).logits)
    assert torch.equal(*logits)


# ---------------------------------------------------------------- ffa


@pytest.mark.parametrize("family", FAMILIES)
def test_with_ffa_b_is_trained_as_by_peft_with_a_frozen(family: str) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method, plain = lora(base, aggregation="ffa"), lora(base)
    drawn = {n: t.double() for n, t in plain.initial().items() if "lora_A" in n}
    assert not set(drawn) & set(method.payload.shapes)
    assert set(drawn) | set(method.payload.shapes) == set(plain.payload.shapes)
    start, group = warm(method, torch.float64), works(3)
    together = tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1).updates
    for i, work in enumerate(group):
        model, named = in_peft("lora", base, plain)
        with torch.no_grad():
            for name, value in {**drawn, **method.payload.views(start[0])}.items():
                named[name].copy_(value)
        train_in_peft(model, {n: named[n] for n in method.payload.shapes}, config, data, work, lambda *_: None)
        wanted = method.payload.flatten({n: named[n].detach() for n in method.payload.shapes})
        assert relative(start[0] - together[i], wanted, start[0]) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_with_ffa_the_mean_of_the_products_is_the_product_of_the_means(family: str, tmp_path: Path) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    weights = np.array([0.5, 0.2, 0.3])

    def difference(method: Lora) -> float:
        """Largest distance between the two, in units of the mean of the products."""
        start = warm(method, torch.float64)
        ends = (
            start - tiny.train(base, method, tiny.objective(base), start, works(3), data, config, 1, 1).updates
        ).numpy()
        clients = []
        for end in [*ends, np.average(ends, axis=0, weights=weights)]:
            folder = tmp_path / f"{method.options.aggregation}{len(clients)}"
            method.export(method.payload.views(torch.from_numpy(end)), folder)
            clients.append(products(folder))
        worst = 0.0
        for path in clients[0]:
            mean = sum(w * c[path] for w, c in zip(weights, clients[:-1], strict=True))
            worst = max(worst, float(np.linalg.norm(mean - clients[-1][path]) / np.linalg.norm(mean)))
        return worst

    assert difference(lora(base, aggregation="ffa")) < 1e-12
    assert difference(lora(base)) > 1e-2
    # A is what it was drawn as.
    assert_same(exported(tmp_path / "ffa0", "lora_A"), exported(tmp_path / "ffa3", "lora_A"))
    drawn = {f"base_model.model.{n}": t.numpy() for n, t in lora(base).initial().items() if "lora_A" in n}
    assert_same(exported(tmp_path / "ffa0", "lora_A"), drawn)


def exported(folder: Path, part: str = "") -> dict[str, np.ndarray]:
    """The tensors of an exported adapter whose name has `part` in it."""
    return {name: tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items() if part in name}


def products(folder: Path) -> dict[str, np.ndarray]:
    """Path -> B A, with the scale, of an exported adapter."""
    about = json.loads((folder / "adapter_config.json").read_text())
    tensors = exported(folder)
    scale = about["lora_alpha"] / about["r"]
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")] @ a for name, a in tensors.items() if "lora_A" in name
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


# ---------------------------------------------------------------- exact and stack

SHARES = np.array([0.5, 0.2, 0.3])


def with_added(base: Any, added: dict[str, np.ndarray]) -> Any:
    """The base with (out, in) added to the weights of its layers."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        for path, more in added.items():
            weight = model.get_submodule(path).weight
            weight += torch.from_numpy(more.T if base.name == "gpt2" else more)
    return replace(base, model=model)


def trained(method: Lora, start: torch.Tensor, group: list[Any], round_: int) -> np.ndarray:
    """The payloads of clients after a round, each of which trained alone: (C, P)."""
    data, config = tiny.examples(), settings(optimizer="adamw", lr=0.02)
    base, objective = method.base, tiny.objective(method.base)
    updates = [tiny.train(base, method, objective, start, [w], data, config, round_, 3).updates[0] for w in group]
    return (start - torch.stack(updates)).numpy()


def factors(method: Lora, payload: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Path -> (A, B) of one payload (P,)."""
    views = {n: v.numpy() for n, v in method.payload.views(torch.from_numpy(payload)).items()}
    ends = [n for n in views if n.endswith("lora_A.weight")]
    return {n.removesuffix(".lora_A.weight"): (views[n], views[n.replace("lora_A", "lora_B")]) for n in ends}


def deltas(method: Lora, payload: np.ndarray) -> dict[str, np.ndarray]:
    """Path -> D of one payload (P,)."""
    views = method.payload.views(torch.from_numpy(payload))
    return {n.removesuffix(".lora_delta.weight"): v.numpy() for n, v in views.items() if n.endswith("delta.weight")}


def mean_of_products(ends: list[dict[str, tuple[np.ndarray, np.ndarray]]], scale: float) -> dict[str, np.ndarray]:
    return {
        path: sum(w * scale * end[path][1] @ end[path][0] for w, end in zip(SHARES, ends, strict=True))
        for path in ends[0]
    }  # fmt: skip


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Equal, relative to the norm of what is wanted."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert np.linalg.norm(found[name] - value) < tolerance * np.linalg.norm(value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_the_mean_of_the_products_with_the_residual_in_the_base(family: str) -> None:
    """Three rounds of FedEx-LoRA by hand: plain LoRA, numpy, and a base whose weights take the residual."""
    base, group = tiny.base(family), works(3)
    method, plain = lora(base, aggregation="exact"), lora(base)
    payload, reference = start_of(method, torch.float64), start_of(plain, torch.float64)
    scale, residual = 2.0, {path: np.zeros_like(d) for path, d in deltas(method, payload[0].numpy()).items()}
    for round_ in (1, 2, 3):
        found = np.average(trained(method, payload, group, round_), axis=0, weights=SHARES)

        tuned = lora(with_added(base, residual))
        ends = trained(tuned, reference, group, round_)
        mean = np.average(ends, axis=0, weights=SHARES)
        products_mean = mean_of_products([factors(tuned, end) for end in ends], scale)
        of_means = {path: scale * b @ a for path, (a, b) in factors(tuned, mean).items()}
        # W + R + mean(s B_i A_i) is what the model becomes, as W + D.
        assert_close(deltas(method, found), {p: residual[p] + m for p, m in products_mean.items()}, 1e-9)
        factor_size = plain.payload.size
        assert np.linalg.norm(found[:factor_size] - mean) < 1e-9 * np.linalg.norm(mean - reference[0].numpy())
        gaps = [np.linalg.norm(m - of_means[p]) / np.linalg.norm(m) for p, m in products_mean.items()]
        assert min(gaps) > 1e-2  # averaging A and B is something else
        residual = {p: residual[p] + m - of_means[p] for p, m in products_mean.items()}
        payload, reference = torch.from_numpy(found)[None], torch.from_numpy(mean)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_stack_adds_up_the_products_of_clients_of_different_ranks(family: str) -> None:
    """Two rounds of FLoRA by hand: each client is plain LoRA of its own rank on a base with all that was added."""
    base, group, ranks = tiny.base(family), works(3), [2, 4, 1]
    method = lora(base, aggregation="stack", ranks=ranks)
    payload = start_of(method, torch.float64)
    scale, began = method.options.alpha / method.options.rank, []
    for round_ in (1, 2):
        found = np.average(trained(method, payload, group, round_), axis=0, weights=SHARES)

        before, ends = deltas(method, payload[0].numpy()), []
        for work in group:
            rank = ranks[work.client_id % 3]
            alone = lora(with_added(base, before), rank=rank, alpha=scale * rank)
            fresh = method.start(method.payload.views(payload), round_, [work.client_id])
            shapes = alone.payload.shapes
            cut = {n: t[0][tuple(slice(k) for k in shapes[n])] for n, t in fresh.items()}
            began.append(next(iter(cut.values())))
            assert all(bool(t.any()) == n.endswith("lora_A.weight") for n, t in cut.items())
            start = alone.payload.flatten(cut)[None]
            ends.append(factors(alone, trained(alone, start, [work], round_)[0]))
        stacked = {
            path: np.hstack([w * scale * e[path][1] for w, e in zip(SHARES, ends, strict=True)])
            @ np.vstack([e[path][0] for e in ends])
            for path in ends[0]
        }
        after = deltas(method, found)
        assert_close({path: after[path] - before[path] for path in after}, stacked, 1e-9)
        for path in after:
            assert np.linalg.matrix_rank(after[path] - before[path], tol=1e-9) == sum(ranks)
        payload = torch.from_numpy(found)[None]
    # Nobody begins as another, nor as in another round.
    assert len({tuple(a[0].tolist()) for a in began}) == len(began)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"aggregation": "exact"}, {"aggregation": "stack", "ranks": [2, 4, 1]}], ids=str)
def test_a_block_that_folds_equals_its_clients_alone(options: dict[str, Any], family: str) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method, group = lora(base, **options), works(5)
    start = warm(method, torch.float64)
    together = start - tiny.train(base, method, tiny.objective(base), start, group, data, config, 2, 3).updates
    for i, work in enumerate(group):
        alone = torch.from_numpy(trained(method, start, [work], 2)[0])
        assert relative(together[i], alone, start[0]) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("aggregation", ["exact", "stack"])
def test_the_sum_of_the_products_is_exported_as_lora_of_its_rank(aggregation: str, family: str, tmp_path: Path) -> None:
    base = tiny.base(family)
    method = lora(base, aggregation=aggregation)
    payload = np.average(trained(method, start_of(method, torch.float64), works(3), 1), axis=0, weights=SHARES)
    views = method.payload.views(torch.from_numpy(payload)[None])
    method.export({name: view[0] for name, view in views.items()}, tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    # From B = 0 the clients of exact begin with the same A, and move away from it.
    assert about["r"] == 3 * 3
    exact = {f"base_model.model.{path}.lora_A.weight": d for path, d in deltas(method, payload).items()}
    assert_close(products(tmp_path), exact, 1e-12)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9))
    with torch.no_grad(), method.attach(method.start(views), views, torch.zeros(2, dtype=torch.int64)):
        ours = base.model(input_ids=ids).logits
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).double()
    torch.testing.assert_close(loaded(input_ids=ids).logits, ours, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(base.model(input_ids=ids).logits, ours)


@pytest.mark.parametrize("aggregation", ["exact", "stack"])
def test_what_nothing_was_added_to_is_exported_as_nothing(aggregation: str, tmp_path: Path) -> None:
    method = lora(tiny.base("llama"), aggregation=aggregation)
    method.export(method.payload.views(start_of(method, torch.float64)[0]), tmp_path)
    assert not any(value.any() for value in products(tmp_path).values())


@pytest.mark.parametrize(
    ("method", "mode", "message"),
    [
        ({"ranks": [1, 2]}, "federated", "method.ranks needs method.aggregation stack"),
        ({"aggregation": "exact", "ranks": [1, 2]}, "federated", "method.ranks needs method.aggregation stack"),
        ({"aggregation": "stack"}, "local", "method.aggregation stack begins afresh after every aggregation"),
        ({"aggregation": "stack"}, "centralized", "mode centralized has none: use average"),
    ],
)
def test_options_that_do_not_go_together(method: dict[str, Any], mode: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration.resolve(
            {"mode": mode, "partition": {"name": "iid", "num_clients": 4}, "method": {"name": "lora", **method}}
        )


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


VARIANTS: dict[str, dict[str, Any]] = {
    "ffa": {"aggregation": "ffa", "dropout": 0.1},
    "exact": {"aggregation": "exact", "dropout": 0.1},
    "stack": {"aggregation": "stack", "ranks": [1, 3]},
    "dora": {
        "use_dora": True, "init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2},
        "loraplus_lr_ratio": 4.0, "dropout": 0.1,
    },
}  # fmt: skip


def raw_of(texts: Path, variant: str, **changes: Any) -> dict[str, Any]:
    """A small federation of a variant with unequal clients, one of which may drop out."""
    common = {
        "method": {"name": "lora", "rank": 3, "targets": ["q_proj", "down_proj"], **VARIANTS[variant]},
        "client": {"optimizer": "adamw", "lr": 0.05, "steps": None, "epochs": 1},
        "federation": {"rounds": 2, "dropout": 0.2},
    }
    raw = tree(texts, **{**common, **changes})
    raw["method"] = common["method"]
    return raw


@pytest.mark.parametrize("counts", [(3,), pytest.param((2, 4), marks=pytest.mark.slow)], ids=["quick", "many"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_ranks_does_not_change_a_bit(
    tmp_path: Path, texts: Path, variant: str, counts: tuple[int, ...]
) -> None:
    raw = raw_of(texts, variant)
    federate(run_settings(tmp_path / "1", raw))
    for ranks in counts:
        federate(run_settings(tmp_path / str(ranks), raw), ranks)
        same_results(tmp_path / "1", tmp_path / str(ranks))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_anywhere_and_resumed_equals_one_that_was_not(tmp_path: Path, texts: Path, variant: str) -> None:
    raw = raw_of(texts, variant, federation={"rounds": 3, "dropout": 0.2})
    whole = federate(run_settings(tmp_path / "whole", raw), ranks=2)
    config = run_settings(tmp_path / "stopped", raw)
    for share, ranks in ((0.45, 2), (0.4, 3)):
        with pytest.raises(Interrupted):
            federate(config, ranks, stop_at=int(share * whole))
    federate(config)
    same_results(tmp_path / "whole", tmp_path / "stopped", ("rounds", "clients"))
    assert set(table(tmp_path / "stopped", "events")["kind"]) == {"resumed"}


@pytest.mark.parametrize("variant", ["exact", "stack"])
def test_a_run_is_what_numpy_makes_of_it_and_peft_loads_it(tmp_path: Path, texts: Path, variant: str) -> None:
    config = run_settings(tmp_path, raw_of(texts, variant, model={"dtype": "float64"}))
    federate(config, ranks=2)
    task = prepare(config, LoopbackTransport(), Launch(), False)
    np.testing.assert_allclose(flat(final(tmp_path), task), by_hand(config, task)[1], rtol=0, atol=1e-10)

    model = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=torch.float64)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(texts / "model")
    reported = float(table(tmp_path, "test")["loss"])
    assert abs(loss_of(loaded, tokenizer, rows_of(texts)) - reported) < 1e-5
    assert abs(reported - float(table(tmp_path, "base")["loss"])) > 1e-3

    # A client sends its own factors; what goes down has the sum of all products in full.
    clients, rounds = table(tmp_path, "clients"), table(tmp_path, "rounds")
    widths = {"q_proj": (32, 32), "down_proj": (48, 32)}
    per_rank = 2 * sum(i + o for i, o in widths.values())
    dense = 2 * sum(i * o for i, o in widths.values())
    for round_ in (1, 2):
        sent = (clients["round"] == round_) & (clients["status"] != 1)
        ranks = [[1, 3][c % 2] if variant == "stack" else 3 for c in clients["client_id"][sent]]
        assert rounds["bytes_up"][round_] == 8 * per_rank * sum(ranks)
        down = dense + (3 * per_rank if variant == "exact" else 0)
        assert rounds["bytes_down"][round_] == 8 * down * rounds["cohort_size"][round_]


@pytest.mark.parametrize("variant", ["exact", "stack"])
def test_a_client_that_diverges_adds_nothing(tmp_path: Path, texts: Path, variant: str) -> None:
    """At this rate whoever takes a second step overflows."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [json.loads(line) for line in (texts / "train.jsonl").read_text().splitlines()]
    owners = ["few"] * 3 + ["many"] * 9 + ["some"] * 4
    made = [{**row, "client": owner} for row, owner in zip(rows, owners, strict=False)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    for split in ("validation", "test"):
        (folder / f"{split}.jsonl").write_text((texts / f"{split}.jsonl").read_text())
    raw = raw_of(
        texts,
        variant,
        model={"dtype": "float64"},
        data={"source": str(folder), "label": None},
        client={"optimizer": "sgd", "lr": 1e200, "batch_size": 4, "steps": None, "epochs": 1},
        federation={"rounds": 1, "cohort_size": 3},
    ) | {"partition": {"name": "natural"}}
    config = run_settings(tmp_path / "run", raw)
    federate(config, ranks=2)
    clients = table(tmp_path / "run", "clients")
    assert dict(zip(clients["num_examples"], clients["status"], strict=True)) == {3: 0, 9: 2, 4: 0}
    task = prepare(config, LoopbackTransport(), Launch(), False)
    wanted = by_hand(config, task)[1]
    assert np.isfinite(wanted).all() and np.abs(wanted).max() > 1e100
    np.testing.assert_allclose(flat(final(tmp_path / "run"), task) / 1e200, wanted / 1e200, rtol=0, atol=1e-10)


@pytest.mark.parametrize("aggregation", ["exact", "stack"])
def test_a_classifier_folds_beside_its_head(aggregation: str) -> None:
    base, data, config = tiny.base("bert"), tiny.labelled(), settings(optimizer="adamw", lr=0.02)
    method = with_head(lora(base, aggregation=aggregation))
    start, group = warm(method, torch.float64), works(3)
    together = start - tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1).updates
    head = sum(p.numel() for p in base.model.classifier.parameters())
    assert method.numbers_sent(7, 1) == head + 4 * 3 * (32 + 32)
    for i, work in enumerate(group):
        alone = start - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates
        assert relative(together[i], alone[0], start[0]) < 1e-9
