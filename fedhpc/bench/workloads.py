"""The workloads that are measured, each written into a folder that fedhpc runs from (config.yaml, model/, data/).

All have 64 clients with 32 sequences each, 16 clients a round, batches of 4, one local epoch of plain SGD, and FedAvg.

W1, W2: a Llama with random weights and 48 random tokens a sequence; a prefix of 16 (W1), LoRA of rank 8 on q, k, v and
o (W2). small: hidden 128, 4 layers, vocabulary 2048; big: 288, 6 layers, 4096; large, for a GPU: 768, 12, 32000. The
data are texts with a word per token, `t17` for token 17. So fedhpc reads them like any other data, and the peers can be
given exactly the same tokens. The last token of a sequence is the end of text, as in any row of a language model.

W3: real text. A prefix of 16 on tinystories-260k with E2E (both in `shared/` beside the checkout); texts keep their
lengths, and the loss is on the target alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc import config as configuration
from fedhpc.config import Config

CLIENTS, COHORT, SEQUENCES, LENGTH, BATCH = 64, 16, 32, 48, 4
TOKENS = COHORT * SEQUENCES * LENGTH  # in a round of W1 and W2
LEARNING_RATE = 0.5  # large: a prefix moves by more than float32's resolution
SHARED = Path("../shared")  # seen from the repository's root, as in configs/
_EOS, _FIRST = 2, 3  # the end of text, and the first of the tokens that are drawn

_SIZES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 344,
        "vocab_size": 2048,
    },
    "big": {
        "hidden_size": 288,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 768,
        "vocab_size": 4096,
    },
    "large": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "vocab_size": 32000,
    },
}
_PREFIX = {"name": "prefix", "num_virtual_tokens": 16, "init": "random"}
_LORA = {"name": "lora", "rank": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@dataclass(frozen=True)
class Workload:
    """A workload: its name, its method, and the size of its random model ("" where the model is a real one)."""

    name: str
    method: Mapping[str, Any] = field(repr=False)
    size: str = ""

    @property
    def real(self) -> bool:
        """Whether the data are real texts, of their own lengths."""
        return not self.size

    def absent(self) -> str | None:
        """Why the workload cannot be measured on this machine; None where it can."""
        missing = [path for path in (_model(SHARED), _e2e(SHARED)) if not path.is_dir()] if self.real else []
        return f"there is no {' and no '.join(map(str, missing))}" if missing else None


W1, W1_BIG = Workload("W1 small", _PREFIX, "small"), Workload("W1 big", _PREFIX, "big")
W2, W2_BIG = Workload("W2 small", _LORA, "small"), Workload("W2 big", _LORA, "big")
W3 = Workload("W3", _PREFIX)
ALL = (W1, W2, W1_BIG, W2_BIG, W3)


def write(workload: Workload, folder: Path, rounds: int, **changes: Mapping[str, Any]) -> Path:
    """Write a workload into a folder: model, data and configuration file, whose path is returned.

    changes: other values of configuration keys, by section, such as runtime={"block_size": 1}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, partition = _real(folder) if workload.real else _random(workload, folder)
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": "bench", "dir": str(folder / "run")},
        "model": {"name": str((_model(SHARED) if workload.real else folder / "model").resolve())},
        "data": data,
        "partition": partition,
        "method": dict(workload.method),
        "federation": {"rounds": rounds, "cohort_size": COHORT},
        "client": {"optimizer": "sgd", "lr": LEARNING_RATE, "batch_size": BATCH, "epochs": 1},
        # As little evaluation as possible: the peers do not evaluate.
        "evaluation": {
            "every": rounds,
            "metrics": ["loss"],
            "max_examples": 1,
            "test_max_examples": 1,
            "samples": 0,
        },
        "runtime": {"device": "cpu", "block_size": COHORT // 2},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    path = folder / "config.yaml"
    path.write_text(configuration.resolve(tree).to_yaml(), encoding="utf-8")
    return path


def read(path: Path) -> Config:
    """Read the configuration file that `write` wrote."""
    return configuration.load(str(path), [])


def _model(shared: Path) -> Path:
    return shared / "models" / "tinystories-260k"


def _e2e(shared: Path) -> Path:
    return shared / "data" / "e2e"


def _real(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    data = {"source": str(_e2e(SHARED).resolve()), "validation": "dev", "prompt": "{mr} :", "target": " {ref}"}
    return data, {"name": "iid", "num_clients": CLIENTS, "max_examples": SEQUENCES}


def _random(workload: Workload, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    shape = _SIZES[workload.size]
    if not (folder / "model").exists():
        _save_model(folder / "model", shape)
        (folder / "data").mkdir()
        draw = np.random.default_rng(10_000)
        for split, count in (("train", CLIENTS * SEQUENCES), ("validation", 1), ("test", 1)):
            tokens = draw.integers(_FIRST, shape["vocab_size"], (count, LENGTH - 1))
            lines = [
                {"client": f"{row // SEQUENCES:02}", "first": f"t{first}", "rest": " ".join(f"t{t}" for t in rest)}
                for row, (first, *rest) in enumerate(tokens.tolist())
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")
    data = {
        "source": str(folder / "data"),
        "prompt": "{first}",
        "target": " {rest}",
        "client": "client",
        "max_length": LENGTH,
    }
    return data, {"name": "natural"}


def _save_model(folder: Path, shape: Mapping[str, int]) -> None:
    """Save the same random Llama as `common.py` of the peers' harness, and a tokenizer with one word per token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(1234)
    special = {"bos_token_id": 1, "eos_token_id": _EOS, "pad_token_id": 0}
    LlamaForCausalLM(
        LlamaConfig(**shape, max_position_embeddings=256, tie_word_embeddings=False, **special)
    ).save_pretrained(folder)
    # Not t0 and t2: special tokens are found within words.
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": _EOS, **{f"t{i}": i for i in range(_FIRST, shape["vocab_size"])}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
