"""The keys that both levels of privacy have: how much noise, or how much may be spent, and who adds up."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.privacy._accountant import LEAST_NOISE, MOST_NOISE, Method
from fedhpc.registry import Section

LEAST_CLIP, MOST_CLIP = 1e-9, 1e9


class Budget(Section):
    clip_norm: float = Field(
        ge=LEAST_CLIP, le=MOST_CLIP, description="C, the largest L2 norm of what one record contributes"
    )
    delta: float = Field(gt=0, lt=1, description="the delta of (epsilon, delta); at most 1 / number of records")
    noise_multiplier: float | None = Field(
        None,
        ge=LEAST_NOISE,
        le=MOST_NOISE,
        description="z: standard deviation of the noise over clip_norm; default by epsilon",
    )
    epsilon: float | None = Field(
        None, gt=0, description="the budget: the run ends before it passes it; alone it chooses noise_multiplier"
    )
    accountant: Method = Field("pld", description="how rounds add up: privacy loss distributions, or Renyi divergences")

    @property
    def ends_run(self) -> bool:
        """Whether the rounds spend a budget that did not choose their noise, so that it may end before they do."""
        return self.noise_multiplier is not None and self.epsilon is not None

    def require_a_round(self, affordable: int, of_one: Callable[[], float]) -> None:
        """UserError where no round is affordable. of_one: gives the epsilon of one."""
        if affordable == 0:
            raise UserError(
                f"privacy.epsilon {self.epsilon} is less than one round spends ({of_one():.4g})",
                key="privacy.epsilon", remedy="raise privacy.noise_multiplier or privacy.epsilon",
            )  # fmt: skip

    @property
    def fixes_rounds(self) -> str:
        return "" if self.noise_multiplier else "the noise was chosen so that these spend privacy.epsilon"

    @property
    def problem(self) -> str | None:
        """What is wrong with these keys among themselves, in one line."""
        if self.noise_multiplier is None and self.epsilon is None:
            return "privacy.noise_multiplier and privacy.epsilon are both missing: give one of them"
        return None
