"""LoRA's rules by which round or server makes the factors: whole runs against PEFT's model, torch.optim and numpy."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhpc import config as configuration
from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.approaches.prepare import prepare
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.methods import with_head
from fedhpc.methods.lora.factors import leading, leading_of_sum
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.training import client_state
from fedhpc.training.block import train_block
from fedhpc.training.example_privacy import ExamplePrivacy
from fedhpc.training.local import LocalTraining
from fedhpc.training.schedule import batches
from tests import tiny
from tests.federations import Interrupted, federate, final, settings, table, tree, write_texts
from tests.test_block import settings as block_settings
from tests.test_block import start_of, works
from tests.test_export import loss_of, rows_of
from tests.test_federation import same_results
from tests.test_lora import lora, products
from tests.test_methods import warm

TARGETS, RANK, SCALE = ["q_proj", "down_proj"], 3, 4.0  # SCALE: alpha / rank
RANKS = [1, 3]  # of clients, with flex
RULES: dict[str, dict[str, Any]] = {"alternate": {}, "svd": {}, "flex": {"ranks": RANKS}, "sb": {}}
every_rule = pytest.mark.parametrize("rule", RULES)
#: Path of a layer -> A (r, in), B (out, r) and what is between them, R (r, r): a layer gains SCALE B R A.
Terms = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def raw_of(texts: Path, rule: str, **changes: Any) -> dict[str, Any]:
    """A small federation of unequal clients, some of which drop out."""
    raw = tree(
        texts,
        model={"dtype": "float64"},
        client={"optimizer": "adamw", "lr": 0.02},
        federation={"rounds": 3, "cohort_size": 4, "dropout": 0.2},
        evaluation={"every": 3},
    )
    raw["method"] = {"name": "lora", "rank": RANK, "alpha": RANK * SCALE, "targets": TARGETS}
    raw["method"] |= {"aggregation": rule, **RULES.get(rule, {})}
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value}
    return raw


# ---------------------------------------------------------------- the papers' formulas


def after_training(
    task: Averaging, config: Config, round_: int, client: int, start: Terms, moves: str, resting: int = 0
) -> Terms:
    """What torch.optim makes of a client's terms in PEFT's model, of which it moves A, B or R, or several of them.

    resting: so many of the first ranks stay as they are.
    """
    rank = len(next(iter(start.values()))[0])
    shape = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank * SCALE, target_modules=TARGETS)
    model = peft.get_peft_model(copy.deepcopy(task.base.model), shape).double()
    leaves = {p: [torch.from_numpy(np.array(value)) for value in term] for p, term in start.items()}
    moved = [leaf for term in leaves.values() for which, leaf in zip("ABR", term, strict=True) if which in moves]
    rule = torch.optim.AdamW([leaf.requires_grad_() for leaf in moved], lr=config.client.lr, weight_decay=0.0)
    indices, data = task.data.population.indices(client), task.data.train
    for picked in batches(len(indices), config.client, config.run.seed, round_, client):
        chosen = indices[picked]
        rows = [torch.from_numpy(data.tokens(int(i)).astype(np.int64)) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        prompt = torch.from_numpy(data.prompt_lengths[chosen].astype(np.int64))
        supervised = (torch.arange(ids.shape[1]) >= prompt[:, None]) & real
        given: dict[str, torch.Tensor] = {}
        for path, (a, b, r) in leaves.items():
            given |= {f"base_model.model.{path}.lora_A.default.weight": a}
            given |= {f"base_model.model.{path}.lora_B.default.weight": b @ r}
        logits = functional_call(model, given, (ids,), {"attention_mask": real.long()}).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        rule.zero_grad()
        losses[supervised[:, 1:].flatten()].mean().backward()
        for a, b, _ in leaves.values() if resting else ():
            a.grad[:resting], b.grad[:, :resting] = 0.0, 0.0  # type: ignore[index]
        rule.step()
    return {path: tuple(leaf.detach().numpy() for leaf in term) for path, term in leaves.items()}  # type: ignore[misc]


def cut(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V^T, U and S of the largest singular values, so that U S V^T is the best approximation of that rank."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    return vt[:rank], u[:, :rank], np.diag(s[:rank])


def first_terms(task: Averaging, rule: str) -> Terms:
    initial = {name: tensor.double().numpy() for name, tensor in task.method.initial().items()}
    paths = [path for path, _ in task.base.model.named_modules() if path.rpartition(".")[2] in TARGETS]
    if rule == "sb":
        weights = {path: task.base.model.get_submodule(path).weight.detach().numpy() for path in paths}
        return {path: (*cut(weight, RANK)[:2], np.zeros((RANK, RANK))) for path, weight in weights.items()}
    return {p: (initial[f"{p}.lora_A.weight"], initial[f"{p}.lora_B.weight"], np.eye(RANK)) for p in paths}


def by_hand(task: Averaging, config: Config) -> dict[str, np.ndarray]:
    """Path -> what a layer has gained after all rounds, (out, in): one client at a time."""
    rule = config.method.aggregation
    terms = first_terms(task, rule)
    for t in range(1, config.federation.rounds + 1):
        moves = {"alternate": "BA"[(t - 1) % 2], "svd": "B", "flex": "AB", "sb": "R"}[rule]
        ends, counts = [], []
        for client in task.plan(t).training:
            rank = RANKS[client % 2] if rule == "flex" else RANK
            start = {p: (a[:rank], b[:, :rank], r[:rank, :rank]) for p, (a, b, r) in terms.items()}
            ends.append(after_training(task, config, t, client, start, moves))
            counts.append(len(task.data.population.indices(client)))
        shares = (np.array(counts) / sum(counts)).tolist()
        for path in terms:
            products = sum(w * e[path][1] @ e[path][2] @ e[path][0] for w, e in zip(shares, ends, strict=True))
            if rule == "flex":
                a, u, s = cut(products, RANK)
                terms[path] = a, u @ s, np.eye(RANK)
                continue
            a, b, r = (sum(w * e[path][k] for w, e in zip(shares, ends, strict=True)) for k in range(3))
            # What the papers are about: the mean of the products is the product of the means.
            assert np.linalg.norm(products - b @ r @ a) < 1e-12 * np.linalg.norm(products)
            if rule == "svd":
                a, u, s = cut(b @ a, RANK)
                b = u @ s
            terms[path] = a, b, r
    return {path: SCALE * b @ r @ a for path, (a, b, r) in terms.items()}


def numbers(rule: str, round_: int, client: int) -> tuple[int, int]:
    """What a client needs and sends in a round."""
    widths = [(32, 32), (48, 32)] * 2  # of q_proj and down_proj, in both layers
    a, b = (RANK * sum(width[side] for width in widths) for side in (0, 1))
    if rule == "sb":
        return (4 * RANK**2,) * 2
    if rule == "flex":
        return ((a + b) * RANKS[client % 2] // RANK,) * 2
    return a + b, a if rule == "alternate" and round_ % 2 == 0 else b


def run_on_any_ranks(folder: Path, raw: dict[str, Any]) -> tuple[Config, Averaging]:
    """The run of folder/3, by three ranks: one rank that was stopped and went on made the same results."""
    config = settings(folder / "3", raw)
    collectives = federate(config, ranks=3)
    stopped = settings(folder / "1", raw)
    with pytest.raises(Interrupted):
        federate(stopped, stop_at=int(0.6 * collectives))
    federate(stopped)
    same_results(folder / "3", folder / "1", ("rounds", "clients"))
    task = prepare(config, LoopbackTransport(), Launch(), False)
    assert isinstance(task, Averaging)
    return config, task


@every_rule
def test_a_run_is_its_papers_formula_on_any_ranks_and_resumed(tmp_path: Path, texts: Path, rule: str) -> None:
    raw = raw_of(texts, rule)
    config, task = run_on_any_ranks(tmp_path, raw)
    wanted, exported = by_hand(task, config), products(tmp_path / "3" / "adapter")
    for path, gained in wanted.items():
        assert np.linalg.norm(gained) > 0.1
        found = exported[f"base_model.model.{path}.lora_A.weight"]
        assert np.linalg.norm(found - gained) < 1e-9 * np.linalg.norm(gained), path

    # PEFT computes what was reported.
    model = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=torch.float64)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "3" / "adapter").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(texts / "model")
    reported = float(table(tmp_path / "3", "test")["loss"])
    assert abs(loss_of(loaded, tokenizer, rows_of(texts)) - reported) < 1e-5
    assert abs(reported - float(table(tmp_path / "3", "base")["loss"])) > 1e-3

    rounds = table(tmp_path / "3", "rounds")
    for t in (1, 2, 3):
        plan = task.plan(t)
        down = 8 * sum(numbers(rule, t, client)[0] for client in plan.cohort)
        up = 8 * sum(numbers(rule, t, client)[1] for client in plan.training)
        assert (task.bytes_down(plan), task.bytes_up(plan)) == (down, up)
        assert (rounds["bytes_down"][t], rounds["bytes_up"][t]) == (down, up)
    assert rounds["dropped"].sum() > 0


def test_a_run_with_two_adapters_is_its_formula_on_any_ranks_and_resumed(tmp_path: Path, texts: Path) -> None:
    """The client's is trained beside the shared one as it was received, and then the shared one alone."""
    weight = 0.3
    more = {"evaluation": {"client_fraction": 0.2}, "personalization": {"parts": ["*_local.weight"]}}
    raw = raw_of(texts, "dual", method={"local_weight": weight}, federation={"rounds": 2}, **more)
    config, task = run_on_any_ranks(tmp_path, raw)
    initial = {name: tensor.double().numpy() for name, tensor in task.method.initial().items()}
    terms = first_terms(task, "dual")
    firsts = {p: tuple(initial[f"{p}.lora_{which}_local.weight"] for which in "AB") for p in terms}
    of_clients: dict[int, dict[str, tuple[np.ndarray, ...]]] = {}
    between = np.diag([1 - weight] * RANK + [weight] * RANK)
    for t in (1, 2):
        ends, counts = [], []
        for client in task.plan(t).training:
            mine = of_clients.get(client, firsts)
            both: Terms = {
                p: (np.vstack([a, mine[p][0]]), np.hstack([b, mine[p][1]]), between) for p, (a, b, _) in terms.items()
            }
            after = after_training(task, config, t, client, both, "AB", resting=RANK)
            of_clients[client] = {p: (a[RANK:], b[:, RANK:]) for p, (a, b, _) in after.items()}
            ends.append(after_training(task, config, t, client, terms, "AB"))
            counts.append(len(task.data.population.indices(client)))
        shares = (np.array(counts) / sum(counts)).tolist()
        for path in terms:
            a, b = (sum(w * e[path][k] for w, e in zip(shares, ends, strict=True)) for k in range(2))
            terms[path] = a, b, np.eye(RANK)

    found = final(tmp_path / "3")
    for path, (a, b, _) in terms.items():
        for which, wanted in (("A", a), ("B", b)):
            name = f"{path}.lora_{which}.weight"
            assert np.linalg.norm(found[name] - wanted) < 1e-9 * np.linalg.norm(wanted - initial[name])
            # /final has that of a client never sampled.
            np.testing.assert_array_equal(found[f"{path}.lora_{which}_local.weight"], firsts[path]["AB".index(which)])
    assert 1 < len(of_clients) < 8
    for client, mine in of_clients.items():
        (file,) = (tmp_path / "3" / "clients" / str(client)).iterdir()
        state = client_state.load(tmp_path / "3", client, int(file.stem))
        for path, pair in mine.items():
            for which, wanted in zip("AB", pair, strict=True):
                kept = state[f"personal.{path}.lora_{which}_local.weight"].numpy()
                assert np.linalg.norm(kept - wanted) < 1e-9 * np.linalg.norm(wanted - firsts[path]["AB".index(which)])

    # The adapter is the shared one; clients are evaluated with both, those never sampled with the shared one alone.
    exported = products(tmp_path / "3" / "adapter")
    for path, (a, b, _) in terms.items():
        np.testing.assert_allclose(exported[f"base_model.model.{path}.lora_A.weight"], SCALE * b @ a, atol=1e-9)
    rows = table(tmp_path / "3", "client_eval")
    trained = np.isin(rows["client_id"], list(of_clients))
    assert (np.abs(rows["loss_personal"] - rows["loss"])[trained] > 1e-6).all()
    np.testing.assert_allclose(rows["loss_personal"][~trained], rows["loss"][~trained], rtol=1e-9)
    rounds, size = table(tmp_path / "3", "rounds"), sum(numbers("svd", 1, 0)[:1])
    for t in (1, 2):
        plan = task.plan(t)
        assert rounds["bytes_down"][t] == task.bytes_down(plan) == 8 * size * len(plan.cohort)
        assert rounds["bytes_up"][t] == task.bytes_up(plan) == 8 * size * len(plan.training)


