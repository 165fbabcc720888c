"""What a method says: which tensors are exchanged and trained, how they enter the frozen base, what they export to.

A method never sees a rank, a plan, an optimizer or a file other than its export. It names two layouts (names and
shapes, no numbers): the *payload* is what server and clients exchange, the *trainable* is what a client's optimizer
trains. They are the same unless a method reparametrises, like prefix with `exchange: materialised`, which trains a
network and exchanges the prefix that the network makes.

Values of a layout are mappings from its names to tensors, of two types:

- Tensors: those of one client, name -> (*shape).
- PerClient: those of the K clients that train in one forward pass, name -> (K, *shape), or (1, *shape) where all K
  share them. Row b of a batch belongs to client rows[b]; `kernels.of_rows(value, rows)` makes (B, *shape) of either.

A round takes them this way: the server's payload is `received`; `start(received)` gives what is trained; the optimizer
changes it in steps, and for the loss of each `attach(trained, received, rows)` puts it into the base;
`finish(trained, received)` gives the payload that goes back. The server may make another one of the mean (`on_server`).
A whole method:

    class Scale(Method):
        \"\"\"Multiplies the embeddings of the text by a trained vector.\"\"\"

        class Options(Section):
            start: float = Field(1.0, description="every number of the vector at first")

        @property
        def payload(self) -> Layout:
            return Layout({"scale": (self.base.hidden_size,)})

        def initial(self) -> Tensors:
            return {"scale": torch.full((self.base.hidden_size,), self.options.start)}

        @contextmanager
        def attach(self, trained, received, rows, row_keys=None):
            scale = kernels.of_rows(trained["scale"], rows).unsqueeze(1).to(self.base.dtype)  # (B, 1, D)
            embeddings = self.base.model.get_input_embeddings()
            hook = embeddings.register_forward_hook(lambda module, inputs, output: output * scale)
            try:
                yield Attached()
            finally:
                hook.remove()

        def export(self, values: Tensors, path: Path) -> None:
            self.write_adapter(path, {"format": "scale"}, values)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor
from fedhpc.models.base import Attached as Attached
from fedhpc.models.load import layers_above
from fedhpc.registry import Section
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base
    from fedhpc.models.parts import Parts

#: Values of a layout for one client: name -> (*shape).
Tensors = Mapping[str, Tensor]
#: Values of a layout for the K clients of a block: name -> (K, *shape), or (1, *shape) where all of them share these.
PerClient = Mapping[str, Tensor]


class Method(ABC):
    """One way to customize a frozen base model."""

    #: The keys of the method in the configuration; a method that has some nests a class `Options(Section)`.
    Options: ClassVar[type[Section]] = Section

    def __init__(self, options: Any, base: Base, seed: int) -> None:
        """options: the section of the configuration that names the method; seed: of its random draws."""
        self.options, self.base, self.seed = options, base, seed

    @property
    @abstractmethod
    def payload(self) -> Layout:
        """Names and shapes of what server and clients exchange."""

    @property
    def trainable(self) -> Layout:
        """Names and shapes of what a client's optimizer trains."""
        return self.payload

    def in_round(self, round_: int) -> Sequence[Method]:
        """What a client trains in a round, one after the other, each from the payload that it received.

        Their payload is this one, and a tensor of it changes in one of them at most.
        """
        return [self]

    @property
    def shares_base(self) -> bool:
        """Whether clients of a block can share one forward pass; those that cannot train in turn."""
        return True

    @property
    def starts_from_payload(self) -> bool:
        """Whether what clients compute and train follows from options, base and payload, and neither seed nor round.

        Then clients of several runs, in rounds of their own, can share one forward pass (`fedhpc sweep`): the method of
        one of these runs stands for all. Only a method that says so is taken for one.
        """
        return False

    @property
    def can_be_divided(self) -> bool:
        """Whether the ranks of a worker, which hold the base between them, can train one client together (`parts`).

        Of methods that cannot share the base.
        """
        return False

    @property
    def parts(self) -> Parts | None:
        """What this rank holds of the trainable, where the ranks of a worker train a client together; None elsewhere.

        The trainable is then what this rank holds, and its values are of one client (`Parts`).
        """
        return None

    def received(self, flat: Tensor) -> PerClient:
        """What a rank that trains or measures has of payloads (K, P): views by name; (K, T) where it has `parts`."""
        return self.payload.views(flat)

    @property
    def virtual_tokens(self) -> int:
        """How many positions of the base the method takes in front of a text."""
        return 0

    @property
    def messages(self) -> list[str]:
        """What the log says of it before the first round, such as what it leaves alone."""
        return []

    @property
    def finite_difference_step(self) -> float | None:
        """How far to either side the loss is taken where local training differentiates numerically.

        None: it differentiates by backpropagation.
        """
        return None

    def serving(self, exported: Mapping[str, Any] | None = None) -> str:
        """What a server of language models needs to take an export, or that none does; empty where it just takes it.

        exported: the adapter_config.json, once there is one.
        """
        return ""

    def trains_parameter(self, parameter: str) -> bool:
        """Whether the base's own parameter of this name is among what is trained."""
        return parameter in self.payload.shapes

    @abstractmethod
    def initial(self) -> Tensors:
        """The payload before the first round, on the CPU."""

    def start(self, received: PerClient, round_: int = 0, clients: Sequence[int] = ()) -> PerClient:
        """The values of the trainable with which local training starts.

        received: the payload from the server. clients: ids of the K that train in this round, none in an evaluation.
        """
        return received

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        """The payload (K, ...) after local training.

        trained: the trainable as it is now; received: the payload from which training started.
        """
        return trained

    def on_server(self, values: Tensors) -> Tensors:
        """What the server makes of the payload after its own step, before it goes down again."""
        return values

    def numbers_sent(self, client: int, round_: int) -> int:
        """How many numbers a client has to send back: those of its payload that do not follow from the others."""
        return self.payload.size

    def numbers_received(self, client: int) -> int:
        """How many numbers of the payload a client needs to begin a round."""
        return self.payload.size

    def blocks(self, name: str) -> int:
        """Into how many blocks of like numbers the last axis of a trainable tensor falls, such as one a layer."""
        return 1

    def lr_ratio(self, name: str, shape: tuple[int, ...]) -> float:
        """By what the client's learning rate is multiplied for a tensor of the trainable."""
        return 1.0

    def layers_above(self, name: str) -> Sequence[int]:
        """How many layers of the base are above each block of a trainable tensor, for client.layer_lr_decay.

        Of a tensor that is named by where it stands in the base; UserError where another one is in no layer.
        """
        path = name
        while path and path not in self._layers_above:
            path = path.rpartition(".")[0]
        if not path:
            raise UserError(
                f"{name}, which is trained, is in no layer of the base", key="client.layer_lr_decay",
                remedy="take it out, or give method prefix (exchange raw), lora, ia3, adapter or full",
            )  # fmt: skip
        return [self._layers_above[path]] * self.blocks(name)

    @cached_property
    def _layers_above(self) -> Mapping[str, int]:
        return layers_above(self.base.model)

    def weights(self, received: PerClient) -> Tensors:
        """What a payload puts in place of the base's own weights, where this rank has `parts` of them."""
        return {}

    @abstractmethod
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> AbstractContextManager[Attached]:
        """Make the base compute row b of a batch with what client rows[b] has trained, while the context is open.

        trained: the trainable as it is now; received: the payload from which training started. rows: int64 (B,).
        row_keys: int64 (B,), the key of each row's random draws in training (`fedhpc.rng.bits`), such as dropout; None
        in an evaluation, which draws nothing.
        """

    @abstractmethod
    def export(self, values: Tensors, path: Path) -> None:
        """Write a payload to the folder `path` in the format of its own library (PEFT, transformers)."""

    def imported(self, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        """The payload that an exported adapter stands for: training goes on from it (`method.from`).

        config, tensors: what its adapter_config.json and adapter_model.safetensors hold. UserError where it is of
        another method, other options or another base.
        """
        raise UserError("this method cannot go on from an adapter", key="method.from", remedy="take it out")

    def write_adapter(self, path: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` to the folder `path`, for `export`.

        config: goes into the JSON file beside what all adapters have there: base model, type of task.
        """
        from fedhpc.methods._peft import write_adapter

        write_adapter(path, config, tensors, self.base)


def as_one_client(values: Tensors) -> PerClient:
    """The values of one client with a client axis of length 1 in front."""
    return {name: tensor.unsqueeze(0) for name, tensor in values.items()}
