"""Label flipping: attackers train on wrong classes (Fang et al. 2020, arXiv 1911.11815, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedhpc.attacks.base import Attack


class LabelFlip(Attack):
    """Of L classes in order, the examples of class l have class L - 1 - l."""

    sees_others = False

    changes_examples = True

    def relabelled(self, labels: np.ndarray, names: Sequence[str], draws: np.random.Generator) -> np.ndarray:
        return len(names) - 1 - labels
