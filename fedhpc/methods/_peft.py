"""Writing adapters that peft.PeftModel.from_pretrained loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhpc import models

if TYPE_CHECKING:
    from torch import Tensor


def virtual_tokens(prompt: Tensor, base: models.Base) -> dict[str, Any]:
    """The keys that PEFT's soft prompts (n, D) have in common."""
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_layers": base.num_layers,
        "num_attention_heads": base.num_kv_heads,
        "num_transformer_submodules": 1,
    }


def write_adapter(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: models.Base) -> None:
    """adapter_config.json and adapter_model.safetensors in the folder `path`, on the CPU, contiguous."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    source = str(models.BUILTIN) if base.name == "builtin" else base.name
    full = {**config, "base_model_name_or_path": source, "inference_mode": True}
    (path / "adapter_config.json").write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()},
        path / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
