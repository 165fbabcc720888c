"""LoRA: a trained low-rank term beside frozen weights (Hu et al. 2022, arXiv 2106.09685, equation 3).

h = W x + s B A x with s = alpha / r, A (r, in) drawn at random and B (out, r) zero at first; in training with dropout
on the x of the second term. Payload and export are named and shaped as in PEFT. How the clients' terms combine is the
option `aggregation`; each rule is a file of this folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.methods._architectures import architecture
from fedhpc.methods._changes import Change, Rows, changed
from fedhpc.methods._linear import find_layers, is_conv1d, names_of_experts, unreached
from fedhpc.methods.base import Attached, Method, PerClient, Tensors
from fedhpc.methods.lora.average import Average
from fedhpc.methods.lora.exact import Exact
from fedhpc.methods.lora.factors import Factors, is_a
from fedhpc.methods.lora.ffa import FrozenA
from fedhpc.methods.lora.stack import Stack
from fedhpc.methods.lora.term import Dropout, adds_term
from fedhpc.registry import Section
from fedhpc.rng import bits
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base

# Keys of PEFT's LoraConfig with which a layer computes something else than W x + s B A x with one s for all.
_OTHER_LAYERS = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "rank_pattern", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "velora_config",
)  # fmt: skip
# Where A and B began, if the weights of the base stayed what they were.
_BASE_UNTOUCHED = ("gaussian", "eva", "orthogonal")

_RULES: dict[str, type[Average]] = {"average": Average, "ffa": FrozenA, "exact": Exact, "stack": Stack}


class Lora(Method):
    """LoRA: a trained low-rank term is added to some linear layers of the base (Hu et al. 2022, arXiv 2106.09685)."""

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

    options: Options

    def __init__(self, options: Options, base: Base, seed: int) -> None:
        super().__init__(options, base, seed)
        self.targets = options.targets or architecture(base).queries_and_values
        self._layers = find_layers(base, self.targets, "method.targets")
        _require_names_of_layers(base, self.targets)
        sizes = {path: layer.widths for path, layer in self._layers.items()}
        rank, self._scale = max(options.ranks or [options.rank]), options.alpha / options.rank
        self._rule = _RULES[options.aggregation](Factors(sizes, rank, self._scale, seed), options, base)

    @property
    def payload(self) -> Layout:
        return self._rule.payload

    @property
    def trainable(self) -> Layout:
        return self._rule.trainable

    @property
    def messages(self) -> list[str]:
        return unreached(self.base, self.targets)

    def initial(self) -> Tensors:
        return self._rule.initial()

    def start(self, received: PerClient, round_: int = 0, clients: Sequence[int] = ()) -> PerClient:
        return self._rule.start(received, round_, clients)

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        return self._rule.finish(trained, received)

    def numbers_sent(self, client: int) -> int:
        return self._rule.numbers_sent(client)

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        of_rows = Rows(trained, received, rows, row_keys if self.options.dropout else None)
        with changed(self._layers, self._change, of_rows) as output:
            yield Attached(by_position=of_rows.keys is not None, output=output)

    def _change(self, path: str, rows: Rows) -> Change:
        """The term that is added behind the layer at `path`."""
        a, b = self._rule.term(path, rows.trained)
        gained, dropout = self._rule.gained(path, rows.received), self._dropout(path, rows.keys)
        return Change(behind=adds_term(a, b, self._scale, gained, rows.clients, dropout))

    def _dropout(self, path: str, keys: Tensor | None) -> Dropout | None:
        """The dropout of the layer at `path`."""
        if keys is None:
            return None
        return Dropout(bits(keys, torch.tensor(list(self._layers).index(path))), self.options.dropout)

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT LoRA adapter."""
        tensors, alpha = self._rule.exported(values)
        config = {
            "peft_type": "LORA",
            "r": next(tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name),
            "lora_alpha": alpha,
            "lora_dropout": self.options.dropout,
            "bias": "none",
            "target_modules": self.targets,
            "fan_in_fan_out": any(is_conv1d(layer.module) for layer in self._layers.values()),
        }
        self.write_adapter(path, config, {f"base_model.model.{name}": t for name, t in tensors.items()})

    def imported(self, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        from fedhpc.methods._peft import as_payload, require, require_method, without_wrappers

        require_method(config, "LORA")
        wanted = options_of(config, tensors)
        if not self._rule.takes_any_rank:
            require({"rank": self.options.rank, "alpha": self.options.alpha}, {k: wanted[k] for k in ("rank", "alpha")})
        sizes = {path: layer.widths for path, layer in self._layers.items()}
        factors = Factors(sizes, wanted["rank"], wanted["alpha"] / wanted["rank"], self.seed)
        bare = without_wrappers(tensors)
        if {name for name in bare if is_a(name)} != {name for name in factors.layout.shapes if is_a(name)}:
            require({"targets": sorted(self.targets)}, {"targets": sorted(wanted["targets"])})  # PEFT has a set of them
        return self._rule.imported(factors, as_payload(bare, factors.layout.shapes))


def options_of(config: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The options with which this method computes what an adapter of PEFT does. UserError where there are none.

    config: its adapter_config.json, which may have a pattern in place of the layers' names. tensors: what it holds.
    """
    start = config.get("init_lora_weights", True)
    changed = [key for key in _OTHER_LAYERS if config.get(key)]
    if isinstance(start, str) and start not in _BASE_UNTOUCHED:
        changed.append("init_lora_weights")
    if changed:
        raise UserError(f"the adapter was made with {changed[0]} of PEFT, which fedhpc does not compute")
    rank = int(config["r"])
    alpha = float(config["lora_alpha"]) * (rank**0.5 if config.get("use_rslora") else 1.0)
    targets = config["target_modules"]
    if isinstance(targets, str):
        targets = sorted({name.split(".")[-3] for name in tensors if is_a(name)})
    return {"rank": rank, "alpha": alpha, "targets": targets}


def _require_names_of_layers(base: Base, targets: Sequence[str]) -> None:
    """UserError where PEFT takes a name for that of the routed experts, so that the export would be something else.

    transformers holds the weights of all experts of a layer as one parameter. For the families that it converts as
    Qwen2-MoE, PEFT (0.21) takes the names that these weights have in files, like down_proj, for the parameters, and no
    longer for layers of that name.
    """
    from transformers import conversion_mapping

    family = base.model.config.model_type
    # A release without this table is taken to convert every family so.
    converted = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {family: "qwen2_moe"})
    shared = sorted({name for name in targets if name.rsplit(".", 1)[-1] in names_of_experts(base)})
    if shared and converted.get(family) == "qwen2_moe":
        raise UserError(
            f"{', '.join(shared)} is also a name of the routed experts of '{family}', and PEFT would put what was "
            "trained there and not into these layers",
            key="method.targets", remedy="choose layers of attention, or others whose name no expert has",
        )  # fmt: skip
