"""Base models: the built-in one, a local folder or a hub id, frozen, on one device.

Any decoder-only Hugging Face model whose logits are `output_embeddings(last_hidden_state)` (with an optional
soft cap or scale, checked when it is loaded): logits are then computed at supervised positions only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhpc.config import Model
from fedhpc.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BUILTIN = Path(__file__).parent / "builtin" / "base"
_SAMPLE = 65_536  # elements per tensor that go into the fingerprint


@dataclass(frozen=True)
class Base:
    """A frozen decoder-only language model and its tokenizer."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    device: torch.device
    name: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., hidden_size) -> logits (..., vocabulary)."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        config = self.model.config
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (scaling := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / scaling
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = (logits / cap).tanh() * cap
        return logits


def source_of(model: Model) -> str:
    """The folder or hub id that `model.name` means. UserError for a folder without a model."""
    if model.name == "builtin":
        return str(BUILTIN)
    path = Path(model.name).expanduser()
    looks_local = path.exists() or model.name.startswith((".", "/", "~")) or model.name.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        raise UserError(f"model.name: '{model.name}' is not a model folder (it has no config.json)")
    return str(path) if looks_local else model.name


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of `model`."""
    from transformers import AutoTokenizer

    with _loading(model, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            source_of(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def load_base(model: Model, device: torch.device) -> Base:
    """Load the base model onto `device`, in eval mode, without gradients.

    UserError where there is no such model, its tokenizer does not fit, or its head is of an unknown kind.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = source_of(model)
    tokenizer = load_tokenizer(model)
    with _loading(model, "model"):
        config = AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=model.trust_remote_code)
        if getattr(config, "is_encoder_decoder", False) or type(config) not in AutoModelForCausalLM._model_mapping:
            raise UserError(f"model.name: '{model.name}' ({config.model_type}) is not a decoder-only language model")
        network, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=getattr(torch, model.dtype),
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed; without, the reason is only logged
        )
    unfit = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if unfit:
        raise UserError(
            f"model.name: the weights of '{model.name}' do not fit its config.json: {len(unfit)} tensors are missing "
            f"or of another shape, like {min(unfit)}"
        )
    network.requires_grad_(False).eval().to(device)
    text = config.get_text_config(decoder=True)
    if len(tokenizer) > network.get_input_embeddings().weight.shape[0]:
        raise UserError(
            f"model.name: the tokenizer of '{model.name}' has {len(tokenizer)} tokens but the model embeds only "
            f"{network.get_input_embeddings().weight.shape[0]}: they do not belong together"
        )
    heads = text.num_attention_heads
    base = Base(
        model=network,
        tokenizer=tokenizer,
        device=device,
        name=model.name,
        fingerprint=_fingerprint(network),
        num_layers=text.num_hidden_layers,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        hidden_size=text.hidden_size,
    )
    _check_head(base)
    return base


def max_positions(base: Base) -> int | None:
    """The longest sequence the model has positions for; None where it has no limit."""
    limit = getattr(base.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if limit else None


def layer_stacks(model: Any) -> list[list[Any]]:
    """The layers of a transformer, bottom up: one list for its encoder or decoder, two where it has both."""
    from torch.nn import ModuleList

    stacks: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        if isinstance(module, ModuleList) and not any(path.startswith(f"{outer}.") for outer in stacks):
            stacks[path] = list(module)
    return list(stacks.values())


class _loading:  # noqa: N801  a context manager used like a function
    """Turns the many errors of a failed load into one line."""

    def __init__(self, model: Model, what: str) -> None:
        self.model, self.what = model, what

    def __enter__(self) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()  # one per rank would tear the run's own display
        logging.set_verbosity_error()  # what matters of its warnings is an error here

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # The libraries raise anything, from OSError (no such file or hub id) to classes of their own (half a file).
        if isinstance(error, Exception) and not isinstance(error, UserError):
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"model.name: the {self.what} of '{self.model.name}' cannot be loaded: {first[:300]}"
            ) from error


def _check_head(base: Base) -> None:
    """The model's own logits must equal ours, or losses would be silently wrong."""
    import torch

    ids = torch.tensor([[1, 2, 3]], device=base.device) % base.model.config.get_text_config().vocab_size
    with torch.inference_mode():
        own = base.model(input_ids=ids, use_cache=False).logits
        ours = base.logits(base.model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(own.float(), ours.float(), atol=1e-3, rtol=1e-3):
        raise UserError(
            f"model.name: '{base.name}' ({base.model.config.model_type}) changes its logits after the output layer "
            "in a way that fedhpc does not know"
        )


def _fingerprint(network: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in _sorted_parameters(network):
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLE)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(flat[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _sorted_parameters(network: Any) -> Iterator[tuple[str, Tensor]]:
    yield from sorted(network.named_parameters(), key=lambda item: str(item[0]))
