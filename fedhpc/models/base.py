"""What every base model can do, and what it is given: batches, and what a method attaches to its inputs.

Shapes: B rows, T positions, S supervised tokens of a batch, D hidden size, V classes, n virtual positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhpc.data.tokens import Examples, Join, Row, Tokens, examples_from
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.models.trial import same_rows

if TYPE_CHECKING:
    from fedhpc.models.parts import Parts

Int64 = NDArray[np.int64]

# Forms of rotary embedding whose angles are stretched for every input, and those that look at the longest one first.
_STRETCHED = frozenset({"linear", "yarn", "llama3"})
_ANGLES_OF_THE_LONGEST = frozenset({"longrope", "dynamic"})
# The most elements of logits that are computed at once; more are computed and differentiated piece by piece.
LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Attached:
    """What an attached method adds to the inputs and outputs of the base.

    past: per layer (key, value), each (B, kv_heads, n, head_dim), or empty.
    embeddings: (B, n, D) in front of the embedded text, or None.
    questions: what becomes of the vectors (B, D) of the rows' questions, for an encoder of sentences; None: nothing.
    by_position: hooks on layers tell the positions of a row apart, so a layer must be given all of them.
    output: for a method on the output layer, which is given tokens and not rows: by the rows (S,) of all tokens and a
        piece of these, while it is open, the output layer computes the tokens of the piece, each with what its row's
        client has trained. None: nothing is attached there.
    """

    past: tuple[tuple[Tensor, Tensor], ...] = ()
    embeddings: Tensor | None = None
    questions: Callable[[Tensor], Tensor] | None = None
    by_position: bool = False
    output: Callable[[Tensor, slice], AbstractContextManager[None]] | None = None

    @property
    def virtual_length(self) -> int:
        """n, the number of virtual positions in front of the text."""
        if self.embeddings is not None:
            return int(self.embeddings.shape[1])
        return int(self.past[0][0].shape[2]) if self.past else 0


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass over E examples; who makes it adds the tensors."""

    row: Tensor  # int64 (S,): the row of each supervised token
    supervised: np.ndarray  # int64 (E,): supervised tokens per example
    tokens: int  # input tokens, padding included
    real_tokens: int  # without padding
    #: int64 (B,): which example each row is of; None: each has one row, in order.
    example: np.ndarray | None = field(default=None, kw_only=True)

    def per_row(self, values: np.ndarray) -> np.ndarray:
        """What is of the examples (E, ...) for each of their rows (B, ...)."""
        return values if self.example is None else values[self.example]


@dataclass(frozen=True)
class TargetBatch(Batch):
    """Rows with a class to be predicted at each supervised token."""

    targets: Tensor  # int64 (S,)


@dataclass(frozen=True)
class LabelRows:
    """The rows to compute so that every example has a score for every label: each gives `width` scores, in order."""

    example: Int64  # (R,)
    label: Int64  # (R,): the first label of the row
    lengths: NDArray[Any]  # (R,): input tokens
    width: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of the layers that keys and values can be put in front of."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int


class Absent(NamedTuple):
    """The parameters that a model folder does not have."""

    missing: AbstractSet[str]
    resized: Mapping[str, int]  # stored in another shape -> how many rows they have there


class Fitted(NamedTuple):
    """What became of a stored head."""

    anew: Sequence[str] = ()  # parameters that are drawn anew though they were stored
    messages: Sequence[str] = ()  # for the log


