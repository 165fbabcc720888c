"""Bases whose weights have few bits: quantised while they are loaded (`model.quantize`), or stored so in their folder.

4 bits are those of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3), 8 bits those of LLM.int8() (Dettmers et
al. 2022, arXiv 2208.07339, section 2), both by bitsandbytes, or 8 bits by torchao. Linear layers are quantised;
embeddings, norms, the output layer, a head that is trained and routed experts keep `model.dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fedhpc.config import Model
from fedhpc.errors import UserError
from fedhpc.models.imports import import_bitsandbytes, transformers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NEEDED = {"bitsandbytes": ("bitsandbytes", "accelerate"), "torchao": ("torchao", "accelerate")}
# What loads weights that are stored in few bits, by the name that their config.json gives; others transformers knows.
_NEEDED_BY_STORED = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "gptq": ("gptqmodel", "optimum", "accelerate"),
    "awq": ("gptqmodel", "accelerate"),
    "compressed-tensors": ("compressed-tensors", "accelerate"),
    "torchao": ("torchao", "accelerate"),
}


def loading_options(model: Model, config: Any, device: torch.device, keep: Sequence[str]) -> dict[str, Any]:
    """Arguments of from_pretrained, none for a base with all its bits. UserError where a library is lacking.

    config: the model's configuration of transformers. keep: paths of linear layers that are not quantised, beside
    those that transformers leaves out, as the output layer.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        if _stored_by(model, dict(stored)) == "bitsandbytes":
            import_bitsandbytes()
        return {"device_map": {"": device}}
    if model.quantize == "none":
        return {}
    lacking = _lacking(_NEEDED[model.quantization_library])
    if lacking:
        extra = "quantize" if model.quantization_library == "bitsandbytes" else "torchao"
        raise UserError(
            f"model.quantize: {model.quantize} needs {' and '.join(lacking)}: pip install 'fedhpc[{extra}]'"
        )
    return {"quantization_config": _of_library(model, list(keep) or None), "device_map": {"": device}}


def _of_library(model: Model, keep: list[str] | None) -> Any:
    """The configuration of transformers for `model.quantize`."""
    import torch

    if model.quantization_library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers().TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=keep)
    import_bitsandbytes()
    if model.quantize == "8bit":
        return transformers().BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return transformers().BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization_type,
        bnb_4bit_use_double_quant=model.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        llm_int8_skip_modules=keep,
    )


def _stored_by(model: Model, stored: dict[str, Any]) -> str:
    """The library of weights that are stored in few bits, as a config.json has it.

    UserError where they cannot be loaded, or are to be quantised once more.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    loads = stored.get("load_in_4bit") or stored.get("load_in_8bit")
    name = "bitsandbytes" if loads else str(stored.get("quant_method"))
    if name not in {*KNOWN, "bitsandbytes"}:
        raise UserError(
            f"'{model.name}' is stored in few bits by '{name}', as its config.json says, and transformers knows no "
            "such library", key="model.name", remedy="choose another model",
        )  # fmt: skip
    if model.quantize != "none":
        raise UserError(
            f"model.quantize: '{model.name}' is stored in few bits already ({name})", remedy="take it out, or give the "
            "model with all its bits",
        )  # fmt: skip
    if lacking := _lacking(_NEEDED_BY_STORED.get(name, ())):
        raise UserError(
            f"'{model.name}' is stored in few bits by {name} and needs {' and '.join(lacking)} to load",
            key="model.name", remedy=f"pip install {' '.join(lacking)}, or choose another model",
        )  # fmt: skip
    return name


def bits_of(model: Model, config: Any) -> int | None:
    """How many bits a weight of a linear layer takes, as loaded or stored; None: all of `model.dtype`."""
    if model.quantize != "none":
        return int(model.quantize.removesuffix("bit"))
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return int(dict(stored).get("bits", 8 if dict(stored).get("load_in_8bit") else 4))


def _lacking(needed: Sequence[str]) -> list[str]:
    return [name for name in needed if find_spec(name.replace("-", "_")) is None]


def layers(network: Any) -> dict[str, Any]:
    """Path -> linear layer whose weight is quantised."""
    import torch

    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and _is_packed(module.weight)
    }


def _is_packed(weight: Tensor) -> bool:
    """Whether a weight holds few bits: as integers, as what bitsandbytes stores 4 bits in, or as torchao's tensors."""
    in_parts = hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor")  # that one is of a group
    return not weight.is_floating_point() or hasattr(weight, "quant_state") or in_parts


