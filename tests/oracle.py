"""Every causal, encoder and seq2seq class of the installed transformers, tiny and random, beside references.

    python -m tests.oracle [--task causal_lm] [--only llama ...] [--table docs/models.md]

A class is loaded as a user's model would be, from a folder. It works or is refused in one line (UserError). Where it
works, these agree with transformers itself, which sees every row alone and without padding:

- the base's losses; its losses in a padded batch; its texts in a padded batch with `generate`
- a federated round of two clients (two steps of SGD, one forward for both) of LoRA, prompt and prefix, with PEFT's own
  layers for LoRA, with embeddings or keys and values put in front by hand for the others, and torch.optim
- the texts behind what that round gave, with a forward over the whole text for every token
- an exported LoRA adapter's losses in PEFT
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.config import Model
from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.errors import UserError
from fedhpc.methods import with_head
from fedhpc.methods.base import Method
from fedhpc.models.load import BUILTIN, MODELS, load_base, model_class
from fedhpc.training.block import Work
from fedhpc.training.schedule import batches
from tests import tiny

TOLERANCE = 1e-4  # float32: of losses, and of what a round changes relative to its norm
VOCABULARY = 802  # of the built-in tokenizer
VIRTUAL, NEW_TOKENS = 4, 6
CLIENT = {"optimizer": "sgd", "batch_size": 3, "steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "alpha": 4.0},
    "prompt": {"num_virtual_tokens": VIRTUAL},
    "prefix": {"num_virtual_tokens": VIRTUAL},
}
_MAPPINGS = {
    "causal_lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": {
        name: model
        for name, model in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items()
        if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    },
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

# ---------------------------------------------------------------- tiny configurations

# Fields of a configuration by name, wherever they occur, also in the parts of a multimodal one.
_SIZES = {
    "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim emb_dim attention_hidden_size": 32,
    "pooler_hidden_size hidden_size_global encoder_hidden_size image_size": 32,
    "intermediate_size ffn_dim n_inner d_ff d_inner dff dim_ff hidden_dim encoder_ffn_dim decoder_ffn_dim": 48,
    "ffn_hidden_size intermediate_size_mlp": 48,
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size qk_head_dim": 16,
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size": 16,
    "sliding_window window_size sliding_window_size attention_window local_attention": 16,
    "head_dim d_kv d_head dim_head kv_channels swa_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim": 8,
    "kv_lora_rank index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head": 8,
    "mamba_head_dim q_lora_rank o_lora_rank mamba_dt_rank time_step_rank laurel_rank hc_lowrank": 8,
    "hidden_size_per_layer_input rotary_dim query_pre_attn_scalar mamba_d_state ssm_state_size state_size": 8,
    "chunk_size mamba_chunk_size": 8,
    "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads": 4,
    "decoder_attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads mamba_n_heads": 4,
    "mamba_num_heads num_experts n_routed_experts num_local_experts moe_num_experts": 4,
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads index_n_heads": 2,
    "n_mamba_heads o_groups num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k": 2,
    "num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers num_decoder_layers": 2,
    "num_encoder_layers eos_token_id": 2,
    "n_group topk_group num_expert_group n_groups mamba_n_groups first_k_dense_replace bos_token_id": 1,
    "pad_token_id decoder_start_token_id": 0,
    "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions": 96,
    "max_source_positions max_encoder_position_embeddings index_topk": 96,
    "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size decoder_vocab_size": VOCABULARY,
}
_SMALL: dict[str, int] = {name: size for names, size in _SIZES.items() for name in names.split()}
# Those that are given also where the default is None.
_ALWAYS = (
    "vocab_size", "head_dim", "num_key_value_heads", "num_experts_per_tok", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
# What the names alone do not give, by model type; with a dot, of a part.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            one: {"rope_type": "default", "rope_theta": 1e4} for one in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "dots1": {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "longcat_flash": {"expert_ffn_hidden_size": 16},
    "luke": {"entity_vocab_size": 10},
    "mamba2": {"num_heads": 8},
    # As their own losses, which begin with the last token of the target.
    "mbart": {"decoder_start_token_id": 2},
    "plbart": {"decoder_start_token_id": 2},
    "perceiver": {
        "d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2, "qk_channels": 32, "v_channels": 32,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "lsh_attn_chunk_length": 64,
        "local_attn_chunk_length": 64, "num_buckets": 4,
    },
    "roc_bert": {"pronunciation_vocab_size": 10, "shape_vocab_size": 10},
    "t5gemma": {"decoder_start_token_id": 1},
    "t5gemma2": {"decoder_start_token_id": 1},
    "xlstm": {"chunk_size": 8, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(kind: type, more: Mapping[str, Any] = {}) -> Any:
    """A configuration of this class with every size small. more: fields that override, with a dot those of a part."""
    default = kind()
    fields = (
        {one.name for one in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set(default.to_dict())
    )
    overrides = {**_EXCEPTIONS.get(default.model_type, {}), **more}
    values: dict[str, Any] = {}
    for name in sorted(fields):
        value = _default(default, name)
        if isinstance(value, tf.PretrainedConfig):
            of_part = {key.partition(".")[2]: v for key, v in overrides.items() if key.startswith(f"{name}.")}
            values[name] = tiny_config(type(value), of_part)
        elif isinstance(value, bool):
            continue
        elif name in _SMALL and (value is not None or name in _ALWAYS):
            values[name] = _SMALL[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            values[name] = VOCABULARY - 1  # the special tokens of images and the like, which no text here has
    given = {name: value for name, value in overrides.items() if "." not in name}
    values |= given
    layers = next((n for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if n in values), None)
    if "kv_lora_rank" in fields:  # latent attention makes keys and values for every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    if layers:
        for name in fields & {"layer_types", "layers_block_type"} - set(given):
            if kinds := _default(default, name):
                different = list(dict.fromkeys(kinds))
                values[name] = different if len(different) > 1 else different * 2
                values[layers] = len(values[name])
        for name in fields - {"layer_types", "layers_block_type"}:  # other lists with a value for each layer
            value = _default(default, name)
            if isinstance(value, list) and len(value) == _default(default, layers):
                values[name] = [values[name]] * values[layers] if name in values else value[: values[layers]]
    return kind(**{**values, **given})


def _default(config: Any, name: str) -> Any:
    """A field of a configuration; 1 where it differs from layer to layer, which some classes refuse to say."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return 1


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """A class of transformers, by the task that it is loaded for and its model type."""

    task: str
    model_type: str

    def __str__(self) -> str:
        return f"{self.task}-{self.model_type}"

    @property
    def class_name(self) -> str:
        """The class in transformers."""
        return str(_MAPPINGS[self.task][self.model_type])

    def config(self) -> Any:
        """A tiny configuration with which it is of this task."""
        kind = tf.CONFIG_MAPPING[self.model_type]
        more = {}
        if self.task == "causal_lm":  # the decoders of BERT's and BART's kind are such only if they say so
            fields = set(kind().to_dict()) | set(vars(kind))
            more = {k: v for k, v in (("is_decoder", True), ("is_encoder_decoder", False)) if k in fields}
            more = more if self.model_type in _TWO_WAYS else {}
        config = tiny_config(kind, more)
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0  # which no class of T5's kind has as a field
        if self.task == "classification":
            config.id2label, config.label2id = dict(enumerate(LABELS)), {name: i for i, name in enumerate(LABELS)}
        return config


