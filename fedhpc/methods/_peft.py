"""Writing adapters that peft.PeftModel.from_pretrained loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhpc.methods._linear import ends_with

if TYPE_CHECKING:
    from torch import Tensor

    from fedhpc.models.base import Base


def virtual_tokens(prompt: Tensor, base: Base) -> dict[str, Any]:
    """The keys that PEFT's soft prompts (n, D) have in common."""
    return {
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_layers": base.num_layers,
        "num_attention_heads": base.num_kv_heads,
        "num_transformer_submodules": 1,
    }


def write_adapter(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base) -> None:
    """adapter_config.json and adapter_model.safetensors in the folder `path`, on the CPU, contiguous."""
    path.mkdir(parents=True, exist_ok=True)
    where = {"base_model_name_or_path": base.source or base.name, "revision": base.revision}
    full = {"task_type": base.task_type, **config, **where, "inference_mode": True}
    (path / "adapter_config.json").write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
    _save(path, tensors)


def add_modules(path: Path, tensors: Mapping[str, Tensor], base: Base) -> None:
    """Put layers of the base itself, trained beside the method, into the adapter in `path` (modules_to_save)."""
    from safetensors.torch import load_file

    file = path / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    backbone = f"{base.model.base_model_prefix}."
    # PEFT saves modules whole: what is behind the encoder by the name it has there, and single layers within it.
    config["modules_to_save"] = sorted({p if p.startswith(backbone) else p.split(".")[0] for p in base.head})
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # PEFT wraps the model once for soft prompts and twice for layers; our own adapters wrap nothing.
    wrapped = "base_model." if "num_virtual_tokens" in config else "base_model.model." if "peft_type" in config else ""
    # It takes a name for the end of a path, and misses what is not trained in such a module.
    ends = tuple(config["modules_to_save"]) if "peft_type" in config else ()
    untrained = {
        f"{at}.{name}": parameter
        for at, module in base.model.named_modules()
        if any(ends_with(at, end) for end in ends)
        for name, parameter in module.named_parameters()
    }
    saved = {f"{wrapped}{name}": tensor for name, tensor in {**untrained, **tensors}.items()}
    _save(path, load_file(path / "adapter_model.safetensors") | saved)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    save_file(plain, path / "adapter_model.safetensors", metadata={"format": "pt"})