# ---------------------------------------------------------------- each rule by itself


def test_with_svd_the_server_sends_orthonormal_rows(tmp_path: Path, texts: Path) -> None:
    federate(settings(tmp_path, raw_of(texts, "svd", federation={"rounds": 1})))
    for name, a in final(tmp_path).items():
        if "lora_A" in name:
            np.testing.assert_allclose(a @ a.T, np.eye(RANK), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("clip", "privacy"), [(None, None), (1e-3, None), (None, ExamplePrivacy(0.05, 0.7))])
def test_the_factor_that_rests_has_no_gradient(clip: float | None, privacy: ExamplePrivacy | None) -> None:
    """Nor a part in a norm by which gradients are clipped, nor noise: a round of B is one of ffa, to the bit."""
    base, data = tiny.base("llama"), tiny.examples()
    config = block_settings(optimizer="sgd", lr=0.5, clip_norm=clip, momentum=0.5)
    local = replace(LocalTraining.of(config, 1, 3), privacy=privacy)
    found = {}
    for rule in ("alternate", "svd", "ffa"):
        method = lora(base, aggregation=rule)
        start = start_of(method, torch.float64)
        update = train_block(base, method, tiny.objective(base), start, works(3), data, local).updates
        found[rule] = method.payload.views(update)
    for name, moved in found["ffa"].items():
        assert moved.any()
        assert torch.equal(found["alternate"][name], moved) and torch.equal(found["svd"][name], moved)
    resting = [v for rule in ("alternate", "svd") for n, v in found[rule].items() if "lora_A" in n]
    assert resting and not any(value.any() for value in resting)