# Model types whose class for causal language modelling wants to be told that it is one.
_TWO_WAYS = frozenset(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & (
    frozenset(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    | frozenset(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    | {"bert-generation", "reformer", "trocr", "whisper"}
)


def cases() -> list[Case]:
    """All classes of the installed transformers."""
    return [Case(task, model_type) for task, mapping in _MAPPINGS.items() for model_type in sorted(mapping)]


@dataclass
class Verdict:
    """What became of a class: each check by name -> "" where it agrees, else what is wrong or why it is refused."""

    case: Case
    refused: str = ""  # the line that refuses it altogether
    unmade: str = ""  # why transformers itself cannot make it here
    wrong: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)  # method -> the line that refuses it
    agreed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        """Whether it can be trained, and all that it does is right."""
        return not self.refused and not self.unmade and not self.wrong and "lora" in self.agreed


def judge(case: Case, folder: Path) -> Verdict:
    """Load a class from `folder`, where it is put first, and compare it with transformers."""
    verdict, began = Verdict(case), time.perf_counter()
    try:
        _judge(case, folder, verdict)
    finally:
        verdict.seconds = time.perf_counter() - began
    return verdict


def _judge(case: Case, folder: Path, verdict: Verdict) -> None:
    model = Model.model_validate({"name": str(folder), "task": case.task})
    try:
        config = case.config()
    except Exception as error:  # a class whose sizes the table above does not get right
        verdict.unmade = _last_line(error)
        return
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / file, folder / file)
    try:
        model_class(model)
    except UserError as error:
        verdict.refused = _one_line(error, folder)
        return
    try:
        torch.manual_seed(0)
        network = getattr(tf, MODELS[case.task].auto_class).from_config(config).eval()
        with torch.no_grad():
            text = _ids([*range(3, 12), 2])  # which the classifiers of encoder-decoders want to end with eos
            network(input_ids=text, use_cache=False, **_other_inputs(case.task))
    except Exception as error:  # whatever its own code raises: then it is not for us to load
        verdict.unmade = _last_line(error)
    else:
        _enlarge(network)
        network.save_pretrained(folder)
    try:
        labels = LABELS if case.task == "classification" else []
        base = load_base(model, torch.device("cpu"), labels)
    except UserError as error:
        verdict.refused = _one_line(error, folder)
        return
    except Exception as error:
        verdict.wrong["load"] = _last_line(error)
        return
    plain = getattr(tf, MODELS[case.task].auto_class).from_pretrained(folder, dtype=torch.float32)
    plain.eval().requires_grad_(False)
    Comparison(base, plain, verdict).run()
    if not verdict.wrong and "lora" not in verdict.agreed:  # then nothing can be trained in it
        verdict.refused = verdict.refusals["lora"]


LABELS = ["a", "b", "c"]


def _other_inputs(task: str) -> dict[str, Tensor]:
    return {"decoder_input_ids": torch.arange(3, 9).unsqueeze(0)} if task == "seq2seq" else {}


def _enlarge(network: Any) -> None:
    """Weights larger than usual: attention is not even, no norm or bias is idle, and what a payload does shows."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype))
        for module in network.modules():
            linear = type(module).__name__ in ("Linear", "Conv1D") or isinstance(module, torch.nn.Embedding)
            if linear and module is not network.get_input_embeddings():
                # T5 does not scale its attention, so larger weights would make it chaotic.
                module.weight.mul_(1.0 if hasattr(network.config, "d_kv") else 4.0)


def _one_line(error: UserError, folder: Path) -> str:
    text = str(error)
    assert "\n" not in text, text
    return text.replace(str(folder), "...")


def _last_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/fedhpc/" in f.filename] or frames
    where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0][:200]}{' ...' + said[-1][:200] if len(said) > 1 else ''}{where}"


# ---------------------------------------------------------------- comparison

SIZES = (5, 7)  # rows of the two clients
Pairs = Sequence[tuple[Tensor, Tensor]]


class Comparison:
    """A loaded base beside transformers' own model with the same weights, `plain`."""

    def __init__(self, base: Any, plain: Any, verdict: Verdict) -> None:
        self.base, self.plain, self.verdict, self.task = base, plain, verdict, verdict.case.task
        self.data = _rows(self.task)
        self.objective = tiny.objective(base)
        bounds = np.cumsum([0, *SIZES])
        self.works = [Work(i, np.arange(bounds[i], bounds[i + 1])) for i in range(len(SIZES))]

    def run(self) -> None:
        self._check("base loss", self._base_loss)
        self._check("padded", self._padded)
        if self.task != "classification":
            self._check("texts", self._texts)
        for name in METHODS:
            self._check(name, lambda name=name: self._method(name))

    def _check(self, what: str, compare: Callable[[], str]) -> None:
        try:
            wrong = compare()
        except UserError as error:
            self.verdict.refusals[what] = _one_line(error, Path(self.base.name))
            return
        except Exception as error:
            wrong = _last_line(error)
        if wrong:
            self.verdict.wrong[what] = wrong
        else:
            self.verdict.agreed.append(what)

    # ---- the base

    def ours(self, indices: Sequence[int], method: Method | None = None, payload: Tensor | None = None) -> list[Tensor]:
        """The losses of the supervised tokens of each row, all in one padded batch."""
        rows = np.asarray(indices)
        batch = self.objective.batch(self.base, self.data, rows, np.zeros(len(rows), np.int64))
        with torch.no_grad(), self._attached(method, payload, len(rows)) as attached:
            losses = self.objective.losses(self.base, attached, batch)
        return [losses[batch.row == row] for row in range(len(rows))]

    def _attached(self, method: Method | None, payload: Tensor | None, rows: int) -> Any:
        from contextlib import nullcontext

        from fedhpc.models.base import Attached

        if method is None:
            return nullcontext(Attached())
        assert payload is not None
        views = method.payload.views(payload)
        return method.attach(views, views, torch.zeros(rows, dtype=torch.int64))

    def _base_loss(self) -> str:
        """Transformers' own loss of each row, from labels. The decoders of BART's kind do not shift them themselves."""
        worst = 0.0
        for row in range(len(self.data)):
            ours, inputs = float(self.ours([row])[0].mean()), self._labelled(row)
            shifted = torch.nn.functional.pad(inputs["labels"][..., 1:], (0, 1), value=-100)
            forms = [inputs, {**inputs, "labels": shifted}] if self.task == "causal_lm" else [inputs]
            with torch.no_grad():
                try:
                    theirs = [float(self.plain(**form).loss) for form in forms]
                except ValueError:  # GIT's counts the places of its images
                    theirs = [float(self.losses(self.plain, row).mean())]
            worst = max(worst, min(abs(ours - one) for one in theirs))
        return "" if worst < TOLERANCE else f"the base's loss is {worst:.2g} from transformers' own"

    def _labelled(self, row: int) -> dict[str, Tensor]:
        ids = _ids(self.data.tokens(row))
        if self.task == "classification":
            return {"input_ids": ids, "labels": torch.tensor([int(self.data.labels[row])])}
        if self.task == "seq2seq":
            return {"input_ids": _ids(self.data.prompt(row)), "labels": _ids(self.data.target(row))}
        labels = ids.clone()
        labels[:, : int(self.data.prompt_lengths[row])] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}

    def _padded(self) -> str:
        together = self.ours(range(len(self.data)))
        worst = max(float((together[row] - self.ours([row])[0]).abs().max()) for row in range(len(self.data)))
        return "" if worst < TOLERANCE else f"a row's loss changes by {worst:.2g} beside others"

    def _texts(self) -> str:
        """`generate` of transformers, each prompt alone, and ours in a batch."""
        start = getattr(self.plain.config, "decoder_start_token_id", None)
        plain = tf.GenerationConfig(
            do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=2, pad_token_id=0, bos_token_id=1,
            decoder_start_token_id=start,
        )  # fmt: skip
        self.plain.generation_config = plain  # without what the class itself forces upon a text, such as its last token
        ours = self._write(None, None)
        for row, text in zip(PROMPTS, ours, strict=True):
            prompt = _ids(self.data.prompt(row))
            try:
                with torch.no_grad():
                    written = self.plain.generate(
                        prompt, attention_mask=torch.ones_like(prompt), generation_config=plain
                    )
            except Exception:  # some cannot generate at such sizes, or not without images
                written = torch.tensor([[*prompt[0].tolist(), *token_by_token(self.next_logits, row)]])
            theirs = written[0, 1 if self.task == "seq2seq" else prompt.shape[1] :].tolist()
            theirs = theirs[: theirs.index(2)] if 2 in theirs else theirs
            if text == theirs or self._tie(self.next_logits, row, text, theirs):
                continue
            if text != token_by_token(self.next_logits, row):
                return f"row {row} in a batch: {text}, generate: {theirs}"
            self.verdict.notes.append("its generate is not what its own forward gives, token by token; fedhpc's is")
            break
        return ""

    def _write(self, method: Method | None, payload: Tensor | None) -> list[list[int]]:
        """Our texts behind all prompts at once."""
        prompts = [self.data.prompt(row) for row in PROMPTS]
        with torch.no_grad(), self._attached(method, payload, len(prompts)) as attached:
            written = self.base.generate(attached, prompts, NEW_TOKENS)
        return [[token for token in row if token >= 0] for row in written.tolist()]

    def next_logits(self, row: int, text: list[int]) -> Tensor:
        """The logits (V,) behind a prompt and what was written so far, by transformers alone."""
        with torch.no_grad():
            return self.logits(self.plain, row, text)[-1]

    def _tie(self, logits: Callable[[int, list[int]], Tensor], row: int, ours: list[int], theirs: list[int]) -> bool:
        """Whether two texts part where the best two tokens are as good as equal."""
        common = 0
        while common < min(len(ours), len(theirs)) and ours[common] == theirs[common]:
            common += 1
        best, second = logits(row, ours[:common]).float().topk(2).values.tolist()
        return best - second < TOLERANCE

    # ---- forwards of transformers, one row and no padding

    def logits(
        self, network: Any, row: int, text: list[int] | None, soft: Tensor | None = None, past: Pairs | None = None
    ) -> Tensor:
        """Logits (T, V) of a row behind embeddings `soft` (n, D) or keys and values `past`.

        text: what follows the prompt; None: the row's own target, without its last token.
        """
        ids = _ids(self.data.tokens(row)) if self.task != "seq2seq" else _ids(self.data.prompt(row))
        if self.task == "causal_lm":
            ids = _ids([*self.data.prompt(row), *text]) if text is not None else ids[:, :-1]
        n = len(soft) if soft is not None else past[0][0].shape[2] if past and self.task != "seq2seq" else 0
        more: dict[str, Any] = {"attention_mask": torch.ones(1, n + ids.shape[1], dtype=torch.int64)}
        if self.task == "seq2seq":
            target = list(self.data.target(row)[:-1]) if text is None else text
            start = network.config.decoder_start_token_id
            more["decoder_input_ids"] = _ids([start, *target])
        elif self.task == "causal_lm":
            more["use_cache"] = bool(past)
        if past:
            cache = tf.DynamicCache([(k, v) for k, v in past])
            more["past_key_values"] = (
                tf.EncoderDecoderCache(cache, tf.DynamicCache()) if self.task == "seq2seq" else cache
            )
        if soft is None:
            inputs = {"input_ids": ids}
        else:
            embedded = network.get_input_embeddings()(ids)
            inputs = {"inputs_embeds": torch.cat([soft.unsqueeze(0), embedded], dim=1)}
        if self.task == "classification":
            return self._classify(network, inputs, more)
        logits: Tensor = network(**inputs, **more).logits[0]
        return logits[n:] if self.task == "causal_lm" and soft is not None else logits

    def _classify(self, network: Any, inputs: dict[str, Tensor], more: dict[str, Any]) -> Tensor:
        """The classifier hands no cache on, so its encoder is given one."""
        cache = more.pop("past_key_values", None)
        backbone = network.base_model if not hasattr(network, "peft_config") else network.base_model.model.base_model
        hook = backbone.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, **({"past_key_values": cache} if cache else {})}),
            with_kwargs=True,
        )
        try:
            logits: Tensor = network(**inputs, **more).logits
        finally:
            hook.remove()
        return logits

    def losses(self, network: Any, row: int, soft: Tensor | None = None, past: Pairs | None = None) -> Tensor:
        """Losses of the supervised tokens of a row."""
        logits = self.logits(network, row, None, soft, past).float()
        if self.task == "classification":
            target = torch.tensor([int(self.data.labels[row])])
        else:
            target = _ids(self.data.target(row))[0]
            logits = logits[-len(target) :]
        return torch.nn.functional.cross_entropy(logits, target, reduction="none")

    # ---- methods

    def _method(self, name: str) -> str:
        """A federated round of a method, what it writes then, and what of it PEFT reads."""
        method = self._make(name)
        start = method.payload.flatten({n: t.float() for n, t in method.initial().items()}).unsqueeze(0)
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(3))
        start = start + 0.1 * noise * start.std().clamp(min=0.1)
        reference = _REFERENCES[name](self, method)
        config = self._config(reference, start)
        updates = tiny.train(self.base, method, self.objective, start, self.works, self.data, config).updates
        shares = torch.tensor(SIZES) / sum(SIZES)
        after = start - (shares.unsqueeze(1) * updates).sum(dim=0, keepdim=True)
        before, found = reference.of(start[0]), reference.of(after[0])
        wanted = reference.round(before, shares, config)
        moved = _norm([w - b for w, b in zip(wanted, before, strict=True)])
        error = _norm([f - w for f, w in zip(found, wanted, strict=True)]) / max(moved, 1e-12)
        if not moved > 1e-5:
            return f"the round changes nothing: {moved:.2g}"
        if not error < TOLERANCE:
            return f"a round is {error:.2g} of what it changes off"
        reference.put(found)
        if self.task != "classification":
            for row, text in zip(PROMPTS, self._write(method, after), strict=True):
                theirs = reference.text(row)
                if text != theirs and not self._tie(reference.next_logits, row, text, theirs):
                    return f"row {row} in a batch: {text}, a token at a time: {theirs}"
        return self._exported(method, after) if name == "lora" else ""

    def _config(self, reference: Reference, start: Tensor) -> Any:
        """The clients' training; steps so long that they show beside what is trained in 32 bits."""
        values = reference.put(reference.of(start[0]))
        torch.cat([self.losses(reference.network, row, **reference.inputs()) for row in range(4)]).mean().backward()
        gradient = _norm([value.grad for value in values if value.grad is not None])
        lr = 0.2 * float(start.norm()) / max(gradient, 1e-6)
        return configuration.resolve({"partition": {"name": "iid"}, "client": {**CLIENT, "lr": lr}})

    def _make(self, name: str, targets: Sequence[str] = ()) -> Method:
        """A method. Where layers are not called as Llama's, LoRA goes on one of those that the refusal names.

        The first refusal lists all linear layers; where that one is not for text, the next lists those that are.
        """
        options = registry.options("methods", name)(**METHODS[name], **({"targets": [*targets]} if targets else {}))
        try:
            method = with_head(registry.choice("methods", name)(options, self.base, 0))
        except UserError as error:
            offers = ("it has: ", "it does: ")
            there = next((str(error).split(offer)[1].split(", ") for offer in offers if offer in str(error)), [])
            likely = [layer for layer in there if any(part in layer for part in ("q", "in_proj", "att"))]
            chosen = (likely or there)[:1]
            if name != "lora" or not chosen or chosen == [*targets]:
                raise
            return self._make(name, chosen)
        if targets:
            self.verdict.notes.append(f"lora needs method.targets (here {targets[0]})")
        return method

    def _exported(self, method: Method, payload: Tensor) -> str:
        """The losses of the exported adapter in PEFT."""
        import peft

        with tempfile.TemporaryDirectory() as folder:
            method.export(method.payload.views(payload[0]), Path(folder))
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(self.plain), folder).eval()
        ours = self.ours(range(4), method, payload)
        with torch.no_grad():
            worst = max(float((self.losses(loaded, row) - ours[row]).abs().max()) for row in range(4))
        return "" if worst < TOLERANCE else f"the exported adapter's loss in PEFT is {worst:.2g} off"


