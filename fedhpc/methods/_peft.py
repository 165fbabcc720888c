"""Adapters in the format of PEFT: written so that peft.PeftModel.from_pretrained loads them, and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.methods._linear import ends_with

if TYPE_CHECKING:
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


def adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of an export, or the config.json of an exported model.

    UserError, with what is there instead, for another folder.
    """
    remedy = "give the adapter/ of a complete run"
    if (folder / "adapter").is_dir():
        raise UserError(f"'{folder}' is no export of a run", remedy=f"give '{folder / 'adapter'}'")
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'", remedy=remedy)
    clients = sorted(file.parent.name for file in folder.glob("*/adapter_config.json"))
    if clients:
        raise UserError(f"'{folder}' has an adapter for each client", remedy=f"give one, like '{folder / clients[0]}'")
    if (folder / "prompt.json").is_file():
        raise UserError(f"'{folder}' holds a prompt in words: prompt.json is all that the run made")
    config = read_json(folder / "adapter_config.json", missing_ok=True)
    if not config and (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    if not config.keys() & {"peft_type", "format"}:
        raise UserError(f"'{folder}' is no adapter that fedhpc loads", remedy=remedy)
    return config


def adapter_tensors(folder: Path, base: Base) -> dict[str, Tensor]:
    """The adapter_model.safetensors of an export, without weights of `base` under an adapted output layer.

    PEFT saves these too. UserError where it cannot be read, and where the weights are other than the base's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{folder}': adapter_model.safetensors cannot be read: {error}") from None
    bare = dict(zip(without_wrappers(tensors), tensors, strict=True))
    parameters = dict(base.model.named_parameters(remove_duplicate=False))
    # Factors of experts have it in their names too.
    for name in [name for name in bare if ".base_layer." in name and ".lora_" not in name]:
        theirs, ours = tensors.pop(bare[name]), parameters.get(name.replace(".base_layer.", "."))
        if ours is None or not _same_weights(theirs.to(ours.device), ours.detach()):
            raise UserError(
                f"'{folder}' holds {name}, which is not that of '{base.name}'",
                remedy="choose the base that it was trained on",
            )
    return tensors


def _same_weights(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same weights, each rounded to its own type."""
    if one.shape != other.shape:
        return False
    if one.dtype != other.dtype and one.itemsize == other.itemsize:  # float16 and bfloat16: neither holds the other
        types = torch.finfo(one.dtype), torch.finfo(other.dtype)
        # Half a unit in the last place of each, and of the numbers that are too small for float16's exponents.
        relative, least = sum(t.eps for t in types), max(t.smallest_normal * t.eps for t in types)
        return torch.allclose(one.float(), other.float(), rtol=relative, atol=least)
    coarser = one.dtype if one.itemsize < other.itemsize else other.dtype
    return torch.equal(one.to(coarser), other.to(coarser))


def read_json(file: Path, missing_ok: bool = False) -> dict[str, Any]:
    """The object in a JSON file; none where it is missing and may be. UserError where it cannot be read."""
    if missing_ok and not file.exists():
        return {}
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"'{file}' is not a JSON object")
    return tree


def without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that the base's own parameters have, without PEFT's one or two wrappers."""
    return {
        name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name: tensor
        for name, tensor in tensors.items()
    }


def require(options: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """UserError where the options of a method are not those that an adapter needs, with all of these."""
    if any(options[key] != value for key, value in wanted.items()):
        shown = ", ".join(f"{key} {options[key]}" for key, value in wanted.items() if options[key] != value)
        keys = " ".join(f"method.{key}={json.dumps(value, separators=(',', ':'))}" for key, value in wanted.items())
        raise UserError(f"the adapter has other options than {shown}", key="method.from", remedy=f"give {keys}")


def require_method(config: Mapping[str, Any], *types: str) -> None:
    """UserError where an adapter is of another method than those that PEFT calls so."""
    written_by = config.get("peft_type", config.get("format"))
    if written_by not in types:
        raise UserError(
            f"the adapter is {written_by or 'a whole model'}, and this method's are {types[0]}", key="method.from",
            remedy="choose the method of the adapter" if written_by else "give the folder as model.name",
        )  # fmt: skip


def as_payload(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of an adapter, which must have the names and shapes of a payload. UserError where they do not."""
    for name in sorted({*tensors, *shapes}):
        there, wanted = (tuple(tensors[name].shape) if name in tensors else None), shapes.get(name)
        if there != wanted:
            raise UserError(
                f"the adapter's {name} is {there or 'missing'}, and {wanted or 'nothing'} fits this base and method",
                key="method.from", remedy="choose the base and the layers of the adapter",
            )  # fmt: skip
    return {name: tensors[name] for name in shapes}


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
