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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._text import INIT_TEXT, first_tokens, no_server
from fedhpc.methods.base import Attached, Method, PerClient, Tensors, as_one_client
from fedhpc.registry import Section
from fedhpc.rng import torch_seed
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base

PREFIX = "prompt_embeddings"


class Prefix(Method):
    """Prefix-tuning: trained keys and values stand in front of every layer (Li and Liang 2021, arXiv 2101.00190)."""

    class Options(Section):
        num_virtual_tokens: int = Field(16, ge=1, description="n, length of the prefix")
        exchange: Literal["raw", "mlp", "materialised"] = Field("raw", description="what is trained and sent")
        hidden_size: int = Field(512, ge=1, description="width of the MLP (exchange mlp or materialised)")
        init: Literal["text", "random"] = Field("text", description="start from real words' activations or noise")
        init_text: str = Field(
            INIT_TEXT, min_length=1, description="the real words; repeated where they are fewer than n tokens"
        )

    options: Options

    def __init__(self, options: Options, base: Base, seed: int) -> None:
        super().__init__(options, base, seed)
        base.check_past()
        self._exchange = _EXCHANGES[options.exchange](self)

    @property
    def virtual_tokens(self) -> int:
        return self.options.num_virtual_tokens

    @property
    def payload(self) -> Layout:
        return self._exchange.payload

    @property
    def trainable(self) -> Layout:
        return self._exchange.trainable

    @property
    def starts_from_payload(self) -> bool:
        return type(self._exchange).start is _Raw.start

    def initial(self) -> Tensors:
        return self._exchange.initial()

    def start(self, received: PerClient, round_: int = 0, clients: Sequence[int] = ()) -> PerClient:
        return self._exchange.start(received)

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        return self._exchange.finish(trained, received)

    def blocks(self, name: str) -> int:
        return 2 * self.base.num_layers if name == PREFIX else 1  # keys and values of each layer

    def layers_above(self, name: str) -> Sequence[int]:
        if name != PREFIX:
            return super().layers_above(name)
        return [above for above in reversed(range(self.base.num_layers)) for _ in ("keys", "values")]

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        prefix = self._exchange.prefix(trained, received).to(self.base.dtype)
        clients, n, _ = prefix.shape
        # (K, n, 2L, H, d) -> one tensor (B, H, n, d) per layer's keys and values.
        prefix = prefix.view(clients, n, 2 * self.base.num_layers, self.base.num_kv_heads, self.base.head_dim)
        per_row = kernels.of_rows(prefix, rows)
        parts = per_row.permute(2, 0, 3, 1, 4).unbind(0)
        yield Attached(past=tuple(zip(parts[0::2], parts[1::2], strict=True)))

    def serving(self, exported: Mapping[str, Any] | None = None) -> str:
        return no_server("prefix", "the prefix as its cache")

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT prefix without projection."""
        with torch.no_grad():
            received = as_one_client(values)
            prefix = self._exchange.prefix(self.start(received), received)[0]
        prefix, layout = self.base.peft_prefix(prefix)
        config = {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": self.options.num_virtual_tokens,
            "num_attention_heads": self.base.num_kv_heads,
            "token_dim": self.token_width,
            **layout,
            "encoder_hidden_size": self.token_width,
            "prefix_projection": False,
        }
        self.write_adapter(path, config, {PREFIX: prefix})

    def imported(self, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        from fedhpc.methods._peft import as_payload, require, require_method

        require_method(config, "PREFIX_TUNING")
        require({"num_virtual_tokens": self.virtual_tokens}, {"num_virtual_tokens": config["num_virtual_tokens"]})
        if PREFIX not in self.payload.shapes:
            raise UserError(
                f"method.exchange {self.options.exchange} exchanges a network, and an adapter has what it made",
                key="method.from", remedy="use exchange raw or materialised",
            )  # fmt: skip
        prefix = {name: self.base.from_peft_prefix(tensor) for name, tensor in tensors.items() if name == PREFIX}
        return as_payload({**tensors, **prefix}, self.payload.shapes)

    # ---- what the exchanges are made of

    @property
    def token_width(self) -> int:
        """Numbers of a virtual token among the keys, or the values, of one layer."""
        return self.base.num_kv_heads * self.base.head_dim

    @property
    def width(self) -> int:
        """Numbers of a virtual token in all layers, keys and values."""
        return self.base.num_layers * 2 * self.token_width

    def first(self) -> Tensor:
        """The prefix before any training: (n, width)."""
        if self.options.init == "text":
            return self.anchor
        drawing = torch.Generator().manual_seed(torch_seed(self.seed, "prefix"))
        return torch.randn((self.options.num_virtual_tokens, self.width), generator=drawing)

    @cached_property
    def anchor(self) -> Tensor:
        """Keys and values of the base on the first n tokens of `init_text`: (n, width), on the CPU."""
        n = self.options.num_virtual_tokens
        ids = first_tokens(self.base, self.options.init_text, n)
        layers = self.base.activations(ids)  # each (H, n, d)
        stacked = torch.stack(layers).to("cpu", self.base.payload_dtype)  # (2L, H, n, d)
        return stacked.permute(2, 0, 1, 3).reshape(n, self.width).contiguous()

    @cached_property
    def network(self) -> _Network:
        """The network that makes a prefix, with exchange mlp and materialised."""
        return _Network(
            self.options.num_virtual_tokens, self.token_width, self.options.hidden_size, self.width, self.seed
        )


class _Network:
    """MLP(E) of section 4.3: n trained vectors through a perceptron with one hidden layer."""

    def __init__(self, n: int, token_width: int, hidden: int, width: int, seed: int) -> None:
        self.seed = seed
        self.layout = Layout(
            {
                "embedding.weight": (n, token_width),
                "transform.0.weight": (hidden, token_width),
                "transform.0.bias": (hidden,),
                "transform.2.weight": (width, hidden),
                "transform.2.bias": (width,),
            }
        )

    def initial(self, zero_output: bool) -> Tensors:
        """As torch.nn.Embedding and torch.nn.Linear initialise, from a keyed generator."""
        drawing = torch.Generator().manual_seed(torch_seed(self.seed, "prefix mlp"))
        shapes, tensors = self.layout.shapes, {}
        for name, shape in shapes.items():
            if name == "embedding.weight":
                tensors[name] = torch.randn(shape, generator=drawing)
            elif zero_output and name.startswith("transform.2"):
                tensors[name] = torch.zeros(shape)
            else:
                fan_in = shapes[name.rsplit(".", 1)[0] + ".weight"][1]
                tensors[name] = (torch.rand(shape, generator=drawing) * 2 - 1) / fan_in**0.5
        return tensors

    def output(self, values: PerClient) -> Tensor:
        """(K, n, width)"""
        hidden = torch.baddbmm(
            values["transform.0.bias"].unsqueeze(1), values["embedding.weight"], values["transform.0.weight"].mT
        ).tanh()
        return torch.baddbmm(values["transform.2.bias"].unsqueeze(1), hidden, values["transform.2.weight"].mT)


class _Raw:
    """`exchange: raw`: the prefix itself is trained and exchanged. The others say where they differ."""

    def __init__(self, method: Prefix) -> None:
        self.method = method

    @cached_property
    def payload(self) -> Layout:
        return Layout({PREFIX: (self.method.options.num_virtual_tokens, self.method.width)})

    @property
    def trainable(self) -> Layout:
        return self.payload

    def initial(self) -> Tensors:
        return {PREFIX: self.method.first()}

    def start(self, received: PerClient) -> PerClient:
        return received

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        return trained

    def prefix(self, trained: PerClient, received: PerClient) -> Tensor:
        """The prefixes of K clients: (K, n, width)."""
        return trained[PREFIX]


class _Mlp(_Raw):
    """`exchange: mlp`: the network is trained and exchanged."""

    @cached_property
    def payload(self) -> Layout:
        return self.method.network.layout

    def initial(self) -> Tensors:
        return self.method.network.initial(zero_output=self.method.options.init == "text")

    @cached_property
    def _anchor(self) -> Tensor:
        return self.method.anchor.to(self.method.base.device)

    def prefix(self, trained: PerClient, received: PerClient) -> Tensor:
        out = self.method.network.output(trained)
        return out + self._anchor.to(out) if self.method.options.init == "text" else out


class _Materialised(_Raw):
    """`exchange: materialised`: a network is trained, and the prefix that it makes is exchanged."""

    @property
    def trainable(self) -> Layout:
        return self.method.network.layout

    def start(self, received: PerClient) -> PerClient:
        prefix = received[PREFIX]
        network = self.method.network.initial(zero_output=True)
        return {name: t.to(prefix).expand(prefix.shape[0], *t.shape) for name, t in network.items()}

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        return {PREFIX: self.prefix(trained, received)}

    def prefix(self, trained: PerClient, received: PerClient) -> Tensor:
        return received[PREFIX] + self.method.network.output(trained)


_EXCHANGES: dict[str, type[_Raw]] = {"raw": _Raw, "mlp": _Mlp, "materialised": _Materialised}
