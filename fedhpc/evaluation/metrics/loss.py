"""Mean negative log-likelihood per supervised token, in nats (target and eos; the prompt is not predicted)."""

from __future__ import annotations

from fedhpc.evaluation.metrics._intervals import Interval, of_ratio
from fedhpc.evaluation.metrics.base import Metric, Outputs


class Loss(Metric):
    """How unlikely the model finds the right tokens, on average."""

    needs = "losses"
    higher_is_better = False
    lowest = 0.0

    def compute(self, outputs: Outputs) -> float:
        """Sum over all tokens of all examples, divided by their number: long examples weigh more."""
        return outputs.nll_sum / outputs.tokens

    def interval(self, outputs: Outputs) -> Interval:
        """The interval of the mean per token, where whole prompts are drawn and not tokens."""
        return of_ratio(outputs.prompt_nll, outputs.prompt_tokens)
