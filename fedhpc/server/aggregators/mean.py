"""The weighted mean of the updates (FedAvg, McMahan et al. 2017, arXiv 1602.05629, algorithm 1).

Linear in the updates, so it rides the exact sum-reduce of `fedhpc.updates.cohort`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedhpc.registry import Section

LINEAR = True


class Options(Section):
    pass


def weights(shares: np.ndarray, rates: Sequence[Sequence[float]], client: Any) -> np.ndarray:
    """The weight of each accepted client (C,); shares (C,) are of the planned cohort."""
    return shares / shares.sum()
