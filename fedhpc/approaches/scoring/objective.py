"""The objectives of prompt search: a small loss of the right answer, or the right label."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedhpc.approaches.scoring.likelihoods import Float64, Int64

Objective = Literal["loss", "label_loss", "accuracy"]


def row_losses(objective: Objective, log_likelihoods: Float64, right: Int64) -> Float64:
    """What each row adds to the score of a candidate prompt; the smaller, the better: (R,).

    log_likelihoods: of the L answers to each row, (R, L). right: the index of the right answer of each row, (R,).
    objective: "loss" is the negative log-likelihood of the right answer, "label_loss" the cross-entropy between the L
    labels, "accuracy" 1 for a wrong label and 0 for the right one.
    """
    of_right = np.take_along_axis(log_likelihoods, right[:, None], axis=1)[:, 0]
    if objective == "loss":
        return -of_right
    if objective == "label_loss":
        highest = log_likelihoods.max(axis=1)
        return highest + np.log(np.exp(log_likelihoods - highest[:, None]).sum(axis=1)) - of_right
    wrong = (log_likelihoods.argmax(axis=1) != right).astype(np.float64)
    return np.where(np.isfinite(log_likelihoods).all(axis=1), wrong, np.nan)
