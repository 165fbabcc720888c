"""Federated optimisation against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest

from fedhpc import config as configuration
from fedhpc.server.aggregators import fednova
from fedhpc.training.optimizers.sgd import SGD


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_norm_of_fednova_is_that_of_the_paper(steps: int) -> None:
    """Wang et al. 2020, section 3.1: plain SGD, momentum rho, proximal with alpha = eta mu."""

    def length(lr: float, **client: float) -> float:
        section = configuration.resolve({"partition": {"name": "iid"}, "client": {"optimizer": "sgd", **client}}).client
        return SGD(section).movement([lr] * steps) / lr

    rho, alpha = 0.9, 0.02
    assert length(0.1) == pytest.approx(steps)
    assert length(0.1, momentum=rho) == pytest.approx((steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho))
    assert length(0.1, proximal=alpha / 0.1) == pytest.approx((1 - (1 - alpha) ** steps) / alpha)


def test_fednova_of_equal_work_is_fedavg() -> None:
    shares = np.array([0.2, 0.5, 0.1])
    np.testing.assert_allclose(fednova.weights(shares, np.full(3, 0.4)), shares / 0.8)
    np.testing.assert_array_equal(fednova.weights(shares, np.zeros(3)), 0)
