"""Partitioners: what every file of data/partitioners promises, and what each one is for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from fedhpc import registry
from fedhpc.config import resolve
from fedhpc.data.partitioners.base import Partitioner, limited, raised
from fedhpc.errors import UserError

FAMILY = "partitioners"
NAMES = registry.names(FAMILY)
DRAWING = ["virtual"]
DIVIDING = [n for n in NAMES if n not in DRAWING]
WITH_CLIENTS = [n for n in DIVIDING if "num_clients" in registry.options(FAMILY, n).model_fields]


@dataclass
class Rows:
    """What a partitioner sees of the training examples."""

    num_examples: int
    labels: np.ndarray | None = None
    owners: np.ndarray | None = None

    def __len__(self):
        return self.num_examples

    @property
    def owner_names(self):
        return [] if self.owners is None else [str(i) for i in range(self.owners.max() + 1)]


def partitioner(name, seed=0, **options):
    cls = registry.choice(FAMILY, name)
    return cls(cls.Options(**options), seed)


def sample(num_examples, classes=6):
    """Uneven labels and owners; the class 1 has no example."""
    rng = np.random.default_rng(num_examples)
    labels = (rng.random(num_examples) ** 2 * classes).astype(np.int32)
    labels[labels == 1] = 2
    return labels, rng.integers(0, 7, num_examples).astype(np.int32)


def divide(name, num_examples, seed=0, **options):
    labels, owners = sample(num_examples)
    return partitioner(name, seed, **options).partition(Rows(num_examples, labels, owners)), labels


def client_sets(assignment):
    return np.split(assignment.indices, assignment.offsets[1:-1])


def test_every_file_has_one_partitioner():
    assert {"iid", "dirichlet", "quantity_skew", "shard", "natural", "virtual"} <= set(NAMES)
    for name in NAMES:
        cls = registry.choice(FAMILY, name)
        assert issubclass(cls, Partitioner) and cls.__doc__
        assert issubclass(registry.options(FAMILY, name), registry.Section)


@pytest.mark.parametrize("name", DIVIDING)
def test_a_limit_keeps_a_sample_of_each_client(name):
    assignment, _ = divide(name, 501)
    everything = client_sets(assignment)
    few, more = (client_sets(limited(assignment, limit, 7)) for limit in (5, 20))
    for mine, at_most_20, at_most_5 in zip(everything, more, few, strict=True):
        assert len(at_most_20) == min(len(mine), 20) and len(at_most_5) == min(len(mine), 5)
        assert set(at_most_5) <= set(at_most_20) <= set(mine)
        assert (np.diff(at_most_20) > 0).all()
    assert any(not np.array_equal(a, b) for a, b in zip(few, client_sets(limited(assignment, 5, 8)), strict=True))


@pytest.mark.parametrize("name", DIVIDING)
def test_every_example_has_exactly_one_client(name):
    for num_examples, seed in product((40, 501, 2000), (0, 7)):
        assignment, _ = divide(name, num_examples, seed)
        indices, offsets = assignment
        assert indices.dtype == offsets.dtype == np.int64
        assert np.array_equal(np.sort(indices), np.arange(num_examples))
        assert offsets[0] == 0
        assert offsets[-1] == num_examples
        assert all((np.diff(mine) > 0).all() for mine in client_sets(assignment))


@pytest.mark.parametrize("name", DIVIDING)
def test_a_partition_follows_from_its_seed(name):
    first, again, other = (divide(name, 700, seed)[0] for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    if name != "natural":
        assert not np.array_equal(first.indices, other.indices)


@pytest.mark.parametrize("name", WITH_CLIENTS)
def test_minimum_is_attained_wherever_it_can_be(name):
    cases = [(20, 20, 1), (100, 10, 10), (103, 10, 10), (1000, 150, 5), (1000, 3, 300), (50, 1, 50)]
    for num_examples, num_clients, minimum in cases:
        options = {"num_clients": num_clients, "min_examples": minimum}
        if name == "shard":
            options["shards_per_client"] = 1
        (_, offsets), _ = divide(name, num_examples, **options)
        assert len(offsets) == num_clients + 1
        assert np.diff(offsets).min() >= minimum


@pytest.mark.parametrize("name", WITH_CLIENTS)
def test_impossible_partitions_are_user_errors(name):
    with pytest.raises(UserError, match=r"num_clients: 21 clients, but only 20"):
        divide(name, 20, num_clients=21)
    with pytest.raises(UserError, match=r"min_examples: 3 for each of 10 clients needs 30 .* use at most 2"):
        divide(name, 29, num_clients=10, min_examples=3)


@pytest.mark.parametrize("name", ["dirichlet", "quantity_skew"])
@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 0.1, 1, 1e6])
def test_any_alpha_divides(name, alpha):
    (indices, offsets), _ = divide(name, 400, num_clients=50, alpha=alpha)
    assert np.array_equal(np.sort(indices), np.arange(400))
    assert np.diff(offsets).min() >= 1


@pytest.mark.parametrize("name", ["dirichlet", "shard"])
def test_label_skew_needs_labels(name):
    assert registry.choice(FAMILY, name).needs_labels
    with pytest.raises(UserError, match=rf"partition\.name {name} skews labels and needs data\.label"):
        resolve({"partition": {"name": name}})


def test_iid_sizes_differ_by_at_most_one():
    (_, offsets), _ = divide("iid", 1003, num_clients=20)
    assert set(np.diff(offsets)) == {50, 51}


def test_dirichlet_skew_grows_as_alpha_falls():
    def purity(alpha):
        assignment, labels = divide("dirichlet", 5000, num_clients=10, alpha=alpha)
        mine = client_sets(assignment)
        return np.mean([np.bincount(labels[e]).max() / len(e) for e in mine])

    even, skewed, pure = purity(1e4), purity(0.5), purity(0.01)
    assert even < skewed < pure
    assert pure > 0.9
    labels, _ = sample(5000)
    assert even == pytest.approx(np.bincount(labels).max() / 5000, abs=0.01)


def test_dirichlet_shares_have_the_variance_of_the_distribution():
    # A class of m examples over N clients: E[share] = 1/N, Var[share] = (1/N)(1 - 1/N) / (N alpha + 1).
    clients, alpha, count = 10, 0.5, 2000
    rows = Rows(count, np.zeros(count, np.int32))
    draws = [partitioner("dirichlet", s, num_clients=clients, alpha=alpha).partition(rows) for s in range(200)]
    shares = [np.diff(draw.offsets) / count for draw in draws]
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.var(shares) == pytest.approx(expected, rel=0.15)


def test_quantity_skew_leaves_labels_alone():
    assignment, labels = divide("quantity_skew", 20000, num_clients=5, alpha=1.0)
    sizes = np.diff(assignment.offsets)
    assert sizes.max() > 2 * sizes.min()
    overall = np.bincount(labels, minlength=6) / len(labels)
    for mine in client_sets(assignment):
        if len(mine) > 1000:
            assert np.abs(np.bincount(labels[mine], minlength=6) / len(mine) - overall).max() < 0.05


def test_shards_hold_few_labels():
    labels = np.repeat(np.arange(10, dtype=np.int32), 100)
    assignment = partitioner("shard", num_clients=50).partition(Rows(1000, labels))
    assert set(np.diff(assignment.offsets)) == {20}
    assert max(len(set(labels[mine])) for mine in client_sets(assignment)) <= 2
    with pytest.raises(UserError, match="shards_per_client"):
        partitioner("shard", num_clients=50, shards_per_client=21).partition(Rows(1000, labels))


def test_natural_clients_are_the_owners():
    rows = Rows(6, owners=np.array([2, 0, 2, 3, 0, 2], np.int32))
    assignment = partitioner("natural").partition(rows)
    assert [list(mine) for mine in client_sets(assignment)] == [[1, 4], [], [0, 2, 5], [3]]
    assert partitioner("natural").client_names(rows) == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match=r"data\.client"):
        resolve({"partition": {"name": "natural"}})


@pytest.mark.parametrize("name", DRAWING)
def test_drawn_clients_cost_nothing_until_asked_for(name):
    def drawn(seed):
        population = partitioner(name, seed, num_clients=2_000_000_000, examples_per_client=10).partition(Rows(100))
        assert (population.num_clients, population.size) == (2_000_000_000, 10)
        return population.draw

    draw = drawn(0)
    far = draw(1_999_999_999)
    assert np.array_equal(far, draw(1_999_999_999))
    assert (np.diff(far) > 0).all()
    assert far[0] >= 0 and far[-1] < 100
    assert not np.array_equal(far, drawn(1)(1_999_999_999))
    assert not np.array_equal(far, draw(1_999_999_998))
    used = np.bincount(np.concatenate([draw(c) for c in range(2000)]), minlength=100)
    assert used.min() > 140 and used.max() < 260  # 200 expected, standard deviation 13
    with pytest.raises(UserError, match="examples_per_client: 10, but there are only 9"):
        partitioner(name, examples_per_client=10).partition(Rows(9))


def test_raised_moves_no_more_than_is_missing():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = (rng.random(rng.integers(1, 12)) ** 4 * 50).astype(np.int64)
        minimum = int(rng.integers(0, sizes.sum() // len(sizes) + 1))
        result = raised(sizes, minimum)
        assert result.sum() == sizes.sum()
        assert result.min() >= minimum
        assert np.abs(result - sizes).sum() == 2 * np.maximum(minimum - sizes, 0).sum()
        cut = result < sizes
        if cut.any():  # only the largest give, down to one level
            assert result[cut].max() - result[cut].min() <= 1
            assert result[~cut].max(initial=0) <= result[cut].min() + 1


def test_partitioners_are_light():
    code = (
        "import sys; from fedhpc import registry; import fedhpc.data; "
        f"[registry.choice('{FAMILY}', n) for n in registry.names('{FAMILY}')]; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'h5py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
