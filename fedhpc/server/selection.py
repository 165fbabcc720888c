"""The state that a run is evaluated by and ends with: an average of late ones, the best one, or the last.

evaluation.ema and evaluation.lawa make the average, which is what is evaluated; evaluation.keep and
evaluation.patience say which of the evaluated states is the best, and how long ago.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from fedhpc.lazy import Tensor, torch

_NAME = "selection"  # of its numbers in a checkpoint
_AVERAGE = "average."  # in front of the names of an average's tensors there


class Average(ABC):
    """A mean of the states theta (P,) that the server's steps have made so far, theta_0 not among them."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is, for people."""

    @abstractmethod
    def see(self, theta: Tensor) -> None:
        """Take in theta (P,) after a step; nobody changes it later."""

    @property
    @abstractmethod
    def value(self) -> Tensor | None:
        """The mean (P,) float64; None before the first step."""

    @abstractmethod
    def tensors(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps; nothing before the first step."""

    @abstractmethod
    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The inverse of `tensors`."""


class Ema(Average):
    """The exponential moving average: every state counts `decay` times as much as the one after it, 1 in all.

    sum_s d^(t-s) theta_s / sum_s d^(t-s) over steps s = 1 to t; that is a_t = a_(t-1) + (theta_t - a_(t-1)) / w_t
    with w_t = 1 + d w_(t-1).
    """

    def __init__(self, decay: float) -> None:
        self._decay, self._weight = decay, 0.0
        self._mean: Tensor | None = None

    @property
    def title(self) -> str:
        return f"the moving average of the states of all rounds, with decay {self._decay:g}"

    def see(self, theta: Tensor) -> None:
        self._weight = 1 + self._decay * self._weight
        before = 0.0 if self._mean is None else self._mean
        self._mean = before + (theta.double() - before) / self._weight

    @property
    def value(self) -> Tensor | None:
        return self._mean

    def tensors(self) -> dict[str, np.ndarray]:
        if self._mean is None:
            return {}
        return {f"{_AVERAGE}mean": self._mean.numpy(), f"{_AVERAGE}weight": np.array([self._weight])}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        if f"{_AVERAGE}mean" in tensors:
            self._mean = torch.from_numpy(tensors[f"{_AVERAGE}mean"].copy())
            self._weight = float(tensors[f"{_AVERAGE}weight"][0])


class Lawa(Average):
    """The mean of the last `most` states, of fewer at first (LAWA, Kaddour 2022, arXiv 2209.14981)."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._states: list[Tensor] = []

    @property
    def title(self) -> str:
        return f"the mean of the states of the last {len(self._states)} rounds"

    def see(self, theta: Tensor) -> None:
        self._states = [*self._states, theta][-self._most :]

    @property
    def value(self) -> Tensor | None:
        if not self._states:
            return None
        total = torch.zeros_like(self._states[0], dtype=torch.float64)
        for state in self._states:
            total += state
        return total / len(self._states)

    def tensors(self) -> dict[str, np.ndarray]:
        return {f"{_AVERAGE}{i}": state.numpy() for i, state in enumerate(self._states)}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        names = [f"{_AVERAGE}{i}" for i in range(self._most)]
        self._states = [torch.from_numpy(tensors[name].copy()) for name in names if name in tensors]


def average(ema: float | None, lawa: int | None) -> Average | None:
    """The average that evaluation.ema or evaluation.lawa asks for; None where neither does."""
    if ema is not None:
        return Ema(ema)
    return None if lawa is None else Lawa(lawa)


class Selection:
    """The best value of a metric so far, and the evaluations without a better one since then."""

    def __init__(self) -> None:
        self.round = -1  # that of the best state; -1: nothing was evaluated
        self.value = math.nan
        self.waited = 0  # evaluations since

    def see(self, round_: int, value: float, higher_is_better: bool) -> bool:
        """Take in the metric of the state after `round_`; whether it is the best so far. NaN never is."""
        if not math.isnan(value) and (
            math.isnan(self.value) or (value > self.value if higher_is_better else value < self.value)
        ):
            self.round, self.value, self.waited = round_, value, 0
            return True
        self.waited += 1
        return False

    def tensors(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps; nothing where nothing was seen."""
        if self.round < 0 and not self.waited:
            return {}
        return {_NAME: np.array([self.round, self.value, self.waited], dtype=np.float64)}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The inverse of `tensors`."""
        if _NAME in tensors:
            round_, self.value, waited = tensors[_NAME].tolist()
            self.round, self.waited = int(round_), int(waited)
