"""The head of a classifier, trained beside any method, as PEFT's modules_to_save are.

Its weights and biases join the payload under their own names (`classifier.weight`). The clients of a block have
heads of their own: every linear layer of the head computes row b with the weights of client rows[b].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._peft import add_modules, as_payload, without_wrappers
from fedhpc.methods._weights import holders, swapped
from fedhpc.methods.base import Attached, Method, PerClient, Tensors
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.parts import Parts


def with_head(method: Method) -> Method:
    """The method, with what its base has of a head and the method itself does not train."""
    head = {f"{path}.{name}" for path in method.base.head for name in ("weight", "bias")}
    return method if all(method.trains_parameter(name) for name in head) else WithHead(method)


class WithHead(Method):
    """`method` and the head of its base.

    Every member of `Method` is here, so that none falls back to the default of the base class (a test compares them).
    """

    def __init__(self, method: Method) -> None:
        super().__init__(method.options, method.base, method.seed)
        self.method = method

    @cached_property
    def _parameters(self) -> dict[str, Tensor]:
        """Name -> parameter of the head that the method does not train."""
        layers = {path: self.base.model.get_submodule(path) for path in self.base.head}
        return {
            f"{path}.{name}": p for path, layer in layers.items() for name, p in layer.named_parameters()
            if f"{path}.{name}" not in self.method.payload.shapes
        }  # fmt: skip

    @cached_property
    def _head(self) -> Layout:
        return Layout({name: tuple(p.shape) for name, p in self._parameters.items()})

    @cached_property
    def payload(self) -> Layout:
        return Layout({**self.method.payload.shapes, **self._head.shapes})

    @cached_property
    def trainable(self) -> Layout:
        return Layout({**self.method.trainable.shapes, **self._head.shapes})

    def in_round(self, round_: int) -> Sequence[Method]:
        (method,) = self.method.in_round(round_)  # of several each would train the head
        return [self if method is self.method else WithHead(method)]

    @property
    def shares_base(self) -> bool:
        return self.method.shares_base

    @property
    def starts_from_payload(self) -> bool:
        return self.method.starts_from_payload

    @property
    def can_be_divided(self) -> bool:
        return False  # the head is beside the base, and each rank has it whole

    @property
    def parts(self) -> Parts | None:
        return self.method.parts

    def received(self, flat: Tensor) -> PerClient:
        return self.payload.views(flat)

    @property
    def virtual_tokens(self) -> int:
        return self.method.virtual_tokens

    @property
    def messages(self) -> list[str]:
        return self.method.messages

    @property
    def finite_difference_step(self) -> float | None:
        return self.method.finite_difference_step

    def serving(self, exported: Mapping[str, Any] | None = None) -> str:
        return self.method.serving(exported)

    def trains_parameter(self, parameter: str) -> bool:
        return parameter in self._head.shapes or self.method.trains_parameter(parameter)

    def initial(self) -> Tensors:
        head = {name: p.detach().to("cpu", self.base.payload_dtype, copy=True) for name, p in self._parameters.items()}
        return {**self.method.initial(), **head}

    def start(self, received: PerClient, round_: int = 0, clients: Sequence[int] = ()) -> PerClient:
        return {**self.method.start(received, round_, clients), **_part(received, self._head)}

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        return {**self.method.finish(trained, received), **_part(trained, self._head)}

    def on_server(self, values: Tensors) -> Tensors:
        return {**self.method.on_server(_part(values, self.method.payload)), **_part(values, self._head)}

    def numbers_sent(self, client: int, round_: int) -> int:
        return self.method.numbers_sent(client, round_) + self._head.size

    def numbers_received(self, client: int) -> int:
        return self.method.numbers_received(client) + self._head.size

    def blocks(self, name: str) -> int:
        return 1 if name in self._head.shapes else self.method.blocks(name)

    def layers_above(self, name: str) -> Sequence[int]:
        return super().layers_above(name) if name in self._head.shapes else self.method.layers_above(name)

    def lr_ratio(self, name: str, shape: tuple[int, ...]) -> float:
        return self.method.lr_ratio(name, shape)

    def weights(self, received: PerClient) -> Tensors:
        return self.method.weights(_part(received, self.method.payload))

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        with ExitStack() as stack:
            without_head = _part(trained, self.method.trainable)
            attached = stack.enter_context(self.method.attach(without_head, received, rows, row_keys))
            for path in self.base.head:
                of_client = _of_client(trained.get(f"{path}.weight"), trained.get(f"{path}.bias"), rows)
                stack.callback(self.base.model.get_submodule(path).register_forward_hook(of_client).remove)
            yield attached

    def export(self, values: Tensors, path: Path) -> None:
        """Export the method with the head in it, and with the names of the classes, for which PEFT has no key.

        The names are in a config.json that transformers' AutoConfig reads.
        """
        head = _part(values, self._head)
        with swapped(holders(self.base.model, head), {n: t.to(self._parameters[n]) for n, t in head.items()}):
            self.method.export(_part(values, self.method.payload), path)
        # A model folder has the head among its weights by now.
        if (path / "adapter_config.json").exists():
            add_modules(path, head, self.base)
            self.base.model.config.save_pretrained(path)

    def imported(self, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        bare, parameters = without_wrappers(tensors), dict(self.base.model.named_parameters())
        # PEFT saves a head whole, with what is not trained in it.
        frozen = {n for n, t in bare.items() if n in parameters and n not in self._head.shapes}
        for name in frozen:
            if not torch.equal(bare[name].to(parameters[name]), parameters[name]):
                raise UserError(
                    f"the adapter trained {name}, which this method does not", key="method.from",
                    remedy="take it out",
                )  # fmt: skip
        head = as_payload({n: bare[n] for n in self._head.shapes if n in bare}, self._head.shapes)
        others = {
            name: tensor for (name, tensor), plain in zip(tensors.items(), bare, strict=True)
            if plain not in frozen and plain not in head
        }  # fmt: skip
        return {**self.method.imported(config, others), **head}

    def write_adapter(self, path: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
        self.method.write_adapter(path, config, tensors)


def _part(values: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    return {name: values[name] for name in layout.shapes}


def _of_client(weight: Tensor | None, bias: Tensor | None, rows: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    """A forward hook: the output of a linear layer with the weight (K, out, in) and bias (K, out) of row i's client.

    None: that of the layer itself.
    """

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        x = inputs[0]  # (B, ..., in)
        w = module.weight.unsqueeze(0) if weight is None else weight.to(x.dtype)
        b = module.bias.unsqueeze(0) if bias is None and module.bias is not None else bias
        b = None if b is None else b.to(x.dtype)
        if len(w) == 1 and (b is None or len(b) == 1):
            return torch.nn.functional.linear(x, w[0], None if b is None else b[0])
        y = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), kernels.of_rows(w, rows).mT)
        if b is not None:
            y = y + kernels.of_rows(b, rows).unsqueeze(1)
        return y.view(*x.shape[:-1], -1)

    return hook