@dataclass(frozen=True, eq=False)
class Base(ABC):
    """A frozen model and its tokenizer, on one device.

    What can be told from the model's configuration alone is said by the class, before any weights are loaded.
    """

    task: ClassVar[str]  # as in `model.task`
    objective: ClassVar[str]  # the file of fedhpc.objectives that it is trained with by default
    needs: ClassVar[str]  # the models it takes, for messages
    auto_class: ClassVar[str]  # of transformers
    task_type: ClassVar[str]  # in PEFT
    has_target: ClassVar[bool] = True  # whether an example has a target text (data.target)
    one_text: ClassVar[bool] = False  # whether a target is read behind its prompt, as one text
    answers: ClassVar[frozenset[str]] = frozenset({"losses"})  # what metrics can need of it: losses, labels, texts

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    device: torch.device
    name: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    head: tuple[str, ...] = ()  # linear layers that every method trains beside its own payload
    drawn: bool = False  # whether some of the weights that are used, as those of a new head, are drawn by the seed
    messages: tuple[str, ...] = ()  # for the log: what was decided while loading
    source: str = ""  # where it was loaded from: a hub id, or the absolute path of a folder
    revision: str | None = None  # of the hub
    quantization: Mapping[str, Any] = field(default_factory=dict)  # keys of `model` on it, as models/quantized.py has
    parts: Parts | None = None  # what this rank holds of the parameters, where a group holds them between them

    @classmethod
    def of(
        cls, network: Any, tokenizer: Any, device: torch.device, name: str, fingerprint: str, new: Sequence[str] = ()
    ) -> Base:
        """The base that a loaded transformers model is; its parameters `new` had no stored weights."""
        sizes = vars(cls.sizes(network.config))
        return cls(network, tokenizer, device, name, fingerprint, **sizes, head=cls.head_layers(network, new))

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def payload_dtype(self) -> torch.dtype:
        """What is trained and exchanged has at least 32 bits, whatever the base computes in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def num_embedded(self) -> int:
        """How many tokens the model embeds; its tokenizer may have more, and fewer."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def some_ids(self, rows: int, length: int) -> Tensor:
        """Any tokens (rows, length), behind the first few, which are often special."""
        return ((5 + torch.arange(rows * length, device=self.device)) % self.num_embedded).view(rows, length)

    @property
    def pad_id(self) -> int:
        """The id that fills rows."""
        tokenizer = self.tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        return next((int(id_) for id_ in ids if id_ is not None), 0)

    # ---- before it is loaded

    @classmethod
    @abstractmethod
    def fits(cls, config: Any) -> bool:
        """Whether models with this transformers configuration are of this class."""

    @classmethod
    @abstractmethod
    def join(cls, tokenizer: Any, max_length: int, room: int = 0, truncate: bool = False) -> Join:
        """How the token ids of a prompt and of its target become those of an example (data/tokens.py)."""

    @classmethod
    @abstractmethod
    def sizes(cls, config: Any) -> Sizes:
        """Layers, heads and widths from the transformers configuration."""

    @classmethod
    def config_options(cls, labels: Sequence[str]) -> dict[str, Any]:
        """What is set in the model's configuration when it is loaded."""
        return {}

    @classmethod
    def stored_classes(cls, config: Any) -> list[str]:
        """The classes of a stored head, row by row, by the transformers configuration; none without one, or names."""
        return []

    @classmethod
    def fit_head(cls, network: Any, head: Sequence[str], labels: Sequence[str], absent: Absent) -> Fitted:
        """Make the stored head of `network` one of the classes `labels`, in place. head: as `stored_classes` says."""
        return Fitted()

    @classmethod
    def may_be_new(cls, network: Any, parameter: str) -> bool:
        """Whether the model is sound without stored weights for this parameter: a head to be trained."""
        return False

    @classmethod
    def head_layers(cls, network: Any, new: Sequence[str]) -> tuple[str, ...]:
        """Paths of the linear layers that every method trains beside its own payload; `new` had no stored weights."""
        return ()

    # ---- the network

    @property
    @abstractmethod
    def max_positions(self) -> int | None:
        """The longest input, virtual positions included; None where the model has no limit."""

    @property
    def limited_by(self) -> str:
        """Why no input is longer than `max_positions`, where it is not for want of positions."""
        return ""

    def check(self) -> None:  # noqa: B027  most have nothing to refuse
        """UserError where the model computes something else than this class believes."""

    def check_examples(self, examples: Examples, split: str) -> None:  # noqa: B027
        """UserError where a row of `split` lacks what the model needs in it."""

    def require_same_rows(self, alone: Sequence[Tensor], beside: Sequence[Tensor]) -> None:
        """UserError where rows are something else beside others than alone (see `same_rows`)."""
        if not same_rows(alone, beside):
            raise UserError(
                f"'{self.name}' ({self.model.config.model_type}) gives a row something else beside longer rows than "
                "alone, so what it learns would depend on who shares a batch",
                key="model.name", remedy="choose another model",
            )  # fmt: skip

    def check_past(self) -> None:  # noqa: B027
        """UserError where no keys and values can be put in front of the model's own."""

    def check_embeddings(self) -> None:  # noqa: B027
        """UserError where no embeddings can be put in front of the text's own."""

    @abstractmethod
    def activations(self, ids: Sequence[int]) -> list[Tensor]:
        """Keys and values of every layer on a text (n tokens): 2 * layers tensors (kv_heads, n, head_dim)."""

    def read_text(self, ids: Tensor, prompt: int) -> Tensor:
        """What the network makes of rows of tokens (B, T), as training has them, with nothing attached.

        prompt: how many tokens of each row are its prompt; the others are its target.
        """
        states: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        return states

    def read_some(self, rows: int, prompt: int, target: int) -> Tensor:
        """What `read_text` gives for rows of any tokens. prompt, target: tokens of each row."""
        return self.read_text(self.some_ids(rows, prompt + target), prompt)

    def peft_prefix(self, prefix: Tensor) -> tuple[Tensor, dict[str, int]]:
        """A prefix (n, layers * 2 * kv_heads * head_dim) as PEFT lays it out, and the keys that say so."""
        return prefix, {"num_layers": self.num_layers, "num_transformer_submodules": 1}

    def from_peft_prefix(self, prefix: Tensor) -> Tensor:
        """The prefix that `peft_prefix` laid out."""
        return prefix


