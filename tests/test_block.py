"""Block training against PEFT's own model trained by torch.optim, and a block against its clients alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.methods.base import Method
from fedhpc.training.block import Work
from fedhpc.training.forwards import cut_by_length
from fedhpc.training.memory import Memory
from fedhpc.training.schedule import batches, learning_rate
from tests import tiny

SIZES = [17, 5, 24, 9, 12, 3, 20, 8]


def settings(**client: Any) -> configuration.Config:
    return configuration.resolve({"partition": {"name": "iid"}, "client": {"batch_size": 4, **client}})


def make(base: Any, **options: Any) -> Method:
    raw = {"num_virtual_tokens": 5, "init_text": "some words", **options}
    method: Method = registry.choice("methods", "prefix")(registry.options("methods", "prefix")(**raw), base, 0)
    return method


def works(count: int) -> list[Work]:
    rng = np.random.default_rng(1)
    return [Work(10 + i, np.sort(rng.choice(60, SIZES[i], replace=False))) for i in range(count)]


def start_of(method: Method, dtype: torch.dtype) -> torch.Tensor:
    return method.payload.flatten({n: t.to(dtype) for n, t in method.initial().items()}).unsqueeze(0)


def peft_reference(base: Any, method: Method, data: Any, work: Work, config: Any, start: torch.Tensor) -> torch.Tensor:
    """PEFT's model, torch.optim, our batches one after another: the trained prefix (n, width)."""
    import copy

    options = method.options
    model = get_peft_model(
        copy.deepcopy(base.model),
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=options.num_virtual_tokens,
            num_layers=base.num_layers,
            num_attention_heads=base.num_kv_heads,
            token_dim=base.num_kv_heads * base.head_dim,
            prefix_projection=options.exchange == "mlp",
            encoder_hidden_size=options.hidden_size,
        ),
    ).to(base.dtype)
    encoder = model.prompt_encoder["default"]
    names = dict(encoder.named_parameters())
    for name, value in method.payload.views(start[0]).items():
        with torch.no_grad():
            names["embedding.weight" if name == "prompt_embeddings" else name].copy_(value)
    trained = [p for p in model.parameters() if p.requires_grad]
    c = config.client
    if c.optimizer == "sgd":
        rule: Any = torch.optim.SGD(
            trained, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, nesterov=c.nesterov
        )
    else:
        rule = torch.optim.AdamW(trained, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay)
    steps = batches(len(work.indices), c, config.run.seed, 1, work.client_id)
    for s, picked in enumerate(steps):
        rows = [torch.from_numpy(data.tokens(int(i)).astype(np.int64)) for i in work.indices[picked]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(r) for r in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        prompt = torch.from_numpy(data.prompt_lengths[work.indices[picked]].astype(np.int64))
        logits = model(input_ids=ids, attention_mask=mask).logits
        supervised = (torch.arange(ids.shape[1]) >= prompt[:, None]) & mask.bool()
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
        )
        chosen = supervised[:, 1:].reshape(-1)
        loss = losses[chosen].mean()
        rule.zero_grad()
        loss.backward()
        if c.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, c.clip_norm)
        for group in rule.param_groups:
            group["lr"] = learning_rate(c, s / len(steps) / 1)
        rule.step()
    after = dict(encoder.named_parameters())
    return method.payload.flatten(
        {n: after["embedding.weight" if n == "prompt_embeddings" else n].detach() for n in method.payload.shapes}
    )


def relative(found: torch.Tensor, wanted: torch.Tensor, start: torch.Tensor) -> float:
    moved = torch.linalg.vector_norm(wanted - start)
    assert moved > 1e-3, "the reference did not train"
    return float(torch.linalg.vector_norm(found - wanted) / moved)


CLIENTS = [
    {"optimizer": "sgd", "lr": 0.5},
    {"optimizer": "sgd", "lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"optimizer": "adamw", "lr": 0.05, "weight_decay": 0.1, "clip_norm": 0.5, "epochs": 2},
    {"optimizer": "adamw", "lr": 0.05, "schedule": "cosine", "warmup": 0.2},
]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_client_trains_as_peft_and_torch_optim_do(family: str, client: dict[str, Any]) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(**client)
    method = make(base)
    start = start_of(method, torch.float64)
    work = works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    wanted = peft_reference(base, method, data, work, config, start)
    assert relative(found, wanted, start[0]) < 1e-9


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_family_trains_as_in_peft_in_float32(family: str) -> None:
    base, data, config = tiny.base(family, torch.float32), tiny.examples(), settings(optimizer="sgd", lr=0.5)
    method = make(base)
    start = start_of(method, torch.float32)
    work = works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    wanted = peft_reference(base, method, data, work, config, start)
    assert relative(found, wanted, start[0]) < 1e-4


def test_an_exchanged_mlp_trains_as_pefts_projection() -> None:
    base, data, config = tiny.base("llama"), tiny.examples(), settings(optimizer="adamw", lr=0.01)
    method = make(base, exchange="mlp", hidden_size=24, init="random")
    start = start_of(method, torch.float64)
    work = works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    assert relative(found, peft_reference(base, method, data, work, config, start), start[0]) < 1e-9


@pytest.mark.parametrize("exchange", ["raw", "mlp", "materialised"])
@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_equals_its_clients_alone(family: str, count: int, exchange: str) -> None:
    """Unequal numbers of examples, hence of steps, and of lengths."""
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.05, clip_norm=1.0)
    method = make(base, exchange=exchange, hidden_size=24)
    start = start_of(method, torch.float64)
    group = works(count)
    together = tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1)
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1)
        error = torch.linalg.vector_norm(together.updates[i] - alone.updates[0])
        assert float(error / torch.linalg.vector_norm(alone.updates[0])) < 1e-9
        for name in ("steps", "tokens"):
            assert getattr(together, name)[i] == getattr(alone, name)[0]
        for name in ("loss_sum", "loss_first", "loss_last"):
            assert getattr(together, name)[i] == pytest.approx(getattr(alone, name)[0], rel=1e-9)