class Reference:
    """What a method trains as plain tensors, and transformers' model behind them."""

    def __init__(self, comparison: Comparison, method: Method) -> None:
        self.comparison, self.method = comparison, method
        self.network = copy.deepcopy(comparison.plain)
        parameters = dict(self.network.named_parameters())
        #: Parameters of the network itself that are trained too: a classifier's head.
        self.head = {name: parameters[name] for name in method.payload.shapes if name in parameters}

    def of(self, payload: Tensor) -> list[Tensor]:
        """A payload (P,) as the tensors that are trained here."""
        views = self.method.payload.views(payload)
        return [*self.own(views, payload), *(views[name] for name in self.head)]

    def own(self, views: Mapping[str, Tensor], payload: Tensor) -> list[Tensor]:
        """Those beside the head."""
        raise NotImplementedError

    def put(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Take these values, and return the tensors to train."""
        heads = list(self.head.values())
        self.values = [value.detach().clone().requires_grad_() for value in values[: len(values) - len(heads)]]
        with torch.no_grad():
            for parameter, value in zip(heads, values[len(self.values) :], strict=True):
                parameter.copy_(value)
        return [*self.values, *(parameter.requires_grad_() for parameter in heads)]

    def inputs(self) -> dict[str, Any]:
        """What the forward is given beside the row."""
        return {}

    def round(self, before: Sequence[Tensor], shares: Tensor, config: Any) -> list[Tensor]:
        """A federated round of plain SGD: the mean of what the clients have after their steps."""
        c = self.comparison
        total = [torch.zeros_like(value) for value in before]
        for work, share in zip(c.works, shares.tolist(), strict=True):
            trained = self.put(before)
            rule = torch.optim.SGD(trained, lr=config.client.lr)
            for picked in batches(len(work.indices), config.client, config.run.seed, 1, work.client_id):
                losses = torch.cat([c.losses(self.network, int(row), **self.inputs()) for row in work.indices[picked]])
                rule.zero_grad()
                losses.mean().backward()
                rule.step()
            total = [t + share * value.detach() for t, value in zip(total, trained, strict=True)]
        return total

    def next_logits(self, row: int, text: list[int]) -> Tensor:
        """The logits behind a prompt and what was written so far."""
        with torch.no_grad():
            return self.comparison.logits(self.network, row, text, **self.inputs())[-1]

    def text(self, row: int) -> list[int]:
        """What the method writes behind a prompt."""
        return token_by_token(self.next_logits, row)


class _Lora(Reference):
    """PEFT's own layers."""

    def __init__(self, comparison: Comparison, method: Method) -> None:
        import peft

        super().__init__(comparison, method)
        inner: Any = getattr(method, "method", method)  # without the head
        options = METHODS["lora"]
        config = peft.LoraConfig(r=options["rank"], lora_alpha=options["alpha"], target_modules=inner.targets)
        self.network = peft.get_peft_model(self.network, config).eval()
        found = {n.replace(".default", ""): p for n, p in self.network.named_parameters() if "lora_" in n}
        self.names = [name for name in method.payload.shapes if name not in self.head]
        wanted = {f"base_model.model.{name}" for name in self.names}
        assert wanted == set(found), f"PEFT adapts other layers: {sorted(wanted ^ set(found))[:3]}"
        self.parameters = [found[f"base_model.model.{name}"] for name in self.names]

    def own(self, views: Mapping[str, Tensor], payload: Tensor) -> list[Tensor]:
        return [views[name] for name in self.names]

    def put(self, values: Sequence[Tensor]) -> list[Tensor]:
        trained = [*self.parameters, *self.head.values()]
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
        return [parameter.requires_grad_() for parameter in trained]


class _Prompt(Reference):
    """Embeddings in front of those of the text."""

    def own(self, views: Mapping[str, Tensor], payload: Tensor) -> list[Tensor]:
        return [views["prompt_embeddings"]]

    def inputs(self) -> dict[str, Any]:
        return {"soft": self.values[0]}


class _Prefix(Reference):
    """Keys and values in transformers' own cache."""

    def own(self, views: Mapping[str, Tensor], payload: Tensor) -> list[Tensor]:
        batched = self.method.payload.views(payload.unsqueeze(0))
        with self.method.attach(batched, batched, torch.zeros(1, dtype=torch.int64)) as attached:
            return [tensor for pair in attached.past for tensor in pair]

    def inputs(self) -> dict[str, Any]:
        return {"past": list(zip(self.values[0::2], self.values[1::2], strict=True))}


_REFERENCES: dict[str, type[Reference]] = {"lora": _Lora, "prompt": _Prompt, "prefix": _Prefix}
PROMPTS = (0, 5, 9)  # rows of unequal length


def token_by_token(next_logits: Callable[[int, list[int]], Tensor], row: int) -> list[int]:
    """The most likely token again and again, each from a forward over everything before it."""
    text: list[int] = []
    while len(text) < NEW_TOKENS:
        token = int(next_logits(row, text).argmax())
        if token == 2:
            break
        text.append(token)
    return text


def _rows(task: str) -> Examples:
    """Twelve rows of unequal length; no id is a special token or one of images."""
    rng = np.random.default_rng(0)
    rows, prompts = [], []
    for i in range(sum(SIZES)):
        text = rng.integers(3, 700, 4 + (5 * i) % 17)
        begin, end = ([], [2]) if task == "seq2seq" else ([1], [])
        prompt = np.array([*begin, *text, *end])
        target = np.array([]) if task == "classification" else np.array([*rng.integers(3, 700, 1 + (3 * i) % 7), 2])
        rows.append(np.concatenate([prompt, [2] if task == "classification" else target]).astype(np.int32))
        prompts.append(len(rows[-1]) if task == "classification" else len(prompt))
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    tokens = Tokens(np.concatenate(rows), offsets, np.array(prompts, dtype=np.int32))
    if task != "classification":
        return examples_from(tokens)
    return examples_from(tokens, labels=rng.integers(0, 3, len(rows)).astype(np.int32), label_names=LABELS)


def _ids(tokens: Any) -> Tensor:
    return torch.tensor([[int(token) for token in tokens]])


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.sqrt(sum((t.double() ** 2).sum() for t in tensors)))


