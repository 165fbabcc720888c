"""The gate of a refactoring in which no bit of a result may change.

    python tests/gate.py record SOURCE OUT [--only PATTERN] [--quick] [--inputs DIR]
    python tests/gate.py compare OLD NEW
    python tests/gate.py resume SOURCE OLD NEW

`record` runs small configurations, which together use every choice of the program, with the package of the checkout
SOURCE and keeps their run directories in OUT. Each runs on one rank, on 3 and some on 2 ranks, and once interrupted
and resumed; these must agree with each other. `compare` shows what two records differ in. `resume` lets SOURCE finish
the interrupted runs of an older record and compares them with that record's uninterrupted ones.

It uses only what users see: the command line (fedhpc.main), YAML, results.h5 and the files of a run directory. One
process imports the libraries and forks a child for every run, which then imports fedhpc from SOURCE.

In OUT: runs/<configuration>/<way>/ with the ways r1, r2, r3 (ranks) and resumed; interrupted/<configuration>/, as the
interrupted run was left; logs/, configs/, inputs/ (models and data) and record.json.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import inspect
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

os.environ.update(
    OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1", PYTORCH_NVML_BASED_CUDA_CHECK="1",
)  # fmt: skip

import h5py
import numpy as np
import yaml
from safetensors import safe_open

AT_ONCE = 2  # runs; those on several ranks have as many processes each
TIMEOUT_S = 300.0

# ---------------------------------------------------------------- configurations


@dataclass(frozen=True)
class Case:
    """One configuration.

    cut: how the interrupted run ends. extend: it is asked for fewer rounds; kill: SIGKILL once that round is on disk.
    Those that also run on 2 ranks are resumed on 2.
    """

    tree: dict[str, Any]
    cut: str = "extend"
    at: int = 1  # the round after which it is interrupted
    ranks: tuple[int, ...] = (1, 3)
    needs: tuple[str, ...] = ()  # configurations whose adapter/ it reads


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the keys of `changes` put into its sections; `method` and `partition` are replaced whole."""
    result = dict(tree)
    for section, value in changes.items():
        whole = section in ("method", "partition") or not isinstance(value, dict)
        result[section] = value if whole else {**result.get(section, {}), **value}
    return result


def small(**changes: Any) -> dict[str, Any]:
    """A small federation of a causal Llama in float64."""
    tree: dict[str, Any] = {
        "model": {"name": "inputs/llama", "dtype": "float64"},
        "data": {"source": "inputs/texts", "label": "label", "client": "client"},
        "partition": {"name": "quantity_skew", "num_clients": 8, "alpha": 2.0},
        "method": {"name": "prefix", "num_virtual_tokens": 4},
        "federation": {"rounds": 2, "cohort_size": 5},
        "client": {"optimizer": "sgd", "lr": 2.0, "batch_size": 3, "steps": 2},
        "evaluation": {"every": 1, "max_examples": 8, "samples": 0, "max_new_tokens": 6},
    }
    return merged(tree, changes)


def encoder(**changes: Any) -> dict[str, Any]:
    """The same with a classifier of the foods."""
    tree = small(
        model={"name": "inputs/bert", "task": "classification"},
        data={"prompt": "{ref}", "max_length": 48},
        client={"lr": 0.5},
        evaluation={"metrics": ["loss", "accuracy", "macro_f1"]},
    )
    return merged(tree, changes)


def library(**changes: Any) -> dict[str, Any]:
    """Passages of clients, and questions."""
    tree: dict[str, Any] = {
        "model": {"name": "inputs/llama", "dtype": "float64"},
        "data": {"source": "inputs/library", "prompt": "{question}", "target": " {answer}", "client": "client"},
        "partition": {"name": "natural"},
        "method": {"name": "rag"},
        "federation": {"rounds": 3, "cohort_fraction": 1.0, "dropout": 0.2},
        "evaluation": {
            "metrics": ["recall", "mrr"], "max_examples": 6, "samples": 2, "max_new_tokens": 3, "every": 1,
        },
    }  # fmt: skip
    return merged(tree, changes)


FLOAT32 = {"dtype": "float32"}
LORA = {"name": "lora", "rank": 2}
SEARCH = {
    "name": "prompt_search",
    "instructions": ["A place to eat.", "What kind of place is it? It is"],
    "cues": [" it is a", ""],
    "demonstrations": 2,
    "population": 6,
    "survivors": 2,
    "examples": 2,
    "max_prompt_tokens": 200,
}
FEDBPT = {"name": "fedbpt", "num_virtual_tokens": 3, "dimension": 6, "popsize": 6, "iterations": 2, "examples": 3}

