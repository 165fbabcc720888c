"""Full fine-tuning by seeds and scalars: FedKSeed (Qin et al. 2024, arXiv 2312.06353, section 3.2).

Every weight of the base moves, along K fixed random directions: W(c) = W_0 + sum_k c_k z_k, where z_k is standard
normal over all parameters and is drawn again from candidate seed k wherever it is needed. Trained and exchanged are the
K coefficients c alone, 4 K bytes: 16 KB a client, each way and round, with the default K whatever the base.

A local step draws one k and takes the two-point estimate of MeZO (Malladi et al. 2023, arXiv 2305.17333, definition 1),

    dL/dc_k = (L(W + eps z_k) - L(W - eps z_k)) / (2 eps),

from two forwards without a backward pass, and steps c_k by it; the loss that is reported is the mean of the two. In the
coordinates c this is SGD, so rounds, schedules, clipping and the aggregators are those of every method. Rules that move
more coordinates than the one of the step would draw as many z in every step, so they are refused (config.py).

Time: about 3 draws of z a step, and one per coefficient that is not zero, at most K, where a round (or, with mode
local, a client) begins. Memory: two copies of the weights beside the base. Clients train in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.methods._weights import conflict_with_quantized, holders, require_unquantized, save_model, swapped
from fedhpc.methods.base import Attached, Method, PerClient, Tensors, as_one_client
from fedhpc.registry import Section
from fedhpc.rng import normals, torch_seed
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base

COEFFICIENTS = "coefficients"


class FedKSeed(Method):
    """Full fine-tuning along fixed random directions; one number for each travels (Qin et al. 2024)."""

    class Options(Section):
        num_seeds: int = Field(
            4096, ge=1, description="K: 4 K bytes each way, and up to K draws of all weights where a round begins"
        )
        eps: float = Field(1e-3, gt=0, description="how far to either side the loss is taken")

        def conflict(self, config: Any) -> str | None:
            return conflict_with_quantized("fedkseed", config)

    options: Options

    shares_base = False  # each client has weights of its own

    def __init__(self, options: Options, base: Base, seed: int) -> None:
        super().__init__(options, base, seed)
        require_unquantized(base, "fedkseed")
        self._start: tuple[Tensor, dict[str, Tensor]] | None = None  # a payload's c and W(c)
        self._at: Tensor  # the c of the working copy, (K,) float64 on the CPU
        self._working: dict[str, Tensor]

    @property
    def payload(self) -> Layout:
        return Layout({COEFFICIENTS: (self.options.num_seeds,)})

    @property
    def finite_difference_step(self) -> float:
        return self.options.eps

    def trains_parameter(self, parameter: str) -> bool:
        return True

    def initial(self) -> dict[str, Tensor]:
        return {COEFFICIENTS: torch.zeros(self.options.num_seeds, dtype=self.base.payload_dtype)}

    def direction(self, k: int) -> Iterator[tuple[str, Tensor]]:
        """z_k: the name of each parameter and its part, of its shape."""
        for number, (name, p) in enumerate(self._parameters.items()):
            key = torch_seed(self.seed, "candidate", k, number)
            yield name, normals(key, p.numel(), self.base.payload_dtype, self.base.device).view(p.shape)

    def start(self, received: PerClient, round_: int = 0, clients: Sequence[int] = ()) -> PerClient:
        """The payload; the working copy becomes W(c) to the last bit, wherever the method has been before."""
        c = received[COEFFICIENTS][0].detach().to("cpu", torch.float64)
        if self._start is None or not torch.equal(self._start[0], c):
            weights = {name: p.detach().to(self.base.payload_dtype, copy=True) for name, p in self._parameters.items()}
            self._move(weights, c)
            self._start = c, weights
        self._at, self._working = c, {name: weight.clone() for name, weight in self._start[1].items()}
        return received

    @contextmanager
    def attach(
        self, trained: PerClient, received: PerClient, rows: Tensor, row_keys: Tensor | None = None
    ) -> Iterator[Attached]:
        """Moves the working copy from the c of the last call by the coordinates that differ."""
        c = trained[COEFFICIENTS][0].detach().to("cpu", torch.float64)
        self._move(self._working, c - self._at)
        self._at = c
        with swapped(self._holders, {name: weight.to(self.base.dtype) for name, weight in self._working.items()}):
            yield Attached()

    def export(self, values: Tensors, path: Path) -> None:
        """A model folder that transformers loads, with the weights W(c)."""
        received = as_one_client(values)
        with self.attach(self.start(received), received, torch.zeros(1, dtype=torch.int64)):
            save_model(self.base, path)

    @cached_property
    def _parameters(self) -> dict[str, Any]:
        """Name -> parameter, in the model's order."""
        return dict(self.base.model.named_parameters())

    @cached_property
    def _holders(self) -> dict[str, list[tuple[Any, str]]]:
        return holders(self.base.model, self._parameters)

    def _move(self, weights: Mapping[str, Tensor], by: Tensor) -> None:
        """weights += sum_k by_k z_k, in the order of k. by (K,)."""
        for k in by.nonzero().flatten().tolist():
            for name, z in self.direction(k):
                weights[name].add_(z, alpha=float(by[k]))
