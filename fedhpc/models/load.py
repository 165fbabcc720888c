"""Loading base models: the built-in one, a local folder or a hub id, frozen, on one device."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhpc.config import QUANTIZATION, Model
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.models import quantized
from fedhpc.models.base import Absent, Base
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.encoder import Classifier, SentenceEncoder
from fedhpc.models.imports import transformers, without_compiler
from fedhpc.models.seq2seq import Seq2Seq
from fedhpc.ranks.failed_collective import TransportError
from fedhpc.ranks.group import Group
from fedhpc.rng import torch_seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BUILTIN = Path(__file__).parents[1] / "builtin" / "base"
_SAMPLE = 65_536  # elements per tensor that go into the fingerprint
#: What `model.task` can name; auto takes the first that fits the model.
MODELS: dict[str, type[Base]] = {model.task: model for model in (CausalLM, Seq2Seq, Classifier, SentenceEncoder)}
_UNTRAINABLE = {
    "perceiver": "turns a text into latents, which its layers see in place of the tokens",
    "reformer": "has reversible layers, which train in train mode alone, where they draw at random",
}


def source_of(model: Model) -> str:
    """The folder (absolute) or hub id that `model.name` means. UserError for a folder without a model."""
    if model.name == "builtin":
        return str(BUILTIN)
    path = Path(model.name).expanduser()
    looks_local = path.exists() or model.name.startswith((".", "/", "~")) or model.name.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        raise UserError(f"'{model.name}' is not a model folder (it has no config.json)", key="model.name")
    return os.path.abspath(path) if looks_local else model.name


def load_tokenizer(model: Model) -> Any:
    """The tokenizer of `model`."""
    with _loading(model, "tokenizer"):
        return transformers().AutoTokenizer.from_pretrained(
            source_of(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def model_class(model: Model) -> type[Base]:
    """The class of base that `model` is loaded as. UserError where `model.task` does not fit it, or nothing does."""
    config = _load_config(model)
    if config.model_type in _UNTRAINABLE:
        raise UserError(
            f"'{model.name}' ({config.model_type}) {_UNTRAINABLE[config.model_type]}",
            key="model.name", remedy="choose another model",
        )  # fmt: skip
    fitting = [one for one in MODELS.values() if one.fits(config)]
    if not fitting:
        raise UserError(
            f"'{model.name}' ({config.model_type}) is none of what can be trained here: "
            + "; ".join(f"{one.needs} ({task})" for task, one in MODELS.items()),
            key="model.name",
        )
    if model.task == "auto":
        return fitting[0]
    if MODELS[model.task] not in fitting:
        raise UserError(
            f"model.task: {model.task} needs {MODELS[model.task].needs}, but '{model.name}' ({config.model_type}) is "
            f"{fitting[0].needs}: leave model.task out, or choose another model"
        )
    return MODELS[model.task]


def stored_dtype(model: Model) -> str:
    """The type in which the weights of `model` are stored, as its configuration names it; empty where it does not."""
    return str(_load_config(model).dtype or "").removeprefix("torch.")


def import_classes(model: Model) -> None:
    """Import and set up all that `load_base` and `load_tokenizer` will need. UserError where there is no such model."""
    import torch.fx.experimental.symbolic_shapes  # noqa: F401  a network on the device meta needs it, and it sympy

    config, chosen = _load_config(model), model_class(model)
    with _loading(model, "model"):
        from transformers import AutoTokenizer  # noqa: F401

        with suppress(ImportError):  # a module of transformers' own, which another release may name otherwise
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping

            # It compiles 900 patterns of weights' names the first time.
            get_checkpoint_conversion_mapping(config.model_type)
        getattr(transformers(), chosen.auto_class)._model_mapping[type(config)]  # imports the module that has it


def empty_network(model: Model) -> Any:
    """The network of `model` on the device meta: shapes and types of all weights, tied as they are, without numbers.

    UserError where there is no such model.
    """
    import torch

    chosen, config = model_class(model), _load_config(model)
    with _loading(model, "model"), without_compiler(), _on_meta():
        network = getattr(transformers(), chosen.auto_class).from_config(
            config, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code
        )
        network.tie_weights()
    return network.requires_grad_(False).eval()


@contextmanager
def _on_meta() -> Iterator[None]:
    """What is made in here is on the device meta, without first values, as where transformers loads a model."""
    import torch
    from transformers import initialization

    # Of newer releases: some models compute with numbers of theirs while they are made.
    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    with torch.device("meta"), initialization.no_init_weights(), safe():
        yield


def stored_classes(model: Model) -> list[str]:
    """The classes of the model's own head, row by row; none where it has no head, or one without names."""
    return model_class(model).stored_classes(_load_config(model))


