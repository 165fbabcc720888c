"""Which of the evaluated states of a run is the best, and how long ago (evaluation.keep, evaluation.patience)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

_NAME = "selection"  # of its numbers in a checkpoint


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
