"""Hooks on the layers of a base: those by which a layer that is elsewhere is gathered, and those of others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fedhpc.ranks.group import Layer, OneWhole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_OF_SHARDING, _NEED = "hooks_of_sharding", "need"


def ask_for(module: torch.nn.Module, layers: OneWhole, layer: Layer) -> None:
    """Let a layer of the base be whole, among `layers`, before it runs, forward and backward."""
    need = partial(layers.need, layers.add(layer))
    module.register_forward_pre_hook(partial(_before, need), prepend=True)
    module.register_forward_hook(partial(_behind, need), with_kwargs=True)
    setattr(module, _OF_SHARDING, _hooks(module))
    for part in module.modules():
        setattr(part, _NEED, need)


def named_parameters(layer: torch.nn.Module) -> list[tuple[torch.nn.Module, str, Tensor]]:
    """The parameters of a layer in order, each with the module that has it and its name there."""
    return [(module, name, p) for module in layer.modules() for name, p in module._parameters.items() if p is not None]


def size_bytes(layer: torch.nn.Module) -> int:
    """Bytes of the parameters of a layer."""
    return sum(parameter.nbytes for _, _, parameter in named_parameters(layer))


def gather(module: Any) -> None:
    """Have the weights of a module of the base whole, until the next module is asked for. Any rank may, at any time."""
    if hasattr(module, _NEED):
        module.need()


def is_hooked(module: Any) -> bool:
    """Whether a module has hooks beside those by which it is gathered."""
    return bool(_hooks(module) - getattr(module, _OF_SHARDING, frozenset()))


def called_as(layer: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of a layer and more arguments, with the hooks by which the layer is gathered around it."""
    if not hasattr(layer, _OF_SHARDING):
        return function(layer, *arguments)
    layer.forward = lambda *given: function(layer, *given)
    try:
        return layer(*arguments)
    finally:
        del layer.forward


def _before(need: Callable[[], None], *_: Any) -> None:
    need()


def _behind(need: Callable[[], None], module: torch.nn.Module, inputs: Any, named: Any, outputs: Any) -> None:
    """Ask for the layer when a gradient comes to what it has computed, not to what it passes on."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    def ask(gradient: Tensor) -> None:
        need()

    given = {id(leaf) for leaf in tree_leaves((inputs, named))}
    for output in tree_leaves(outputs):
        if isinstance(output, Tensor) and output.requires_grad and id(output) not in given:
            output.register_hook(ask)


def _hooks(module: Any) -> frozenset[int]:
    """The ids of a module's hooks."""
    return frozenset({*module._forward_pre_hooks, *module._forward_hooks})