def load_base(
    model: Model, device: torch.device, labels: Sequence[str] = (), seed: int = 0, group: Group | None = None
) -> Base:
    """Load the base model onto `device`, in eval mode, without gradients.

    labels: the classes, for a classifier. A head that has no stored weights is drawn by `seed`. group: the ranks that
    hold the layers between them.
    UserError where there is no such model, its tokenizer does not fit, or it computes something unknown.
    """
    import torch

    source = source_of(model)
    tokenizer = load_tokenizer(model)
    chosen = model_class(model)
    config = _load_config(model, **chosen.config_options(labels))
    of_few_bits = quantized.loading_options(model, config, device, _unquantized(model, chosen))
    if of_few_bits and group is not None:
        raise UserError(
            f"the weights of '{model.name}' are stored in few bits, which cannot be divided among ranks",
            key="runtime.worker_ranks", remedy="give 1",
        )  # fmt: skip
    with _loading(model, "model"), _reading(model, group, device) as more, without_compiler():
        network, info = getattr(transformers(), chosen.auto_class).from_pretrained(
            source,
            config=config,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=getattr(torch, model.dtype),
            attn_implementation=None,  # torch's own where the class supports it, else what it has
            # Grouped products, where the class has them, are not there for 64 bits (torch 2.13).
            experts_implementation="eager" if model.dtype == "float64" else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed; without, the reason is only logged
            **of_few_bits,
            **more,
        )
    absent = Absent(set(info["missing_keys"]), {key[0]: key[1][0] for key in info["mismatched_keys"]})
    new = sorted(name for name in {*absent.missing, *absent.resized} if chosen.may_be_new(network, name))
    unfit = {*absent.missing, *absent.resized}.difference(new)
    if unfit:
        raise UserError(
            f"the weights of '{model.name}' do not fit its config.json: {len(unfit)} tensors are missing "
            f"or of another shape, like {min(unfit)}",
            key="model.name",
        )
    fingerprint = _fingerprint(network, new)  # of what is stored, whatever the data make of it
    fitted = chosen.fit_head(network, stored_classes(model), labels, absent)
    drawn = {*new, *fitted.anew}
    _draw(network, drawn, seed)
    network.requires_grad_(False).eval()
    if of_few_bits:
        quantized.leave_files(network)
        quantized.compute_exactly(network, device)
    else:  # quantised weights are there, and their libraries refuse to move them
        _move(network, model, device, group)
    if group is not None and group.is_guest:
        _spread(network, model, group, device)
    with _loading(model, "model"):  # a class of transformers that cannot do what this one of ours asks for
        _check_special_tokens(model.name, tokenizer, network.get_input_embeddings().weight.shape[0])
        made = chosen.of(network, tokenizer, device, model.name, fingerprint, new)
        base = replace(
            made,
            drawn=bool(made.head and drawn),  # a pooler that is not stored is not used
            source=source,
            revision=model.revision,
            quantization={key: getattr(model, key) for key in QUANTIZATION},
            messages=(
                *(f"model: '{model.name}' {message}" for message in fitted.messages),
                *([quantized.message(model, network)] if of_few_bits else ()),
                *_slow(model, device),
            ),
        )
        base.check()
    if group is not None and not group.is_guest:
        from fedhpc.models.parts import Parts

        base = replace(base, parts=Parts(network, group, base.payload_dtype))
    if model.gradient_checkpointing:
        checkpoint_layers(network)
    return base


def _unquantized(model: Model, chosen: type[Base]) -> list[str]:
    """Paths of the layers that may have no stored weights, as a head that is trained: they are not quantised."""
    if model.quantize == "none":
        return []
    network = empty_network(model)
    new = (name for name, _ in network.named_parameters() if chosen.may_be_new(network, name))
    return sorted({name.rpartition(".")[0] for name in new})


def _reading(model: Model, group: Group | None, device: torch.device) -> AbstractContextManager[Mapping[str, Any]]:
    """What must be open while transformers reads a model, and gives it more arguments.

    For a rank of `group` it reads a part of each layer. The guest reads them whole: without a change of dtype they are
    pages of the file.
    """
    if group is None or group.is_guest:
        return nullcontext({})
    from fedhpc.models.slices import sharding_first

    return sharding_first(lambda network: _spread(network, model, group, device))


