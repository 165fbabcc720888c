"""What every choice of a family promises, whoever wrote it: tests over all that the registry finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.attacks.base import AttackContext, attacked
from fedhpc.errors import UserError
from fedhpc.ranks.transport.base import LoopbackTransport, Transport
from fedhpc.secure.masked_sum import Masking
from fedhpc.secure.protocols.pairwise import Pairwise
from fedhpc.server.state import ParameterState
from fedhpc.updates.cohort import Cohort
from fedhpc.updates.layout import Layout
from fedhpc.updates.pipeline import Pipeline
from tests.federations import on_threads

LAYOUT = Layout({"a": (40,), "b": (6, 5)})
CLIENTS = [4, 9, 2, 7, 5]
SHARES = np.array([0.25, 0.125, 0.25, 0.125, 0.25])  # sums of them have the same bits in any order


def made(family: str, name: str, **changed: Any) -> Any:
    """A choice with its default options, but for those that are changed."""
    raw: dict[str, Any] = {"data": {"label": "label"}, "client": {"optimizer": "sgd"}}
    section, key = {
        "aggregators": ("server", "aggregator"),
        "attacks": ("attack", "name"),
        "client_optimizers": ("client", "optimizer"),
        "server_optimizers": ("server", "optimizer"),
        "transforms": ("transforms", "name"),
    }[family]
    raw[section] = [{key: name}] if section == "transforms" else {key: name, **changed}
    config = configuration.resolve(raw)
    options = config.transforms[0] if section == "transforms" else getattr(config, section)
    return registry.choice(family, name)(options)


def values(rows: int, seed: int = 0) -> torch.Tensor:
    """(rows, P) of some size."""
    return 3 * torch.randn(rows, LAYOUT.size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- aggregators


def memory_of(name: str) -> dict[str, torch.Tensor]:
    """What an aggregator finds in the first round."""
    names = made("aggregators", name).keeps_on_server
    return {key: torch.zeros(LAYOUT.size, dtype=torch.float64) for key in names}


def root_of(name: str, update: torch.Tensor) -> torch.Tensor | None:
    """The server's own update, where an aggregator asks for one."""
    return update if made("aggregators", name).needs_root else None


def aggregated(name: str, order: list[int], ranks: int = 1, masked: bool = False) -> torch.Tensor:
    """Of the clients in this order, dealt out to the ranks, with and without secure aggregation."""
    updates, chosen = values(len(CLIENTS)), np.array(order)

    def one(transport: Transport) -> torch.Tensor:
        mine = np.arange(len(order))[transport.rank :: ranks][::-1].copy()
        cohort = Cohort(
            transport,
            LAYOUT,
            [CLIENTS[i] for i in order],
            SHARES[chosen],
            mine,
            updates[torch.from_numpy(chosen[mine])],
            lambda client: 0.5 * client,
            memory_of(name),
            Masking(Pairwise(Pairwise.Options()), 0, 1, CLIENTS) if masked else None,
            root=root_of(name, updates[torch.from_numpy(np.sort(chosen))].mean(dim=0)),
        )
        total: torch.Tensor = made("aggregators", name).combine(cohort)
        return total

    return on_threads(ranks, one)[0]


@pytest.mark.parametrize("name", registry.names("aggregators"))
def test_an_aggregator_of_one_client_is_the_identity(name: str) -> None:
    for client in range(len(CLIENTS)):
        torch.testing.assert_close(
            aggregated(name, [client]), values(len(CLIENTS))[client].double(), rtol=1e-14, atol=0
        )


