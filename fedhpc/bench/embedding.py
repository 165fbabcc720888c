"""Measures an encoder of sentences: texts in batches of fixed shape beside one after another.

The encoder has the shape of all-MiniLM-L6-v2 and random weights. Lengths are drawn around those of questions (XQuAD: 14
tokens on average) and of short passages (E2E: 25).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np

from fedhpc.bench.table import Part, Row, interleaved, ratio

_TEXTS = 96
_MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
_FASTER = 2.0


def parts(repeats: int) -> list[Part]:
    """All parts of this file."""
    return [partial(_embedded, repeats)]


def _embedded(repeats: int) -> list[Row]:
    import torch
    from transformers import BertConfig, BertModel

    from fedhpc.models.encoder import SentenceEncoder

    torch.manual_seed(0)
    model = BertModel(BertConfig(**_MINILM)).requires_grad_(False).eval()
    special = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    encoder = SentenceEncoder.of(model, special, torch.device("cpu"), "encoder", "encoder")
    assert isinstance(encoder, SentenceEncoder)

    def batches(texts: Sequence[np.ndarray]) -> None:
        encoder.vectors(texts)

    def alone(texts: Sequence[np.ndarray]) -> None:
        with torch.no_grad():
            for text in texts:
                model(input_ids=torch.from_numpy(text).unsqueeze(0))

    rows = []
    for what, mean in (("questions", 14), ("short passages", 25)):
        draw = np.random.default_rng(mean)
        lengths = np.clip(draw.normal(mean, mean / 3, _TEXTS).round().astype(int), 4, None)
        texts = [draw.integers(1000, model.config.vocab_size, length) for length in lengths]
        runs = {"alone": partial(alone, texts), "batches": partial(batches, texts)}
        seconds = interleaved(runs, repeats, time.process_time)
        gain = ratio(seconds["alone"], seconds["batches"])
        note = f"{1000 * min(seconds['batches']) / _TEXTS:.1f} ms a text, of {lengths.mean():.0f} tokens"
        rows.append(Row(f"encoder, {what}: in batches over one after another", gain, _FASTER, note=note))
    return rows
