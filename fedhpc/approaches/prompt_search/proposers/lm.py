"""Lets the base model itself write new instructions (as in APE, Zhou et al. 2023, arXiv 2211.01910, section 3.1).

They are continuations of the first words of a parent, or answers to a request for a paraphrase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, field_validator

from fedhpc.approaches.prompt_search.proposers.base import Proposer
from fedhpc.approaches.prompt_search.sampling import continuations
from fedhpc.approaches.scoring.prompts import Candidate, Shared
from fedhpc.lazy import lazy
from fedhpc.registry import Section

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


class LanguageModel(Proposer):
    """Lets the base model write new instructions."""

    class Options(Section):
        request: str | None = Field(
            None, description="text with {instruction}, whose continuation is the new one; null: its first words go on"
        )
        temperature: float = Field(0.8, gt=0, description="of the draws; small: the likeliest words")
        max_tokens: int = Field(16, ge=1, description="tokens drawn for a candidate; it ends with its first line")

        @field_validator("request")
        @classmethod
        def _has_instruction(cls, request: str | None) -> str | None:
            if request is not None and "{instruction}" not in request:
                raise ValueError("has no {instruction}, which the instruction to be reworded replaces")
            return request

    def propose(
        self, parents: Sequence[Candidate], shared: Sequence[Shared], count: int, draws: np.random.Generator
    ) -> list[Candidate]:
        writer, options = self.space.writer, self.options
        chosen, prompts = [], []
        for _ in range(count):
            parent = parents[int(draws.integers(len(parents), size=2).min())]
            words = parent.instruction.split()
            head = " ".join(words[: int(draws.integers(len(words) + 1))]) if options.request is None else ""
            text = head if options.request is None else options.request.replace("{instruction}", parent.instruction)
            ids = writer.written(text)
            bos = self.base.tokenizer.bos_token_id
            first = self.base.tokenizer.eos_token_id if bos is None else bos
            chosen.append(parent)
            prompts.append(np.concatenate([np.array([first], np.int32), ids]))
        with torch.no_grad():
            drawn = continuations(self.base, prompts, draws.random((count, options.max_tokens)), options.temperature)
        candidates = []
        for parent, prompt, ids in zip(chosen, prompts, drawn, strict=True):
            # A tokenizer may drop the first space of a text, so words are decoded with those before them.
            text_ids = ids if options.request is not None else np.concatenate([prompt[1:], ids])
            instruction = (self.base.decoded(text_ids).strip().splitlines() or [""])[0].strip()
            if instruction:
                candidates.append(replace(parent, instruction=instruction))
        return candidates
