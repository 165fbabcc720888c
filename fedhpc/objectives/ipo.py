"""Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, equation 17).

Log-ratios are per token of the answer, as its authors have it in their experiments and TRL in `loss_type="ipo"`.
"""

from __future__ import annotations

from pydantic import Field

from fedhpc.lazy import Tensor
from fedhpc.objectives._preference import Answers, PairPreference
from fedhpc.registry import Open, Section


class IPO(PairPreference):
    """The squared distance of the two answers' log-ratios from 1 / (2 beta), beyond which nothing is gained."""

    class Options(Section):
        beta: float = Field(0.1, gt=0, description="tau of the paper: the larger, the closer to the base")

    options: Open

    def rewards(self, answers: Answers) -> Tensor:
        return self.options.beta * answers.ratio

    def losses_of(self, chosen: Answers, rejected: Answers) -> Tensor:
        gap = chosen.ratio / chosen.tokens - rejected.ratio / rejected.tokens
        return (gap - 1 / (2 * self.options.beta)).square()