CASES: dict[str, Case] = {
    # ------------------------------------------------------------ soft prompts and prefixes
    "prefix_raw_adam": Case(
        small(
            federation={"rounds": 3, "dropout": 0.2, "min_cohort": 3},
            client={"momentum": 0.8, "nesterov": True},
            server={"optimizer": "adam", "lr": 0.05},
            evaluation={"metrics": ["loss", "perplexity"], "samples": 3},
        ),
        ranks=(1, 2, 3),
        at=2,
    ),
    "prefix_mlp_yogi_cosine": Case(
        small(
            model=FLOAT32,
            partition={"name": "dirichlet", "num_clients": 7, "alpha": 0.5},
            method={"name": "prefix", "num_virtual_tokens": 3, "exchange": "mlp", "hidden_size": 16},
            federation={"rounds": 3},
            client={"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.1, "schedule": "cosine", "warmup": 0.2,
                    "clip_norm": 0.5},
            server={"optimizer": "yogi", "lr": 0.02},
        ),
        cut="kill",
    ),
    "prefix_materialised_fednova": Case(
        small(
            partition={"name": "iid", "num_clients": 6, "max_examples": 9},
            method={"name": "prefix", "num_virtual_tokens": 3, "exchange": "materialised", "hidden_size": 16,
                    "init": "random"},
            client={"lr": 0.1, "momentum": 0.5, "steps": None, "epochs": 1, "proximal": 0.1},
            server={"aggregator": "fednova", "weighting": "uniform"},
        ),
    ),
    "prompt_gpt2_adagrad_clip": Case(
        small(
            model={"name": "inputs/gpt2", **FLOAT32},
            partition={"name": "shard", "num_clients": 6, "shards_per_client": 2},
            method={"name": "prompt", "num_virtual_tokens": 4},
            client={"lr": 1.0, "weight_decay": 0.01},
            server={"optimizer": "adagrad", "lr": 0.05, "beta1": 0.5},
            transforms=[{"name": "clip", "norm": 0.05}],
        ),
        ranks=(1, 2, 3),
    ),
    "p_tuning_virtual_median": Case(
        small(
            partition={"name": "virtual", "num_clients": 1000, "examples_per_client": 7},
            method={"name": "p_tuning", "num_virtual_tokens": 3, "hidden_size": 12},
            federation={"rounds": 2, "cohort_size": None, "cohort_fraction": 0.005, "dropout": 0.1},
            client={"optimizer": "adamw", "lr": 0.02, "clip_norm": 1.0},
            server={"aggregator": "median", "lr": 0.7},
        ),
        cut="kill",
    ),
    # ------------------------------------------------------------ LoRA
    "lora_average_natural": Case(
        small(
            data={"where_not": {"client": ["c3"]}},
            partition={"name": "natural"},
            method={**LORA, "dropout": 0.3},
            federation={"rounds": 3, "cohort_size": 6},
            client={"optimizer": "adamw", "lr": 0.02, "proximal": 0.05, "beta2": 0.99},
            server={"optimizer": "sgd", "momentum": 0.6, "lr": 0.8},
            checkpoint={"every": 2},
        ),
        cut="kill",
        at=2,
        ranks=(1, 2, 3),
    ),
    "lora_ffa_scaffold": Case(
        small(
            method={**LORA, "aggregation": "ffa"},
            federation={"rounds": 3, "cohort_size": 4, "dropout": 0.2},
            client={"lr": 1.0, "scaffold": True},
        ),
        ranks=(1, 2, 3),
    ),
    "lora_exact_linear": Case(
        small(
            model=FLOAT32,
            method={**LORA, "aggregation": "exact", "targets": ["q_proj", "down_proj"]},
            client={"lr": 0.3, "schedule": "linear", "momentum": 0.3},
        ),
        cut="kill",
    ),
    "lora_stack_ranks": Case(
        small(
            method={"name": "lora", "aggregation": "stack", "ranks": [1, 3, 2], "alpha": 4.0},
            client={"lr": 0.3},
            server={"lr": 0.9},
        ),
        ranks=(1, 2, 3),
    ),
    "lora_alternate": Case(
        small(method={**LORA, "aggregation": "alternate"}, federation={"rounds": 3}, client={"lr": 0.3}),
        ranks=(1, 2, 3),
    ),
    "lora_svd_adam": Case(
        small(method={**LORA, "aggregation": "svd"}, client={"optimizer": "adamw", "lr": 0.02}, server={"lr": 0.9}),
        cut="kill",
    ),
    "lora_flex_ranks": Case(
        small(method={**LORA, "aggregation": "flex", "ranks": [1, 3]}, client={"lr": 0.3}),
        ranks=(1, 2, 3),
    ),
    "lora_dual": Case(
        small(
            method={**LORA, "aggregation": "dual", "local_weight": 0.3},
            federation={"rounds": 3, "cohort_size": 4, "dropout": 0.2},
            evaluation={"client_fraction": 0.2, "max_clients": 6},
            personalization={"parts": ["*_local.weight"]},
        ),
        cut="kill",
    ),
    "lora_sb": Case(small(model=FLOAT32, method={**LORA, "aggregation": "sb"}, client={"lr": 0.3})),
    "lora_exact_median": Case(
        small(method={**LORA, "aggregation": "exact"}, client={"lr": 0.3}, server={"aggregator": "median"}),
    ),
    "personal": Case(
        small(
            method=LORA,
            federation={"rounds": 3, "cohort_size": 4, "dropout": 0.2},
            evaluation={"client_fraction": 0.2, "max_clients": 6},
            personalization={"parts": ["*lora_B*"], "finetune_steps": 2},
        ),
        cut="kill",
        ranks=(1, 2, 3),
    ),
    "bfloat16_model": Case(
        small(model={"dtype": "bfloat16"}, method=LORA, client={"optimizer": "adamw", "lr": 0.02}),
        ranks=(1, 3),
    ),
    "bfloat16_autocast": Case(
        small(
            model={**FLOAT32, "gradient_checkpointing": True},
            method=LORA,
            client={"optimizer": "adamw", "lr": 0.02},
            runtime={"precision": "bfloat16", "block_size": 2},
        ),
    ),
    "lora_clip_held_out": Case(
        small(
            model=FLOAT32,
            data={"source": "inputs/texts/train.jsonl"},
            partition={"name": "dirichlet", "num_clients": 8, "alpha": 0.1, "min_examples": 4, "max_examples": 9},
            method=LORA,
            client={"lr": 0.2},
            transforms=[{"name": "clip", "norm": 0.1}],
            runtime={"precision": "float16"},
        ),
        cut="kill",
    ),
    "prompt_t5_virtual": Case(
        small(
            model={"name": "inputs/t5"},
            data={"prompt": "{mr}", "target": "{ref}", "label": None},
            partition={"name": "virtual", "num_clients": 9, "examples_per_client": 6},
            method={"name": "prompt", "num_virtual_tokens": 3},
            evaluation={"client_fraction": 0.3, "samples": 1},
        ),
        ranks=(1, 2, 3),
    ),
    # ------------------------------------------------------------ other methods
    "adapter_houlsby": Case(small(method={"name": "adapter", "bottleneck": 4}, client={"lr": 0.5})),
    "adapter_pfeiffer_bert": Case(
        encoder(
            method={"name": "adapter", "bottleneck": 4, "placement": "pfeiffer", "activation": "gelu"},
            partition={"name": "dirichlet", "num_clients": 6, "alpha": 1.0, "min_examples": 3},
            data={"label_noise": 0.3},
            evaluation={"client_fraction": 0.25},
            personalization={"finetune_steps": 1},
        ),
        cut="kill",
    ),
    "ia3_t5": Case(
        small(
            model={"name": "inputs/t5"},
            data={"prompt": "{mr}", "target": "{ref}"},
            method={"name": "ia3"},
            client={"optimizer": "adamw", "lr": 0.05},
            evaluation={"samples": 2},
        ),
    ),
    "prefix_t5": Case(
        small(
            model={"name": "inputs/t5", **FLOAT32},
            data={"prompt": "{mr}", "target": "{ref}"},
            method={"name": "prefix", "num_virtual_tokens": 2},
        ),
        cut="kill",
    ),
    "prefix_bert": Case(
        encoder(model=FLOAT32, method={"name": "prefix", "num_virtual_tokens": 2}),
        ranks=(1, 2, 3),
    ),
    "prefix_bart": Case(
        small(
            model={"name": "inputs/bart"},
            data={"prompt": "{mr}", "target": "{ref}", "max_length": 64},
            method={"name": "prefix", "num_virtual_tokens": 2},
            evaluation={"samples": 1},
        ),
    ),
    "lora_roberta": Case(
        encoder(
            model={"name": "inputs/roberta"},
            method={**LORA, "dropout": 0.1},
            partition={"name": "shard", "num_clients": 6},
            client={"optimizer": "adamw", "lr": 0.02},
        ),
    ),
    "ia3_qwen3": Case(
        small(model={"name": "inputs/qwen3", **FLOAT32}, method={"name": "ia3"}, client={"lr": 1.0}),
    ),
    "full_last_layers": Case(
        small(
            model=FLOAT32,
            method={"name": "full", "last_layers": 1},
            client={"lr": 0.2, "proximal": 0.1},
            server={"optimizer": "sgd", "momentum": 0.5},
        ),
    ),
    "full_bert_bias_scaffold": Case(
        encoder(
            method={"name": "full", "parameters": "bias"},
            client={"scaffold": True, "lr": 0.1},
            evaluation={"test_metrics": ["loss", "accuracy"], "test_max_examples": 5},
        ),
        cut="kill",
    ),
    "fedkseed": Case(
        small(
            model=FLOAT32,
            method={"name": "fedkseed", "num_seeds": 16},
            client={"lr": 0.01, "clip_norm": 3.0},
            server={"lr": 0.9},
        ),
        ranks=(1, 2, 3),
    ),
    # ------------------------------------------------------------ modes, metrics, the built-in demo
    "centralized": Case(
        small(
            mode="centralized",
            federation={"rounds": 3},
            client={"optimizer": "adamw", "lr": 0.02},
            data={"where": {"label": ["thai", "french"]}},
        ),
        cut="kill",
    ),
    "local": Case(
        small(
            mode="local",
            method=LORA,
            local={"max_clients": 4},
            client={"momentum": 0.5},
            evaluation={"client_fraction": 0.2},
        ),
        ranks=(1, 2, 3),
    ),
    "metrics_of_texts": Case(
        small(
            model={"name": "builtin", **FLOAT32},
            data={"source": "builtin:dining", "label": "label", "client": None},
            partition={"name": "virtual", "num_clients": 8, "examples_per_client": 4},
            federation={"cohort_size": 3},
            client={"lr": 30.0},
            evaluation={
                "metrics": ["loss", "bleu", "chrf", "rouge_l", "exact_match", "f1", "contains"], "samples": 4,
                "max_examples": 5, "batch_size": 2, "max_new_tokens": 24,
                "test_metrics": ["perplexity", "rouge_l", "f1"], "test_max_examples": 6,
            },
        ),
        ranks=(1, 2, 3),
    ),
    "diverging": Case(
        small(
            model=FLOAT32,
            method={"name": "full"},
            federation={"rounds": 2, "cohort_size": 6},
            client={"lr": 1e4, "steps": None, "epochs": 1, "batch_size": 4},
        ),
    ),
    "metrics_of_labels": Case(
        small(
            data={"prompt": "{ref} The food is", "target": " {label}", "label_noise": 0.2, "max_length": 64},
            method={"name": "prompt", "num_virtual_tokens": 3, "init": "random"},
            evaluation={"metrics": ["accuracy", "macro_f1", "loss"], "every": 2},
            federation={"rounds": 3, "min_cohort": 2},
        ),
        cut="kill",
        at=2,
    ),
    "builtin_demo": Case(
        {
            "data": {"source": "builtin:dining", "label": "label"},
            "partition": {"name": "virtual", "num_clients": 8, "examples_per_client": 4},
            "federation": {"rounds": 2, "cohort_size": 3},
            "method": {"name": "prefix", "num_virtual_tokens": 2},
            "client": {"batch_size": 4},
            "evaluation": {"every": 1, "max_examples": 4, "samples": 1, "max_new_tokens": 4},
        },
    ),
    # ------------------------------------------------------------ retrieval
    "retriever": Case(
        small(
            model={"name": "inputs/bert", "task": "embedding", **FLOAT32},
            data={"source": "inputs/library", "train": "pairs", "validation": "pairs", "test": "pairs",
                  "join": {"file": "train", "column": "passage_id", "key": "id"}, "label": None, "client": None,
                  "prompt": "{question}", "target": "{text}", "max_length": 60},
            partition={"name": "iid", "num_clients": 4},
            method={"name": "retriever"},
            federation={"cohort_size": 3},
            client={"optimizer": "adamw", "lr": 0.01, "steps": None, "epochs": 1},
        ),
    ),
    "rag_lexical": Case(
        library(method={"name": "rag", "gold": "passage_id", "k": 3, "context_tokens": 60, "per_client": 2}),
        cut="kill",
        ranks=(1, 2, 3),
    ),
    "rag_dense_routed": Case(
        library(
            method={
                "name": "rag", "gold": "passage_id", "k": 3, "context_tokens": 60, "index": "dense", "route": 3,
                "centroids": 2, "encoder": "inputs/bert", "retriever": "runs/retriever/r1/adapter",
                "chunk_words": 8, "overlap_words": 2, "distinct": False,
            },
        ),
        cut="kill",
        needs=("retriever",),
    ),
    "rag_hybrid_tuned": Case(
        library(
            method={
                "name": "rag", "gold": "passage_id", "k": 2, "candidates": 4, "context_tokens": 60, "index": "hybrid",
                "encoder": "inputs/bert", "rerank": "likelihood", "merge": "reciprocal_rank",
                "adapter": "runs/lora_average_natural/r1/adapter",
            },
            evaluation={"metrics": ["loss", "exact_match", "f1", "contains", "recall", "mrr"]},
        ),
        cut="kill",
        needs=("lora_average_natural",),
    ),
    "rag_centralized": Case(
        library(
            mode="centralized",
            federation={"dropout": 0.0},
            method={"name": "rag", "gold": "passage_id", "k": 3, "context_tokens": 60},
        ),
        cut="kill",
    ),
    # ------------------------------------------------------------ distillation
    "distillation_groups": Case(
        small(
            method={
                "name": "distillation",
                "student": LORA,
                "groups": [
                    {"method": LORA, "share": 2.0},
                    {"model": "inputs/other", "method": {"name": "prefix", "num_virtual_tokens": 2}},
                ],
                "public": {"max_examples": 5},
                "top_k": 5,
                "distil": {"lr": 50.0},
            },
            federation={"cohort_size": 4},
        ),
        ranks=(1, 2, 3),
    ),
    "distillation_aligned": Case(
        small(
            method={
                "name": "distillation",
                "student": {"name": "prefix", "num_virtual_tokens": 2},
                "groups": [{"method": LORA}, {"model": "inputs/words", "method": LORA}],
                "public": {"max_examples": 4, "split": "public"},
                "aggregation": "entropy",
                "align": "edit_distance",
                "down": "server",
                "temperature": 2.0,
                "hard_weight": 0.3,
                "digest": {"epochs": 2},
                "alone": False,
            },
            federation={"cohort_size": 4},
        ),
        cut="kill",
    ),
    "distillation_bert": Case(
        encoder(
            method={"name": "distillation", "student": LORA, "public": {"max_examples": 6}, "top_k": None,
                    "down": "none"},
            federation={"cohort_size": 4},
        ),
    ),
    # ------------------------------------------------------------ prompts without gradients
    "prompt_search_labels": Case(
        small(
            model=FLOAT32,
            data={"target": " {label}", "max_length": 128},
            method={**SEARCH, "objective": "label_loss",
                    "proposers": [{"name": "templates"}, {"name": "lm", "max_tokens": 4}]},
            federation={"rounds": 4, "cohort_size": 4},
            evaluation={"metrics": ["accuracy", "loss"], "max_examples": 5},
        ),
        at=2,
        ranks=(1, 2, 3),
    ),
    "prompt_search_many": Case(
        small(
            model={"name": "builtin", **FLOAT32},
            data={"target": " {label}", "max_length": 128},
            method={
                **SEARCH, "objective": "accuracy", "population": 16, "survivors": 5, "examples": 1,
                "label_words": {"thai": ["thai", "Thai food"], "french": ["french", "bistro"],
                                "italian": ["italian"]},
                "cues": [" it is a", "", " :"], "proposers": [{"name": "templates"}],
            },
            federation={"rounds": 4, "cohort_size": 3},
            evaluation={"metrics": ["accuracy", "loss"], "max_examples": 4},
        ),
        cut="kill",
        at=2,
    ),
    "prompt_search_rearranged": Case(
        small(
            model={"name": "builtin", **FLOAT32},
            data={"label": None},
            method={
                **SEARCH, "share_demonstrations": True, "population": 10, "survivors": 3, "examples": 1,
                "rules": ["random", "short"], "demonstrations": 3,
            },
            federation={"rounds": 4, "cohort_size": 3},
            evaluation={"max_examples": 4},
        ),
    ),
    "prompt_search_shared": Case(
        small(
            data={"label": None},
            method={**SEARCH, "share_demonstrations": True, "rules": ["random", "short"],
                    "proposers": [{"name": "lm", "max_tokens": 3, "request": "Say again: {instruction} Again:"}]},
            federation={"rounds": 3, "cohort_size": 4},
            evaluation={"max_examples": 4, "samples": 1},
            server={"aggregator": "median"},
        ),
        cut="kill",
    ),
    "fedbpt_moments": Case(
        small(method={**FEDBPT, "exchange": "moments"}, federation={"cohort_size": 4}, evaluation={"max_examples": 4}),
        ranks=(1, 2, 3),
    ),
    "fedbpt_scores": Case(
        small(
            model=FLOAT32,
            data={"target": " {label}"},
            method={**FEDBPT, "exchange": "scores", "objective": "label_loss"},
            federation={"rounds": 3, "cohort_size": 4},
            evaluation={"max_examples": 4},
        ),
        cut="kill",
    ),
}  # fmt: skip