# ---------------------------------------------------------------- by hand


def verdicts(wanted: Sequence[Case]) -> Iterator[Verdict]:
    """Judge these classes, each in a folder of its own that is gone afterwards."""
    for case in wanted:
        with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
            yield judge(case, Path(folder))


def line(verdict: Verdict) -> str:
    """What became of a class, in one line."""
    state = "works" if verdict.works else "unmade" if verdict.unmade else "refused" if verdict.refused else "FAILS"
    parts = [verdict.unmade or verdict.refused]
    parts += [f"{what}: {text}" for what, text in verdict.wrong.items()]
    parts += [f"({what} refused: {text})" for what, text in verdict.refusals.items()] + verdict.notes
    return f"{state:8} {verdict.case!s:40} {verdict.seconds:5.1f} s  " + " | ".join(part for part in parts if part)


#: Sections of the page docs/models.md.
TITLES = {"causal_lm": "Causal language models", "classification": "Encoders", "seq2seq": "Encoder-decoders"}


def table(judged: Sequence[Verdict]) -> str:
    """The page docs/models.md: what works and what is refused, by class."""
    import peft

    lines = [
        "# Models, class by class",
        "",
        f"Written by `python -m tests.oracle --table docs/models.md` with transformers {tf.__version__}, PEFT "
        f"{peft.__version__} and torch {torch.__version__}. Every class that transformers offers was made tiny and "
        "random, loaded from a folder, and compared with transformers itself, which saw each row alone: losses of the "
        "base, losses in a padded batch, texts, a federated round of LoRA, prompt and prefix (to 1e-4 of what it "
        "changes, in float32), what is written after it, and the exported LoRA adapter in PEFT. *Works* says that all "
        "of it agrees, or that a method is refused in one line where the class has no room for it. Classes for images "
        "or sound count too: with text alone.",
    ]
    for task, title in TITLES.items():
        of_task = [verdict for verdict in judged if verdict.case.task == task]
        if not of_task:
            continue
        works = [verdict for verdict in of_task if verdict.works]
        lines += ["", f"## {title}: {len(works)} of {len(of_task)} work", "", "| class | result | |", "|---|---|---|"]
        for verdict in sorted(of_task, key=lambda one: one.case.model_type):
            notes = [f"{what} refused" for what in verdict.refusals] + verdict.notes
            notes += [f"**{what}: {text}**" for what, text in verdict.wrong.items()]
            why = verdict.unmade or verdict.refused.partition(": ")[2] or "; ".join(notes)
            result = (
                "works"
                if verdict.works
                else "not tried"
                if verdict.unmade
                else "refused"
                if verdict.refused
                else "fails"
            )
            lines.append(
                f"| {verdict.case.class_name} (`{verdict.case.model_type}`) | {result} | {why[:200]} |".replace(
                    "\n", " "
                )
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", action="append", choices=list(_MAPPINGS))
    parser.add_argument("--only", nargs="*", help="model types")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the page docs/models.md")
    options = parser.parse_args()
    quiet()
    wanted = [c for c in cases() if (not options.task or c.task in options.task)]
    wanted = [c for c in wanted if not options.only or c.model_type in options.only]
    judged = []
    for verdict in verdicts(wanted):
        judged.append(verdict)
        print(line(verdict), flush=True)
        if options.table:
            options.table.write_text(table(judged), encoding="utf-8")


def quiet() -> None:
    """What transformers and PEFT say of tiny random models is of no interest."""
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    main()
