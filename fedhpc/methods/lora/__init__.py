"""LoRA: a trained low-rank term beside frozen weights (Hu et al. 2022, arXiv 2106.09685, equation 3).

h = W x + s B A x with s = alpha / r, A (r, in) drawn at random and B (out, r) zero at first; in training with dropout
on the x of the second term. The weights of routed experts have a term for each expert. The export is named and shaped
as in PEFT, and so are the options that change the term, and the payload but for experts, whose factors have an axis of
their own (`stored.py`). How the clients' terms combine is the option `aggregation`; each rule is a file of this folder.

- use_rslora: s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732, definition 3.1).
- rank_pattern, alpha_pattern: r and alpha of some layers.
- use_dora: row o of W + s B A is made m_o long, and m (out,) is trained and averaged as A and B are (DoRA, Liu et al.
  2024, arXiv 2402.09353, equation 5).
- init_lora_weights: where A and B begin (`starts`); init_text: on which texts, with eva.
- loraplus_lr_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.methods._architectures import architecture
from fedhpc.methods._changes import Change, Rows, changed
from fedhpc.methods._experts import ChangeOfExperts
from fedhpc.methods._linear import find_layers, is_conv1d, unreached
from fedhpc.methods._peft import as_payload, require, require_method, without_wrappers
from fedhpc.methods.base import Attached, Method, PerClient, Tensors, as_one_client
from fedhpc.methods.lora.alternate import Alternate
from fedhpc.methods.lora.average import Average
from fedhpc.methods.lora.dual import Dual
from fedhpc.methods.lora.exact import Exact
from fedhpc.methods.lora.factors import Factors, by_pattern, is_a, layer_of, name_a, name_b, name_magnitude
from fedhpc.methods.lora.ffa import FrozenA
from fedhpc.methods.lora.flex import Flex
from fedhpc.methods.lora.sb import Between
from fedhpc.methods.lora.stack import Stack
from fedhpc.methods.lora.starts import STARTS, eva, pieces_of
from fedhpc.methods.lora.stored import stored, target_keys, targets_of, unstored
from fedhpc.methods.lora.svd import Refactored
from fedhpc.methods.lora.term import Dropout, Magnitudes, adds_term, adds_term_of_experts
from fedhpc.models import quantized
from fedhpc.registry import Section
from fedhpc.rng import bits
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base

# Keys of PEFT's LoraConfig with which a layer computes something else than W x + s B A x.
_OTHER_LAYERS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
# Its keys with which some layers that target_modules names have no factors.
_FEWER_LAYERS = ("exclude_modules", "layers_to_transform")
# Options that say which rank and scale each layer has.
_SHAPE = ("rank", "alpha", "use_rslora", "rank_pattern", "alpha_pattern")
# Rules for which the magnitudes of DoRA, or another start, mean something.
_WITH_MAGNITUDES = ("average", "ffa")
_WITH_START = ("average", "ffa", "exact")
# Rules whose trained factors go on from round to round, all of them together.
_WITH_MOMENTS = ("average", "ffa", "sb")
# Where A and B began, if the weights of the base stayed what they were.
_BASE_UNTOUCHED = ("gaussian", "eva", "orthogonal")

# What --max-lora-rank of vLLM (0.22) can be.
_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)

_RULES: dict[str, type[Average]] = {
    "average": Average, "ffa": FrozenA, "exact": Exact, "stack": Stack, "alternate": Alternate, "svd": Refactored,
    "flex": Flex, "sb": Between, "dual": Dual,
}  # fmt: skip


class Lora(Method):
    """LoRA: a trained low-rank term is added to some linear layers of the base (Hu et al. 2022, arXiv 2106.09685)."""

    class Options(Section):
        rank: int = Field(8, ge=1, description="r, rank of the added term")
        alpha: float = Field(16.0, gt=0, description="the term is scaled by alpha / rank")
        use_rslora: bool = Field(False, description="scale the term by alpha / sqrt(rank) instead (rsLoRA)")
        rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
            {}, description="other ranks: end of a layer's path, a regular expression as in PEFT, to its rank"
        )
        alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
            {}, description="other alphas: end of a layer's path, a regular expression as in PEFT, to its alpha"
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="share of the inputs of the term dropped in training")
        aggregation: Literal["average", "ffa", "exact", "stack", "alternate", "svd", "flex", "sb", "dual"] = Field(
            "average", description="what is trained and how it combines"
        )
        ranks: list[Annotated[int, Field(ge=1)]] | None = Field(
            None,
            min_length=1,
            description="with stack and flex: client c has rank ranks[c mod length], scaled by alpha / rank as all",
        )
        local_weight: float = Field(
            0.5, ge=0, le=1, description="with dual: share of a client's own adapter beside the one that all share"
        )
        targets: list[str] | str | None = Field(
            None,
            min_length=1,
            description="the adapted linear layers: names (experts.down_proj too), all-linear (all but the output "
            "layer) or a regular expression for whole paths; default: attention, by architecture",
        )
        use_dora: bool = Field(False, description="train the length of each row of the weight too (DoRA)")
        init_lora_weights: Literal[True, "pissa", "olora", "eva"] = Field(
            True,
            description="where A and B begin: true: A at random, B = 0; pissa: the weight's first singular vectors; "
            "olora: its QR decomposition; eva: A at the first components of what the layer is given on init_text",
        )
        init_text: str | list[str] | None = Field(
            None,
            min_length=1,
            description="with eva: public texts of more tokens than the rank, like those of the task",
        )
        loraplus_lr_ratio: float | None = Field(
            None, gt=0, description="learning rate of B over client.lr, which A has (LoRA+); default 1"
        )
        exclude_modules: list[str] | str | None = Field(
            None, min_length=1, description="layers that are not adapted: names, or one expression for whole paths"
        )

        @property
        def reads_weights(self) -> str:
            """The option that needs the weights of the base as numbers; empty where none does."""
            started = f"init_lora_weights {self.init_lora_weights}" if self.init_lora_weights in STARTS else ""
            return "use_dora" if self.use_dora else started

        def conflict(self, config: Any) -> str | None:
            if self.ranks is not None and self.rank_pattern:
                return "method.ranks is of clients and method.rank_pattern of layers: take one of them out"
            rule = _RULES[self.aggregation]
            if self.ranks is not None and not rule.takes_ranks:
                return "method.ranks needs method.aggregation stack or flex: the others combine factors of one rank"
            if self.aggregation != "dual" and self.local_weight != type(self).model_fields["local_weight"].default:
                return "method.local_weight needs method.aggregation dual: the others have one adapter"
            if self.use_dora and self.aggregation not in _WITH_MAGNITUDES:
                return (
                    f"method.use_dora with method.aggregation {self.aggregation}: lengths of a weight's rows do not "
                    f"add up as products do; use {' or '.join(_WITH_MAGNITUDES)}"
                )
            if self.init_lora_weights == "eva" and self.aggregation == "ffa":
                return (
                    "method.init_lora_weights eva with method.aggregation ffa: A begins on the server, and ffa sends "
                    "no A; use average or exact"
                )
            if self.init_lora_weights is not True and self.aggregation not in _WITH_START:
                return (
                    f"method.init_lora_weights {self.init_lora_weights} with method.aggregation {self.aggregation}, "
                    f"which has another start; use {', '.join(_WITH_START[:-1])} or {_WITH_START[-1]}"
                )
            if (self.init_lora_weights == "eva") != (self.init_text is not None):
                return (
                    "method.init_lora_weights eva and method.init_text need each other: eva begins with what layers "
                    "are given on public texts; give both or none"
                )
            if self.reads_weights and config.model.quantize != "none":
                return f"method.{self.reads_weights} needs the weights, which model.quantize has in few bits: use none"
            carried = [key for key in config.beside_theta if key != "client.scaffold"]
            if carried and self.aggregation not in _WITH_MOMENTS:
                return (
                    f"{carried[0]} with method.aggregation {self.aggregation}, whose factors do not last from round "
                    f"to round, or are not trained together: use {', '.join(_WITH_MOMENTS[:-1])} or {_WITH_MOMENTS[-1]}"
                )
            if self.loraplus_lr_ratio is not None and config.divides_by_rate:
                return (
                    f"{config.divides_by_rate} divides by one learning rate, and method.loraplus_lr_ratio has two: "
                    "give one of them"
                )
            return rule.conflict(self, config)

    options: Options

    def __init__(self, options: Options, base: Base, seed: int) -> None:
        super().__init__(options, base, seed)
        named = options.targets or architecture(base).queries_and_values
        self._layers = find_layers(base, named, "method.targets", options.exclude_modules or (), experts=True)
        #: The names of the adapted layers for PEFT, whole paths where no shorter names are given.
        self.targets = list(self._layers) if options.exclude_modules or isinstance(named, str) else named
        self._require_options_of_experts()
        self._require_weights()
        factors = self._factors(dict(options))
        if options.ranks:
            factors = replace(factors, ranks=dict.fromkeys(self._layers, max(options.ranks)))
        self._rule = _RULES[options.aggregation](factors, options, base)

    @property
    def payload(self) -> Layout:
        return Layout({**self._rule.payload.shapes, **self._magnitudes.shapes})

    @property
    def trainable(self) -> Layout:
        return Layout({**self._rule.trainable.shapes, **self._magnitudes.shapes})

    @property
    def starts_from_payload(self) -> bool:
        # Other rules keep factors that the seed has drawn, or draw new ones in every round.
        return type(self._rule) is Average and not self._rule.factors.taken

    @cached_property
    def _magnitudes(self) -> Layout:
        """The lengths of the rows of every weight, with DoRA."""
        layers = self._layers.items() if self.options.use_dora else ()
        return Layout({name_magnitude(path): (layer.widths[1],) for path, layer in layers})

    @cached_property
    def _squares(self) -> dict[str, Tensor]:
        """The squares of the lengths of the rows of every weight of the base: (out,), on the device."""
        dtype = self.base.payload_dtype
        return {path: layer.weight.to(dtype).square().sum(1) for path, layer in self._layers.items()}

    def in_round(self, round_: int) -> Sequence[Method]:
        return [self._with(rule) for rule in self._rule.in_round(round_)]

    def _with(self, rule: Average) -> Lora:
        """The same method with another rule."""
        if rule is self._rule:
            return self
        other = copy(self)
        other._rule = rule
        return other

    @property
    def messages(self) -> list[str]:
        given = self.options.targets
        experts = unreached(self.base, self._layers, "method.targets")
        if self.options.exclude_modules is None and not isinstance(given, str):
            return experts
        names = sorted({path.rsplit(".", 1)[-1] for path in self._layers})
        return [f"method.targets: {len(self._layers)} layers are adapted, named {', '.join(names)}", *experts]

    def initial(self) -> Tensors:
        squares = self._squares if self.options.use_dora else {}
        return {**self._rule.initial(), **{name_magnitude(path): s.sqrt().cpu() for path, s in squares.items()}}

    def start(self, received: PerClient, round_: int = 0, clients: Sequence[int] = ()) -> PerClient:
        return {**self._rule.start(received, round_, clients), **self._of_magnitudes(received)}

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        return {**self._rule.finish(trained, received), **self._of_magnitudes(trained)}

    def _of_magnitudes(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[name] for name in self._magnitudes.shapes}

    def on_server(self, values: Tensors) -> Tensors:
        return self._rule.on_server(values)

    def numbers_sent(self, client: int, round_: int) -> int:
        return self._rule.numbers_sent(client, round_) + self._magnitudes.size

    def numbers_received(self, client: int) -> int:
        return self._rule.numbers_received(client) + self._magnitudes.size

    def lr_ratio(self, name: str, shape: tuple[int, ...]) -> float:
        """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns faster than A, as do vectors in its authors' code."""
        faster = "lora_B" in name or len(shape) == 1
        return self.options.loraplus_lr_ratio or 1.0 if faster else 1.0

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        of_rows = Rows(trained, received, rows, row_keys if self.options.dropout else None)
        with changed(self._layers, self._change, of_rows) as output:
            yield Attached(by_position=of_rows.keys is not None, output=output)

    def _change(self, path: str, rows: Rows) -> Change | ChangeOfExperts:
        """The term that is added behind the layer at `path`."""
        a, b = self._rule.term(path, rows.trained, rows.received)
        scale = self._rule.factors.scales[path]
        if self._layers[path].experts:
            return ChangeOfExperts(behind=adds_term_of_experts(a, b, scale))
        gained, dropout = self._rule.gained(path, rows.received), self._dropout(path, rows.keys)
        magnitudes = None
        if self.options.use_dora:
            magnitudes = Magnitudes(rows.trained[name_magnitude(path)], self._squares[path], self._layers[path])
        return Change(behind=adds_term(a, b, scale, gained, rows.clients, dropout, self._rule.lost(path), magnitudes))

    def _dropout(self, path: str, keys: Tensor | None) -> Dropout | None:
        """The dropout of the layer at `path`."""
        if keys is None:
            return None
        return Dropout(bits(keys, torch.tensor(list(self._layers).index(path))), self.options.dropout)

    def export(self, values: Tensors, path: Path) -> None:
        """A PEFT LoRA adapter."""
        tensors, shape = self._rule.exported({n: t for n, t in values.items() if n not in self._magnitudes.shapes})
        tensors = {**tensors, **self._of_magnitudes(values)}
        config = {
            "peft_type": "LORA",
            **shape,
            **target_keys(self.targets, self._layers, self.base, shape),
            **({"use_dora": True} if self.options.use_dora else {}),
            "lora_dropout": self.options.dropout,
            "bias": "none",
            "fan_in_fan_out": any(is_conv1d(layer.module) for layer in self._layers.values()),
        }
        in_peft = stored(tensors, self._layers)
        self.write_adapter(path, config, {f"base_model.model.{name}": t for name, t in in_peft.items()})

    def serving(self, exported: Mapping[str, Any] | None = None) -> str:
        if self.options.use_dora:
            return "vLLM loads no DoRA: merge it into the base with fedhpc export --merge"
        rank, limit = self._rule.exported_rank, "--max-lora-rank, which is 16 unless raised"
        if exported is not None:
            rank = max(exported["r"], *exported.get("rank_pattern", {}).values(), 0)
        if rank is None:
            return f"the rank of the adapter is known at the end alone; vLLM loads it up to its {limit}"
        if self._rule.exported_rank is not None and len({*self._rule.factors.scales.values()}) > 1:
            return "vLLM scales all layers alike, and here they have scales of their own: fedhpc export --merge"
        if rank > _VLLM_RANKS[-1]:
            return f"rank {rank}, and vLLM loads {_VLLM_RANKS[-1]} at most: merge it with fedhpc export --merge"
        raised = next(one for one in _VLLM_RANKS if one >= rank)
        return f"vLLM loads it with --max-lora-rank {raised}, which is 16 unless raised" if raised > 16 else ""

    def merge(self, values: Tensors) -> None:
        """Put the terms into the weights of the base, which then computes alone what `attach` makes it compute."""
        dtype, one = self.base.payload_dtype, as_one_client(values)
        trained = self.start(one)
        merged: dict[str, Tensor] = {}
        for path, layer in self._layers.items():
            scale, lost = self._rule.factors.scales[path], self._rule.lost(path)
            a, b = self._rule.term(path, trained, one)
            weight = layer.weight.to(dtype) + scale * (b @ a)[0]
            if (gained := self._rule.gained(path, one)) is not None:
                weight = weight + gained[0]
            if lost is not None:
                weight = weight - scale * (lost[1] @ lost[0])[0]
            if self.options.use_dora:
                weight = weight * (trained[name_magnitude(path)][0] / weight.norm(dim=1)).unsqueeze(1)
            merged[path] = weight
        for path, layer in self._layers.items():  # not before all are made: two layers may share a weight
            layer.hold(merged[path])

    def factors_of(self, tensors: Tensors) -> Tensors:
        """The factors of an adapter of PEFT by the names, and in the shapes, that they have here."""
        return unstored(without_wrappers(tensors), self._layers)

    def imported(self, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        require_method(config, "LORA")
        wanted, given = options_of(config, tensors), dict(self.options)
        bare = self.factors_of(tensors)
        if {name for name in bare if is_a(name)} != {name for name in self._rule.factors.layout.shapes if is_a(name)}:
            ours = {**given, "targets": self.options.targets or self.targets}
            keys = ("targets", "exclude_modules") if self.options.exclude_modules else ("targets",)
            require(ours, {key: wanted.get(key) for key in keys})
        factors = self._factors(wanted)
        fixed = ["use_dora"]
        if not self._rule.takes_any_rank:
            fixed += ["init_lora_weights", *(_SHAPE if factors != self._rule.factors else ())]
        if any(wanted[key] != given[key] for key in fixed):
            every = (*_SHAPE, "use_dora", "init_lora_weights")
            require(given, {k: wanted[k] for k in every if k in ("rank", "alpha") or wanted[k] != given[k]})
        values = as_payload(bare, {**factors.layout.shapes, **self._magnitudes.shapes})
        return {**self._rule.imported(factors, values), **self._of_magnitudes(values)}

    def _factors(self, options: Mapping[str, Any]) -> Factors:
        """The factors of the adapted layers, whose ranks, scales and start are those of PEFT with the same options."""
        widths = {path: layer.widths for path, layer in self._layers.items()}
        experts = {path: layer.experts for path, layer in self._layers.items() if layer.experts}
        ranks = by_pattern(widths, options["rank"], options["rank_pattern"], "method.rank_pattern")
        alphas = by_pattern(widths, options["alpha"], options["alpha_pattern"], "method.alpha_pattern")
        scales = {path: alphas[path] / (r**0.5 if options["use_rslora"] else r) for path, r in ranks.items()}
        name = options["init_lora_weights"]
        if name is True:
            return Factors(widths, ranks, scales, self.seed, experts)
        for path, rank in ranks.items():
            if rank > min(widths[path][:1] if name == "eva" else widths[path]):
                raise UserError(
                    f"rank {rank} is more than {path} has, whose weight is {' x '.join(map(str, widths[path]))}",
                    key="method.init_lora_weights", remedy="choose a lower rank, or true",
                )  # fmt: skip

        if name == "eva":
            factors, text = Factors(widths, ranks, scales, self.seed, experts), self.options.init_text
            pieces = pieces_of(self.base, [text] if isinstance(text, str) else text or [], max(ranks.values()))
            return replace(factors, start=partial(self._components, factors, pieces))

        def start() -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = {}
            for path, layer in self._layers.items():
                a, b = STARTS[name](layer.weight, ranks[path], scales[path])
                tensors |= {name_a(path): a.cpu(), name_b(path): b.cpu()}
            return tensors

        return Factors(widths, ranks, scales, self.seed, experts, start, taken=True)

    def _components(self, factors: Factors, pieces: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """A and B before the first round, with eva: `factors` are those of layers that no text passes through."""
        starts = eva(self.base, self._layers, factors.ranks, pieces)
        drawn = {name: tensor.double() for name, tensor in factors.drawn().items()}
        return {**drawn, **{name_a(path): a.cpu() for path, a in starts.items()}}

    def _require_weights(self) -> None:
        """UserError where an option is for other layers, or needs weights that a layer holds in few bits."""
        reads, packed = self.options.reads_weights, quantized.layers(self.base.model)
        start = self.options.init_lora_weights
        option = reads or ("" if start is True else f"init_lora_weights {start}")
        for path, layer in self._layers.items() if option else ():
            if layer.parameter:
                raise UserError(
                    f"method.{option} is for linear layers, and {path} is of experts or a router",
                    key="method.targets", remedy="choose other layers",
                )  # fmt: skip
            if reads and path in packed:
                raise UserError(
                    f"method.{self.options.reads_weights} needs the weights, and {path} has them in few bits",
                    key="model.name", remedy="choose the model with all its bits",
                )  # fmt: skip

    def _require_options_of_experts(self) -> None:
        """UserError where an option knows no weights of experts, and there are some among the layers."""
        path = next((path for path, layer in self._layers.items() if layer.experts), None)
        if path is None:
            return
        if self.options.aggregation not in ("average", "ffa"):
            raise UserError(
                f"method.aggregation: {self.options.aggregation} knows no factors of experts, and {path} has them",
                key="method.aggregation", remedy="use average or ffa, or choose other layers in method.targets",
            )  # fmt: skip
        if self.options.dropout:
            raise UserError(
                f"method.dropout: in experts, like those of {path}, nothing can be dropped: PEFT could not train on",
                key="method.dropout", remedy="use dropout 0, or choose other layers in method.targets",
            )  # fmt: skip


def options_of(config: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The options with which this method computes what an adapter of PEFT does. UserError where there are none.

    config: its adapter_config.json, which may have a pattern in place of the layers' names. tensors: what it holds.
    """
    start = config.get("init_lora_weights", True)
    changed = [key for key in _OTHER_LAYERS if config.get(key)]
    if isinstance(start, str) and start not in (*_BASE_UNTOUCHED, *STARTS):
        changed.append("init_lora_weights")
    if changed:
        raise UserError(f"the adapter was made with {changed[0]} of PEFT, which fedhpc does not compute")
    targets = targets_of(config)
    # PEFT has a set of names, and other keys that leave layers out.
    by_name = not isinstance(targets, str) and not any(config.get(key) is not None for key in _FEWER_LAYERS)
    return {
        "rank": int(config["r"]),
        "alpha": float(config["lora_alpha"]),
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "init_lora_weights": start if start in STARTS else True,
        "rank_pattern": dict(config.get("rank_pattern") or {}),
        "alpha_pattern": dict(config.get("alpha_pattern") or {}),
        "targets": sorted(targets) if by_name else [layer_of(name) for name in without_wrappers(tensors) if is_a(name)],
    }
