"""A LoRA in llama.cpp's file format (GGUF), for `--lora FILE` beside a base that llama.cpp has converted.

As in llama.cpp's own convert_lora_to_gguf.py: A of a layer is `blk.N.attn_q.weight.lora_a`, B `....lora_b`, and the
product is scaled by adapter.lora.alpha over the rank. Queries and keys of Llama have the rows of each head in another
order there, as its rotary embedding turns pairs of neighbours where transformers turns halves; so have the rows of B.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fedhpc.customized import model_of
from fedhpc.errors import UserError
from fedhpc.methods._peft import adapter_config, without_wrappers
from fedhpc.methods.lora.factors import by_pattern, is_a, layer_of, name_a, name_b
from fedhpc.models.load import empty_network

if TYPE_CHECKING:
    import gguf
else:
    from fedhpc.lazy import lazy

    gguf = lazy("gguf", extra="gguf")

#: Family in transformers -> (architecture in llama.cpp, whether the rows of queries and keys are in another order).
_FAMILIES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
}
_MERGE = "use --merge, and llama.cpp's own convert_hf_to_gguf.py of that folder"


def write(adapter: Path, file: Path, base: str | None = None) -> None:
    """Write the LoRA in the folder `adapter` to `file`. base: where the base is another than the export names.

    UserError for an adapter that llama.cpp does not load, for a base of another family, and without the package.
    """
    config = adapter_config(adapter)
    network = empty_network(model_of(adapter, base))
    _require_loadable(config, network)
    family, is_permuted = _FAMILIES[network.config.model_type]
    factors = _factors(adapter)
    ranks = {path: len(a) for path, (a, _) in factors.items()}
    alphas = by_pattern(ranks, float(config["lora_alpha"]), config.get("alpha_pattern") or {}, "alpha_pattern")
    if config.get("use_rslora"):  # scaled by alpha / sqrt(rank) there, by alpha / rank here
        alphas = {path: alpha * ranks[path] ** 0.5 for path, alpha in alphas.items()}
    alpha = next(iter(alphas.values()))
    architecture = gguf.MODEL_ARCH[family]
    names = gguf.get_tensor_name_map(architecture, network.config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for path, (a, b) in factors.items():
        if is_permuted and path.endswith((".q_proj", ".k_proj")):
            b = _in_pairs(b, _heads(network.config, path))
        if alphas[path] != alpha:  # the file has one alpha for all layers
            b = b * (alphas[path] / alpha)
        if (name := names.get_name(path)) is None:
            raise UserError(f"llama.cpp has no name for the layer {path}", remedy=_MERGE)
        writer.add_tensor(f"{name}.weight.lora_a", _array(a))
        writer.add_tensor(f"{name}.weight.lora_b", _array(b))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _require_loadable(config: dict[str, Any], network: Any) -> None:
    """UserError where llama.cpp has no such adapter, or it would be wrong there."""
    if config.get("peft_type") != "LORA":
        written_as = config.get("peft_type") or config.get("format") or "a whole model"
        raise UserError(
            f"--gguf writes a LoRA, and what the run trained is {written_as}", remedy="use --merge or --adapter"
        )
    family = network.config.model_type
    if family not in _FAMILIES:
        raise UserError(f"--gguf is for bases of {', '.join(_FAMILIES)}, and this one is '{family}'", remedy=_MERGE)
    if config.get("use_dora"):
        raise UserError("llama.cpp knows no DoRA", remedy=_MERGE)
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    if tied and "lm_head" in {name.rsplit(".", 1)[-1] for name in config["target_modules"]}:
        raise UserError(
            "llama.cpp has no output layer of its own for a base that shares its weight with the embeddings",
            remedy=_MERGE,
        )


def _factors(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of each layer -> A (r, in) and B (out, r)."""
    from safetensors.torch import load_file

    tensors = without_wrappers(load_file(adapter / "adapter_model.safetensors"))
    return {path: (tensors[name_a(path)], tensors[name_b(path)]) for path in map(layer_of, filter(is_a, tensors))}


def _heads(config: Any, path: str) -> int:
    return int(config.num_attention_heads if path.endswith(".q_proj") else config.num_key_value_heads)


def _in_pairs(b: Tensor, heads: int) -> Tensor:
    """B (out, r) with the rows of each head, of which i turns with i + half, in the order 0, half, 1, half + 1, ..."""
    return b.view(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.float().numpy())