def test_a_head_is_trained_in_every_round_beside_the_factor_of_the_round() -> None:
    base, data, config = tiny.base("bert"), tiny.labelled(), block_settings(optimizer="adamw", lr=0.02)
    method = with_head(lora(base, aggregation="alternate"))
    start = warm(method, torch.float64)
    for round_, moves in ((1, "lora_B"), (2, "lora_A")):
        update = tiny.train(base, method, tiny.objective(base), start, works(2), data, config, round_, 3).updates
        for name, moved in method.payload.views(update).items():
            assert bool(moved.any()) == (moves in name or name.startswith("classifier")), name
        sent = sum(tensor.numel() for name, tensor in method.initial().items() if moves in name)
        assert method.numbers_sent(0, round_) == sent + sum(p.numel() for p in base.model.classifier.parameters())
    method = with_head(lora(base, aggregation="svd"))
    views = method.payload.views(warm(method, torch.float64)[0])
    made = method.on_server(views)
    assert all(torch.equal(made[name], value) == name.startswith("classifier") for name, value in views.items())


def test_more_ranks_than_a_weight_has_are_zeros() -> None:
    weight = torch.arange(6, dtype=torch.float64).view(3, 2) + 1
    u, s, vt = leading(weight, 4)
    assert u.shape == (3, 4) and s.shape == (4,) and vt.shape == (4, 2)
    torch.testing.assert_close(u * s @ vt, weight)
    assert not s[2:].any() and not u[:, 2:].any() and not vt[2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own_rank", [5, 40, 90])
def test_a_sum_of_products_has_the_singular_values_of_any_weight(own_rank: int, dtype: torch.dtype) -> None:
    """Of a rank that few, some or no products with random vectors span."""
    drawing = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, own_rank, generator=drawing, dtype=torch.float64) for size in (90, 120))
    weight = (left * torch.logspace(0, -3, own_rank, dtype=torch.float64) @ right.T).to(dtype)
    u, s, vt = leading_of_sum(weight, 8)
    wanted = torch.linalg.svdvals(weight.double())[:8]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(s, wanted, rtol=0, atol=tolerance * float(wanted[0]))
    for one in (u.T @ u, vt @ vt.T):
        found = min(own_rank, 8)
        torch.testing.assert_close(one[:found, :found], torch.eye(found, dtype=torch.float64), rtol=0, atol=1e-9)
    missed = torch.linalg.matrix_norm(weight.double() - u * s @ vt)
    least = torch.linalg.vector_norm(torch.linalg.svdvals(weight.double())[8:])
    assert missed <= least + tolerance * wanted[0]


