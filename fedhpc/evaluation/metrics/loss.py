"""Mean negative log-likelihood per supervised token, in nats (target and eos; the prompt is not predicted)."""

from __future__ import annotations

from fedhpc.evaluation.metrics.base import Outputs
from fedhpc.registry import Section

NEEDS = "losses"
HIGHER_IS_BETTER = False


class Options(Section):
    pass


def compute(outputs: Outputs) -> float:
    """Sum over all tokens of all examples, divided by their number: long examples weigh more."""
    return outputs.nll_sum / outputs.tokens
