"""No differential privacy: nothing is bounded, nothing is added, nothing is promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedhpc.lazy import Tensor
from fedhpc.privacy.base import Privacy


class NoPrivacy(Privacy):
    """Leaves the rounds as they are."""

    spends: ClassVar[bool] = False

    def account(self, spent: Mapping[str, Tensor], clients: Sequence[int]) -> None:
        pass

    def epsilon(self, spent: Mapping[str, Tensor]) -> float:
        return float("inf")