@pytest.mark.parametrize("name", registry.names("aggregators"))
def test_an_aggregator_of_equal_updates_is_that_update(name: str) -> None:
    updates = values(1).expand(3, -1)
    three, shares, memory = CLIENTS[:3], SHARES[[0, 2, 4]], memory_of(name)
    cohort = Cohort(
        LoopbackTransport(), LAYOUT, three, shares, np.arange(3), updates, lambda client: 2.0, memory, root=updates[0]
    )
    torch.testing.assert_close(made("aggregators", name).combine(cohort), updates[0].double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", registry.names("aggregators"))
def test_an_aggregator_gives_the_same_bits_in_any_order_and_on_any_number_of_ranks(name: str) -> None:
    alone = aggregated(name, [0, 1, 2, 3, 4])
    assert alone.dtype == torch.float64 and alone.shape == (LAYOUT.size,)
    for order, ranks in (([3, 0, 4, 1, 2], 1), ([0, 1, 2, 3, 4], 3), ([4, 3, 2, 1, 0], 2)):
        assert torch.equal(aggregated(name, order, ranks), alone)


@pytest.mark.parametrize("name", registry.names("aggregators"))
def test_an_aggregator_goes_on_from_what_it_kept(name: str) -> None:
    """To the bit, on any number of ranks, after a resume."""

    def rounds(seeds: list[int], memory: dict[str, torch.Tensor], ranks: int) -> torch.Tensor:
        def one(transport: Transport) -> torch.Tensor:
            mine = np.arange(len(CLIENTS))[transport.rank :: ranks]
            for seed in seeds:
                updates = values(len(CLIENTS), seed)[torch.from_numpy(mine)]
                before = dict(memory) if transport.rank == 0 else {key: torch.empty(0) for key in memory}
                root = root_of(name, values(1, seed)[0])
                cohort = Cohort(
                    transport, LAYOUT, CLIENTS, SHARES, mine, updates, lambda client: 2.0, before, root=root
                )
                total: torch.Tensor = made("aggregators", name).combine(cohort)
                if transport.rank == 0:
                    memory.update(cohort.memory)
            return total

        return on_threads(ranks, one)[0]

    whole, resumed = memory_of(name), memory_of(name)
    last = rounds([0, 1, 2], whole, 1)
    rounds([0, 1], resumed, 3)
    assert torch.equal(rounds([2], {key: tensor.clone() for key, tensor in resumed.items()}, 2), last)


# ---------------------------------------------------------------- pre-aggregators


def mixed(name: str, order: list[int], ranks: int = 1) -> torch.Tensor:
    """The means of what a pre-aggregator makes of the clients in this order, dealt out to the ranks."""
    updates, chosen = values(len(CLIENTS)), np.array(order)
    options = configuration.resolve({"partition": {"name": "iid"}, "server": {"preaggregator": {"name": name}}}).server

    def one(transport: Transport) -> torch.Tensor:
        mine = np.arange(len(order))[transport.rank :: ranks]
        rows, planned = updates[torch.from_numpy(chosen[mine])], [CLIENTS[i] for i in order]
        cohort = Cohort(transport, LAYOUT, planned, SHARES[chosen], mine, rows)
        maker = registry.choice("preaggregators", name)(options.preaggregator)
        combinations = maker.mixed(cohort, np.random.default_rng(3))
        assert len(combinations) == maker.rows(len(order))
        uniform = np.full(len(combinations), 1 / len(combinations))
        highest: torch.Tensor = combinations.by_coordinate(lambda column: column.amax(dim=0))
        norms = combinations.gram().diagonal()
        return torch.cat([combinations.weighted_sum(uniform), highest, norms])

    return on_threads(ranks, one)[0]


@pytest.mark.parametrize("name", registry.names("preaggregators"))
def test_a_preaggregator_gives_the_same_bits_in_any_order_and_on_any_number_of_ranks(name: str) -> None:
    alone = mixed(name, [0, 1, 2, 3, 4])
    for order, ranks in (([3, 0, 4, 1, 2], 1), ([0, 1, 2, 3, 4], 3), ([4, 3, 2, 1, 0], 2)):
        assert torch.equal(mixed(name, order, ranks), alone)
    client, size = values(len(CLIENTS))[1].double(), LAYOUT.size
    of_one = mixed(name, [1])
    assert torch.equal(of_one[:size], client) and torch.equal(of_one[size : 2 * size], client)


@pytest.mark.parametrize("name", registry.names("aggregators"))
def test_an_aggregator_says_whether_weighted_sums_are_all_that_it_asks_for(name: str) -> None:
    """Then masked updates give the same bits."""
    order = [0, 1, 2, 3, 4]
    if registry.choice("aggregators", name).sums_only:
        assert torch.equal(aggregated(name, order, ranks=3, masked=True), aggregated(name, order))
    else:
        with pytest.raises(UserError, match="more of the updates than weighted sums"):
            aggregated(name, order, masked=True)


# ---------------------------------------------------------------- attacks


def attacked_rows(name: str, order: list[int], who: list[int], ranks: int = 1) -> dict[int, torch.Tensor]:
    """What each client sends in round 3, the clients in this order being dealt out to the ranks."""
    updates, chosen = values(len(CLIENTS)), np.array(order)
    attack = made("attacks", name)

    def one(transport: Transport) -> dict[int, torch.Tensor]:
        mine = np.arange(len(order))[transport.rank :: ranks][::-1].copy()
        rows, planned = updates[torch.from_numpy(chosen[mine])], [CLIENTS[i] for i in order]
        cohort = Cohort(transport, LAYOUT, planned, SHARES[chosen], mine, rows)
        sent = attacked(attack, cohort, who, 3, 0)
        assert torch.equal(rows, updates[torch.from_numpy(chosen[mine])]) and sent.dtype == rows.dtype
        return dict(zip(cohort.my_clients, sent, strict=True))

    return {client: row for part in on_threads(ranks, one) for client, row in part.items()}


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_an_attack_changes_attackers_alone_to_the_same_bits_on_any_number_of_ranks(name: str) -> None:
    alone, honest = attacked_rows(name, [0, 1, 2, 3, 4], [9, 7]), values(len(CLIENTS))
    for order, ranks in (([3, 0, 4, 1, 2], 1), ([0, 1, 2, 3, 4], 3), ([4, 3, 2, 1, 0], 2)):
        several = attacked_rows(name, order, [9, 7], ranks)
        assert several.keys() == alone.keys()
        assert all(torch.equal(several[client], row) for client, row in alone.items())
    for i, client in enumerate(CLIENTS):
        assert torch.isfinite(alone[client]).all()
        assert client in (9, 7) or torch.equal(alone[client], honest[i])
    nobody = attacked_rows(name, [0, 1, 2, 3, 4], [3])
    everybody = attacked_rows(name, [0, 1, 2, 3, 4], CLIENTS)
    for i, client in enumerate(CLIENTS):  # nobody of this round, or all: then there is nobody to attack
        assert torch.equal(nobody[client], honest[i]) and torch.equal(everybody[client], honest[i])


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_an_attack_says_whether_it_asks_what_others_send(name: str) -> None:
    attack, nobody = made("attacks", name), AttackContext(3, [9, 7], None, 0.5, 0)  # type: ignore[arg-type]
    if attack.sees_others:
        with pytest.raises(AttributeError):
            attack.sent(values(2), nobody)
    else:
        assert attack.sent(values(2), nobody).shape == (2, LAYOUT.size)


# ---------------------------------------------------------------- transforms


def sent(name: str, updates: torch.Tensor, clients: list[int], kept: dict[str, torch.Tensor] | None = None) -> Any:
    """What those clients send, in round 3."""
    pipeline = Pipeline([made("transforms", name)], 0, LAYOUT, updates.dtype)
    if kept is None:
        kept = {key: torch.stack([pipeline.initial(key) for _ in clients]) for key in pipeline.keeps}
    return pipeline.on_clients(updates, 3, clients, kept, np.full(len(clients), 4 * LAYOUT.size))


@pytest.mark.parametrize("name", registry.names("transforms"))
def test_a_transform_sees_every_client_alone(name: str) -> None:
    """The same bits in a block of any size and order, in every round in which the client keeps something."""
    updates, order = values(len(CLIENTS)), [3, 0, 4, 1, 2]
    together = sent(name, updates, CLIENTS)
    together = sent(name, updates, CLIENTS, together.tensors)
    first = sent(name, updates[order], [CLIENTS[i] for i in order])
    mixed = sent(name, updates[order], [CLIENTS[i] for i in order], first.tensors)
    for row, i in enumerate(order):
        alone = sent(name, updates[i : i + 1], [CLIENTS[i]])
        alone = sent(name, updates[i : i + 1], [CLIENTS[i]], alone.tensors)
        for other, at in ((mixed, row), (alone, 0)):
            assert torch.equal(other.updates[at], together.updates[i])
            assert other.bytes_up[at] == together.bytes_up[i]
            assert other.tensors.keys() == together.tensors.keys()
            assert all(torch.equal(other.tensors[key][at], together.tensors[key][i]) for key in together.tensors)


@pytest.mark.parametrize("name", registry.names("transforms"))
def test_a_transform_changes_nothing_in_place_and_keeps_the_dtype(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        updates = values(len(CLIENTS)).to(dtype)
        result = sent(name, updates, CLIENTS)
        assert torch.equal(updates, values(len(CLIENTS)).to(dtype))
        assert result.updates.dtype == dtype and result.updates.shape == updates.shape
        assert torch.isfinite(result.updates).all()


@pytest.mark.parametrize("name", registry.names("transforms"))
def test_what_a_transform_sends_takes_bytes(name: str) -> None:
    """And one that sends other bytes than the numbers take says so: masked updates (`secure`) cannot be packed."""
    result = sent(name, values(len(CLIENTS)), CLIENTS)
    assert result.bytes_up.shape == (len(CLIENTS),) and (result.bytes_up > 0).all()
    assert made("transforms", name).packs or (result.bytes_up == 4 * LAYOUT.size).all()


@pytest.mark.parametrize("name", registry.names("transforms"))
def test_the_server_half_of_a_transform_goes_on_from_what_it_kept(name: str) -> None:
    pipeline = Pipeline([made("transforms", name)], 0, LAYOUT, torch.float32)
    total = values(1)[0].double()

    def after(rounds: list[int], kept: dict[str, torch.Tensor]) -> torch.Tensor:
        for round_ in rounds:
            result = pipeline.on_server(total.clone(), round_, CLIENTS, kept)
        return result

    kept, resumed = pipeline.server_tensors(), pipeline.server_tensors()
    whole = after([1, 2, 3], kept)
    after([1, 2], resumed)
    assert torch.equal(after([3], {key: tensor.clone() for key, tensor in resumed.items()}), whole)
    assert whole.dtype == torch.float64 and whole.shape == total.shape


# ---------------------------------------------------------------- optimizers of the server

#: Each with its defaults, and with options by which it keeps more.
SERVER_OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in registry.names("server_optimizers")),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("adam", {"bias_correction": True}),
    ("yogi", {"bias_correction": True}),
]


