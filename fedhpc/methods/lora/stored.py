"""How PEFT names and lays out LoRA's factors, where layers have experts, and what it calls the layers.

PEFT wraps the weights of a layer's experts in one another, and names the factors by the wrappers: the first weight that
it adapts is the innermost, `experts.base_layer`, and the last one is `experts`. A of all experts is (E r, in), with the
experts' matrices one below the other; B is (out, r E), with the experts' columns next to each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedhpc.lazy import Tensor
from fedhpc.methods._linear import Layer, ends_with
from fedhpc.methods.base import Tensors
from fedhpc.methods.lora.factors import name_a, name_b

if TYPE_CHECKING:
    from fedhpc.models.base import Base

# What the linear layers of routed experts and their router are called in files, of Mixtral and of Qwen2-MoE.
_NAMES_IN_FILES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def stored(values: Tensors, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The factors of all layers as PEFT has them."""
    tensors = dict(values)
    for path, wrapper in _wrappers(layers).items():
        a, b = tensors.pop(name_a(path)), tensors.pop(name_b(path))
        tensors[name_a(wrapper)] = a.flatten(0, 1)
        tensors[name_b(wrapper)] = b.permute(1, 2, 0).flatten(1)
    return tensors


def unstored(tensors: Tensors, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The inverse of `stored`; what is missing there is missing here."""
    values = dict(tensors)
    taken = {
        path: (values.pop(name_a(at), None), values.pop(name_b(at), None)) for path, at in _wrappers(layers).items()
    }
    for path, (a, b) in taken.items():
        experts = layers[path].experts
        if a is not None and b is not None and experts and len(a) % experts == 0 and b.shape[1] % experts == 0:
            values[name_a(path)] = a.unflatten(0, (experts, -1))
            values[name_b(path)] = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return values


def _wrappers(layers: Mapping[str, Layer]) -> dict[str, str]:
    """Path of a weight of experts -> path of what PEFT wraps it in."""
    of_modules: dict[Any, list[str]] = {}
    for path, layer in layers.items():
        if layer.experts:
            of_modules.setdefault(layer.module, []).append(path)
    wrappers = {}
    for module, paths in of_modules.items():
        in_order = list(module._parameters)
        paths.sort(key=lambda path: in_order.index(layers[path].parameter))
        for number, path in enumerate(paths):
            wrappers[path] = path.rpartition(".")[0] + ".base_layer" * (len(paths) - 1 - number)
    return wrappers


def target_keys(
    names: Sequence[str], layers: Mapping[str, Layer], base: Base, shape: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys of PEFT's LoraConfig that choose the same layers as `names`; shape: its keys of ranks and scales.

    Weights of experts and routers are target_parameters. So are linear layers whose name PEFT (0.21) would take for
    that of experts: in most families it reads down_proj as the weight of all experts, and no longer as a layer. Its
    patterns of ranks and alphas must match such a path with .weight behind it.
    """
    modules, parameters = [], []
    for name in (name.removesuffix(".weight") for name in names):
        some = next(layer for path, layer in layers.items() if ends_with(path, name))
        if some.experts:
            parameters.append(name)
        elif some.parameter or (name.rsplit(".", 1)[-1] in _NAMES_IN_FILES and _taken_for_experts(base)):
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    if not parameters:
        return {"target_modules": modules}
    patterns = {
        key: {rf"(?:{pattern})(\.weight)?": value for pattern, value in shape[key].items()}
        for key in ("rank_pattern", "alpha_pattern") if key in shape
    }  # fmt: skip
    return {"target_modules": modules, "target_parameters": parameters, **patterns}


def _taken_for_experts(base: Base) -> bool:
    """Whether PEFT takes some names of linear layers in this family for those of experts."""
    from transformers import conversion_mapping

    family = base.model.config.model_type
    # A release without this table is taken to convert every family so.
    converted = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {family: "qwen2_moe"})
    return family == "mixtral" or converted.get(family) in ("qwen2_moe", "mixtral")


def targets_of(config: Mapping[str, Any]) -> list[str] | str:
    """The names that a config of PEFT has for the layers, or its pattern."""
    modules = config.get("target_modules") or []
    parameters = config.get("target_parameters") or []
    return modules if isinstance(modules, str) else [*modules, *(name.removesuffix(".weight") for name in parameters)]
