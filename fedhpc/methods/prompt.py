"""Prompt tuning: trained embeddings in front of the text (Lester et al. 2021, arXiv 2104.08691, section 2).

Only the input layer sees them, so the payload is n * D numbers whatever the depth. `init: text` starts from the
embeddings of real words, the paper's "sampled vocabulary / class label" initialisation (section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._text import INIT_TEXT, first_tokens, no_server
from fedhpc.methods.base import Attached, Method, PerClient, Tensors
from fedhpc.registry import Section
from fedhpc.rng import torch_seed
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base

PROMPT = "prompt_embeddings"


class Prompt(Method):
    """Prompt tuning: trained embeddings stand in front of the text (Lester et al. 2021, arXiv 2104.08691)."""

    class Options(Section):
        num_virtual_tokens: int = Field(16, ge=1, description="n, length of the soft prompt")
        init: Literal["text", "random"] = Field("text", description="start from real words' embeddings or noise")
        init_text: str = Field(
            INIT_TEXT, min_length=1, description="the real words; repeated where fewer than n tokens"
        )

    options: Options
    starts_from_payload = True

    def __init__(self, options: Any, base: Base, seed: int) -> None:
        super().__init__(options, base, seed)
        base.check_embeddings()

    @property
    def virtual_tokens(self) -> int:
        return self.options.num_virtual_tokens

    @property
    def payload(self) -> Layout:
        width = self.base.model.get_input_embeddings().weight.shape[1]
        return Layout({PROMPT: (self.options.num_virtual_tokens, width)})

    def initial(self) -> dict[str, Tensor]:
        if self.options.init == "random":
            drawing = torch.Generator().manual_seed(torch_seed(self.seed, "prompt"))
            return {PROMPT: torch.randn(self.payload.shapes[PROMPT], generator=drawing)}
        ids = first_tokens(self.base, self.options.init_text, self.options.num_virtual_tokens)
        with torch.no_grad():
            embeddings = self.base.model.get_input_embeddings()(torch.tensor(ids, device=self.base.device))
        return {PROMPT: embeddings.to("cpu", self.base.payload_dtype)}

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        prompts = trained[PROMPT].to(self.base.dtype)
        per_row = kernels.of_rows(prompts, rows)
        yield Attached(embeddings=per_row)

    def serving(self, exported: Mapping[str, Any] | None = None) -> str:
        return no_server("soft prompt", "the prompt in front of a text's embeddings")

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT prompt-tuning adapter."""
        from fedhpc.methods._peft import virtual_tokens

        config = {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            **virtual_tokens(values[PROMPT], self.base),
        }
        self.write_adapter(path, config, {PROMPT: values[PROMPT]})

    def imported(self, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        from fedhpc.methods._peft import as_payload, require, require_method

        require_method(config, "PROMPT_TUNING", "P_TUNING")
        require({"num_virtual_tokens": self.virtual_tokens}, {"num_virtual_tokens": config["num_virtual_tokens"]})
        return as_payload(tensors, self.payload.shapes)
