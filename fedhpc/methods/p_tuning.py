"""P-tuning: a soft prompt made by a small trained network (Liu et al. 2021, arXiv 2103.10385, section 3.2).

The virtual embeddings are MLP(E), a three-layer perceptron over n trained vectors (the variant of PEFT's PromptEncoder
that is called MLP); E and the MLP are trained and exchanged. The export is the soft prompt that they make.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._text import no_server
from fedhpc.methods.base import Attached, Method, PerClient, Tensors, as_one_client
from fedhpc.registry import Section
from fedhpc.rng import torch_seed
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base


class PTuning(Method):
    """P-tuning: a soft prompt made by a small trained network (Liu et al. 2021, arXiv 2103.10385)."""

    class Options(Section):
        num_virtual_tokens: int = Field(16, ge=1, description="n, length of the soft prompt")
        hidden_size: int = Field(128, ge=1, description="width of the MLP")

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
        n, hidden = self.options.num_virtual_tokens, self.options.hidden_size
        width = int(self.base.model.get_input_embeddings().weight.shape[1])
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (n, width)}
        for layer, (inside, outside) in {0: (width, hidden), 2: (hidden, hidden), 4: (hidden, width)}.items():
            shapes[f"mlp_head.{layer}.weight"] = (outside, inside)
            shapes[f"mlp_head.{layer}.bias"] = (outside,)
        return Layout(shapes)

    def initial(self) -> dict[str, Tensor]:
        drawing = torch.Generator().manual_seed(torch_seed(self.seed, "p-tuning"))
        shapes = self.payload.shapes
        tensors = {}
        for name, shape in shapes.items():
            if name == "embedding.weight":
                tensors[name] = torch.randn(shape, generator=drawing)
            else:  # the uniform bound of torch.nn.Linear
                fan_in = shapes[name.rsplit(".", 1)[0] + ".weight"][1]
                tensors[name] = (torch.rand(shape, generator=drawing) * 2 - 1) / fan_in**0.5
        return tensors

    def prompts(self, trained: PerClient) -> Tensor:
        """The soft prompts of K clients: (K, n, D)."""
        x = trained["embedding.weight"]
        for layer in (0, 2, 4):
            weight, bias = trained[f"mlp_head.{layer}.weight"], trained[f"mlp_head.{layer}.bias"]
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
            x = x.relu() if layer < 4 else x
        return x

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        prompts = self.prompts(trained).to(self.base.dtype)
        per_row = kernels.of_rows(prompts, rows)
        yield Attached(embeddings=per_row)

    def serving(self, exported: Mapping[str, Any] | None = None) -> str:
        return no_server("soft prompt", "the prompt in front of a text's embeddings")

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT p-tuning adapter: the soft prompt, without the network that made it."""
        from fedhpc.methods._peft import virtual_tokens

        with torch.no_grad():
            prompt = self.prompts(as_one_client(values))[0]
        config = {
            "peft_type": "P_TUNING",
            "encoder_reparameterization_type": "MLP",
            "encoder_hidden_size": self.options.hidden_size,
            **virtual_tokens(prompt, self.base),
        }
        self.write_adapter(path, config, {"prompt_embeddings": prompt})