@pytest.mark.parametrize(("name", "changed"), SERVER_OPTIMIZERS)
def test_a_server_optimizer_that_was_resumed_goes_on_to_the_bit(name: str, changed: dict[str, Any]) -> None:
    gradients = values(6).double()
    whole = ParameterState(values(1, 1)[0].double(), made("server_optimizers", name, **changed))
    for gradient in gradients:
        before = gradient.clone()
        whole.step(gradient)
        assert torch.equal(gradient, before)  # it is the caller's
    half = ParameterState(values(1, 1)[0].double(), made("server_optimizers", name, **changed))
    for gradient in gradients[:3]:
        half.step(gradient)
    resumed = ParameterState(torch.zeros(LAYOUT.size, dtype=torch.float64), made("server_optimizers", name, **changed))
    resumed.load({key: array.copy() for key, array in half.tensors().items()})
    for gradient in gradients[3:]:
        resumed.step(gradient)
    assert torch.equal(resumed.theta, whole.theta)


@pytest.mark.parametrize(("name", "changed"), SERVER_OPTIMIZERS)
def test_a_server_optimizer_goes_against_the_pseudo_gradient_of_each_coordinate_alone(
    name: str, changed: dict[str, Any]
) -> None:
    gradient, theta = values(1)[0].double(), torch.zeros(LAYOUT.size, dtype=torch.float64)
    optimizer = made("server_optimizers", name, **changed)
    after = optimizer.step(theta, gradient, optimizer.buffers(LAYOUT.size))
    assert (after * gradient < 0).all() and not theta.any()
    part = optimizer.step(theta[:7], gradient[:7], optimizer.buffers(7))
    torch.testing.assert_close(part, after[:7], rtol=1e-14, atol=0)
    still = optimizer.step(theta, torch.zeros_like(theta), optimizer.buffers(LAYOUT.size))
    assert torch.equal(still, theta)


