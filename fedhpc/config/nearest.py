"""Which key somebody meant who wrote one that there is not: hints for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress

from fedhpc import registry
from fedhpc.config.schema import KEYS, SECTIONS
from fedhpc.errors import UserError, nearest
from fedhpc.registry import flat_choices

#: What other programs and papers call a key: transformers, PEFT, TRL, Axolotl, LLaMA-Factory, Flower.
SYNONYMS = {
    "run.name": "experiment project run_name",
    "run.dir": "output_dir save_dir",
    "run.seed": "manual_seed random_seed random_state",
    "model.name": "base_model model_id model_name model_name_or_path model_path pretrained_model_name_or_path",
    "model.dtype": "torch_dtype",
    "model.quantize": "load_in_4bit load_in_8bit quantization quantization_bit quantization_config",
    "model.quantization_type": "bnb_4bit_quant_type quant_type",
    "model.double_quantization": "bnb_4bit_use_double_quant double_quant use_double_quant use_nested_quant",
    "model.quantization_library": "quant_method quantization_method",
    "data.source": "data_files data_path dataset dataset_name datasets ds_type file format path",
    "data.subset": "config config_name dataset_config_name",
    "data.train": "train_file train_split",
    "data.validation": "dev eval eval_file validation_file validation_split val",
    "data.test": "test_file test_split",
    "data.prompt": "input instruction prompt_template question template text text_column",
    "data.target": "answer completion output response",
    "data.messages": "chat chats conversation conversations dialog messages_field",
    "data.tools": "functions tools_column",
    "data.chat_template": "chat_template_file chat_template_path jinja",
    "data.train_on": "assistant_only_loss roles_to_train train_on_inputs train_on_responses_only",
    "data.label": "class label_column labels",
    "data.client": "client_column client_id group owner",
    "data.where": "filter",
    "data.max_length": "cutoff_len max_len max_seq_len max_seq_length model_max_length sequence_len",
    "data.client_from": "client_by client_files file_per_client per_client",
    "data.missing": "missing_keys optional",
    "data.overlong": "drop_long max_length_strategy overflow truncation truncation_mode",
    "partition.name": "partitioner",
    "partition.num_clients": "clients n_clients num_partitions num_supernodes",
    "partition.alpha": "beta concentration dirichlet_alpha",
    "method.name": "adapter peft peft_type",
    "method.from": "adapter_name_or_path adapter_path init_from resume_from_adapter start_from warm_start",
    "method.rank": "lora_r lora_rank r",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "method.targets": "lora_target lora_target_modules target_modules",
    "method.use_rslora": "rs_lora rslora",
    "method.use_dora": "dora",
    "method.init_lora_weights": "init_weights lora_init olora pissa pissa_init",
    "method.loraplus_lr_ratio": "lora_plus lora_plus_ratio loraplus loraplus_ratio",
    "method.exclude_modules": "exclude exclude_targets",
    "method.num_virtual_tokens": "num_tokens prefix_length prompt_length",
    "federation.rounds": "comm_round communication_rounds global_rounds n_rounds num_rounds num_server_rounds",
    "federation.cohort_size": "clients_per_round num_clients_per_round sample_clients",
    "federation.cohort_fraction": "fraction fraction_fit fraction_train participation_rate sample_rate",
    "federation.min_cohort": "min_available_clients min_clients min_fit_clients min_train_nodes",
    "client.optimizer": "optim",
    "client.lr": "client_lr learning_rate local_lr",
    "client.layer_lr_decay": "layer_decay layerwise_lr_decay layer_wise_lr_decay llrd lr_layer_decay",
    "client.batch_size": "bs local_batch_size per_device_train_batch_size train_batch_size",
    "client.gradient_accumulation_steps": "accumulate_grad_batches accumulation accumulation_steps grad_accum_steps",
    "client.micro_batch": "micro_batch_size micro_bs",
    "client.packing": "group_by_length multipack pack sample_packing",
    "client.epochs": "local_epochs num_epochs num_local_epochs num_train_epochs",
    "client.steps": "local_steps max_steps num_local_steps num_steps",
    "client.clip_norm": "grad_clip gradient_clipping max_grad_norm",
    "client.proximal": "fedprox mu prox_mu proximal_mu",
    "client.schedule": "lr_scheduler lr_scheduler_type scheduler",
    "client.lr_min": "eta_min learning_rate_min lr_end min_lr",
    "client.warmup": "warmup_ratio warmup_steps",
    "server.aggregator": "aggregation algorithm strategy",
    "server.lr": "server_learning_rate server_lr",
    "evaluation.every": "eval_every eval_steps",
    "evaluation.batch_size": "eval_batch_size per_device_eval_batch_size",
    "evaluation.max_examples": "max_eval_samples",
    "runtime.transport": "backend",
    "runtime.precision": "bf16 fp16 mixed_precision",
    "checkpoint.every": "save_every save_steps",
}


def hint(section: str, word: str, valid: Sequence[str]) -> str:
    """What may be meant by a key that its section has not: a synonym, a key of another section, or one written alike.

    valid: the keys that the section has.
    """
    alike = difflib.get_close_matches(word, valid, n=1, cutoff=0.75)
    synonyms = [key for key, words in SYNONYMS.items() if word in words.split()]
    here = [key for key in synonyms if key.startswith(f"{section}.")]
    keys = here or _of_that_name(section, word) or ([] if alike else synonyms or _like_a_synonym(section, word))
    meant = " or ".join(map(_with_choice, keys[:3])) if keys else "".join(f"'{key}'" for key in alike)
    return (f"did you mean {meant}? " if meant else "") + f"valid: {', '.join(valid)}"


def section_hint(name: str, words: Sequence[str]) -> str:
    """What may be meant by a section that there is not. words: the keys that were given in it."""
    alike = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.75)
    hints = [] if alike else [hint(name, word, KEYS) for word in (name, *words)]
    return next((text for text in hints if text.startswith("did")), nearest(name, KEYS))


def _like_a_synonym(section: str, word: str) -> list[str]:
    """The key, if possible of the section, that other programs call something like `word`."""
    names = {word: key for key, words in SYNONYMS.items() for word in words.split()}
    alike = [names[name] for name in difflib.get_close_matches(word, names, n=3, cutoff=0.8)]
    return [key for key in alike if key.startswith(f"{section}.")][:1] or alike[:1]


def _of_that_name(section: str, word: str) -> list[str]:
    """The keys with this name: of the section's other choices, else of other sections, else of their choices."""
    plain = [f"{name}.{word}" for name, model in SECTIONS.items() if word in model.model_fields]
    of_choices = [f"{name}.{word}" for name in SECTIONS if _choices_with(name, word)]
    return [key for key in of_choices if key == f"{section}.{word}"] or plain or of_choices


def _with_choice(key: str) -> str:
    section, word = key.split(".")
    choices = [] if word in SECTIONS[section].model_fields else _choices_with(section, word)
    return f"'{key}'" + (f" (with {' or '.join(choices[:3])})" if choices else "")


def _choices_with(section: str, word: str) -> list[str]:
    """The choices of a section that have this option, like "client.optimizer sgd"."""
    choices = []
    for key, family in flat_choices(SECTIONS[section]).items():
        for name in registry.names(family):
            with suppress(UserError):  # of a file that cannot be imported here, which is no hint then
                if word in registry.options(family, name).model_fields:
                    choices.append(f"{section}.{key} {name}")
    return choices
