"""What a kind of task has to say: how texts become batches, what the loss of a row is, and how the model answers.

Shapes: B rows, T positions, S supervised tokens of a batch, D hidden size, n virtual positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fedhpc.config import Config
from fedhpc.data.tokens import Examples, Join
from fedhpc.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedhpc import kernels
else:
    kernels = lazy("fedhpc.kernels")

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Attached:
    """What an attached method adds to the inputs of the base.

    past: per layer (key, value), each (B, kv_heads, n, head_dim), or empty.
    embeddings: (B, n, D) in front of the embedded text, or None.
    projection: (K, D, D) of the vectors of questions, or (1, D, D) for all, with rows (B,), the client of each row.
    by_position: hooks on layers tell the positions of a row apart, so a layer must be given all of them.
    """

    past: tuple[tuple[Tensor, Tensor], ...] = ()
    embeddings: Tensor | None = None
    projection: Tensor | None = None
    rows: Tensor | None = None
    by_position: bool = False

    @property
    def virtual_length(self) -> int:
        """n, the number of virtual positions in front of the text."""
        if self.embeddings is not None:
            return int(self.embeddings.shape[1])
        return int(self.past[0][0].shape[2]) if self.past else 0


@dataclass(frozen=True)
class Soft:
    """What a teacher holds likely at each supervised token of a batch (fedhpc.data.tokens.SoftTargets)."""

    index: Tensor  # int64 (S, k)
    probability: Tensor  # (S, k)
    temperature: float
    hard_weight: float


@dataclass(frozen=True)
class Batch:
    """Rows of one forward; its kind adds the tensors."""

    row: Tensor  # int64 (S,): the row of each supervised token
    supervised: np.ndarray  # int64 (B,): supervised tokens per row
    tokens: int  # input tokens, padding included
    real_tokens: int  # without padding
    soft: Soft | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class LabelRows:
    """The rows to compute so that every example has a score for every label: each gives `width` scores, in order."""

    example: Int64  # (R,)
    label: Int64  # (R,): the first label of the row
    lengths: NDArray[Any]  # (R,): input tokens
    width: int


@dataclass(frozen=True)
class Sizes:
    """What a method has to know of the layers that keys and values can be put in front of."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int


class Loaded(Protocol):
    """A frozen base, as `fedhpc.models.Base` has it."""

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def name(self) -> str: ...
    @property
    def kept(self) -> dict[bytes, Tensor]: ...


