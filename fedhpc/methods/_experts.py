"""Mixtures of experts: what a method changes in the weights of routed experts, and in the router that chooses them.

transformers holds the weights of all experts of a layer as one parameter (E, ...), and each token is sent to some of
them. Here the tokens are put into the order of their experts, and those of an expert into the order of their clients,
so that each expert computes its tokens at once and every token has what its own client has trained for that expert.

Shapes: E experts of a layer, k of them for each token, K clients, S pairs of a token and one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.models.trial import agree, succeeds


@dataclass(frozen=True)
class Routed:
    """S tokens in the order of their experts, and for each expert in that of their clients."""

    groups: Tensor  # int64 (S,): K times the expert, plus the client
    of_experts: kernels.Groups  # E of them
    of_clients: kernels.Groups  # E * K
    clients: int  # K

    @classmethod
    def of(cls, groups: Tensor, experts: int, clients: int) -> Routed:
        """Tokens whose groups (S,) ascend."""
        ends = torch.searchsorted(groups, torch.arange(1, experts * clients + 1, device=groups.device), out_int32=True)
        of_experts = kernels.Groups(ends[clients - 1 :: clients].contiguous())
        return cls(groups, of_experts, kernels.Groups(ends), clients)

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (S, in) times the weights (1 or K, E, in, out) of each token's client and expert: (S, out)."""
        if len(weights) == 1:
            return kernels.grouped_product(x, weights[0], self.of_experts)
        return kernels.grouped_product(x, weights.transpose(0, 1).flatten(0, 1), self.of_clients)

    def of_tokens(self, vectors: Tensor) -> Tensor:
        """Of vectors (1 or K, E, width) that of each token's client and expert: (S, width)."""
        if len(vectors) == 1:
            return kernels.of_rows(vectors[0], self.groups // self.clients)
        return kernels.of_rows(vectors.transpose(0, 1).flatten(0, 1), self.groups)


@dataclass(frozen=True)
class ChangeOfExperts:
    """What a method does at a weight of experts."""

    before: Callable[[Tensor, Routed], Tensor] | None = None  # to the inputs (S, in)
    behind: Callable[[Tensor, Tensor, Routed], Tensor] | None = None  # to the outputs (S, out), the second argument


@contextmanager
def changed_experts(module: Any, changes: Mapping[str, ChangeOfExperts], clients: Tensor, count: int) -> Iterator[None]:
    """Change what the routed experts of a layer compute, while the context is open.

    changes: by the name of the weight. clients: int64 (B,), of each row, from 0 to count - 1.
    """

    def forward(states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return compute(module, states, index, weights, changes, clients, count)

    with _forward_is(module, forward):
        yield


def compute(
    module: Any,
    states: Tensor,
    index: Tensor,
    weights: Tensor,
    changes: Mapping[str, ChangeOfExperts],
    clients: Tensor,
    count: int,
) -> Tensor:
    """What experts make of the states (N, D) of the tokens of B rows, one row after another: (N, D).

    index, weights: (N, k), the experts of each token and how much each of them counts.
    """
    top, device = index.shape[1], states.device
    of_pairs = torch.arange(index.numel(), device=device) // top
    owners = clients.index_select(0, of_pairs // (len(states) // len(clients)))
    groups = index.reshape(-1) * count + owners
    order = groups.argsort(stable=True)
    routed = Routed.of(groups.index_select(0, order), module.num_experts, count)

    def project(name: str, x: Tensor) -> Tensor:
        weight, change = getattr(module, name), changes.get(name, ChangeOfExperts())
        x = x.to(weight.dtype)
        if change.before is not None:
            x = change.before(x, routed)
        y = kernels.grouped_product(x, weight if module.is_transposed else weight.mT, routed.of_experts)
        if module.has_bias:
            y = y + getattr(module, f"{name}_bias").index_select(0, routed.groups // count)
        return y if change.behind is None else change.behind(x, y, routed)

    # As transformers' own, in the weights' type and not in autocast's.
    with torch.autocast(device.type, enabled=False):
        inner = project("gate_up_proj" if module.has_gate else "up_proj", kernels.of_rows(states, of_pairs[order]))
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        outputs = project("down_proj", inner)
        if module.has_post_expert_norm:
            outputs = module.post_expert_norm(outputs)
        outputs = outputs * weights.reshape(-1, 1).index_select(0, order)
    in_order = kernels.of_rows(outputs, order.argsort())
    return in_order.view(len(states), top, -1).sum(dim=1).to(states.dtype)


@contextmanager
def changed_router(
    module: Any, before: Callable[[Tensor], Tensor] | None, behind: Callable[[Tensor, Tensor], Tensor] | None
) -> Iterator[None]:
    """Change the states (N, D) that a router is given, or its logits (N, E), while the context is open."""
    forward, shape = module.forward, module.weight.shape

    class Changed(torch.overrides.TorchFunctionMode):  # type: ignore[misc,name-defined]  # torch is lazy here
        """Changes the product with a weight of the router's shape, in whatever type the router takes it."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is not torch.nn.functional.linear or args[1].shape != shape:
                return function(*args, **(kwargs or {}))
            x = args[0] if before is None else before(args[0])
            y = function(x, *args[1:], **(kwargs or {}))
            return y if behind is None else behind(x, y)

    def changed(*args: Any, **kwargs: Any) -> Any:
        with Changed():
            return forward(*args, **kwargs)

    with _forward_is(module, changed):
        yield


@contextmanager
def _forward_is(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def computes_alike(module: Any, inputs: Sequence[Any]) -> bool:
    """Whether the experts of a layer make the same of `inputs` as `compute`."""

    def look() -> bool:
        states, index, weights = inputs
        one_client = torch.zeros(1, dtype=torch.int64, device=states.device)
        return agree(compute(module, states, index, weights, {}, one_client, 1), module(*inputs))

    return succeeds(look)


def has_one_product(module: Any, inputs: Sequence[Any]) -> bool:
    """Whether a router multiplies `inputs` with its weight, once."""
    seen = []

    def note(x: Tensor, y: Tensor) -> Tensor:
        seen.append(x.shape)
        return y

    def look() -> bool:
        with changed_router(module, None, note):
            module(*inputs)
        return len(seen) == 1

    return succeeds(look)
