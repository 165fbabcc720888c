"""Full fine-tuning: parameters of the base itself are trained and exchanged (FedAvg as in McMahan et al. 2017,
arXiv 1602.05629). Clients cannot share a base whose weights differ, so they train in turn.

Where ranks hold the base between them (runtime.worker_ranks), they train a client together: each trains its part of
every parameter (`fedhpc.models.parts`).

Two options, which can be combined, say which parameters; the others stay as they are and are not sent:

- parameters: bias trains the bias terms alone (BitFit, Ben Zaken et al. 2022, arXiv 2106.10199, section 2).
- last_layers: k trains the top k layers of every stack (encoder, decoder) and all that stands outside the layers but
  the embeddings: the final norm and the output layer. An output layer tied to the embeddings is one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.methods._weights import conflict_with_quantized, holders, require_unquantized, save_model, swapped
from fedhpc.methods.base import Attached, Method, PerClient, Tensors, as_one_client
from fedhpc.models.experts import biases_of_experts
from fedhpc.models.hooks import gather
from fedhpc.models.load import embedding_modules, layer_stacks
from fedhpc.registry import Section
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base
    from fedhpc.models.parts import Parts


class Full(Method):
    """Full fine-tuning: weights of the base itself are trained and exchanged."""

    class Options(Section):
        parameters: Literal["all", "bias"] = Field("all", description="what is trained; bias: the bias terms alone")
        last_layers: int | None = Field(
            None, ge=1, description="only the top k layers, the final norm and an output layer that is not tied"
        )

        def conflict(self, config: Any) -> str | None:
            return conflict_with_quantized("full", config)

    options: Options

    shares_base = False  # each client has weights of its own

    def __init__(self, options: Options, base: Base, seed: int) -> None:
        super().__init__(options, base, seed)
        require_unquantized(base, "full")

    @cached_property
    def _trained(self) -> dict[str, Any]:
        """Name -> parameter, in the model's order."""
        trained = dict(self.base.model.named_parameters())
        if self.options.parameters == "bias":
            of_experts = biases_of_experts(self.base.model)
            trained = {n: p for n, p in trained.items() if n.rsplit(".", 1)[-1] == "bias" or n in of_experts}
        if self.options.last_layers is not None:
            frozen = self._below(self.options.last_layers)
            trained = {name: p for name, p in trained.items() if id(p) not in frozen}
        if not trained:
            raise UserError(
                f"method.parameters: '{self.base.name}' ({self.base.model.config.model_type}) has no bias terms to "
                "train; use all, or another method such as ia3"
            )
        return trained

    def _below(self, count: int) -> set[int]:
        """Ids of the parameters under the top `count` layers: those of the other layers and of the embeddings."""
        stacks = layer_stacks(self.base.model)
        fewest = min(len(stack) for stack in stacks)
        if count > fewest:
            raise UserError(f"method.last_layers: {count}, but '{self.base.name}' has {fewest} layers")
        lower = [layer for stack in stacks for layer in stack[: len(stack) - count]]
        return {id(p) for module in [*lower, *embedding_modules(self.base.model)] for p in module.parameters()}

    @cached_property
    def payload(self) -> Layout:
        return Layout({name: tuple(p.shape) for name, p in self._trained.items()})

    can_be_divided = True

    @property
    def parts(self) -> Parts | None:
        return self.base.parts

    @cached_property
    def trainable(self) -> Layout:
        parts = self.parts
        return self.payload if parts is None else Layout({name: parts.shape(name) for name in self.payload.shapes})

    def initial(self) -> dict[str, Tensor]:
        values = {}
        for name, ((module, attribute), *_) in self._holders.items():
            gather(module)
            values[name] = module._parameters[attribute].detach().to("cpu", self.base.payload_dtype, copy=True)
        return values

    @cached_property
    def _holders(self) -> dict[str, list[tuple[Any, str]]]:
        return holders(self.base.model, self.payload.shapes)

    def received(self, flat: Tensor) -> PerClient:
        return self.trainable.views(flat)

    def weights(self, received: PerClient) -> Tensors:
        return {} if self.parts is None else {name: part.squeeze(0) for name, part in received.items()}

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        if self.parts is not None:
            # In an evaluation the base has them already: `weights`.
            training = any(t.requires_grad for t in trained.values())
            with self.parts.trained({name: t.squeeze(0) for name, t in trained.items()}) if training else nullcontext():
                yield Attached()
            return
        with swapped(self._holders, {name: t.squeeze(0).to(self.base.dtype) for name, t in trained.items()}):
            yield Attached()

    def export(self, values: Tensors, path: Path) -> None:
        """A model folder that AutoModelForCausalLM and AutoTokenizer load."""
        received = as_one_client({name: t.to(self.base.device) for name, t in values.items()})
        with self.attach(received, received, torch.zeros(1, dtype=torch.int64)):
            save_model(self.base, path)