def test_clients_with_starts_of_their_own_keep_their_optimizer_state() -> None:
    """Two rounds with memory equal one client going on in torch.optim's way: here, a block equals alone."""
    base, data, config = tiny.base("llama"), tiny.examples(), settings(optimizer="adamw", lr=0.05)
    method = make(base)
    first = start_of(method, torch.float64)
    starts = torch.cat([first, first * 0.9, first * 1.1])
    group = works(3)

    def memory(*counts: int) -> Memory:
        shape = (len(counts), method.trainable.size)
        buffers = {name: torch.full(shape, 0.01, dtype=torch.float64) for name in ("mean", "square")}
        return Memory(buffers, torch.tensor(counts))

    objective = tiny.objective(base)
    together = tiny.train(base, method, objective, starts, group, data, config, memory=memory(0, 1, 2))
    assert together.memory is not None
    for i, work in enumerate(group):
        alone = tiny.train(base, method, objective, starts[i : i + 1], [work], data, config, memory=memory(i))
        assert alone.memory is not None
        torch.testing.assert_close(together.updates[i], alone.updates[0], rtol=1e-8, atol=1e-10)
        assert together.memory.count[i] == alone.memory.count[0] > i
        torch.testing.assert_close(together.memory.buffers["mean"][i], alone.memory.buffers["mean"][0])


def test_zero_learning_rate_gives_a_zero_update() -> None:
    base, data, config = tiny.base("llama"), tiny.examples(), settings(lr=0.0)
    for exchange in ("raw", "mlp", "materialised"):
        method = make(base, exchange=exchange, hidden_size=24)
        trained = tiny.train(
            base, method, tiny.objective(base), start_of(method, torch.float64), works(2), data, config, 1, 1
        )
        assert not trained.updates.any()


def test_the_proximal_term_pulls_towards_the_start() -> None:
    """theta_2 = theta_1 - lr (g_1 + mu (theta_1 - theta_0)): mu changes the second step by exactly that."""
    base, data = tiny.base("llama"), tiny.examples()
    method = make(base)
    start = start_of(method, torch.float64)

    def moved(steps: int, mu: float) -> torch.Tensor:
        config = settings(optimizer="sgd", lr=0.5, steps=steps, proximal=mu)
        return tiny.train(base, method, tiny.objective(base), start, works(3), data, config, 1, 1).updates

    assert torch.equal(moved(1, 0.0), moved(1, 0.7))
    torch.testing.assert_close(moved(2, 0.7), moved(2, 0.0) - 0.5 * 0.7 * moved(1, 0.0), rtol=1e-9, atol=1e-12)


def test_a_correction_is_added_to_every_gradient() -> None:
    """Along the client axis, after clipping, to clients of unequal steps: lr times it in one step, for each its own."""
    base, data = tiny.base("llama"), tiny.examples()
    method = make(base)
    start = start_of(method, torch.float64)
    group = works(3)
    pull = torch.randn(3, method.payload.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def moved(corrections: torch.Tensor | None, **client: Any) -> torch.Tensor:
        config = settings(optimizer="sgd", lr=0.5, **client)
        return tiny.train(
            base, method, tiny.objective(base), start, group, data, config, 1, 1, corrections=corrections
        ).updates

    one = moved(pull, steps=1, clip_norm=0.1) - moved(None, steps=1, clip_norm=0.1)
    torch.testing.assert_close(one, 0.5 * pull, rtol=1e-9, atol=1e-12)
    for i, work in enumerate(group):
        config = settings(optimizer="sgd", lr=0.5)
        alone = tiny.train(
            base, method, tiny.objective(base), start, [work], data, config, 1, 1, corrections=pull[i : i + 1]
        )
        torch.testing.assert_close(moved(pull)[i], alone.updates[0], rtol=1e-9, atol=1e-12)


def test_the_same_block_twice_gives_the_same_bits() -> None:
    base, data, config = tiny.base("gpt2", torch.float32), tiny.examples(), settings()
    method = make(base)
    start = start_of(method, torch.float32)
    one, two = (tiny.train(base, method, tiny.objective(base), start, works(4), data, config, 1, 1) for _ in range(2))
    assert torch.equal(one.updates, two.updates)


def test_logits_in_pieces_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    base, data, config = tiny.base("llama"), tiny.examples(), settings()
    # As where the head is trained or changed: without the frozen head's own gradient.
    monkeypatch.setattr(type(base), "frozen_head", lambda *_: None)
    method = make(base)
    start = start_of(method, torch.float64)
    whole = tiny.train(base, method, tiny.objective(base), start, works(3), data, config, 1, 1)
    monkeypatch.setattr("fedhpc.models.base.LOGITS_AT_ONCE", 7 * tiny.VOCABULARY)
    pieces = tiny.train(base, method, tiny.objective(base), start, works(3), data, config, 1, 1)
    torch.testing.assert_close(whole.updates, pieces.updates, rtol=1e-9, atol=1e-12)


def test_cuts_by_length_are_the_cheapest() -> None:
    lengths = np.sort(np.random.default_rng(3).integers(5, 60, 9))

    def cost(cuts: list[int]) -> float:
        return sum((b - a) * lengths[b - 1] + 40 for a, b in itertools.pairwise(cuts))

    every = [[0, *inner, 9] for r in range(9) for inner in itertools.combinations(range(1, 9), r)]
    assert cost(cut_by_length(lengths, 40)) == min(cost(c) for c in every)
    assert cut_by_length(lengths, 10**9) == [0, 9]