def _spread(network: Any, model: Model, group: Group, device: torch.device) -> None:
    """Spread the layers of `network` over the ranks of `group`."""
    from fedhpc.models.sharding import shard

    shard(_layers(network), group, device, offloads(model, device.type))


def _move(network: Any, model: Model, device: torch.device, group: Group | None) -> None:
    """Move `network` to `device`, but the parameters of layers that are offloaded, of this rank's part in a group."""
    if not offloads(model, device.type):
        network.to(device)
        return
    staying = {id(parameter) for layer in _layers(network) for parameter in layer.parameters()}
    network._apply(lambda tensor: tensor if id(tensor) in staying else tensor.to(device))
    if group is None:
        from fedhpc.models.streaming import stream

        stream(_layers(network), device)


def offloads(model: Model, device_type: str) -> bool:
    """Whether the layers of a base for such a device stay in host memory: the CPU computes with them there."""
    return model.offload == "cpu" and device_type == "cuda"


def _layers(network: Any) -> list[Any]:
    return [layer for stack in layer_stacks(network) for layer in stack]


def _check_special_tokens(name: str, tokenizer: Any, rows: int) -> None:
    """UserError where the model, which embeds `rows` tokens, lacks one that rows begin, end or are filled with."""
    for part in ("bos", "eos", "pad", "cls", "sep"):
        token = getattr(tokenizer, f"{part}_token_id", None)
        if token is not None and token >= rows:
            raise UserError(
                f"the tokenizer of '{name}' has {len(tokenizer)} tokens but the model embeds only {rows}, without "
                f"its {part} token {tokenizer.convert_ids_to_tokens(token)!r}: they do not belong together",
                key="model.name",
            )


def check_tokens(base: Base, examples: Examples, split: str) -> None:
    """UserError where a row lacks what the model needs, or has a token that it does not embed.

    Such tokens are those for pictures in some tokenizers.
    """
    base.check_examples(examples, split)
    tokenizer, rows = base.tokenizer, base.num_embedded
    if len(tokenizer) <= rows or not len(examples.ids) or int(examples.ids.max()) < rows:
        return
    first = int(np.argmax(examples.ids >= rows))
    example = int(np.searchsorted(examples.offsets, first, "right")) - 1
    text = tokenizer.decode(examples.tokens(example).tolist())
    raise UserError(
        f"example {example + 1} of {split}, {text[:60]!r}, has the token "
        f"{tokenizer.convert_ids_to_tokens(int(examples.ids[first]))!r}, which the tokenizer of '{base.name}' has and "
        f"the model does not: it embeds {rows} tokens and this is number {examples.ids[first]}; take it out of the "
        "text and of the templates, or give a model that embeds it",
        key="model.name",
    )


def _slow(model: Model, device: torch.device) -> list[str]:
    """What to say where the processor converts every number of `model.dtype` before it computes with it."""
    import torch

    needed = {"bfloat16": ("avx512_bf16", "amx_bf16"), "float16": ("avx512_fp16", "amx_fp16")}.get(model.dtype)
    # Older releases of torch do not tell, and other architectures name their instructions otherwise.
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if device.type != "cpu" or needed is None or has.get("architecture") != "x86_64" or any(map(has.get, needed)):
        return []
    return [f"model.dtype: this processor has no instructions for {model.dtype}: float32 is several times as fast here"]


def check_length(base: Base, max_length: int, virtual: int) -> None:
    """UserError where the model has too few positions for `max_length` tokens and `virtual` ones before them."""
    limit = base.max_positions
    if limit is not None and max_length + virtual > limit:
        raise UserError(
            f"data.max_length: {max_length} tokens and {virtual} virtual ones exceed the {limit} positions of "
            f"'{base.name}'{base.limited_by}: lower "
            + (f"data.max_length to {limit - virtual}" if virtual + 4 <= limit else "method.num_virtual_tokens")
        )


def autocast(base: Base, precision: str) -> AbstractContextManager[object]:
    """The autocast of `runtime.precision` on the base's device."""
    import torch

    if precision == "float32":
        return nullcontext()
    return torch.autocast(base.device.type, dtype=getattr(torch, precision))