# ---------------------------------------------------------------- optimizers of the clients


def trained(name: str, gradients: torch.Tensor, steps: list[int], begins_again: int | None = None) -> torch.Tensor:
    """(K, P) after so many steps of each client, the most first, along `gradients` (steps, K, P).

    begins_again: the step at which a new round begins, with the moments of the last.
    """
    optimizer, clients = made("client_optimizers", name), len(steps)
    theta = torch.ones(clients, LAYOUT.size, dtype=torch.float64)
    buffers = {key: torch.zeros_like(theta) for key in optimizer.buffers}
    count = torch.zeros(clients, 1, dtype=torch.float64)
    for s in range(max(steps)):
        if s == begins_again:
            optimizer, count = optimizer.going_on(dict.fromkeys(optimizer.moments, float(s))), torch.zeros_like(count)
        active = sum(n > s for n in steps)
        count[:active] += 1
        leading = {key: buffer[:active] for key, buffer in buffers.items()}
        rates = torch.full((active, 1), 0.1, dtype=torch.float64)
        optimizer.step(theta[:active], gradients[s, :active].clone(), leading, count[:active], rates)
    return theta


@pytest.mark.parametrize("name", registry.names("client_optimizers"))
def test_a_client_optimizer_moves_every_client_as_if_it_were_alone(name: str) -> None:
    gradients, steps = values(15).double().view(5, 3, LAYOUT.size), [5, 3, 2]
    together = trained(name, gradients, steps)
    for client, count in enumerate(steps):
        alone = trained(name, gradients[:, client : client + 1], [count])
        torch.testing.assert_close(together[client], alone[0], rtol=1e-14, atol=1e-14)
        assert not torch.equal(alone, torch.ones_like(alone))


@pytest.mark.parametrize("name", registry.names("client_optimizers"))
def test_a_client_optimizer_goes_on_from_its_moments(name: str) -> None:
    """A round that begins with them is no break; nor is any for an optimizer that does not count."""
    gradients = values(10).double().view(5, 2, LAYOUT.size)
    assert set(made("client_optimizers", name).moments) <= set(made("client_optimizers", name).buffers)
    assert torch.equal(trained(name, gradients, [5, 5], begins_again=2), trained(name, gradients, [5, 5]))


@pytest.mark.parametrize("name", registry.names("client_optimizers"))
def test_a_client_optimizer_says_how_far_it_goes_if_it_sums_gradients(name: str) -> None:
    optimizer = made("client_optimizers", name)
    if not optimizer.sums_gradients:
        with pytest.raises(NotImplementedError):
            optimizer.movement([0.1])
        return
    ones = torch.ones(5, 1, LAYOUT.size, dtype=torch.float64)
    moved = 1 - trained(name, ones, [5])
    torch.testing.assert_close(moved, torch.full_like(moved, optimizer.movement([0.1] * 5)), rtol=1e-12, atol=0)
