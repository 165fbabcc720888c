"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""

from __future__ import annotations

from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.objectives._preference import Answers, PairPreference
from fedhpc.registry import Open, Section


class DPO(PairPreference):
    """The negative log-likelihood of the preference, where an answer's reward is beta times its log-ratio."""

    class Options(Section):
        beta: float = Field(0.1, gt=0, description="how much the reward counts: the smaller, the further from the base")

    options: Open

    def rewards(self, answers: Answers) -> Tensor:
        return self.options.beta * answers.ratio

    def losses_of(self, chosen: Answers, rejected: Answers) -> Tensor:
        return -torch.nn.functional.logsigmoid(self.rewards(chosen) - self.rewards(rejected))
