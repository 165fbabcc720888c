"""Simple preference optimisation, without a reference (Meng, Xia and Chen 2024, arXiv 2405.14734, equation 6)."""

from __future__ import annotations

from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.objectives._preference import Answers, PairPreference
from fedhpc.registry import Open, Section


class SimPO(PairPreference):
    """The negative log-likelihood of the preference, where a reward is beta times the log-likelihood per token."""

    class Options(Section):
        beta: float = Field(2.0, gt=0, description="what the log-likelihood per token is multiplied with")
        gamma: float = Field(1.0, ge=0, description="margin by which the better answer's reward has to be higher")

    has_reference = False
    options: Open

    def rewards(self, answers: Answers) -> Tensor:
        return self.options.beta * answers.mean

    def losses_of(self, chosen: Answers, rejected: Answers) -> Tensor:
        margin = self.rewards(chosen) - self.rewards(rejected)
        return -torch.nn.functional.logsigmoid(margin - self.options.gamma)
