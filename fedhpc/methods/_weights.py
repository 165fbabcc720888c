"""Putting other weights into the base for a while, and writing the base with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhpc.errors import UserError
from fedhpc.models.hooks import gather
from fedhpc.models.quantized import layers

if TYPE_CHECKING:
    from torch import Tensor

    from fedhpc.models.base import Base

    Holders = Mapping[str, list[tuple[Any, str]]]


def holders(model: Any, names: Collection[str]) -> dict[str, list[tuple[Any, str]]]:
    """Name of a parameter -> the modules that hold it, with their attribute: more than one where weights are tied."""
    ids = {id(p): name for name, p in model.named_parameters() if name in names}
    by_name: dict[str, list[tuple[Any, str]]] = {name: [] for name in ids.values()}
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if id(p) in ids:
                by_name[ids[id(p)]].append((module, attribute))
    return by_name


@contextmanager
def swapped(where: Holders, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with `tensors` as the parameters of those names; its own come back afterwards. where: of `holders`."""
    before = {name: where[name][0][0]._parameters[where[name][0][1]] for name in tensors}
    try:
        _put(where, tensors)
        yield
    finally:
        _put(where, before)


def _put(where: Holders, tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        for module, attribute in where[name]:
            module._parameters[attribute] = tensor


def save_model(base: Base, path: Path) -> None:
    """The base as it now is, with its tokenizer: a model folder that transformers loads.

    Layers that this rank has no memory of are read one at a time.
    """
    state = base.model.state_dict()
    weights = {name: tensor.detach().cpu() for name, tensor in state.items() if not tensor.is_meta}
    for name in [name for name in state if name not in weights]:  # in their order: a layer comes once
        owner, _, attribute = name.rpartition(".")
        module = base.model.get_submodule(owner)
        gather(module)
        weights[name] = module._parameters[attribute].detach().to("cpu", copy=True)
    base.model.save_pretrained(path, state_dict=weights)
    base.tokenizer.save_pretrained(path)


def require_unquantized(base: Base, method: str) -> None:
    """UserError where a method that trains weights of the base has one that is stored in few bits."""
    if layers(base.model):
        raise UserError(
            f"method.name {method} trains the weights of the base, and '{base.name}' has them as integers",
            key="method.name", remedy="give the model with all its bits, or another method such as lora",
        )  # fmt: skip


def conflict_with_quantized(method: str, config: Any) -> str | None:
    """What `conflict` of a method that trains weights of the base says: with model.quantize it cannot."""
    if config.model.quantize == "none":
        return None
    return (
        f"method.name {method} trains the weights of the base, which model.quantize {config.model.quantize} freezes as "
        "integers: use quantize none, or another method such as lora"
    )
