"""The parameters of a sharded base as one rank of its group holds them, and how the group trains them together.

Of each parameter a rank has some rows of its first axis, its *part*, whether the parameter is in a layer (which
FSDP2 gathers from the parts) or outside of them (where every rank has it whole beside). What a client trains is a part
on each rank: put into the base before a pass, and given the gradient that the passes of all ranks add up to, layer by
layer as the pass goes back, in a reduce-scatter (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054, stage 3).

All ranks of a group come here together, each with a pass through the same layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedhpc.ranks.group import Group


class Parts:
    """What one rank holds of the parameters of a sharded base."""

    def __init__(self, network: Any, group: Group, dtype: torch.dtype) -> None:
        """network: sharded over the group, of which this rank is no guest. dtype: in which gradients are added up."""
        group.release()
        assert group.member is not None  # a guest holds nothing
        #: Which of the `size` ranks this one is, from 0.
        self.member, self.size = group.member, group.size
        self._group, self._dtype = group, dtype
        self._parameters = dict(network.named_parameters())
        names = {id(p): name for name, p in self._parameters.items()}
        self._of_layer: dict[int, list[str]] = {}  # by the layer's number
        for number, layer in enumerate(group.layers):
            of_layer = [names.get(id(p), "") for p in layer.parameters()]
            if all(of_layer):  # else it is another base's
                self._of_layer[number] = of_layer
                group.before_release[number] = partial(self._reduce_layer, number)
        self._in_layers = {name for of_layer in self._of_layer.values() for name in of_layer}
        self._when_gathered: dict[int, Sequence[Tensor]] = {}  # a layer's parameters as they are when it is whole
        self._originals: dict[str, Tensor] = {}  # this rank's parts of the base's own weights that were replaced
        self._replaced: frozenset[str] = frozenset()
        self._gradients: dict[str, Tensor] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of this rank's part of a parameter."""
        rows = self._rows(name)
        return (rows.stop - rows.start, *self._shape(name)[1:])

    def of(self, name: str, values: Tensor) -> Tensor:
        """This rank's part of a parameter (*shape): a view (rows, ...)."""
        return values.view(self._shape(name))[self._rows(name)]

    def gathered(self, name: str, part: Tensor) -> Tensor:
        """A parameter (*shape) from the parts (rows, ...) that all ranks give. Collective."""
        shape = self._parameters[name].shape
        padded = part.new_zeros(self._most_rows(name), *self._shape(name)[1:])
        padded[: len(part)] = part
        gathered: Tensor = self._group.gathered(padded.flatten())
        return gathered[: math.prod(shape)].view(shape)

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in place. Collective."""
        return self._group.add_up(tensor)

    @torch.no_grad()
    def hold(self, parts: Mapping[str, Tensor]) -> None:
        """Have the base compute with these parameters, and with its own in place of all others. Collective.

        parts: name -> this rank's part (rows, ...). Ranks call it between the same two collectives, before any of them
        needs a layer again.
        """
        if not parts and not self._replaced:
            return
        self._group.release()
        for name in self._parameters:
            if name in parts and name not in self._originals:
                self._originals[name] = self._part(name).clone()
            if name in parts or name in self._replaced:
                self._put(name, parts[name] if name in parts else self._originals[name])
        self._replaced = frozenset(parts)

    @contextmanager
    def trained(self, parts: Mapping[str, Tensor]) -> Iterator[None]:
        """`hold` parts while a pass goes forward and back, and add to each the gradient of all ranks. Collective."""
        self.hold({name: part.detach() for name, part in parts.items()})
        parameters = [self._parameters[name] for name in parts]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield
            self._group.release()
            for number in sorted(self._when_gathered):  # late, as to a bias of one layer that those above are given
                if any(parameter.grad is not None for parameter in self._when_gathered[number]):
                    self._reduce(self._of_layer[number], self._when_gathered[number])
            for name in parts:
                if name not in self._in_layers:
                    self._reduce([name], [self._parameters[name]])
            gradients, self._gradients = self._gradients, {}
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        torch.autograd.backward([parts[name] for name in gradients], list(gradients.values()))

    def _rows(self, name: str) -> slice:
        """The rows of this rank, as FSDP2 divides them."""
        rows, most = self._shape(name)[0], self._most_rows(name)
        return slice(min(self.member * most, rows), min((self.member + 1) * most, rows))

    def _most_rows(self, name: str) -> int:
        return math.ceil(self._shape(name)[0] / self.size)

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, of which one number is a row."""
        return tuple(self._parameters[name].shape) or (1,)

    def _part(self, name: str) -> Tensor:
        """This rank's part of a parameter as the base has it now, in its memory."""
        parameter = self._parameters[name].detach()
        if name in self._in_layers:
            part: Tensor = parameter.to_local()
            return part
        return parameter.view(self._shape(name))[self._rows(name)]

    def _put(self, name: str, part: Tensor) -> None:
        if name in self._in_layers:
            self._part(name).copy_(part)
        else:
            parameter = self._parameters[name]
            parameter.copy_(self.gathered(name, part.to(parameter.dtype)))

    def _reduce_layer(self, number: int) -> None:
        """Of a layer that is left, if a pass comes back from it."""
        parameters = self._when_gathered[number] = self._group.layers[number].parameters()
        if any(parameter.grad is not None for parameter in parameters):
            self._reduce(self._of_layer[number], parameters)

    @torch.no_grad()
    def _reduce(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        """Add up the gradients of whole parameters over the ranks, and keep this rank's parts of them.

        Also of those that the rows of this rank do not reach: those of another may, as a token goes to some experts.
        """
        trained = {name: p for name, p in zip(names, parameters, strict=True) if p.requires_grad}
        columns = []  # (G, n) each: in row r what is sent to rank r
        for name, parameter in trained.items():
            gradient, parameter.grad = parameter.grad, None
            size = self.size * self._most_rows(name) * math.prod(self._shape(name)[1:])
            flat = (torch.zeros_like(parameter) if gradient is None else gradient).to(self._dtype).flatten()
            columns.append(torch.nn.functional.pad(flat, (0, size - len(flat))).view(self.size, -1))
        reduced = self._group.reduced((torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]).flatten())
        for name, part in zip(trained, reduced.split([c.shape[1] for c in columns]), strict=True):
            shape = self.shape(name)
            mine = part[: math.prod(shape)].view(shape)
            self._gradients[name] = self._gradients[name] + mine if name in self._gradients else mine
