"""Retriever tuning: a linear map behind the vectors of questions, trained on pairs of a question and its passage.

As the query half of a dual encoder (Karpukhin et al. 2020, arXiv 2004.04906, section 3) with the passages' half frozen:
the vectors of indexed passages stay as they are, so clients need not index anything again. The map W (D, D) starts as
the identity, with which a search finds what it found before; W q is scaled to length 1. The loss is that of
objectives/contrastive.py.

The export is a folder of its own, `adapter_config.json` and `adapter_model.safetensors`, that `rag` takes as
`method.retriever`; `fedhpc export --merge` makes of it and its encoder a folder for the library sentence-transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.methods.base import Attached, Method, PerClient, Tensors
from fedhpc.registry import Section
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base

PROJECTION = "query_projection.weight"
FORMAT = "fedhpc-retriever"


class Retriever(Method):
    """Retriever tuning: a trained linear map behind the vectors of questions (Karpukhin et al. 2020)."""

    class Options(Section):
        def conflict(self, config: Any) -> str | None:
            """What a loss against the other passages of a batch has no meaning for."""
            if config.client.batch_size < 2:
                return (
                    "client.batch_size 1: method.name retriever tells a passage from the others of a step: use 2 or "
                    "more"
                )
            # One model is evaluated against every passage of a batch, one of several against those of its own rows.
            for key, given in (
                ("mode local", config.mode == "local"),
                ("personalization", config.personalization.parts or config.personalization.finetune_steps),
                ("evaluation.client_fraction", config.evaluation.client_fraction),
            ):
                if given:
                    return (
                        f"{key} evaluates clients beside each other, and a retriever's loss depends on how many "
                        "passages it chooses from, which is not the same for each: leave it out"
                    )
            return None

    options: Options
    starts_from_payload = True

    def __init__(self, options: Options, base: Base, seed: int) -> None:
        super().__init__(options, base, seed)
        if base.task != "embedding":
            raise UserError(
                "method.name: retriever trains behind the vectors of sentences: use model.task embedding and the "
                "encoder as model.name"
            )

    @property
    def payload(self) -> Layout:
        width = self.base.hidden_size
        return Layout({PROJECTION: (width, width)})

    def initial(self) -> dict[str, Tensor]:
        return {PROJECTION: torch.eye(self.base.hidden_size)}

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        yield Attached(questions=partial(mapped, trained[PROJECTION], rows))

    def export(self, values: Tensors, path: Path) -> None:
        """The map, and which encoder it belongs to."""
        self.write_adapter(path, {"format": FORMAT, "fingerprint": self.base.fingerprint}, values)


def mapped(projection: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
    """The vectors (B, D) of questions behind the maps (K, D, D) of their clients `rows` (B,), or (1, D, D) of all."""
    weight = projection.to(vectors.dtype)
    of_rows = weight if len(weight) == 1 else weight.index_select(0, rows)
    return torch.nn.functional.normalize(torch.matmul(of_rows, vectors.unsqueeze(-1)).squeeze(-1), dim=1)


def load(path: Path, base: Base) -> Tensor:
    """The map (D, D) of an export for the encoder `base`. UserError where there is none, or it is another's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"'{path}' holds no adapter that can be read: {error}", key="method.retriever") from None
    if config.get("format") != FORMAT or PROJECTION not in tensors:
        raise UserError(f"'{path}' is not the adapter/ of a run with method retriever", key="method.retriever")
    if config.get("fingerprint") != base.fingerprint:
        raise UserError(
            f"'{path}' was trained behind another encoder ({config.get('base_model_name_or_path')}) than '{base.name}'",
            key="method.retriever",
        )
    return tensors[PROJECTION]