def tensors(network: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that quantised weights and the others consist of: integers, scales, tables."""
    for name, value in network.state_dict().items():
        if hasattr(value, "__tensor_flatten__"):
            for part in value.__tensor_flatten__()[0]:
                yield f"{name}.{part}", getattr(value, part)
        else:
            yield name, value


def leave_files(network: Any) -> None:
    """Copy what is not quantised, in place, so that no file stays mapped.

    transformers gives these tensors as parts of the mapped files, all of whose bytes then count as this process's.
    """
    few = {id(layer.weight) for layer in layers(network).values()}
    for tensor in (*network.parameters(), *network.buffers()):
        if id(tensor) not in few:
            tensor.data = tensor.data.clone()


def compute_exactly(network: Any, device: torch.device) -> None:
    """Let bitsandbytes multiply by the weights that its integers stand for on a CPU, in training and evaluation alike.

    In eval mode its layers of 8 bits round their inputs too, and those of 4 bits, where a processor has AVX512-BF16,
    pack their weights anew and compute in bfloat16. Nothing else in them depends on the mode.

    Where a processor has AVX-512 it mistakes the scales of weights of 4 bits whose rows are no multiple of the block
    (findings/bitsandbytes_rows_of_avx512.sh), so such a layer has its weights from what it says of them as one row.
    """
    if device.type != "cpu":
        return
    for layer in layers(network).values():
        if type(layer).__module__.startswith("bitsandbytes."):
            layer.train()
            state = getattr(layer.weight, "quant_state", None)
            if state is not None and state.shape[-1] % state.blocksize:
                layer.forward = partial(_as_one_row, layer)


def _as_one_row(layer: Any, inputs: Tensor) -> Tensor:
    """What a layer of 4 bits makes of its inputs (..., in): (..., out) in their type."""
    output: Tensor = _product()(inputs.to(layer.compute_dtype or inputs.dtype), layer.bias, layer)
    return output.to(inputs.dtype)


@cache
def _product() -> Callable[..., Tensor]:
    """x W^T + b, where W has few bits and is whole only while it multiplies, forward and back."""
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, inputs: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
            context.layer = layer
            bias = None if bias is None else bias.to(inputs.dtype)
            return torch.nn.functional.linear(inputs, _weight_of(layer, inputs.dtype), bias)

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            of_inputs, of_bias, _ = context.needs_input_grad
            return (
                gradient @ _weight_of(context.layer, gradient.dtype) if of_inputs else None,
                gradient.flatten(0, -2).sum(0) if of_bias else None,
                None,
            )

    product: Callable[..., Tensor] = Product.apply
    return product


def _weight_of(layer: Any, dtype: torch.dtype) -> Tensor:
    """W (out, in) of a layer of 4 bits."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy(layer.weight.quant_state)
    shape, state.shape = state.shape, (1, math.prod(state.shape))
    weight: Tensor = dequantize_4bit(layer.weight.data, state).view(shape).to(dtype)
    return weight


def message(model: Model, network: Any) -> str:
    """What to say of a quantised base. UserError where none of its layers could be quantised."""
    quantised = layers(network)
    if not quantised:
        raise UserError(
            f"model.quantize: '{model.name}' ({network.config.model_type}) has no linear layers that can be quantised",
            remedy="use none",
        )
    few = sum(layer.in_features * layer.out_features for layer in quantised.values())
    others = sum(p.numel() for p in network.parameters()) - sum(layer.weight.numel() for layer in quantised.values())
    size = sum({tensor.data_ptr(): tensor.nbytes for _, tensor in tensors(network)}.values()) / 2**20  # some are tied
    how = "as stored" if model.quantize == "none" else f"{model.quantize} by {model.quantization_library}"
    return f"model: {few:,} of {few + others:,} weights in few bits ({how}), {size:,.1f} MiB in all"