# ---------------------------------------------------------------- models and data

_NAMES = ["Anchor", "Bell", "Crown", "Dolphin", "Eagle", "Falcon", "Garden", "Harbour", "Inn", "Juniper"]
_FOODS = ["french", "italian", "thai"]
_AREAS = ["riverside", "centre", "suburb"]
_WAYS = [
    "The {name} serves {food} food in the {area} .",
    "In the {area} you find The {name} , a {food} place .",
    "{food} food is on the table of The {name} in the {area} .",
]


def make_inputs(folder: Path) -> None:
    """Synthetic data and tiny random models, the same bytes at every call."""
    draws = random.Random(7)

    def row() -> dict[str, str]:
        told = {"name": draws.choice(_NAMES), "food": draws.choice(_FOODS), "area": draws.choice(_AREAS)}
        facts = f"name {told['name']} , food {told['food']} , area {told['area']}"
        client = f"c{min(draws.randrange(10), draws.randrange(10))}"
        return {"mr": facts, "ref": draws.choice(_WAYS).format(**told), "label": told["food"], "client": client}

    for split, count in (("train", 70), ("validation", 12), ("test", 12), ("public", 6)):
        _write(folder / "texts" / f"{split}.jsonl", [row() for _ in range(count)])

    passages = []
    for i in range(36):
        a, b = row(), row()
        text = f"Number {i} . {a['ref']} {b['ref']} Ask for table {draws.randrange(50)} ."
        passages.append({"id": f"p{i}", "text": text, "client": f"c{draws.randrange(6)}"})
    # Copies at other clients, and short texts that tie.
    passages += [{**one, "id": f"{one['id']}-copy", "client": f"c{draws.randrange(6)}"} for one in passages[:8]]
    passages += [{"id": f"t{i}", "text": f"The Bell {i}", "client": f"c{i % 6}"} for i in range(8)]
    about = [draws.choice(passages[:36]) for _ in range(12)]
    questions = [
        {
            "question": " ".join(one["text"].split()[:8]) + " ?",
            "answer": one["text"].split()[-2],
            "passage_id": one["id"],
        }
        for one in about
    ]  # fmt: skip
    questions += [{"question": f"The Bell , who is {i} ?", "answer": "Bell", "passage_id": "t3"} for i in range(3)]
    _write(folder / "library" / "train.jsonl", passages)
    _write(folder / "library" / "test.jsonl", questions)
    _write(folder / "library" / "pairs.jsonl", [{k: q[k] for k in ("question", "passage_id")} for q in questions])
    _make_models(folder)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def _make_models(folder: Path) -> None:
    import torch
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    texts = [json.loads(line) for line in (folder / "texts" / "train.jsonl").read_text().splitlines()]
    passages = [json.loads(line) for line in (folder / "library" / "train.jsonl").read_text().splitlines()]
    words = {word for one in texts for key in ("mr", "ref") for word in one[key].split()}
    words = sorted(words | {word for one in passages for word in one["text"].split()} | {":", "?", "who", "is"})

    def of_words(special: dict[str, str], template: str) -> Any:
        vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if template:
            marks = [(word, vocabulary[word]) for word in special.values() if word in template.split()]
            backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
        return tf.PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    def of_bytes() -> Any:
        """Bytes, and the commonest words whole: no training, whose ties might break one way or the other."""
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        vocabulary = {token: i for i, token in enumerate([*special.values(), *letters])}
        merges: list[tuple[str, str]] = []
        for word in ["\u0120The", "\u0120food", "\u0120the", "\u0120in", "\u0120area", "\u0120name", "\u0120place"]:
            for end in range(1, len(word)):
                pair = (word[:end], word[end])
                if pair not in merges:
                    merges.append(pair)
                    vocabulary[word[: end + 1]] = len(vocabulary)
        backend = Tokenizer(models.BPE(vocabulary, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return tf.PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    def save(name: str, tokenizer: Any, model: Any, scale: float, scaled: Callable[[str, Any], bool]) -> None:
        with torch.no_grad():
            for key, p in model.named_parameters():
                p.mul_(scale if scaled(key, p) else 1.0)  # so that what a payload does shows
        model.double().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def llama(tokenizer: Any, seed: int, width: int, layers: int) -> Any:
        torch.manual_seed(seed)
        shape = tf.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 3 // 2, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return tf.LlamaForCausalLM(shape)

    bytes_, nothing = of_bytes(), lambda key, p: False
    save("llama", bytes_, llama(bytes_, 0, 32, 2), 8.0, lambda key, p: "proj" in key)
    bytes_.model_max_length = 400  # another file of the same tokens
    save("other", bytes_, llama(bytes_, 1, 16, 1), 4.0, lambda key, p: "proj" in key)
    plain = of_words({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "")
    save("words", plain, llama(plain, 2, 16, 1), 1.0, nothing)

    torch.manual_seed(3)
    bytes_ = of_bytes()
    gpt2 = tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=len(bytes_), n_positions=512, n_embd=32, n_layer=2, n_head=4, bos_token_id=1,
                      eos_token_id=2)
    )  # fmt: skip
    save("gpt2", bytes_, gpt2, 3.0, lambda key, p: p.ndim == 2 and "wte" not in key and "wpe" not in key)

    torch.manual_seed(4)
    marked = of_words(
        {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}, "[CLS] $A [SEP]"
    )
    bert = tf.BertModel(
        tf.BertConfig(vocab_size=len(marked), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=4, max_position_embeddings=64, pad_token_id=0)
    )  # fmt: skip
    save("bert", marked, bert, 4.0, lambda key, p: p.ndim == 2)

    torch.manual_seed(5)
    ended = of_words({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, "$A </s>")
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=len(ended), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                    decoder_start_token_id=0, tie_word_embeddings=False)
    )  # fmt: skip
    save("t5", ended, t5, 1.0, nothing)

    torch.manual_seed(6)
    bart = tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=len(ended), d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2,
                      decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                      max_position_embeddings=96, pad_token_id=0, bos_token_id=2, eos_token_id=1,
                      decoder_start_token_id=1, forced_eos_token_id=None, scale_embedding=True)
    )  # fmt: skip
    save("bart", ended, bart, 3.0, lambda key, p: p.ndim == 2 and "embed" not in key and "shared" not in key)

    torch.manual_seed(8)
    roberta = tf.RobertaForSequenceClassification(
        tf.RobertaConfig(vocab_size=len(marked), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=70, num_labels=3, pad_token_id=0,
                         bos_token_id=1, eos_token_id=2)
    )  # fmt: skip
    save("roberta", marked, roberta, 4.0, lambda key, p: p.ndim == 2)

    torch.manual_seed(9)
    bytes_ = of_bytes()
    qwen = tf.Qwen3ForCausalLM(
        tf.Qwen3Config(vocab_size=len(bytes_), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
                       bos_token_id=1, eos_token_id=2)
    )  # fmt: skip
    save("qwen3", bytes_, qwen, 3.0, lambda key, p: "proj" in key)