def _load_config(model: Model, **options: Any) -> Any:
    with _loading(model, "model"):
        return transformers().AutoConfig.from_pretrained(
            source_of(model), revision=model.revision, trust_remote_code=model.trust_remote_code, **options
        )


def layer_stacks(model: Any) -> list[list[Any]]:
    """The layers of a transformer, bottom up: one list for its encoder or decoder, two where it has both."""
    from torch.nn import ModuleList

    stacks: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        if isinstance(module, ModuleList) and not any(path.startswith(f"{outer}.") for outer in stacks):
            stacks[path] = list(module)
    return list(stacks.values())


def embedding_modules(model: Any) -> list[Any]:
    """What is below the layers of a transformer: its embeddings, and what they have beside them, as BERT's a norm."""
    from torch.nn import Embedding

    layers = {id(module) for stack in layer_stacks(model) for layer in stack for module in layer.modules()}
    other = layers | {id(model.get_output_embeddings())}  # named embed_out in GPT-NeoX
    return [
        module
        for path, module in model.named_modules()
        if id(module) not in other and (isinstance(module, Embedding) or "embed" in path)
    ]


def layers_above(model: Any) -> dict[str, int]:
    """Path of a module -> how many layers of its stack are above the one that it is in.

    None are above what is behind the layers, and all of the longest stack above the embeddings.
    """
    stacks = layer_stacks(model)
    above = {id(module): max(map(len, stacks), default=0) for module in embedding_modules(model)}
    for stack in stacks:
        for number, layer in enumerate(reversed(stack)):
            above |= {id(module): number for module in layer.modules()}
    return {path: above.get(id(module), 0) for path, module in model.named_modules() if path}


def checkpoint_layers(model: Any) -> None:
    """Let every layer keep its input alone for the backward pass, and compute itself again there.

    transformers' own gradient checkpointing wants train mode and no cache, so that there could be no prefix.
    """
    for layer in (layer for stack in layer_stacks(model) for layer in stack):
        layer.forward = _checkpointed(layer.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from torch.utils.checkpoint import checkpoint

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Nothing in a layer draws from torch's own generators, so there is no state of theirs to keep.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


class _loading:  # noqa: N801  a context manager used like a function
    """Turns the many errors of a failed load into one line."""

    def __init__(self, model: Model, what: str) -> None:
        self.model, self.what = model, what

    def __enter__(self) -> None:
        logging = transformers().utils.logging
        logging.disable_progress_bar()  # one per rank would tear the run's own display
        logging.set_verbosity_error()  # what matters of its warnings is an error here

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # The libraries raise anything, from OSError (no such file or hub id) to classes of their own (half a file).
        if isinstance(error, Exception) and not isinstance(error, (UserError, TransportError)):
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            is_nowhere = isinstance(error, OSError) and not os.path.isabs(source_of(self.model))
            to_find = "give a folder that is there, or a hub id and a network to the hub (HF_HUB_OFFLINE must not be 1)"
            raise UserError(
                f"the {self.what} of '{self.model.name}' cannot be loaded: {first[:300].rstrip('.')}",
                key="model.name",
                remedy=to_find if is_nowhere else "",
            ) from error


def _draw(network: Any, new: Collection[str], seed: int) -> None:
    """Fill the parameters `new` as transformers does, but from a keyed generator.

    Matrices are normal, the weights of norms one and biases zero.
    """
    import torch

    noise = torch.Generator().manual_seed(torch_seed(seed, "head"))
    deviation = getattr(network.config, "initializer_range", 0.02)
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for name in sorted(new):
            parameter = parameters[name]
            parameter.copy_(
                torch.randn(parameter.shape, generator=noise) * deviation
                if parameter.ndim > 1
                else torch.full(parameter.shape, float(name.endswith(".weight")))
            )


def _fingerprint(network: Any, new: Collection[str]) -> str:
    """A hash of the stored weights, without the `new` ones, which follow from the run's seed.

    Collective over the ranks between which the weights are spread.
    """
    digest = hashlib.sha256()
    for name, tensor in _stored(network):
        if name in new:
            continue
        if hasattr(tensor, "full_tensor"):  # of torch.distributed, which is imported where a base is spread alone
            tensor = tensor.full_tensor()
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLE)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(flat[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _stored(network: Any) -> Iterator[tuple[str, Tensor]]:
    named = quantized.tensors(network) if quantized.layers(network) else network.named_parameters()
    yield from sorted(named, key=lambda item: str(item[0]))
