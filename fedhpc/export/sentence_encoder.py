"""A retriever and its encoder as a folder of the library sentence-transformers, written without it.

The modules are those of the method's formula. A text's vector is the mean of the encoder's last states (Transformer,
Pooling). A question then goes through the map (Dense), a passage does not: two routes (Router), at the end of each of
which a vector gets length 1 (Normalize). The map is all of W, which training began with the identity, so nothing is
added to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedhpc.config import Model
from fedhpc.customized import base_of
from fedhpc.errors import UserError
from fedhpc.export.merged import Difference, compare, require_all_bits
from fedhpc.methods import retriever
from fedhpc.methods._peft import adapter_config
from fedhpc.methods._weights import save_model
from fedhpc.models.base import Base
from fedhpc.models.encoder import SentenceEncoder
from fedhpc.models.load import load_base

POOLING, ROUTES, MAP, LENGTH_1 = "1_Pooling", "2_Router", "query_0_Dense", "normalize"  # folders
WEIGHTS = "model.safetensors"
_MODULES = "sentence_transformers.models"  # under these names every release from 5.0 on finds them
_TEXTS, _LENGTH = 4, 12  # of the tokens that both read


def fits(adapter: Path) -> bool:
    """Whether an export is a retriever's."""
    return adapter_config(adapter).get("format") == retriever.FORMAT


def merge(adapter: Path, folder: Path, dtype: str | None = None, base: str | None = None) -> tuple[Difference, Base]:
    """Write the folder `folder` of the retriever in `adapter`, as `merged.merge` does.

    The difference is of vectors. UserError also for another encoder than the retriever was trained behind.
    """
    encoder = _encoder(base_of(adapter, base).model_copy(update={"task": SentenceEncoder.task}))
    require_all_bits(encoder, adapter)
    try:
        projection = retriever.load(adapter, encoder)
    except UserError as error:
        raise error.but(key="") from error
    ids = list(encoder.some_ids(_TEXTS, _LENGTH).numpy())
    expected = _vectors(encoder, projection, ids)
    encoder.model.to(getattr(torch, dtype) if dtype else encoder.dtype)
    named = str(encoder.model.dtype).removeprefix("torch.")
    encoder.tokenizer.padding_side = encoder.tokenizer.truncation_side = "right"
    save_model(encoder, folder)
    _write_modules(folder, encoder, projection.to(encoder.model.dtype))
    again = _encoder(Model.model_validate({"name": str(folder), "task": encoder.task, "dtype": named}))
    stored = load_file(folder / ROUTES / MAP / WEIGHTS)["linear.weight"]
    difference = compare(expected, _vectors(again, stored, ids), named, "vectors")
    return difference, encoder


def _encoder(model: Model) -> SentenceEncoder:
    encoder = load_base(model, torch.device("cpu"))
    assert isinstance(encoder, SentenceEncoder), "a retriever is trained behind no other"
    return encoder


def _vectors(encoder: SentenceEncoder, projection: Tensor, ids: Sequence[np.ndarray]) -> Tensor:
    """The vectors (n, D) of questions with these ids."""
    one_client = torch.zeros(len(ids), dtype=torch.int64)
    return retriever.mapped(projection.unsqueeze(0), one_client, encoder.vectors(ids))


def _write_modules(folder: Path, encoder: SentenceEncoder, projection: Tensor) -> None:
    """What stands around the encoder's own files: which modules there are, their options, and the map's weights."""
    width = encoder.hidden_size
    modules = [("", "Transformer"), (POOLING, "Pooling"), (ROUTES, "Router")]
    _write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"{_MODULES}.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    _write(
        folder / "config_sentence_transformers.json",
        {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
    )
    # As `rag` cuts the texts that it searches and indexes.
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": encoder.max_positions, "do_lower_case": False},
    )
    _write(folder / POOLING / "config.json", {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True})
    _write(
        folder / ROUTES / "router_config.json",
        {
            "types": {MAP: f"{_MODULES}.Dense", LENGTH_1: f"{_MODULES}.Normalize"},
            "structure": {"query": [MAP, LENGTH_1], "document": [LENGTH_1]},
            # A text of which it is not said what it is gets no vector, in place of one that may be the wrong one.
            "parameters": {"default_route": None, "allow_empty_key": False},
        },
    )
    _write(
        folder / ROUTES / MAP / "config.json",
        {
            "in_features": width,
            "out_features": width,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )
    _write(folder / ROUTES / LENGTH_1 / "config.json", {})
    save_file({"linear.weight": projection.contiguous()}, folder / ROUTES / MAP / WEIGHTS)


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
