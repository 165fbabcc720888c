"""A frozen sentence encoder, and the vectors of passages on disk.

Vectors lie under `$FEDHPC_CACHE/vectors` (default `~/.cache/fedhpc/vectors`), one file per client's passages, named by
a hash of the encoder, the texts and what computed them. A file begins with a checksum; one that is damaged or does not
fit is made again.
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
from fedhpc.kinds.base import special_ids
from fedhpc.kinds.embedding import embed
from fedhpc.methods import retriever
from fedhpc.models import load_base

_CHECKSUM = 32  # bytes of SHA-256 in front of a file's content


class Encoder:
    """Texts to vectors on the grid of fedhpc.approaches.rag.dense, each a function of its own text alone."""

    def __init__(self, name: str, projection: str | None, device: Any) -> None:
        """name: folder or hub id; projection: folder of a tuned retriever, for queries. UserError where one is not."""
        try:
            self.base = load_base(Model.model_validate({"name": name, "task": "embedding"}), device)
        except UserError as error:
            raise UserError(str(error).replace("model.name:", "method.encoder:", 1)) from error
        self._projection = None if projection is None else retriever.load(Path(projection), self.base).to(device)
        self._before, self._after = special_ids(self.base.tokenizer)
        limit = self.base.kind.max_positions(self.base)
        self._room = None if limit is None else limit - len(self._before) - len(self._after)

    @property
    def width(self) -> int:
        """D, of the vectors."""
        return self.base.hidden_size

    @property
    def fingerprint(self) -> str:
        """Of the weights of encoder and projection."""
        parts = [] if self._projection is None else [self._projection.cpu().numpy().tobytes()]
        return hashlib.sha256(b"".join([self.base.fingerprint.encode(), *parts])).hexdigest()

    def queries(self, texts: Sequence[str]) -> Int16:
        """(n, D), through the tuned projection where there is one."""
        vectors = embed(self.base, self._ids(texts)[0])
        if self._projection is not None:
            # One at a time, so that a query's vector does not depend on the others.
            tuned = torch.stack([self._projection.to(v.dtype) @ v for v in vectors])
            vectors = torch.nn.functional.normalize(tuned, dim=1)
        return on_grid(vectors.cpu().numpy())

    def passages(self, texts: Sequence[str]) -> tuple[Int16, list[str]]:
        """(n, D) of at least one text, from the cache where they have been made before; and what is to be told."""
        ids, cut = self._ids(texts)
        notes = [] if not cut else [
            f"{cut} chunks are longer than the {self._room} tokens that method.encoder reads; their ends are not in "
            "their vectors: lower method.chunk_words"
        ]  # fmt: skip
        # A GPU and another version of torch round differently.
        about = f"{self.base.fingerprint} {self.base.device.type} {torch.__version__}"
        digest = hashlib.sha256(about.encode())
        for one in ids:
            digest.update(np.array([len(one), *one], np.int64).tobytes())
        path = cache_dir().parent / "vectors" / f"{digest.hexdigest()}.vectors"
        found = _load(path, (len(texts), self.width))
        if found is None:
            if path.exists():
                notes.append("vectors in the cache were damaged and have been made again")
            found = on_grid(embed(self.base, ids).cpu().numpy())
            try:
                _save(path, found)
            except OSError as error:
                notes.append(f"vectors are not cached in {path.parent}: {error.strerror or error}")
        return found, notes

    def _ids(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """Token ids with the special ones, cut at the end, and how many texts that concerns."""
        encoded = self.base.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
            verbose=False,
        )["input_ids"]  # fmt: skip
        cut = 0 if self._room is None else sum(len(one) > self._room for one in encoded)
        return [np.array([*self._before, *one[: self._room], *self._after], np.int64) for one in encoded], cut


def _load(path: Path, shape: tuple[int, int]) -> Int16 | None:
    """The vectors in a file; None where it is absent, damaged or of another shape."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[_CHECKSUM:]).digest() != content[:_CHECKSUM]:
            return None
        found = np.load(io.BytesIO(content[_CHECKSUM:]), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.int16 else None


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