def digest_of(folder: Path) -> str:
    """One hash over the names and bytes of the files in `folder`."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


# ---------------------------------------------------------------- running


def import_libraries() -> None:
    """All that the runs need but fedhpc itself, once for all children."""
    import importlib

    import torch
    import transformers as tf

    torch.set_num_threads(1)
    tf.utils.logging.disable_progress_bar()
    for name in (
        "pydantic", "safetensors.torch", "safetensors.numpy", "tokenizers", "torch.distributed",
        "torch.utils.checkpoint", "sacrebleu.metrics", "rouge_score.rouge_scorer", "cma", "pyarrow.parquet",
        "rich.live", "rich.table", "transformers.cache_utils", "scipy", "faiss",
    ):  # fmt: skip
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"gate: without {name}")
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig", "AutoModel", "AutoModelForSeq2SeqLM",
                 "AutoModelForSequenceClassification", "LlamaForCausalLM", "GPT2LMHeadModel", "BertModel",
                 "BertForSequenceClassification", "T5ForConditionalGeneration", "PreTrainedTokenizerFast",
                 "BartForConditionalGeneration", "RobertaForSequenceClassification", "Qwen3ForCausalLM"):  # fmt: skip
        getattr(tf, name)


@dataclass
class Step:
    """One child process: fedhpc with `arguments`. kill_at: SIGKILL once status.json says so many rounds."""

    arguments: list[str]
    kill_at: int | None = None
    then: Callable[[], None] | None = None  # in this process, once it has ended well


@dataclass
class Job:
    """The steps of one way to run one configuration, one after another."""

    name: str
    way: str
    steps: list[Step]
    after: set[tuple[str, str]] = field(default_factory=set)
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.way

    def __str__(self) -> str:
        return f"{self.name} ({self.way})"


def _kill_at(round_: int) -> None:
    """Let this process kill itself once a status.json that says this round, or a later one, is in its place."""
    for name in ("replace", "rename"):
        original = getattr(os, name)

        def replaced(source: Any, target: Any, *rest: Any, original: Any = original, **more: Any) -> None:
            original(source, target, *rest, **more)
            if os.path.basename(os.fspath(target)) == "status.json":
                status = json.loads(Path(target).read_text())
                if status.get("round", 0) >= round_ and status.get("state") == "running":
                    os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, replaced)


def _child(source: Path, folder: Path, step: Step, log: Path) -> NoReturn:
    """In a forked process: fedhpc from `source` with the arguments of the step, in `folder`."""
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        print("$ fedhpc", *step.arguments, flush=True)
        os.chdir(folder)
        os.environ["FEDHPC_CACHE"] = str(folder / "cache")
        sys.path.insert(0, str(source))
        sys.pycache_prefix = str(folder / "pycache")
        if step.kill_at is not None:
            _kill_at(step.kill_at)
        from fedhpc import main

        found = Path(str(main.__file__)).resolve()
        if source not in found.parents:
            raise RuntimeError(f"fedhpc came from {found}, not from {source}")
        code = main.main(step.arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # as a rank ends: without the clean-up of libraries
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code or 1)


def run_jobs(source: Path, folder: Path, jobs: list[Job]) -> list[str]:
    """Run them, AT_ONCE at a time; what failed, one text each."""
    sys.stdout.flush()
    waiting, done, failed = list(jobs), set[tuple[str, str]](), list[str]()
    running: dict[int, tuple[Job, int, float]] = {}
    (folder / "logs").mkdir(parents=True, exist_ok=True)

    def start(job: Job, number: int) -> None:
        log = folder / "logs" / f"{job.name}-{job.way}.log"
        if number == 0:
            log.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            _child(source, folder, job.steps[number], log)
        running[pid] = (job, number, time.monotonic())

    while waiting or running:
        known = {job.key for job in waiting} | {job.key for job, _, _ in running.values()}
        ready = [job for job in waiting if not job.after & known]
        while ready and len(running) < AT_ONCE:
            job = ready.pop(0)
            waiting.remove(job)
            if job.after - done:
                failed.append(f"{job}: not run, since it needs what has failed")
                continue
            start(job, 0)
        if not running:
            continue
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            for late, (_, _, began) in running.items():
                if time.monotonic() - began > TIMEOUT_S:
                    _end(late)
            time.sleep(0.02)
            continue
        if pid not in running:
            continue
        job, number, began = running.pop(pid)
        _end(pid)  # ranks that it left behind
        job.cpu_s += usage.ru_utime + usage.ru_stime
        job.wall_s += time.monotonic() - began
        step = job.steps[number]
        wanted = 0 if step.kill_at is None else -signal.SIGKILL
        code = os.waitstatus_to_exitcode(status)
        if code != wanted:
            log = (folder / "logs" / f"{job.name}-{job.way}.log").read_text(errors="replace").splitlines()
            tail = "\n    ".join(log[-15:])
            failed.append(f"{job}: step {number + 1} ended with {code} instead of {wanted}\n    {tail}")
            print(f"gate: FAILED {failed[-1]}", flush=True)
            continue
        if step.then is not None:
            step.then()
        if number + 1 < len(job.steps):
            start(job, number + 1)
        else:
            done.add(job.key)
    return failed


def _end(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _wanted(name: str, only: str | None) -> bool:
    return only is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in only.split(","))


def chosen(only: str | None) -> dict[str, Case]:
    """The cases that match, and what those read."""
    names = [name for name in CASES if _wanted(name, only)]
    needed = {need for name in names for need in CASES[name].needs}
    return {name: case for name, case in CASES.items() if name in names or name in needed}


def record(source: Path, out: Path, only: str | None, quick: bool, inputs: Path | None) -> int:
    """See the module."""
    if not (source / "fedhpc" / "main.py").is_file():
        sys.exit(f"gate: {source} is not a checkout of fedhpc")
    if out.exists() and any(out.iterdir()) and not (out / "record.json").exists() and not (out / "inputs").exists():
        sys.exit(f"gate: {out} holds something that is not a record")
    started = time.monotonic()
    cases = chosen(only)
    if not cases:
        sys.exit(f"gate: no configuration matches {only}")
    import_libraries()
    out.mkdir(parents=True, exist_ok=True)
    note: dict[str, Any] = {"runs": {}, "failed": {}, "ways_differ": {}}
    if (out / "record.json").exists():
        before = _note(out)
        (out / "record.json").unlink()
        if only is not None and before["source"] == str(source):  # the others stay
            note = {key: {k: v for k, v in before[key].items() if k not in cases} for key in note}
            if before["inputs"] != digest_of(out / "inputs") or not _has_inputs(out / "inputs"):
                sys.exit(f"gate: {out} has other models and data; record all of it anew, without --only")
    for folder in ("configs", "runs", "interrupted"):
        for path in (out / folder).glob("*"):
            if path.stem not in note["runs"]:
                path.unlink() if path.is_file() else shutil.rmtree(path)
    for folder in ("logs", "cache", "pycache"):
        shutil.rmtree(out / folder, ignore_errors=True)
    if inputs is not None:
        _link(out / "inputs", inputs.resolve())
    _fill(out / "inputs", inputs is not None)
    (out / "configs").mkdir(exist_ok=True)
    jobs: list[Job] = []
    for name, case in cases.items():
        (out / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(case.tree, sort_keys=False))
        jobs += _jobs(name, case, out, quick)
    failed = run_jobs(source, out, jobs)
    note |= {"source": str(source), "inputs": digest_of(out / "inputs")}
    for name in cases:
        note["runs"][name] = {job.way: round(job.cpu_s, 2) for job in jobs if job.name == name}
        note["failed"][name] = [text for text in failed if text.startswith(f"{name} ")]
        note["ways_differ"][name] = [] if quick else _within(out, name, str(source))
    compared = [line for name in cases for line in note["ways_differ"][name]]
    for line in compared:
        print(line)
    cpu = sum(job.cpu_s for job in jobs)
    (out / "record.json").write_text(json.dumps(note, indent=1) + "\n")
    print(
        f"gate: {len(cases)} configurations, {len(jobs)} runs, {cpu:.0f} CPU s, {time.monotonic() - started:.0f} s; "
        f"{len(failed)} failed, {len(compared)} differences between ways to run the same"
    )
    return 1 if failed or compared else 0


def _note(record: Path) -> dict[str, Any]:
    """record.json: by configuration the ways it was run (with CPU seconds), what failed and what ways differ in."""
    try:
        note: dict[str, Any] = json.loads((record / "record.json").read_text())
    except FileNotFoundError:
        sys.exit(f"gate: {record} is no record, or one that did not come to its end")
    if "runs" not in note:  # the first gates kept lists
        note["runs"] = {p.name: {way.name: 0.0 for way in p.iterdir()} for p in (record / "runs").iterdir()}
        for kind in ("failed", "ways_differ"):
            texts, note[kind] = note[kind], {name: [] for name in note["runs"]}
            for text in texts:
                note[kind].setdefault(text.split()[0], []).append(text)
    return note


def _maker() -> str:
    """What makes the models and data, as a hash."""
    code = "".join(inspect.getsource(maker) for maker in (make_inputs, _write, _make_models))
    return hashlib.sha256(f"{code}{_NAMES}{_FOODS}{_AREAS}{_WAYS}".encode()).hexdigest()


def _has_inputs(folder: Path) -> bool:
    marker = folder / "made_by"
    return marker.exists() and marker.read_text() == _maker()


def _fill(folder: Path, shared: bool) -> None:
    """Models and data in `folder`, unless it has them from this very code."""
    if _has_inputs(folder):
        return
    if folder.exists() and any(folder.iterdir()):
        if shared:
            sys.exit(f"gate: {folder} holds something else than this gate's models and data: give a new folder")
        shutil.rmtree(folder)
    make_inputs(folder)
    (folder / "made_by").write_text(_maker())


def _link(link: Path, target: Path) -> None:
    if link.is_symlink():
        link.unlink()
    if link.exists():
        if link.resolve() == target:
            return
        shutil.rmtree(link)
    target.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def _jobs(name: str, case: Case, out: Path, quick: bool) -> Iterator[Job]:
    file = f"configs/{name}.yaml"
    after = {(need, "r1") for need in case.needs}
    for ranks in (1,) if quick else case.ranks:
        several = ["--ranks", str(ranks)] if ranks > 1 else []
        yield Job(name, f"r{ranks}", [Step([file, f"run.dir=runs/{name}/r{ranks}", *several])], set(after))
    if quick or not case.cut:
        return
    again = [file, f"run.dir=runs/{name}/resumed"]

    def keep() -> None:
        shutil.copytree(out / "runs" / name / "resumed", out / "interrupted" / name, symlinks=True)

    if case.cut == "kill":
        first = Step(again, kill_at=case.at, then=keep)
    else:
        first = Step([*again, f"federation.rounds={case.at}"], then=keep)
    several = ["--ranks", "2"] if 2 in case.ranks else []
    yield Job(name, "resumed", [first, Step([*again, *several])], set(after))


def resume(source: Path, old: Path, new: Path, only: str | None) -> int:
    """See the module."""
    started = time.monotonic()
    kept = sorted(path.name for path in (old / "interrupted").iterdir())
    names = [name for name in kept if _wanted(name, only)]
    if not names:
        sys.exit(f"gate: {old / 'interrupted'} holds no such run")
    import_libraries()
    new.mkdir(parents=True, exist_ok=True)
    _link(new / "inputs", (old / "inputs").resolve())
    for folder in ("configs", "logs", "cache", "pycache", "runs"):
        shutil.rmtree(new / folder, ignore_errors=True)
    shutil.copytree(old / "configs", new / "configs")
    jobs = []
    for name in names:
        shutil.copytree(old / "interrupted" / name, new / "runs" / name / "resumed", symlinks=True)
        jobs.append(Job(name, "resumed", [Step([f"configs/{name}.yaml", f"run.dir=runs/{name}/resumed"])]))
    for need in {need for name in names if name in CASES for need in CASES[name].needs}:
        (new / "runs" / need).mkdir(parents=True, exist_ok=True)
        (new / "runs" / need / "r1").symlink_to((old / "runs" / need / "r1").resolve())
    failed = run_jobs(source, new, jobs)
    found, values, made_by = [], 0, str(_note(old)["source"])
    for name in names:
        lines, count = _same(
            f"{name}", old / "runs" / name / "r1", new / "runs" / name / "resumed", made_by, str(source)
        )
        found += lines
        values += count
    for line in found:
        print(line)
    cpu = sum(job.cpu_s for job in jobs)
    print(
        f"gate: {len(names)} interrupted runs of {old} resumed by {source}, {values} values, {cpu:.0f} CPU s, "
        f"{time.monotonic() - started:.0f} s; {len(failed)} failed, {len(found)} differences"
    )
    return 1 if failed or found else 0


# ---------------------------------------------------------------- comparing

# Of results.h5 and the checkpoint, what may differ between two runs of one program.
TIMES = ("seconds*", "peak_memory_bytes")
ATTRIBUTES = ("*_version", "created_utc", "wall_seconds", "config")
# And what the number of ranks or an interruption changes.
WAYS = (
    "results.h5/rounds/wire_bytes", "results.h5/clients/worker", "results.h5/clients/block", "results.h5/events/*",
    "results.h5 attribute world_size", "results.h5 attribute transport", "config.yaml", "status.json",
    "checkpoint/*",
)  # fmt: skip


def content(run: Path, source: str) -> dict[str, Any]:
    """What a run directory holds that counts: place -> array, text or tree.

    The built-in base is named by its path in the checkout, of which only the end can be compared.
    """

    found: dict[str, Any] = {}
    with h5py.File(run / "results.h5") as file:
        for name, value in file.attrs.items():
            if not _any(name, ATTRIBUTES):
                found[f"results.h5 attribute {name}"] = value if isinstance(value, str) else np.asarray(value)
        found["config.yaml"] = yaml.safe_load(str(file.attrs["config"]))
        events = file["events"]
        rows = zip(*(_read(events[name]).tolist() for name in ("round", "kind", "message")), strict=True)
        found["results.h5/events/all"] = sorted(map(list, rows))

        def visit(name: str, item: Any) -> None:
            column = name.rpartition("/")[2]
            if isinstance(item, h5py.Dataset) and not name.startswith("events/") and not _any(column, TIMES):
                found[f"results.h5/{name}"] = _read(item)

        file.visititems(visit)
    for path in sorted(run.glob("checkpoint/**/*.safetensors")):
        place = str(path.relative_to(run))
        with safe_open(path, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                # Rows that results.h5 lacks: how many depends on the clock, and in the end results.h5 has them all.
                if not name.startswith("rows/"):
                    found[f"{place} {name}"] = tensors.get_tensor(name)
            header = dict(tensors.metadata())
        meta = json.loads(header.get("meta", "{}"))
        rows_ = meta.pop("rows", {})
        if isinstance(rows_, dict):
            meta["rows"] = {"base": rows_.get("base")}
        header.pop("crc32", None)
        found[f"{place} header"] = {**header, "meta": meta}
    for folder in ("adapter", "clients"):
        for path in sorted(p for p in run.glob(f"{folder}/**/*") if p.is_file()):
            data = path.read_bytes()
            if path.suffix == ".json":
                found[str(path.relative_to(run))] = json.loads(data.replace(source.encode(), b"SOURCE"))
            else:
                found[str(path.relative_to(run))] = data
    status = json.loads((run / "status.json").read_text())
    found["status.json"] = {key: value for key, value in status.items() if key != "updated_utc"}
    return found


def _read(dataset: Any) -> np.ndarray:
    return np.asarray(dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()])


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, (dict, list)) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differing(one: Any, other: Any) -> str | None:
    """What two values differ in, None where not a bit."""
    if type(one) is not type(other):
        return f"{type(one).__name__} -> {type(other).__name__}"
    if isinstance(one, np.ndarray):
        return _arrays(one, other)
    if isinstance(one, bytes):
        return None if one == other else _files(one, other)
    if isinstance(one, (dict, list)):
        if one == other and repr(one) == repr(other):
            return None
        a, b = _flat(one), _flat(other)
        keys = [key for key in [*a, *(k for k in b if k not in a)] if repr(a.get(key)) != repr(b.get(key))]
        if not keys:  # the order of keys
            return None
        shown = "; ".join(f"{key}: {_short(a.get(key))} -> {_short(b.get(key))}" for key in keys[:3])
        return shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return None if one == other else f"{_short(one)} -> {_short(other)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:97]}..."


def _arrays(one: np.ndarray, other: np.ndarray) -> str | None:
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{one.dtype}{list(one.shape)} -> {other.dtype}{list(other.shape)}"
    if one.dtype.kind in "OUS":
        places = np.flatnonzero(one.reshape(-1) != other.reshape(-1))
        if not len(places):
            return None
        first = places[0]
        a, b = one.reshape(-1)[first], other.reshape(-1)[first]
        return f"{len(places)} of {one.size} texts, the first {_short(a)} -> {_short(b)}"
    if one.tobytes() == other.tobytes():
        return None
    a, b = (np.asarray(x).reshape(-1).astype(np.float64) for x in (one, other))
    raw = (np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(one.size, -1) for x in (one, other))
    changed = (next(raw) != next(raw)).any(axis=1)
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    gap = gap[np.isfinite(gap)]
    most = f"max abs difference {gap.max():.3g}" if len(gap) else "not finite"
    return f"{changed.sum()} of {one.size} values, {most}"


def _files(one: bytes, other: bytes) -> str | None:
    if not one[8:9] == other[8:9] == b"{":  # safetensors begin with the length of a JSON header, then that
        return f"{len(one)} bytes -> {len(other)} other bytes"
    ends = [8 + int.from_bytes(data[:8], "little") for data in (one, other)]
    headers = [json.loads(data[8:end]) for data, end in zip((one, other), ends, strict=True)]
    # The library writes the keys of __metadata__ in an order that it draws anew in every process.
    if headers[0] == headers[1] and one[ends[0] :] == other[ends[1] :]:
        return None
    from safetensors.torch import load

    pair = [
        {name: t.double().numpy() if t.is_floating_point() else t.numpy() for name, t in load(data).items()}
        for data in (one, other)
    ]
    parts = []
    for name in sorted({*pair[0], *pair[1]}):
        if name not in pair[0] or name not in pair[1]:
            parts.append(f"{name} only in the {'new' if name in pair[1] else 'old'}")
        elif (what := _arrays(pair[0][name], pair[1][name])) is not None:
            parts.append(f"{name}: {what}")
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return "; ".join(parts[:3]) + more or f"its header: {differing(*headers)}"


def size_of(value: Any) -> int:
    """How many values are compared in it."""
    if isinstance(value, np.ndarray):
        return int(value.size)
    if isinstance(value, (dict, list)):
        return len(_flat(value))
    return 1


def _same(name: str, one: Path, other: Path, *sources: str) -> tuple[list[str], int]:
    """(differences, values compared) of two ways to run the same, without what ranks and interruptions change."""
    missing = [str(path) for path in (one, other) if not (path / "results.h5").exists()]
    if missing:
        return [f"{name}: no results in {', '.join(missing)}"], 0
    a, b = (
        {k: v for k, v in content(path, source).items() if not _any(k, WAYS)}
        for path, source in zip((one, other), sources, strict=True)
    )
    found = []
    for place in [*a, *(k for k in b if k not in a)]:
        if place not in a or place not in b:
            found.append(f"{name} ({one.name}, {other.name}): {place} only in {(one if place in a else other).name}")
        elif (what := differing(a[place], b[place])) is not None:
            found.append(f"{name} ({one.name}, {other.name}): {place}: {what}")
    return found, sum(map(size_of, a.values()))


def _within(out: Path, name: str, source: str) -> list[str]:
    """Differences between the ways in which a configuration was run."""
    first = out / "runs" / name / "r1"
    if not first.is_dir():  # it has failed, which is said elsewhere
        return []
    others = sorted(path for path in (out / "runs" / name).iterdir() if path != first)
    return [line for other in others for line in _same(name, first, other, source, source)[0]]


def compare(old: Path, new: Path, only: str | None) -> int:
    """See the module."""
    notes = [_note(old), _note(new)]
    found: list[str] = []
    if notes[0]["inputs"] != notes[1]["inputs"]:
        found.append("the models or data in inputs/ are not the same: record both with one --inputs")
    for path, note in zip((old, new), notes, strict=True):
        for kind, what in (("failed", "failed"), ("ways_differ", "ways to run the same differ")):
            texts = [text for name, some in note[kind].items() if _wanted(name, only) for text in some]
            found += [f"{path}: {what}: {text.splitlines()[0]}" for text in texts]
    names = sorted(name for name in {*notes[0]["runs"], *notes[1]["runs"]} if _wanted(name, only))
    tolerated: dict[str, list[str]] = {"wire_bytes": [], "config keys": []}
    configurations, runs, values = 0, 0, 0
    for name in names:
        lacking = [path for path, note in zip((old, new), notes, strict=True) if name not in note["runs"]]
        if lacking:
            found.append(f"{name}: {lacking[0]} lacks it: record --only {name}")
            continue
        configurations += 1
        texts = [(path / "configs" / f"{name}.yaml") for path in (old, new)]
        if len({text.read_text() if text.exists() else str(text) for text in texts}) > 1:
            found.append(f"{name}: recorded with another configuration, so by another gate.py: record both anew")
        ways = [set(note["runs"][name]) for note in notes]
        if min(map(len, ways)) > 1:  # else one was quick
            found += [f"{name}: way {way} in one record only" for way in sorted(ways[0] ^ ways[1])]
        for way in sorted(ways[0] & ways[1]):
            one, other = (root / "runs" / name / way for root in (old, new))
            if not all((path / "results.h5").exists() for path in (one, other)):
                found.append(f"{name} ({way}): without results")
                continue
            runs += 1
            held = [content(path, str(note["source"])) for path, note in zip((one, other), notes, strict=True)]
            values += _compare_runs(f"{name} ({way})", held[0], held[1], found, tolerated)
    for line in found:
        print(line)
    for kind, lines in tolerated.items():
        if lines:
            print(f"tolerated, {kind}: {len(lines)}, such as {'; '.join(lines[:3])}")
    if found:
        print(f"gate: {len(found)} differences in {configurations} configurations, {runs} runs, {values} values")
        return 1
    print(f"{configurations} configurations, {values} values: 0 bits differ")
    return 0


def _compare_runs(
    label: str, one: dict[str, Any], other: dict[str, Any], found: list[str], tolerated: dict[str, list[str]]
) -> int:
    values = 0
    for place in [*one, *(k for k in other if k not in one)]:
        values += size_of(one.get(place))
        if place == "config.yaml":
            a, b = _flat(one[place]), _flat(other[place])
            keys = [key for key in [*a, *(k for k in b if k not in a)] if repr(a.get(key)) != repr(b.get(key))]
            if keys:
                shown = ", ".join(f"{key} {_short(a.get(key))} -> {_short(b.get(key))}" for key in keys[:4])
                tolerated["config keys"].append(f"{label}: {shown}")
            continue
        if place not in one or place not in other:
            what: str | None = f"only in the {'old' if place in one else 'new'} record"
        else:
            what = differing(one[place], other[place])
        if what is None:
            continue
        where = tolerated["wire_bytes"] if place.endswith("/wire_bytes") else found
        where.append(f"{label}: {place}: {what}")
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, paths: dict[str, str]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        for path, meaning in paths.items():
            made.add_argument(path, type=Path, metavar=path.upper(), help=meaning)
        made.add_argument("--only", metavar="PATTERN", help="only configurations with such names (* ? [...], commas)")
        return made

    out = "folder for the run directories; an earlier record in it is replaced"
    one = command("record", "run the configurations and keep what came out", {"source": "a checkout", "out": out})
    one.add_argument("--quick", action="store_true", help="one rank, uninterrupted: the first look after a change")
    one.add_argument("--inputs", type=Path, metavar="DIR", help="models and data; made there if need be (OUT/inputs)")
    command("compare", "show what two records differ in", {"old": "a record", "new": "another one"})
    command(
        "resume",
        "let a checkout finish the interrupted runs of a record, and compare with its uninterrupted ones",
        {"source": "a checkout", "old": "the record", "new": "folder for the resumed runs"},
    )
    command("list", "names of the configurations", {})
    options = parser.parse_args()
    for name in ("source", "out", "old", "new"):
        if getattr(options, name, None) is not None:
            setattr(options, name, getattr(options, name).resolve())
    if options.command == "record":
        return record(options.source, options.out, options.only, options.quick, options.inputs)
    if options.command == "compare":
        return compare(options.old, options.new, options.only)
    if options.command == "resume":
        return resume(options.source, options.old, options.new, options.only)
    print("\n".join(chosen(options.only)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
