"""Odds ratio preference optimisation, without a reference (Hong, Lee and Thorne 2024, arXiv 2403.07691, equation 6).

The first term is over prompt and better answer, as in the authors' program and TRL's; an encoder-decoder's prompt is
not predicted, so there it is over the answer. Each pair counts the same, however many tokens it has.
"""

from __future__ import annotations

from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.objectives._preference import Answers, PairPreference
from fedhpc.registry import Open, Section


class ORPO(PairPreference):
    """Language modelling of the better answer, and beta times the loss of its odds against those of the worse one."""

    class Options(Section):
        beta: float = Field(
            0.1, ge=0, description="lambda of the paper: weight of the odds ratio beside the likelihood"
        )

    has_reference = False
    reads_prompt = True
    options: Open

    def rewards(self, answers: Answers) -> Tensor:
        return self.options.beta * answers.mean

    def losses_of(self, chosen: Answers, rejected: Answers) -> Tensor:
        ratio = torch.nn.functional.logsigmoid(_log_odds(chosen.mean) - _log_odds(rejected.mean))
        return chosen.text_loss - self.options.beta * ratio


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p < 0; expm1 keeps the digits of 1 - p where p is nearly 1."""
    return log_p - torch.log(-torch.expm1(log_p))
