"""Reward accuracy: the share of preferences, 0 to 1, that the model has the right way round; a tie counts half.

Of pairs, the better answer's reward is higher (Rafailov et al. 2023, arXiv 2305.18290); of single answers, it is above
0 where people want the answer, else below. The reward is that of the objective. Margins below 1e-4 are ties: the
log-likelihood of a whole answer in float32 is no more exact than that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics.base import ItemMetric, Outputs

_TIE = 1e-4  # nats


class RewardAccuracy(ItemMetric):
    """How often the model rewards the answer that people prefer."""

    needs = "preferences"
    higher_is_better = True
    lowest, highest = 0.0, 1.0

    def of_items(self, outputs: Outputs) -> NDArray[np.float64]:
        """1 where the margin is positive, 1/2 where it is a tie; with several models the mean over them."""
        signs = np.where(np.abs(outputs.margins) < _TIE, 0.0, np.sign(outputs.margins))
        shares: NDArray[np.float64] = ((1 + signs) / 2).mean(axis=0)
        return shares
