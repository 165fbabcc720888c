"""Perplexity: exp of the mean loss per supervised token (Jelinek et al. 1977); 1 is perfect.

Per token of the model's own tokenizer, so only models with the same tokenizer can be compared.
"""

from __future__ import annotations

import numpy as np

from fedhpc.evaluation.metrics import loss
from fedhpc.evaluation.metrics.base import Outputs
from fedhpc.registry import Section

NEEDS = "losses"
HIGHER_IS_BETTER = False


class Options(Section):
    pass


def compute(outputs: Outputs) -> float:
    """exp(loss); infinite where a diverged model's loss exceeds what a float64 can hold."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss.compute(outputs)))
