"""What holds for every method whatever it trains: for each file of methods/, with each of its options, and for the
example that methods/base.py has."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedhpc import registry
from fedhpc.config import Model
from fedhpc.errors import UserError
from fedhpc.methods import base as contract
from fedhpc.methods.base import Method, PerClient, as_one_client
from fedhpc.models.base import Base
from fedhpc.models.load import load_base
from tests import tiny
from tests.federations import federate, final, save_random_bert
from tests.federations import settings as run_settings
from tests.test_block import settings, start_of, works

EXAMPLE = "the example of methods/base.py"
NAMES = [name for name in registry.names("methods") if not registry.is_approach(name)]
# Smaller than by default, so that the tests are quick.
SMALL: dict[str, dict[str, Any]] = {"fedkseed": {"num_seeds": 6}, "lora": {"rank": 3}, "prefix": {"hidden_size": 24}}
# What a word asks for beside it.
WITH: dict[str, dict[str, Any]] = {"eva": {"init_text": "Two quiet rooms."}}


def cases() -> Iterator[Any]:
    """Every method with its defaults, and with each other value of each option that chooses among words."""
    yield pytest.param(EXAMPLE, {}, id="example")
    for name in NAMES:
        yield pytest.param(name, {}, id=name)
        for key, field in registry.options("methods", name).model_fields.items():
            words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            for word in words:
                if word != field.default:
                    yield pytest.param(name, {key: word, **WITH.get(word, {})}, id=f"{name}-{key}-{word}")


every_method = pytest.mark.parametrize(("name", "options"), list(cases()))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A bare encoder, for methods that train behind the vectors of sentences."""
    folder = tmp_path_factory.mktemp("encoder")
    save_random_bert(folder)
    model = Model.model_validate({"name": str(folder), "task": "embedding", "dtype": "float64"})
    return load_base(model, torch.device("cpu"))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of the method that is written out where the contract is."""
    assert contract.__doc__ is not None
    code = textwrap.dedent(re.search(r"    class Scale.*", contract.__doc__, re.DOTALL)[0])  # type: ignore[index]
    file = tmp_path_factory.mktemp("example") / "scale.py"
    file.write_text(
        '"""An example."""\n'
        "from contextlib import contextmanager\n"
        "from pathlib import Path\n"
        "from pydantic import Field\n"
        "from fedhpc.lazy import kernels, torch\n"
        "from fedhpc.methods.base import Attached, Method, Tensors\n"
        "from fedhpc.registry import Section\n"
        f"from fedhpc.updates.layout import Layout\n\n\n{code}"
    )
    return str(file)


@pytest.fixture
def method(name: str, options: dict[str, Any], encoder: Base, example: str) -> Method:
    """The method on the first base that it takes: a decoder, a decoder with biases, an encoder of sentences."""
    cls = registry.choice("methods", example if name == EXAMPLE else name)
    chosen = cls.Options(**{**SMALL.get(name, {}), **options})
    for base in (tiny.base("llama"), tiny.base("gpt2"), encoder):
        try:
            made: Method = cls(chosen, base, 0)
            assert made.payload.size
            return made
        except UserError as error:
            refused = error
    raise refused


def train(method: Method, payload: torch.Tensor, group: list[Any], **client: Any) -> torch.Tensor:
    """The pseudo-gradients (K, P) of the clients `group`, which begin from one payload (1, P)."""
    config = settings(**{"optimizer": "adamw", "lr": 0.02, "steps": 3, **client})
    objective = tiny.objective(method.base)
    return tiny.train(method.base, method, objective, payload, group, tiny.examples(), config).updates


def warm(method: Method, count: int = 1) -> torch.Tensor:
    """Payloads (count, P) as a server sends them, away from the initial one, where half of the gradients may vanish."""
    start, drawing = start_of(method, torch.float64), torch.Generator().manual_seed(3)
    moved = start + 0.05 * torch.randn(count, start.shape[1], dtype=start.dtype, generator=drawing)
    return torch.stack([method.payload.flatten(method.on_server(method.payload.views(one))) for one in moved])


def losses(method: Method, trained: PerClient, received: PerClient, rows: torch.Tensor) -> torch.Tensor:
    """Of the supervised tokens of as many examples as there are rows."""
    base, objective = method.base, tiny.objective(method.base)
    batch = objective.batch(base, tiny.examples(), np.arange(len(rows)), rows.numpy())
    with torch.no_grad(), method.attach(trained, received, rows) as attached:
        assert attached.virtual_length == method.virtual_tokens
        found: torch.Tensor = objective.losses(base, attached, batch)
    return found


@every_method
def test_values_have_the_shapes_of_their_layouts(method: Method) -> None:
    initial = method.initial()
    assert {name: tuple(t.shape) for name, t in initial.items()} == method.payload.shapes
    assert list(initial) == list(method.payload.shapes)
    assert all(tensor.device.type == "cpu" for tensor in initial.values())
    again = type(method)(method.options, method.base, method.seed).initial()
    assert all(torch.equal(tensor, again[name]) for name, tensor in initial.items())
    for clients in ([7], [7, 8, 9] if method.shares_base else [7]):
        received = method.payload.views(start_of(method, torch.float64))
        started = method.start(received, 1, clients)
        assert set(started) == set(method.trainable.shapes)
        for name, tensor in started.items():
            assert tensor.shape[0] in (1, len(clients)) and tuple(tensor.shape[1:]) == method.trainable.shapes[name]
    assert 0 < method.numbers_sent(7, 1) <= method.payload.size
    assert 0 < method.numbers_received(7) <= method.payload.size


@every_method
def test_without_a_step_the_pseudo_gradient_is_zero(method: Method) -> None:
    payload = warm(method)
    received = method.payload.views(payload)
    finished = method.finish(method.start(received, 1, [7]), received)
    assert set(finished) >= set(method.payload.shapes)
    torch.testing.assert_close(method.payload.flatten(finished), payload, rtol=1e-13, atol=1e-13)
    update = train(method, payload, works(1), optimizer="sgd", lr=0.0)
    assert float(update.norm()) <= 1e-13 * float(payload.norm())


@every_method
def test_what_the_server_makes_of_a_payload_it_makes_again(method: Method) -> None:
    views = method.payload.views(warm(method)[0])
    again = method.on_server(views)
    assert {name: tuple(tensor.shape) for name, tensor in again.items()} == method.payload.shapes
    rows, found = torch.zeros(3, dtype=torch.int64), []
    for values in (as_one_client(views), as_one_client(again)):
        found.append(losses(method, method.start(values), values, rows))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@every_method
def test_where_runs_share_a_forward_the_seed_is_in_the_payload_alone(method: Method) -> None:
    """The method of one run stands for those of others with the same options, so it computes what theirs do."""
    other, payload, group = type(method)(method.options, method.base, 1), warm(method), works(1)
    if method.starts_from_payload:
        assert method.shares_base
        assert torch.equal(train(other, payload, group), train(method, payload, group))
        received, rows = method.payload.views(payload), torch.zeros(3, dtype=torch.int64)
        found = [losses(one, one.start(received), received, rows) for one in (method, other)]
        assert torch.equal(found[0], found[1])


def test_which_methods_share_a_forward_with_those_of_other_runs(encoder: Base, example: str) -> None:
    """Those that say so: nobody else knows whether something frozen follows from the seed."""
    assert {name for name in NAMES if registry.choice("methods", name).starts_from_payload is True} == {
        *("adapter", "ia3", "p_tuning", "prompt", "retriever")
    }
    plugin = registry.choice("methods", example)
    assert not plugin(plugin.Options(), tiny.base("llama"), 0).starts_from_payload


@every_method
def test_what_a_client_learns_does_not_depend_on_the_others(method: Method) -> None:
    """Neither on those of its block nor on those that came before."""
    payload, group = warm(method), works(3)
    alone = [train(method, payload, [work])[0] for work in group]
    assert all(float(update.norm()) > 0 for update in alone)
    assert torch.equal(train(method, payload, group[:1])[0], alone[0])
    if method.shares_base:
        for update, wanted in zip(train(method, payload, group), alone, strict=True):
            assert float((update - wanted).norm()) < 1e-9 * float(wanted.norm())


@every_method
def test_one_value_for_all_rows_is_that_value_for_each(method: Method) -> None:
    payload, count = warm(method), 4 if method.shares_base else 1
    one = method.payload.views(payload)
    # A contrastive loss compares the rows of one client.
    together = tiny.objective(method.base).needs_full_steps
    rows = torch.zeros(4, dtype=torch.int64) if together else torch.arange(4) % count
    for_all = losses(method, method.start(one), one, torch.zeros_like(rows))
    each = method.payload.views(payload.expand(count, -1).contiguous())
    torch.testing.assert_close(losses(method, method.start(each), each, rows), for_all, rtol=1e-10, atol=1e-10)


@every_method
def test_nothing_stays_attached(method: Method) -> None:
    model, received = method.base.model, method.payload.views(warm(method))
    inputs = {"input_ids": torch.arange(3, 12).unsqueeze(0)}
    with torch.no_grad():
        plain = model(**inputs)[0]
        before = {name: p.clone() for name, p in model.named_parameters()}
        trained = method.start(received)
        with pytest.raises(ZeroDivisionError), method.attach(trained, received, torch.zeros(1, dtype=torch.int64)):
            raise ZeroDivisionError
        assert torch.equal(model(**inputs)[0], plain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@every_method
def test_the_export_is_what_was_evaluated(method: Method, tmp_path: Path) -> None:
    """PEFT's adapters load in PEFT and model folders in transformers, with the same losses; others hold the payload."""
    payload, base, data = warm(method), method.base, tiny.examples()
    values = method.payload.views(payload[0])
    method.export(values, tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text()) if method.shares_base else {}
    if "peft_type" not in about and method.shares_base:
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert set(tensors) == set(values) and "format" in about
        assert all(torch.equal(tensor, values[name]) for name, tensor in tensors.items())
        return
    received = as_one_client(values)
    ours = losses(method, method.start(received), received, torch.zeros(3, dtype=torch.int64))
    if about:
        plain = tiny.base(base.name).model
        model = peft.PeftModel.from_pretrained(plain, tmp_path).double()
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    theirs = []
    for row in range(3):
        ids = torch.from_numpy(data.tokens(row).astype(np.int64)).unsqueeze(0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        theirs.append(loss[int(data.prompt_lengths[row]) - 1 :])
    torch.testing.assert_close(torch.cat(theirs), ours, rtol=1e-5, atol=1e-5)


def test_the_example_is_a_plugin_of_whole_federations(tmp_path: Path, example: str) -> None:
    tree = {
        "method": {"name": example, "start": 0.9},
        "partition": {"name": "iid", "num_clients": 4},
        "federation": {"rounds": 2, "cohort_size": 3},
        "client": {"steps": 2, "batch_size": 2, "lr": 0.01},
        "evaluation": {"every": 1, "max_examples": 8, "test_max_examples": 8, "samples": 0},
    }
    for ranks in (1, 3):
        federate(run_settings(tmp_path / str(ranks), tree), ranks)
    scale = final(tmp_path / "1")["scale"]
    assert np.array_equal(scale, final(tmp_path / "3")["scale"])
    assert scale.dtype == np.float32 and 0 < np.abs(scale - 0.9).max() < 0.1
    stored = load_file(tmp_path / "1" / "adapter" / "adapter_model.safetensors")["scale"]
    assert np.array_equal(stored.numpy(), scale)