class Kind(ABC):
    """One kind of task. It has no state; `base` is the model it is asked about."""

    name: ClassVar[str]  # as in model.task
    needs: ClassVar[str]  # the models it takes, for messages
    auto_class: ClassVar[str]  # of transformers
    task_type: ClassVar[str]  # in PEFT
    has_target: ClassVar[bool] = True  # whether an example has a target text (data.target)
    answers: ClassVar[frozenset[str]] = frozenset({"losses", "labels", "texts"})  # what metrics can NEED
    #: The loss of a row depends on the other rows of its client's step: they are computed together.
    contrasts: ClassVar[bool] = False

    @abstractmethod
    def fits(self, config: Any) -> bool:
        """Whether models with this transformers configuration are of this kind."""

    def check(self, config: Config) -> None:  # noqa: B027  most have nothing to refuse
        """UserError where the configuration asks for what this kind has not."""

    # ---- data

    @abstractmethod
    def join(self, tokenizer: Any, max_length: int) -> Join:
        """How the token ids of a prompt and of its target become those of an example (data/tokens.py)."""

    @abstractmethod
    def supervised(self, examples: Examples, indices: Int64) -> Int64:
        """Supervised tokens of each example: (len(indices),)."""

    @abstractmethod
    def batch(self, base: Loaded, examples: Examples, indices: Int64) -> Batch:
        """The batch of `indices` (B,) of `examples`, in that order, on the base's device."""

    # ---- the model

    def config_options(self, labels: Sequence[str]) -> dict[str, Any]:
        """What is set in the model's configuration when it is loaded."""
        return {}

    def may_be_new(self, network: Any, parameter: str) -> bool:
        """Whether the model is sound without stored weights for this parameter: a head to be trained."""
        return False

    def head(self, network: Any, new: Sequence[str]) -> tuple[str, ...]:
        """Paths of the linear layers that every method trains beside its own payload; `new` had no stored weights."""
        return ()

    @abstractmethod
    def sizes(self, config: Any) -> Sizes:
        """Layers, heads and widths from the transformers configuration."""

    @abstractmethod
    def max_positions(self, base: Loaded) -> int | None:
        """The longest input, virtual positions included; None where the model has no limit."""

    def check_model(self, base: Loaded) -> None:  # noqa: B027
        """UserError where the model computes something else than this kind believes."""

    def check_past(self, base: Loaded) -> None:  # noqa: B027
        """UserError where no keys and values can be put in front of the model's own."""

    @abstractmethod
    def activations(self, base: Loaded, ids: Sequence[int]) -> list[Tensor]:
        """Keys and values of every layer on a text (n tokens): 2 * layers tensors (kv_heads, n, head_dim)."""

    def peft_prefix(self, prefix: Tensor, num_layers: int) -> tuple[Tensor, dict[str, int]]:
        """A prefix (n, layers * 2 * kv_heads * head_dim) as PEFT lays it out, and the keys that say so."""
        return prefix, {"num_layers": num_layers, "num_transformer_submodules": 1}

    # ---- training

    @abstractmethod
    def num_classes(self, base: Loaded) -> int:
        """V, between how many classes the model chooses at a supervised token."""

    @abstractmethod
    def predictions(self, base: Loaded, attached: Attached, batch: Any) -> Iterator[Tensor]:
        """Logits of the supervised tokens in turn, in at least float32, a piece (s, V) at a time."""

    @abstractmethod
    def losses(self, base: Loaded, attached: Attached, batch: Any) -> Tensor:
        """Loss of every supervised token (S,), in at least float32 (fedhpc.kinds._loss). Call it without gradients."""

    @abstractmethod
    def backward(self, base: Loaded, attached: Attached, batch: Any, row_weights: Tensor, scale: float = 1.0) -> Tensor:
        """Backpropagate sum_s row_weights[row_s] * loss_s; returns the unweighted losses (S,), detached.

        row_weights (B,). Gradients are multiplied by `scale`.
        """

    # ---- answers

    @abstractmethod
    def label_rows(self, base: Loaded, examples: Examples, indices: Int64, targets: Sequence[str]) -> LabelRows:
        """What to compute for the scores of `targets`, one per label, on the examples `indices`."""

    @abstractmethod
    def label_scores(
        self, base: Loaded, attached: Attached, examples: Examples, rows: LabelRows, part: Int64, targets: Sequence[str]
    ) -> Tensor:
        """Scores (len(part), width) of the rows `part`, higher is better. Call it without gradients."""

    def generate(self, base: Loaded, attached: Attached, prompts: Sequence[np.ndarray], max_new_tokens: int) -> Tensor:
        """The most likely next token, again and again: int64 (B, max_new_tokens), -1 after the end.

        prompts: B non-empty arrays of token ids. A row ends at eos, which is left out, or when the model has no
        positions left. Call it without gradients and with the method attached.
        """
        raise NotImplementedError(f"{self.name} writes no texts")


def soft_targets(base: Loaded, examples: Examples, indices: Int64) -> Soft | None:
    """What the teachers of `examples` say of the examples `indices`, in their order; None where there are none."""
    soft = examples.soft
    if soft is None:
        return None
    rows = np.concatenate([np.arange(soft.offsets[i], soft.offsets[i + 1]) for i in indices])
    index = kernels.on_device(soft.index[rows].astype(np.int64), base.device)
    probability = kernels.on_device(soft.probability[rows], base.device)
    return Soft(index, probability, soft.temperature, soft.hard_weight)


def pad_id(base: Loaded) -> int:
    """The id that fills rows."""
    tokenizer = base.tokenizer
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def padded(rows: Sequence[np.ndarray], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unequal length as int64 (B, longest), filled at the right, and their mask of the same shape."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), max(int(lengths.max()), 1)), fill, dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    return ids, (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and after a text, such as [CLS] and [SEP]."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ValueError("the tokenizer splits a text in another way where it adds special tokens")


def encoder_positions(network: Any) -> int | None:
    """The longest input of an encoder. RoBERTa's positions begin behind the index of its padding."""
    limit = getattr(network.config, "max_position_embeddings", None)
    embeddings = getattr(network.base_model, "embeddings", None)
    if limit and embeddings is not None and hasattr(embeddings, "create_position_ids_from_inputs_embeds"):
        limit -= int(embeddings.padding_idx) + 1
    return int(limit) if limit else None


def in_mapping(auto_class: str, config: Any) -> bool:
    """Whether a transformers Auto class has a model for this configuration."""
    import transformers

    mapping: Mapping[type, Any] = getattr(transformers, auto_class)._model_mapping
    return type(config) in mapping
