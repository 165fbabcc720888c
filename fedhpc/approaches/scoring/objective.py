"""What is searched for: small losses of the right answers, or the right label."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedhpc.approaches.scoring.likelihoods import Float64, Int64

Objective = Literal["loss", "label_loss", "accuracy"]


def row_losses(objective: Objective, log_likelihoods: Float64, right: Int64) -> Float64:
    """What a row adds to the score of a candidate, the smaller the better: (R,).

    log_likelihoods (R, L) of the answers, of which right (R,) is the place of the right one. loss: its negative
    log-likelihood. label_loss: the cross-entropy between the L labels. accuracy: 1 for a wrong label.
    """
    own = np.take_along_axis(log_likelihoods, right[:, None], axis=1)[:, 0]
    if objective == "loss":
        return -own
    if objective == "label_loss":
        highest = log_likelihoods.max(axis=1)
        return highest + np.log(np.exp(log_likelihoods - highest[:, None]).sum(axis=1)) - own
    wrong = (log_likelihoods.argmax(axis=1) != right).astype(np.float64)
    return np.where(np.isfinite(log_likelihoods).all(axis=1), wrong, np.nan)
