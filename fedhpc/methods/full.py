"""Full fine-tuning: every parameter of the base is trained and exchanged (FedAvg as in McMahan et al. 2017,
arXiv 1602.05629). Clients cannot share a base whose weights differ, so they train in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhpc.lazy import lazy
from fedhpc.methods.base import Attached, Method
from fedhpc.payload import Layout
from fedhpc.registry import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


class Options(Section):
    pass


class Full(Method):
    """See the module."""

    shares_base = False

    @cached_property
    def payload(self) -> Layout:
        return Layout({name: tuple(p.shape) for name, p in self.base.model.named_parameters()})

    def initial(self) -> dict[str, Tensor]:
        dtype = torch.float64 if self.base.dtype == torch.float64 else torch.float32
        return {name: p.detach().to("cpu", dtype, copy=True) for name, p in self.base.model.named_parameters()}

    @cached_property
    def _places(self) -> dict[str, list[tuple[Any, str]]]:
        """Name of a parameter -> the modules that hold it: more than one where weights are tied."""
        names = {id(p): name for name, p in self.base.model.named_parameters()}
        places: dict[str, list[tuple[Any, str]]] = {name: [] for name in names.values()}
        for module in self.base.model.modules():
            for attribute, p in module._parameters.items():
                if p is not None:
                    places[names[id(p)]].append((module, attribute))
        return places

    @contextmanager
    def attach(self, state: Mapping[str, Tensor], payload: Mapping[str, Tensor], rows: Tensor) -> Iterator[Attached]:
        kept = {name: where[0][0]._parameters[where[0][1]] for name, where in self._places.items()}
        try:
            self._swap({name: tensor.squeeze(0).to(self.base.dtype) for name, tensor in state.items()})
            yield Attached()
        finally:
            self._swap(kept)

    def _swap(self, tensors: Mapping[str, Any]) -> None:
        for name, tensor in tensors.items():
            for module, attribute in self._places[name]:
                module._parameters[attribute] = tensor

    def export(self, payload: Mapping[str, Tensor], path: Path) -> None:
        """A model folder that AutoModelForCausalLM and AutoTokenizer load."""
        lead = {name: t.unsqueeze(0).to(self.base.device) for name, t in payload.items()}
        with self.attach(lead, lead, torch.zeros(1, dtype=torch.int64)):
            state = {name: tensor.detach().cpu() for name, tensor in self.base.model.state_dict().items()}
        self.base.model.save_pretrained(path, state_dict=state)
        self.base.tokenizer.save_pretrained(path)


METHOD = Full
