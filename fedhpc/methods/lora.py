"""LoRA: a trained low-rank term beside frozen weights (Hu et al. 2022, arXiv 2106.09685, equation 3).

h = W x + (alpha / r) B A x, with A (r, in) drawn at random and B (out, r) zero at first; in training with dropout on
the x of the second term. Payload and export are named and shaped as in PEFT.

How the clients' terms combine is the option `aggregation`:
average: A and B are averaged apart from each other, as in FedIT (Zhang et al. 2023, arXiv 2305.05644). The product of
the means is not the mean of the products.
ffa: A stays as it was drawn, and B alone is trained and exchanged (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313,
section 4). The mean of the B_i A is then the mean of the B_i times A, and the payload is half as large.
exact: the sum that the base's weight has gained, D, is exchanged beside A and B. Client i returns
D_i = D + s B_i A_i - s B A, so that the mean of the D_i is exactly the mean of the products; what D has more than the
product of the means is the residual that FedEx-LoRA folds into the frozen weight (Singhal et al. 2024, arXiv
2410.09432).
stack: D alone is exchanged. Everybody begins every round with a fresh A, B = 0 and a rank of their own, and returns
D + s B_i A_i. The mean is the product of the stacked A_i and w_i B_i that FLoRA adds to the frozen weight (Wang et al.
2024, arXiv 2409.05976).
With both, the layer computes (W + D - s B A) x + s B_i A_i x, and W, which may be quantised, is not touched. A client
need not send D_i, which follows from A_i and B_i; it is formed where the client trains and rides the same exact sum as
every payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._linear import by_row, features, find_layers, is_conv1d
from fedhpc.methods.base import Attached, Method, PerClient, Tensors
from fedhpc.registry import Section
from fedhpc.rng import bits, torch_seed
from fedhpc.updates.layout import Layout

# The attention projections that the paper adapts (section 4.2), by model_type.
_TARGETS = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "bloom": ["query_key_value"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "xlm-roberta": ["query", "value"],
    "electra": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "t5": ["q", "v"],
    "mt5": ["q", "v"],
}
_USUAL_TARGETS = ["q_proj", "v_proj"]


_A, _B, _D = "lora_A.weight", "lora_B.weight", "lora_delta.weight"


class Options(Section):
    rank: int = Field(8, ge=1, description="r, rank of the added term")
    alpha: float = Field(16.0, gt=0, description="the term is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the inputs of the term dropped in training")
    aggregation: Literal["average", "ffa", "exact", "stack"] = Field(
        "average", description="what is trained and how it combines"
    )
    ranks: list[Annotated[int, Field(ge=1)]] | None = Field(
        None,
        min_length=1,
        description="with stack: client c has rank ranks[c mod length], scaled by alpha / rank all the same",
    )
    targets: list[str] | None = Field(
        None, min_length=1, description="names of the adapted linear layers; default: attention, by architecture"
    )

    def conflict(self, config: Any) -> str | None:
        if self.ranks is not None and self.aggregation != "stack":
            return "method.ranks needs method.aggregation stack: the other rules combine factors of one rank"
        if self.aggregation == "stack" and config.mode != "federated":
            return (
                f"method.aggregation stack begins afresh after every aggregation, and mode {config.mode} has none: "
                "use average"
            )
        return None


class Lora(Method):
    """See the module."""

    @property
    def _targets(self) -> list[str]:
        return self.options.targets or _TARGETS.get(self.base.model.config.model_type, _USUAL_TARGETS)

    @cached_property
    def _modules(self) -> dict[str, Any]:
        """Path in the base -> adapted module, in the model's order."""
        return find_layers(self.base, self._targets, "method.targets")

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of A and B of every module."""
        shapes: dict[str, tuple[int, ...]] = {}
        rank = max(self._ranks)
        for path, module in self._modules.items():
            inside, outside = features(module) or (0, 0)
            shapes[_a(path)] = (rank, inside)
            shapes[_b(path)] = (outside, rank)
        return shapes

    @property
    def _ranks(self) -> list[int]:
        return self.options.ranks or [self.options.rank]

    @property
    def _scale(self) -> float:
        """s"""
        return float(self.options.alpha / self.options.rank)

    @cached_property
    def _deltas(self) -> Layout:
        """D of every module, with the rules that exchange it."""
        if self.options.aggregation not in ("exact", "stack"):
            return Layout({})
        widths = {path: features(module) or (0, 0) for path, module in self._modules.items()}
        return Layout({_d(path): (outside, inside) for path, (inside, outside) in widths.items()})

    @cached_property
    def payload(self) -> Layout:
        return self._deltas if self._restarts else Layout({**self.trainable.shapes, **self._deltas.shapes})

    @cached_property
    def trainable(self) -> Layout:
        return Layout({name: shape for name, shape in self._shapes.items() if name not in self._frozen})

    @property
    def _restarts(self) -> bool:
        return bool(self.options.aggregation == "stack")

    def numbers_sent(self, client: int) -> int:
        rank = self._ranks[client % len(self._ranks)]
        return self.trainable.size * rank // max(self._ranks)

    def initial(self) -> dict[str, Tensor]:
        zeros = {name: torch.zeros(shape) for name, shape in self._deltas.shapes.items()}
        return {name: tensor for name, tensor in {**self._drawn(), **zeros}.items() if name in self.payload.shapes}

    def start(self, received: PerClient, round_: int = 0, clients: Sequence[int] = ()) -> PerClient:
        if not self._restarts:
            return {name: received[name] for name in self.trainable.shapes}
        like = next(iter(received.values()))
        fresh = {n: like.new_zeros(len(clients) or len(like), *shape) for n, shape in self.trainable.shapes.items()}
        for row, client in enumerate(clients):
            # Rows of zeros stay zeros, since B has zeros against them and the other way round.
            rank = self._ranks[client % len(self._ranks)]
            for name, drawn in self._drawn(round_, client).items():
                if name.endswith(_A):
                    fresh[name][row, :rank] = drawn[:rank].to(like)
        return fresh

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        values = {name: tensor for name, tensor in trained.items() if name in self.payload.shapes}
        for path in self._modules if self._deltas.shapes else ():
            values[_d(path)] = self._rest(path, received) + self._product(path, trained)
        return values

    def _product(self, path: str, factors: Mapping[str, Tensor]) -> Tensor:
        """s B A of a layer: (K, out, in)."""
        return self._scale * factors[_b(path)] @ factors[_a(path)]

    def _rest(self, path: str, received: PerClient) -> Tensor:
        """What a layer's weight has gained beside the term that is trained: (1 or K, out, in)."""
        delta = received[_d(path)]
        return delta if self._restarts else delta - self._product(path, received)

    def _drawn(self, *keys: int) -> dict[str, Tensor]:
        """A and B before the first round, or those of `keys`: a round and a client."""
        noise = torch.Generator().manual_seed(torch_seed(self.seed, "lora", *keys))
        # The uniform bound that torch.nn.Linear and PEFT use for A.
        return {
            name: (torch.rand(shape, generator=noise) * 2 - 1) / shape[1] ** 0.5
            if name.endswith(_A)
            else torch.zeros(shape)
            for name, shape in self._shapes.items()
        }

    @cached_property
    def _frozen(self) -> dict[str, Tensor]:
        """With ffa A of every module (1, r, in), on the device."""
        if self.options.aggregation != "ffa":
            return {}
        dtype = self.base.payload_dtype
        return {n: t.to(self.base.device, dtype).unsqueeze(0) for n, t in self._drawn().items() if n.endswith(_A)}

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        hooks = []
        for number, (path, module) in enumerate(self._modules.items()):
            keys = bits(row_keys, torch.tensor(number)) if row_keys is not None and self.options.dropout else None
            factors = {**self._frozen, **trained}
            rest = self._rest(path, received) if self._deltas.shapes else None
            term = self._term(factors[_a(path)], factors[_b(path)], rest, rows, keys)
            hooks.append(module.register_forward_hook(term))
        try:
            yield Attached(by_position=row_keys is not None and self.options.dropout > 0)
        finally:
            for hook in hooks:
                hook.remove()

    def _term(
        self, a: Tensor, b: Tensor, rest: Tensor | None, rows: Tensor, keys: Tensor | None
    ) -> Callable[[Any, Any, Tensor], Tensor]:
        """A forward hook that adds the term of row i's client: a (1 or K, r, in), b (K, out, r), rows (B,).

        rest: (1 or K, out, in) to be added to the weight, or None. keys: int64 (B,) of the dropout, None for none.
        """

        shared = len(a) == len(b) == 1  # one A and one B for all rows

        def of_rows(factor: Tensor, dtype: torch.dtype) -> Tensor:
            factor = factor.to(dtype)
            return factor if shared else kernels.of_rows(factor.expand(max(len(a), len(b)), -1, -1), rows)

        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            x, whole = by_row(inputs[0], rows), by_row(output, rows)  # (B, T, in), (B, T, out)
            # What the layer computes in: under autocast its inputs are not in it yet.
            x, dtype = x.to(output.dtype), output.dtype
            if rest is not None:
                gained = rest.to(dtype)
                whole = whole + x @ (gained if len(rest) == 1 else kernels.of_rows(gained, rows)).mT
            if keys is not None:
                x = x * self.kept(keys, *x.shape[1:]) / (1 - self.options.dropout)
            if shared:
                x, whole = x.flatten(0, 1).unsqueeze(0), whole.flatten(0, 1).unsqueeze(0)
            return kernels.add_low_rank(whole, x, of_rows(a, dtype), of_rows(b, dtype), self._scale).view_as(output)

        return hook

    def kept(self, keys: Tensor, length: int, width: int) -> Tensor:
        """Which inputs of a layer the dropout keeps: bool (B, length, width) for keys int64 (B,).

        Position t of a row has the same draws whatever the length, so padding changes nothing.
        """
        drawn = bits(keys.unsqueeze(1), torch.arange(length * width, device=keys.device))
        # int64 is uniform over [-2^63, 2^63): the lowest share p is dropped.
        return (drawn >= round(self.options.dropout * 2**64) - 2**63).view(-1, length, width)

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT LoRA adapter: adapter_config.json and adapter_model.safetensors.

        Of D it is a LoRA of higher rank: B and A are the singular vectors, scaled by the roots of the singular values.
        Those below 16 eps of the largest (eps of the payload's dtype) are rounding and left out.
        """
        from fedhpc.methods._peft import write_adapter

        tensors = {**{name: tensor[0] for name, tensor in self._frozen.items()}, **values}
        rank, alpha = self.options.rank, self.options.alpha
        if self._deltas.shapes:
            tensors = _factorised({p: values[_d(p)] for p in self._modules})
            rank = next(len(tensor) for name, tensor in tensors.items() if name.endswith(_A))
            alpha = float(rank)
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self.options.dropout,
            "bias": "none",
            "target_modules": self._targets,
            "fan_in_fan_out": any(is_conv1d(m) for m in self._modules.values()),
        }
        write_adapter(path, config, {f"base_model.model.{name}": t for name, t in tensors.items()}, self.base)


def _factorised(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A (r, in) and B (out, r) of every weight (out, in); r is the largest numerical rank, the others get zeros."""
    parts = {}
    for path, weight in weights.items():
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        kept = int((s > 16 * torch.finfo(weight.dtype).eps * s[0]).sum())
        root = s[:kept].sqrt()
        parts[path] = (root.unsqueeze(1) * vt[:kept], u[:, :kept] * root)
    rank = max(1, *(len(a) for a, _ in parts.values()))
    tensors = {}
    for path, (a, b) in parts.items():
        missing = rank - len(a)
        tensors[_a(path)] = torch.nn.functional.pad(a, (0, 0, 0, missing)).to(weights[path].dtype)
        tensors[_b(path)] = torch.nn.functional.pad(b, (0, missing)).to(weights[path].dtype)
    return tensors


def _a(path: str) -> str:
    return f"{path}.{_A}"


def _b(path: str) -> str:
    return f"{path}.{_B}"


def _d(path: str) -> str:
    return f"{path}.{_D}"


METHOD = Lora