class Predictor(Base):
    """A base that chooses between classes at supervised tokens: the tokens of its vocabulary, or labels."""

    answers = frozenset({"losses", "labels"})

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """V, between how many classes the model chooses."""

    @abstractmethod
    def batch(self, examples: Examples, indices: Int64) -> TargetBatch:
        """The batch of `indices` (B,) of `examples`, in that order, on the base's device."""

    @abstractmethod
    def states(self, attached: Attached, batch: Any) -> Tensor:
        """What the logits of the supervised tokens are computed from: (S, D).

        Each row stands behind its own virtual positions.
        """

    @abstractmethod
    def base_logits(self, states: Tensor) -> Tensor:
        """The logits (..., V) that the base alone makes of states (..., D)."""

    def logits(self, attached: Attached, states: Tensor, rows: Tensor, piece: slice = slice(None)) -> Tensor:
        """Logits (s, V) of a piece of the states (S, D), in at least float32. rows (S,): the row of each state."""
        with nullcontext() if attached.output is None else attached.output(rows, piece):
            logits = self.base_logits(states[piece])
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def read_text(self, ids: Tensor, prompt: int) -> Tensor:
        """The `states` of the rows."""
        rows, length = ids.shape
        tokens = Tokens(
            ids.flatten().cpu().numpy().astype(np.int32),
            np.arange(rows + 1) * length,
            np.full(rows, prompt, np.int32),
        )
        examples = examples_from(tokens, labels=np.zeros(rows, np.int32), label_names=["a", "b"])
        return self.states(Attached(), self.batch(examples, np.arange(rows)))

    def frozen_head(self, attached: Attached) -> Tensor | None:
        """The weight (V, D) of an output layer that is one product and not trained, in full precision, else None."""
        return None

    def pieces(self, tokens: int) -> list[slice]:
        """Cut `tokens` supervised tokens into pieces whose logits fit in memory at once."""
        size = max(1, LOGITS_AT_ONCE // self.num_classes)
        return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]

    def predictions(self, attached: Attached, batch: TargetBatch) -> Iterator[Tensor]:
        """Logits of the supervised tokens in turn, in at least float32, a piece (s, V) at a time."""
        states = self.states(attached, batch)
        for piece in self.pieces(len(states)):
            yield self.logits(attached, states, batch.row, piece)

    @abstractmethod
    def label_rows(self, examples: Examples, indices: Int64, targets: Sequence[str]) -> LabelRows:
        """What to compute for the scores of `targets`, one per label, on the examples `indices`."""

    @abstractmethod
    def label_scores(
        self, attached: Attached, examples: Examples, rows: LabelRows, part: Int64, targets: Sequence[str]
    ) -> Tensor:
        """Scores (len(part), width) of the rows `part`, higher is better. Call it without gradients."""


