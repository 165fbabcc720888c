"""Turns texts into vectors with a frozen sentence encoder, and caches the vectors of passages on disk.

The cache is `$FEDHPC_CACHE/vectors` (default `~/.cache/fedhpc/vectors`), one file per client's passages, named by
a hash of the encoder, the texts, the type of device and the version of torch. A file begins with a checksum; one that
is damaged or does not fit is made again.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedhpc.approaches.rag.dense import Int16, on_grid
from fedhpc.config import Model
from fedhpc.data.tokens import cache_dir
from fedhpc.errors import UserError
from fedhpc.methods import retriever
from fedhpc.models.base import special_ids
from fedhpc.models.encoder import SentenceEncoder, batch_shape
from fedhpc.models.load import load_base

_CHECKSUM = 32  # bytes of SHA-256 in front of a file's content


class Encoder:
    """Maps texts to vectors on the grid of fedhpc.approaches.rag.dense; a vector depends on its own text alone."""

    def __init__(self, name: str, projection: str | None, device: Any) -> None:
        """Load the encoder `name` (a folder or hub id) and the tuned `projection` for queries (a folder, or None).

        UserError where one of them cannot be loaded.
        """
        try:
            base = load_base(Model.model_validate({"name": name, "task": "embedding"}), device)
        except UserError as error:
            raise error.but(key="method.encoder") from error
        assert isinstance(base, SentenceEncoder)
        self.base = base
        self._projection = None if projection is None else retriever.load(Path(projection), self.base).to(device)
        self._before, self._after = special_ids(self.base.tokenizer)
        limit = self.base.max_positions
        self._max_tokens = None if limit is None else limit - len(self._before) - len(self._after)

    @property
    def width(self) -> int:
        """D, the length of the vectors."""
        return self.base.hidden_size

    @property
    def fingerprint(self) -> str:
        """A hash of the weights of the encoder and the projection."""
        parts = [] if self._projection is None else [self._projection.cpu().numpy().tobytes()]
        return hashlib.sha256(b"".join([self.base.fingerprint.encode(), *parts])).hexdigest()

    def queries(self, texts: Sequence[str]) -> Int16:
        """The vectors (n, D) of questions, through the tuned projection where there is one."""
        vectors = self.base.vectors(self._ids(texts)[0])
        if self._projection is not None:
            # One at a time, so that a query's vector does not depend on the others.
            tuned = torch.stack([self._projection.to(v.dtype) @ v for v in vectors])
            vectors = torch.nn.functional.normalize(tuned, dim=1)
        return on_grid(vectors.cpu().numpy())

    def passages(self, texts: Sequence[str]) -> tuple[Int16, list[str]]:
        """The vectors (n, D) of n > 0 chunks, from the cache where they are in it, and messages for the log."""
        ids, cut = self._ids(texts)
        notes = [] if not cut else [
            f"{cut} chunks are longer than the {self._max_tokens} tokens that method.encoder reads; their ends are not "
            "in their vectors: lower method.chunk_words"
        ]  # fmt: skip
        # The device, the version of torch and the shapes of batches are part of the name: they round differently.
        shapes = [batch_shape(length, self.base.max_positions) for length in sorted({len(one) for one in ids})]
        computed_by = f"{self.base.fingerprint} {self.base.device.type} {torch.__version__} {shapes}"
        digest = hashlib.sha256(computed_by.encode())
        for one in ids:
            digest.update(np.array([len(one), *one], np.int64).tobytes())
        path = cache_dir().parent / "vectors" / f"{digest.hexdigest()}.vectors"
        vectors = _load(path, (len(texts), self.width))
        if vectors is None:
            if path.exists():
                notes.append("vectors in the cache were damaged and have been made again")
            vectors = on_grid(self.base.vectors(ids).cpu().numpy())
            try:
                _save(path, vectors)
            except OSError as error:
                notes.append(f"vectors are not cached in {path.parent}: {error.strerror or error}")
        return vectors, notes

    def _ids(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """The token ids of texts, special ones included, cut at the end, and how many texts had to be cut."""
        encoded = self.base.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
            verbose=False,
        )["input_ids"]  # fmt: skip
        cut = 0 if self._max_tokens is None else sum(len(one) > self._max_tokens for one in encoded)
        return [np.array([*self._before, *one[: self._max_tokens], *self._after], np.int64) for one in encoded], cut


def _load(path: Path, shape: tuple[int, int]) -> Int16 | None:
    """Read the vectors in a file; None where it is missing, damaged or of another shape."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[_CHECKSUM:]).digest() != content[:_CHECKSUM]:
            return None
        vectors = np.load(io.BytesIO(content[_CHECKSUM:]), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return vectors if vectors.shape == shape and vectors.dtype == np.int16 else None


def _save(path: Path, vectors: Int16) -> None:
    content = io.BytesIO()
    np.save(content, vectors, allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content.getvalue()).digest() + content.getvalue())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