@pytest.mark.parametrize(("rule", "rank"), [("flex", 2), ("sb", 3)])
def test_goes_on_from_an_adapter_of_another_rank_or_scale(tmp_path: Path, texts: Path, rule: str, rank: int) -> None:
    """Its product is what round 0 evaluates; sb keeps to its singular vectors."""
    before = raw_of(texts, "svd", federation={"rounds": 1})
    before["method"] |= {"rank": rank, "alpha": 7.0}
    federate(settings(tmp_path / "before", before))
    raw = raw_of(texts, rule, federation={"rounds": 1})
    raw["method"] |= {"from": str(tmp_path / "before" / "adapter")}
    federate(settings(tmp_path / "after", raw), ranks=2)
    losses = [table(tmp_path / where, "rounds")["eval_loss"] for where in ("before", "after")]
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=1e-9)
    assert abs(losses[1][1] - losses[1][0]) > 1e-4
    if rule == "sb":
        old, new = (products(tmp_path / where / "adapter") for where in ("before", "after"))
        for path, product in new.items():
            vt, u, _ = cut(old[path], rank)
            assert np.linalg.matrix_rank(product, tol=1e-9) == rank
            np.testing.assert_allclose(u @ u.T @ product @ vt.T @ vt, product, rtol=0, atol=1e-9)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("svd", {"method": {"ranks": [1, 2]}}, "method.ranks needs method.aggregation stack or flex"),
    ("flex", {"mode": "local"}, "method.aggregation flex begins afresh after every aggregation, and mode local has"),
    ("svd", {"mode": "centralized"}, "trains other factors after every aggregation, and mode centralized has none"),
    ("alternate", {"server": {"optimizer": "adam"}}, "which server.optimizer adam would mix: use sgd"),
    ("svd", {"server": {"momentum": 0.9}}, "which server.momentum would mix: use sgd"),
    ("svd", {"federation": {"schedule": {"name": "buffered"}}}, "adds updates of several rounds: use synchronous"),
    (
        "alternate",
        {"privacy": {"name": "client", "noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-5}},
        "which the noise of privacy.name client would move: use ffa, or privacy.name example",
    ),
    ("alternate", {"client": {"scaffold": True}}, "and client.scaffold corrects both: use ffa"),
    ("svd", {"client": {"scaffold": True, "optimizer": "adamw", "moments": "second"}}, "client.moments with"),
    (
        "alternate",
        {"personalization": {"finetune_steps": 2}, "evaluation": {"client_fraction": 0.2}},
        "which personalization does not know: use average or ffa",
    ),
    ("dual", {}, "keeps an adapter on each client: give personalization.parts \\['\\*_local.weight'\\]"),
    ("svd", {"method": {"local_weight": 0.2}}, "method.local_weight needs method.aggregation dual"),
    (
        "dual",
        {
            "personalization": {"parts": ["*_local.weight"], "finetune_steps": 2},
            "evaluation": {"client_fraction": 0.2},
        },
        "take personalization.finetune_steps out",
    ),
    (
        "dual",
        {
            "personalization": {"parts": ["*_local.weight"]},
            "evaluation": {"client_fraction": 0.2},
            "privacy": {"name": "example", "noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-5},
        },
        "goes through the examples twice in a round",
    ),
    ("sb", {"model": {"quantize": "4bit"}}, "which model.quantize 4bit has packed: give an adapter with method.from"),
]


@pytest.mark.parametrize(("rule", "changes", "message"), REFUSED)
def test_what_does_not_go_together(rule: str, changes: dict[str, Any], message: str) -> None:
    raw: dict[str, Any] = {"partition": {"name": "iid", "num_clients": 4}, "method": {"name": "lora"}}
    raw["method"]["aggregation"] = rule
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        configuration.resolve(raw)


@pytest.mark.parametrize("rule", ["alternate", "svd", "flex", "dual"])
def test_students_have_no_mean_of_their_terms(rule: str) -> None:
    raw: dict[str, Any] = {"partition": {"name": "iid", "num_clients": 4}, "method": {"name": "distillation"}}
    raw["method"] |= {"student": {"name": "lora", "aggregation": rule}, "public": {"max_examples": 6}}
    with pytest.raises(UserError, match=f"aggregation {rule} is about the mean of the clients' terms"):
        configuration.resolve(raw, given={})


@pytest.mark.parametrize(("rule", "direction", "message"), [
    ("alternate", "up", "sends other numbers than its payload's"),
    ("flex", "down", "sends other numbers down than its payload's"),
])  # fmt: skip
def test_what_is_not_sent_is_not_packed(tmp_path: Path, texts: Path, rule: str, direction: str, message: str) -> None:
    raw = {**raw_of(texts, rule), "transforms": [{"name": "quantize", "bits": 8, "direction": direction}]}
    with pytest.raises(RefusedError, match=message):
        prepare(settings(tmp_path, raw), LoopbackTransport(), Launch(), False)