def padded(rows: Sequence[np.ndarray], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unequal length as int64 (B, longest), filled at the right, and their mask of the same shape."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), max(int(lengths.max()), 1)), fill, dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    return ids, (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)


def bare(ids: list[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The ids of a text without what a tokenizer puts around it, where a template has written it already."""
    start = len(before) if before and ids[: len(before)] == [*before] else 0
    end = len(after) if after and ids[start:][-len(after) :] == [*after] else 0
    return ids[start : len(ids) - end] if start or end else ids


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer itself puts before and after a text, such as [CLS] and [SEP]."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    complete = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(complete) - len(plain) + 1):
        if complete[start : start + len(plain)] == plain:
            return tuple(complete[:start]), tuple(complete[start + len(plain) :])
    raise ValueError("the tokenizer splits a text in another way where it adds special tokens")


def text_of(tokenizer: Any, max_length: int) -> Callable[[list[int]], Row]:
    """How an encoder reads the ids of a text: between the tokenizer's special tokens, cut at its end."""
    before, after = special_ids(tokenizer)
    room = max(max_length - len(before) - len(after), 0)

    def text(ids: list[int]) -> Row:
        ids = bare(ids, before, after)
        lost, needed = max(len(ids) - room, 0), len(before) + len(ids) + len(after)
        return Row([*before, *ids[:room], *after], [], lost, needed)

    return text


def sizes_of(config: Any, num_layers: int) -> Sizes:
    """The sizes of `num_layers` layers by a transformers configuration, whose classes name them in different ways.

    Layers that the configuration gives no heads have one.
    """
    heads = _first_of(config, "decoder_attention_heads", "num_attention_heads") or 1
    return Sizes(
        num_layers=num_layers,
        num_kv_heads=_first_of(config, "num_key_value_heads") or heads,
        head_dim=_first_of(config, "d_kv", "head_dim") or config.hidden_size // heads,
        hidden_size=config.hidden_size,
    )


def _first_of(config: Any, *names: str) -> int | None:
    """The first of these fields that has a value, the same for all layers."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # it differs from layer to layer
            continue
        if value:
            return int(value)
    return None


def most_positions(config: Any) -> int | None:
    """The longest input of a model with this configuration; None where nothing limits it.

    Where angles are stretched for all inputs alike, the stretched length. Where they follow the longest row of a batch
    once it passes a certain length, that length: beyond it a row would depend on its neighbours. Likewise where
    attention chooses among the tokens of longer inputs.
    """
    written = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not written or (hasattr(config, "max_position_embeddings") and getattr(config, "alibi", False)):
        return None  # a bias by distance has no end, but where a class makes a table of it
    limit = int(written)
    for form, rope in _rotations(config):
        original = rope.get("original_max_position_embeddings") or written
        if form in _ANGLES_OF_THE_LONGEST:
            return int(min(written, original))
        if form in _STRETCHED:
            limit = max(limit, int(original * rope.get("factor", 1.0)))
    return min(limit, choosy_beyond(config) or limit)


def choosy_beyond(config: Any) -> int | None:
    """Beyond how many tokens attention chooses to which it looks, padding and later ones among them; None: never.

    DeepSeek-V3.2's kind takes the `index_topk` best.
    """
    chosen = getattr(config, "index_topk", None)
    return int(chosen) if chosen else None


def angles_of_the_longest(config: Any) -> str | None:
    """The form of rotary embedding whose angles follow the longest row of a batch, where the model has one."""
    return next((form for form, _ in _rotations(config) if form in _ANGLES_OF_THE_LONGEST), None)


def _rotations(config: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """The forms of a model's rotary embeddings and their parameters: one, or one for each sort of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    return [(rope.get("rope_type", rope.get("type", "default")), rope) for rope in nested or [given]]


def in_mapping(auto_class: str, config: Any) -> bool:
    """Whether a transformers Auto class has a model for this configuration."""
    import transformers

    mapping: Mapping[type, Any] = getattr(transformers, auto_class)._model_mapping
    return type(config) in mapping
