"""The linear layers of a base by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from fedhpc.errors import UserError
from fedhpc.lazy import torch
from fedhpc.models.base import Predictor

if TYPE_CHECKING:
    from fedhpc.models.base import Base

# Rows, and tokens of their prompts and targets, on which layers are watched. All but the first token are supervised, so
# that no layer leaves any out.
_ROWS, _PROMPT, _TARGET = 3, 1, 22


@dataclass(frozen=True)
class Layer:
    """A linear layer that a method adapts."""

    module: Any
    in_output: bool  # it is given the states of tokens and makes logits of them; any other, the rows of a batch

    @property
    def widths(self) -> tuple[int, int]:
        """How wide its inputs and its outputs are: (in, out)."""
        both = features(self.module)
        assert both is not None, f"{type(self.module).__name__} is no linear layer"
        return both


def find_layers(base: Base, names: list[str], key: str) -> dict[str, Layer]:
    """Path -> linear layer whose path ends with one of `names`, in the model's order, as PEFT matches them.

    The head, which is trained as it is, does not count. UserError with the names that there are where one matches
    nothing, where one is that of other modules too, and where a layer does not see the tokens of each row, so that no
    row could have factors of its own.
    """
    linear = {path: module for path, module in base.model.named_modules() if features(module) and path not in base.head}
    if not linear:
        raise UserError(
            f"'{base.name}' ({base.model.config.model_type}) has no linear layers that can be adapted",
            key=key, remedy="choose another method or model",
        )  # fmt: skip
    for name in names:
        if not any(ends_with(path, name) for path in linear):
            there = sorted({path.rsplit(".", 1)[-1] for path in linear})
            raise UserError(f"{key}: the model has no linear layer named {name}; it has: {', '.join(there)}")
        others = [path for path, module in base.model.named_modules() if ends_with(path, name) and not features(module)]
        if others:
            raise UserError(
                f"{key}: {name} is the name of {others[0]} too, which is no linear layer, and PEFT would not load it",
                key=key, remedy="give more of the path, or choose other layers",
            )  # fmt: skip
    matching = {path: module for path, module in linear.items() if any(ends_with(path, name) for name in names)}
    in_output = _in_output(base, linear, matching, names, key)
    return {path: Layer(module, path in in_output) for path, module in matching.items()}


def _in_output(
    base: Base, linear: Mapping[str, Any], layers: Mapping[str, Any], names: Sequence[str], key: str
) -> set[str]:
    """The layers among `layers` that make logits of the states of tokens.

    UserError where a layer is given neither these states nor the rows of a batch. Found by watching the layers while
    the base reads and predicts a few tokens. A layer that no text passes through, as in a tower for images, is left
    alone, but not all by the same name.
    """
    every_token = {_ROWS * length for length in (_PROMPT, _TARGET, _PROMPT + _TARGET)}  # of encoders, decoders, or both
    seen: dict[str, set[tuple[int, ...]]] = {path: set() for path in linear}
    with torch.no_grad():
        with _watched(linear, seen):
            states = base.read_some(_ROWS, _PROMPT, _TARGET)
        of_states: dict[str, set[tuple[int, ...]]] = {path: set() for path in linear}
        if isinstance(base, Predictor):
            with _watched(linear, of_states):
                base.base_logits(states)
    for path in layers:
        by_row = all(shape[0] == _ROWS if len(shape) > 1 else shape[0] in every_token for shape in seen[path])
        by_token = all(prod(shape) == len(states) for shape in of_states[path])
        if not by_row or not by_token or (seen[path] and of_states[path]):
            raise UserError(
                f"{key}: {path} is not given the tokens row by row, as an expert is not that sees those sent to it, so "
                "no client could have its own there",
                key=key, remedy="choose layers that all tokens of a row pass through",
            )  # fmt: skip
    for name in names:
        if not any(seen[path] or of_states[path] for path in layers if ends_with(path, name)):
            there = sorted({path.rsplit(".", 1)[-1] for path in linear if seen[path] or of_states[path]})
            raise UserError(
                f"{key}: no text passes through the layers named {name}, which are for images, sound or the like; "
                f"through these it does: {', '.join(there)}"
            )
    return {path for path in layers if of_states[path]}


@contextmanager
def _watched(layers: Mapping[str, Any], seen: Mapping[str, set[tuple[int, ...]]]) -> Iterator[None]:
    """Note the shapes of what each layer is given, without the width."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, path=path: seen[path].add(tuple(inputs[0].shape[:-1])))
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def names_of_experts(base: Base) -> set[str]:
    """The names that linear layers of routed experts have in files, where the model holds those of a layer as one."""
    held = {path.rsplit(".", 1)[-1] for path, p in base.model.named_parameters() if p.ndim == 3}
    return held & {"down_proj"} | ({"gate_proj", "up_proj"} if "gate_up_proj" in held else set())


def unreached(base: Base, names: Sequence[str]) -> list[str]:
    """What to say, for the log, of layers by these names that are parts of routed experts, and so left as they are."""
    shared = sorted({name for name in names if name.rsplit(".", 1)[-1] in names_of_experts(base)})
    return [
        f"method: {name} are those of shared experts and dense layers alone: the routed experts of "
        f"'{base.model.config.model_type}', whose weights are held as one, are not adapted"
        for name in shared
    ]


def is_conv1d(module: Any) -> bool:
    """GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def features(module: Any) -> tuple[int, int] | None:
    """(in, out) of a linear layer, None for anything else."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def ends_with(path: str, name: str) -> bool:
    """Whether `name` is the end of a path, cut at a dot."""
    return path == name or path.endswith(f".{name}")
