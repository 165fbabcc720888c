"""Prefix-tuning: trained keys and values in front of every layer (Li and Liang 2021, arXiv 2101.00190, section 4).

A prefix of n virtual tokens is one tensor `prompt_embeddings` (n, layers * 2 * kv_heads * head_dim), laid out as in
PEFT. What is trained and what is exchanged are two choices in a federation (`exchange`):

- raw: the prefix is trained and exchanged (no reparametrisation).
- mlp: P = anchor + MLP(E) (section 4.3); E and the MLP are trained and exchanged, so MLPs are averaged.
- materialised: each client trains an MLP of its own on top of the prefix it received, P = P_t + MLP(E), and
  sends the resulting prefix, so prefixes are averaged. The output layer of the MLP starts at zero.

In an encoder-decoder the prefix is in front of the decoder's self-attention, a prefix of its own for every layer.

`init: text` starts from the activations of the base on real words, which the paper finds to matter with little data
(section 7.4): the keys and values of the first n tokens of `init_text`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._text import INIT_TEXT, first_tokens
from fedhpc.methods.base import Attached, Method, PerClient, Tensors, as_one_client
from fedhpc.registry import Section
from fedhpc.rng import torch_seed
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base

PREFIX = "prompt_embeddings"


class Options(Section):
    num_virtual_tokens: int = Field(16, ge=1, description="n, length of the prefix")
    exchange: Literal["raw", "mlp", "materialised"] = Field("raw", description="what is trained and sent")
    hidden_size: int = Field(512, ge=1, description="width of the MLP (exchange mlp or materialised)")
    init: Literal["text", "random"] = Field("text", description="start from real words' activations or noise")
    init_text: str = Field(
        INIT_TEXT, min_length=1, description="the real words; repeated where they are fewer than n tokens"
    )


class Prefix(Method):
    """See the module."""

    def __init__(self, options: Any, base: Base, seed: int) -> None:
        super().__init__(options, base, seed)
        base.check_past()

    @property
    def _width(self) -> int:
        return self.base.num_layers * 2 * self.base.num_kv_heads * self.base.head_dim

    @property
    def _prefix(self) -> Layout:
        return Layout({PREFIX: (self.options.num_virtual_tokens, self._width)})

    @property
    def _mlp(self) -> Layout:
        token, hidden = self.base.num_kv_heads * self.base.head_dim, self.options.hidden_size
        return Layout(
            {
                "embedding.weight": (self.options.num_virtual_tokens, token),
                "transform.0.weight": (hidden, token),
                "transform.0.bias": (hidden,),
                "transform.2.weight": (self._width, hidden),
                "transform.2.bias": (self._width,),
            }
        )

    @property
    def virtual_tokens(self) -> int:
        return int(self.options.num_virtual_tokens)

    @property
    def payload(self) -> Layout:
        return self._mlp if self.options.exchange == "mlp" else self._prefix

    @property
    def trainable(self) -> Layout:
        return self._prefix if self.options.exchange == "raw" else self._mlp

    def initial(self) -> dict[str, Tensor]:
        if self.options.exchange == "mlp":
            return self._initial_mlp(zero_output=self.options.init == "text")
        if self.options.init == "text":
            return {PREFIX: self._anchor}
        noise = torch.Generator().manual_seed(torch_seed(self.seed, "prefix"))
        return {PREFIX: torch.randn(self._prefix.shapes[PREFIX], generator=noise)}

    def start(self, received: PerClient, round_: int = 0, clients: Sequence[int] = ()) -> PerClient:
        if self.options.exchange != "materialised":
            return received
        prefix = received[PREFIX]
        mlp = self._initial_mlp(zero_output=True)
        return {name: t.to(prefix).expand(prefix.shape[0], *t.shape) for name, t in mlp.items()}

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        return {PREFIX: self.prefix(trained, received)} if self.options.exchange == "materialised" else trained

    def prefix(self, trained: PerClient, received: PerClient) -> Tensor:
        """The prefixes of K clients: (K, n, layers * 2 * kv_heads * head_dim)."""
        if self.options.exchange == "raw":
            return trained[PREFIX]
        hidden = torch.baddbmm(
            trained["transform.0.bias"].unsqueeze(1), trained["embedding.weight"], trained["transform.0.weight"].mT
        ).tanh()
        out = torch.baddbmm(trained["transform.2.bias"].unsqueeze(1), hidden, trained["transform.2.weight"].mT)
        if self.options.exchange == "materialised":
            return received[PREFIX] + out
        return out + self._anchor_on_device.to(out) if self.options.init == "text" else out

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        prefix = self.prefix(trained, received).to(self.base.dtype)
        clients, n, _ = prefix.shape
        # (K, n, 2L, H, d) -> one tensor (B, H, n, d) per layer's keys and values.
        prefix = prefix.view(clients, n, 2 * self.base.num_layers, self.base.num_kv_heads, self.base.head_dim)
        per_row = kernels.of_rows(prefix, rows)
        parts = per_row.permute(2, 0, 3, 1, 4).unbind(0)
        yield Attached(past=tuple(zip(parts[0::2], parts[1::2], strict=True)))

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT prefix without projection: adapter_config.json and adapter_model.safetensors."""
        from fedhpc.methods._peft import write_adapter

        with torch.no_grad():
            received = as_one_client(values)
            prefix = self.prefix(self.start(received), received)[0]
        prefix, layout = self.base.peft_prefix(prefix)
        config = {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.options.num_virtual_tokens,
            "num_attention_heads": self.base.num_kv_heads,
            "token_dim": self.base.num_kv_heads * self.base.head_dim,
            **layout,
            "encoder_hidden_size": self.base.num_kv_heads * self.base.head_dim,
            "prefix_projection": False,
        }
        write_adapter(path, config, {PREFIX: prefix}, self.base)

    def _initial_mlp(self, zero_output: bool) -> dict[str, Tensor]:
        """As torch.nn.Embedding and torch.nn.Linear initialise, from a keyed generator."""
        noise = torch.Generator().manual_seed(torch_seed(self.seed, "prefix mlp"))
        tensors = {}
        for name, shape in self._mlp.shapes.items():
            if name == "embedding.weight":
                tensors[name] = torch.randn(shape, generator=noise)
            elif zero_output and name.startswith("transform.2"):
                tensors[name] = torch.zeros(shape)
            else:
                fan_in = self._mlp.shapes[name.rsplit(".", 1)[0] + ".weight"][1]
                tensors[name] = (torch.rand(shape, generator=noise) * 2 - 1) / fan_in**0.5
        return tensors

    @property
    def _anchor(self) -> Tensor:
        """Keys and values of the base on the first n tokens of `init_text`: (n, width)."""
        if not hasattr(self, "_anchor_cache"):
            self._anchor_cache = self._activations()
        return self._anchor_cache

    @cached_property
    def _anchor_on_device(self) -> Tensor:
        return self._anchor.to(self.base.device)

    def _activations(self) -> Tensor:
        n = self.options.num_virtual_tokens
        ids = first_tokens(self.base, self.options.init_text, n)
        layers = self.base.activations(ids)  # each (H, n, d)
        stacked = torch.stack(layers).to("cpu", self.base.payload_dtype)  # (2L, H, n, d)
        return stacked.permute(2, 0, 1, 3).reshape(n, self._width).contiguous()


METHOD = Prefix
