"""Putting other weights into the base for a while, and writing the base with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fedhpc.models.base import Base

    Places = Mapping[str, list[tuple[Any, str]]]


def places(model: Any, names: Collection[str]) -> dict[str, list[tuple[Any, str]]]:
    """Name of a parameter -> the modules that hold it, with their attribute: more than one where weights are tied."""
    ids = {id(p): name for name, p in model.named_parameters() if name in names}
    found: dict[str, list[tuple[Any, str]]] = {name: [] for name in ids.values()}
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if id(p) in ids:
                found[ids[id(p)]].append((module, attribute))
    return found


@contextmanager
def swapped(where: Places, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with `tensors` in the places of those names; its own come back afterwards."""
    kept = {name: where[name][0][0]._parameters[where[name][0][1]] for name in tensors}
    try:
        _put(where, tensors)
        yield
    finally:
        _put(where, kept)


def _put(where: Places, tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        for module, attribute in where[name]:
            module._parameters[attribute] = tensor


def save_model(base: Base, path: Path) -> None:
    """The base as it now is, with its tokenizer: a model folder that transformers loads."""
    state = {name: tensor.detach().cpu() for name, tensor in base.model.state_dict().items()}
    base.model.save_pretrained(path, state_dict=state)
    base.tokenizer.save_pretrained(path)


def quantized(method: str, config: Any) -> str | None:
    """Why a method that trains the weights of the base cannot train those of model.quantize; None where it can."""
    if config.model.quantize == "none":
        return None
    return (
        f"method.name {method} trains the weights of the base, which model.quantize {config.model.quantize} freezes as "
        "integers: use quantize none, or another method such as lora"
    )
