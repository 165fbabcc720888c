"""The linear layers of a base by name, and where a method takes them, weights of routed experts and their routers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.methods._experts import computes_alike, has_one_product
from fedhpc.models.base import Predictor
from fedhpc.models.experts import routers, weights_of_experts
from fedhpc.models.hooks import gather

if TYPE_CHECKING:
    from fedhpc.models.base import Base

ALL_LINEAR = "all-linear"  # in place of names: every linear layer but the output layer, as PEFT has it
# Rows, and tokens of their prompts and targets, on which layers are watched. All but the first token are supervised, so
# that no layer leaves any out.
_ROWS, _PROMPT, _TARGET = 3, 1, 22


@dataclass(frozen=True)
class Layer:
    """A linear layer that a method adapts, or a weight of routed experts, or a router."""

    module: Any
    in_output: bool  # it is given the states of tokens and makes logits of them; any other, the rows of a batch
    parameter: str = ""  # of experts and routers: the name of the weight

    @property
    def experts(self) -> int | None:
        """E, where it is the weight of that many experts (E, ...)."""
        weight = self.module._parameters.get(self.parameter)
        return len(weight) if weight is not None and weight.ndim == 3 else None

    @property
    def widths(self) -> tuple[int, int]:
        """How wide its inputs and its outputs are: (in, out)."""
        if self.parameter:
            rows, columns = self.module._parameters[self.parameter].shape[-2:]
            return (rows, columns) if is_transposed(self.module) else (columns, rows)
        both = features(self.module)
        assert both is not None, f"{type(self.module).__name__} is no linear layer"
        return both

    @property
    def weight(self) -> Tensor:
        """W (out, in), as the layer holds it; of experts (E, out, in)."""
        return weight_of(self.module, self.parameter or "weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), of experts (E, out), as the layer holds it; None where it has none."""
        return getattr(self.module, self._bias, None)

    def hold(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Give the layer another W and, where one is given, another bias; other modules do not share them."""
        stored = (weight.mT if is_transposed(self.module) else weight).contiguous()
        self.module._parameters[self.parameter or "weight"] = torch.nn.Parameter(stored, requires_grad=False)
        if bias is not None:
            self.module._parameters[self._bias] = torch.nn.Parameter(bias, requires_grad=False)

    @property
    def _bias(self) -> str:
        return f"{self.parameter}_bias" if self.experts else "bias"


def find_layers(
    base: Base, names: Sequence[str] | str, key: str, exclude: Sequence[str] | str = (), experts: bool = False
) -> dict[str, Layer]:
    """Path -> linear layer that `names` names and `exclude` does not, in the model's order, as PEFT matches them.

    names: ends of paths, cut at a dot, or one regular expression for whole paths; ALL_LINEAR is every layer but the
    output layer that a text passes through. exclude: ends of paths or one expression too.

    experts: a name that no linear layer has may be that of a weight of routed experts, like experts.down_proj, or of a
    router, like gate or gate.weight, and an expression may match these; they follow behind the linear layers.

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
    weights = {**weights_of_experts(base.model), **routers(base.model)} if experts else {}
    if names == ALL_LINEAR:
        output = base.model.get_output_embeddings()
        named = [path for path, module in linear.items() if module is not output]
    else:
        named = _named(base, linear, weights, names, key)
    paths = _without(named, exclude)
    parameters = {path: weights[path] for path in paths if path in weights}
    modules = linear | {path: module for path, (module, _) in parameters.items()}
    seen, of_states, tokens = _shapes_of_inputs(base, modules)
    if names == ALL_LINEAR:
        paths = [path for path in paths if seen[path] or of_states[path]]
    every_token = {_ROWS * length for length in (_PROMPT, _TARGET, _PROMPT + _TARGET)}  # of encoders, decoders, or both
    for path in paths:
        by_row = all(shape[0] == _ROWS if len(shape) > 1 else shape[0] in every_token for shape in seen[path])
        by_token = all(prod(shape) == tokens for shape in of_states[path])
        if not by_row or not by_token or (seen[path] and of_states[path]):
            raise UserError(
                f"{key}: {path} is not given the tokens row by row, as an expert is not that sees those sent to it, so "
                "no client could have its own there",
                key=key, remedy="choose layers that all tokens of a row pass through",
            )  # fmt: skip
    for name, test in _tests(names, key).items():
        of_name = [path for path in paths if test(path)]
        if of_name and not any(seen[path] or of_states[path] for path in of_name):
            there = sorted({path.rsplit(".", 1)[-1] for path in linear if seen[path] or of_states[path]})
            raise UserError(
                f"{key}: no text passes through the layers named {name}, which are for images, sound or the like; "
                f"through these it does: {', '.join(there)}"
            )
    layers = {path: Layer(modules[path], bool(of_states[path]), parameters.get(path, ("", ""))[1]) for path in paths}
    _require_known({path: layers[path] for path in parameters}, base, key)
    return layers


def some(names: Collection[str]) -> str:
    """Names for a message, the first few of them."""
    shown = sorted(names)
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def _named(
    base: Base, linear: Collection[str], weights: Mapping[str, tuple[Any, str]], names: Sequence[str] | str, key: str
) -> list[str]:
    """The paths in `linear` and `weights` that are named. UserError where a name is of none, or of other modules."""
    named = set()
    for name, test in _tests(names, key).items():
        of_name = [path for path in linear if test(path)]
        if not of_name or isinstance(names, str):
            of_name += [path for path in weights if test(path)]
        if not of_name:
            _require_list(names, key)
            raise UserError(f"{key}: the model has no linear layer named {name}; it has: {_names(linear, weights)}")
        named |= set(of_name)
    for name in names if not isinstance(names, str) else ():
        others = [path for path, module in base.model.named_modules() if ends_with(path, name) and not features(module)]
        if others and not set(others) <= weights.keys():
            raise UserError(
                f"{key}: {name} is the name of {others[0]} too, which is no linear layer, and PEFT would not load it",
                key=key, remedy="give more of the path, or choose other layers",
            )  # fmt: skip
    return [path for path in [*linear, *weights] if path in named]


def _without(paths: Sequence[str], exclude: Sequence[str] | str) -> list[str]:
    """The paths that are not excluded. UserError where a name excludes none of them, and where none is left."""
    key = "method.exclude_modules"
    tests = _tests(exclude, key)
    for name, test in tests.items():
        if not any(map(test, paths)):
            _require_list(exclude, key)
            raise UserError(f"{key}: {name} matches none of the adapted layers, which are {some(paths)}")
    left = [path for path in paths if not any(test(path) for test in tests.values())]
    if not left:
        raise UserError("no layer is left to adapt", key=key, remedy="exclude fewer")
    return left


def _require_list(names: Sequence[str] | str, key: str) -> None:
    """UserError, which says that names are given as a list, where one expression has matched nothing."""
    if isinstance(names, str):
        raise UserError(
            f"the expression '{names}' matches no layer's whole path, such as model.layers.0.self_attn.q_proj",
            key=key, remedy=f"write {key}=[{names}] if it is a name",
        )  # fmt: skip


def _tests(names: Sequence[str] | str, key: str) -> dict[str, Callable[[str], object]]:
    """What tells whether a path is meant, by each name or by the one expression. UserError where that is none."""
    if not isinstance(names, str):
        return {name: partial(ends_with, name=name.removesuffix(".weight")) for name in names}
    if names == ALL_LINEAR:
        return {}
    return {names: expression(names, key).fullmatch}


def expression(text: str, key: str) -> re.Pattern[str]:
    """A regular expression. UserError where the text is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"'{text}' is no regular expression: {error.msg}", key=key, remedy="correct it") from None


def _names(linear: Iterable[str], weights: Mapping[str, tuple[Any, str]]) -> str:
    """What layers are called, for messages: the last part of their paths, and of weights of experts the last two."""
    experts = {path for path, (_, name) in weights.items() if name != "weight"}
    last = {path.rsplit(".", 1)[-1] for path in {*linear, *weights} - experts}
    return ", ".join(sorted(last | {".".join(path.split(".")[-2:]) for path in experts}))


def _require_known(layers: Mapping[str, Layer], base: Base, key: str) -> None:
    """UserError where experts or a router, by their paths, compute otherwise than is known here."""
    inputs: dict[str, Sequence[Any]] = {}
    if layers:
        with torch.no_grad(), _watched({path: layer.module for path, layer in layers.items()}, inputs.setdefault):
            base.read_some(_ROWS, _PROMPT, _TARGET)
    with torch.no_grad():
        for path, layer in layers.items():
            known = computes_alike if layer.experts else has_one_product
            if path in inputs and not known(layer.module, inputs[path]):
                raise UserError(
                    f"{key}: '{base.model.config.model_type}' computes with {path} in a way that fedhpc does not know",
                    key=key, remedy="choose other layers",
                )  # fmt: skip


_Shapes = Mapping[str, set[tuple[int, ...]]]


def _shapes_of_inputs(base: Base, linear: Mapping[str, Any]) -> tuple[_Shapes, _Shapes, int]:
    """The shapes of what each layer is given, without the width: as texts are read, and as logits are made of states.

    Found by watching the layers while the base reads and predicts a few tokens; third, of how many logits are made. A
    layer that no text passes through, as in a tower for images, is given nothing.
    """
    seen: dict[str, set[tuple[int, ...]]] = {path: set() for path in linear}
    of_states: dict[str, set[tuple[int, ...]]] = {path: set() for path in linear}
    with torch.no_grad():
        with _watched(linear, lambda path, inputs: seen[path].add(tuple(inputs[0].shape[:-1]))):
            states = base.read_some(_ROWS, _PROMPT, _TARGET)
        if isinstance(base, Predictor):
            with _watched(linear, lambda path, inputs: of_states[path].add(tuple(inputs[0].shape[:-1]))):
                base.base_logits(states)
    return seen, of_states, len(states)


def inputs_on(base: Base, layers: Mapping[str, Layer], ids: Sequence[int]) -> dict[str, list[Tensor]]:
    """What linear layers are given while the base reads a text: (tokens, in) by path, once for each of their calls.

    An encoder before a decoder reads its first half, and the decoder the second. Layers that are given the same share
    its memory; those that no text passes through are left out.
    """
    # A last layer may leave out what nothing is predicted from.
    prompt = len(ids) // 2 if base.model.config.is_encoder_decoder else 1
    seen: dict[str, list[Tensor]] = {}
    modules = {path: layer.module for path, layer in layers.items()}

    def note(path: str, inputs: Sequence[Tensor]) -> None:
        seen.setdefault(path, []).append(inputs[0].flatten(0, -2))

    with torch.no_grad(), _watched(modules, note):
        states = base.read_text(torch.tensor([ids], device=base.device), prompt)
        if isinstance(base, Predictor) and any(layer.in_output for layer in layers.values()):
            base.base_logits(states)
    return seen


@contextmanager
def _watched(modules: Mapping[str, Any], note: Callable[[str, Sequence[Any]], object]) -> Iterator[None]:
    """Note the path of each module, and what it is given, whenever it is called."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, path=path: note(path, inputs) and None)
        for path, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unreached(base: Base, layers: Mapping[str, Layer], key: str) -> list[str]:
    """What to say, for the log, of weights of routed experts that are not among the adapted layers."""
    experts = weights_of_experts(base.model)
    left = {path: weight for path, weight in experts.items() if path not in layers}
    if not left:
        return []
    linear = sum(features(module) is not None for _, module in base.model.named_modules())
    total = linear + len(experts) + len(routers(base.model))
    return [
        f"{key}: {len(layers)} of {total} linear layers are adapted; those of routed experts, "
        f"{_names([], left)}, are not among them"
    ]


def is_conv1d(module: Any) -> bool:
    """GPT-2's linear layer, whose weight is (in, out), also where it was one before it was quantised."""
    return "Conv1D" in (type(module).__name__, getattr(getattr(module, "source_cls", None), "__name__", ""))


def weight_of(module: Any, parameter: str = "weight") -> Tensor:
    """W (..., out, in) of a linear layer or of experts, as it holds it, also where ranks hold it together."""
    gather(module)
    weight: Tensor = getattr(module, parameter).detach()
    return weight.mT if is_transposed(module) else weight


def is_transposed(module: Any) -> bool:
    """Whether the weights of a layer or of experts are (..., in, out)."""
    return is_conv1d(module) or bool(getattr(module, "is_transposed", False))


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
