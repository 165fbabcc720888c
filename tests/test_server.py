"""ParameterState optimizers against Reddi et al. 2021, algorithm 2, written in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.errors import UserError
from fedhpc.server.state import ParameterState, ServerState


def paper(name: str, options: dict[str, float], theta: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """x_{t+1} = x_t + eta m_t / (sqrt(v_t) + tau) with Delta_t = -g_t; corrected as Adam's, v_0 is 0."""
    corrected = options.get("bias_correction", False)
    eta, m, v = options["lr"], np.zeros_like(theta), np.full_like(theta, options.get("tau", 0.0) ** 2)
    momentum = np.zeros_like(theta)
    if corrected:
        v = np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        delta = -g
        if name == "sgd":
            beta = options.get("momentum", 0.0)
            momentum = beta * momentum + delta
            theta = theta + eta * (delta + beta * momentum if options.get("nesterov") else momentum)
            continue
        m = options["beta1"] * m + (1 - options["beta1"]) * delta
        if name == "adagrad":
            v = v + delta**2
        elif name == "yogi":
            v = v - (1 - options["beta2"]) * delta**2 * np.sign(v - delta**2)
        else:
            v = options["beta2"] * v + (1 - options["beta2"]) * delta**2
        m_hat = m / (1 - options["beta1"] ** t) if corrected else m
        v_hat = v / (1 - options["beta2"] ** t) if corrected else v
        theta = theta + eta * m_hat / (np.sqrt(v_hat) + options["tau"])
    return theta


CASES: list[tuple[str, dict[str, float]]] = [
    ("sgd", {"lr": 1.0}),
    ("sgd", {"lr": 0.5, "momentum": 0.9}),
    ("sgd", {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    ("adam", {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}),
    ("yogi", {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}),
    ("adam", {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "tau": 1e-2, "bias_correction": True}),
    ("yogi", {"lr": 0.1, "beta1": 0.8, "beta2": 0.95, "tau": 1e-2, "bias_correction": True}),
    ("adagrad", {"lr": 0.1, "beta1": 0.0, "tau": 1e-2}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: str(x))
def test_steps_as_in_the_paper_and_resumes_from_its_tensors(name: str, options: dict[str, Any]) -> None:
    config = configuration.resolve({"partition": {"name": "iid"}, "server": {"optimizer": name, **options}})
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=50), [rng.normal(size=50) for _ in range(6)]
    optimizer = registry.choice("server_optimizers", name)(config.server)
    server = ParameterState(torch.from_numpy(start.copy()), optimizer)
    for i, g in enumerate(gradients):
        if i == 3:
            saved = {n: a.copy() for n, a in server.tensors().items()}
            server = ParameterState(torch.zeros(50, dtype=torch.float64), optimizer)
            server.load(saved)
        before = server.theta.clone()
        norm = server.step(torch.from_numpy(g.copy()))
        assert norm == pytest.approx(float((server.theta - before).norm()))
    np.testing.assert_allclose(server.theta.numpy(), paper(name, options, start, gradients), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "torch_optimizer", "of_torch"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True}, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (
            "adam", {"beta1": 0.8, "beta2": 0.95, "tau": 1e-2, "bias_correction": True},
            torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-2},
        ),
    ],
)  # fmt: skip
def test_steps_as_torch_does(name: str, options: Any, torch_optimizer: Any, of_torch: Any) -> None:
    rng = np.random.default_rng(1)
    theta, gradients = torch.from_numpy(rng.normal(size=50)), [rng.normal(size=50) for _ in range(6)]
    config = configuration.resolve({"partition": {"name": "iid"}, "server": {"optimizer": name, "lr": 0.7, **options}})
    server = ParameterState(theta.clone(), registry.choice("server_optimizers", name)(config.server))
    reference = torch_optimizer([theta], lr=0.7, **of_torch)
    for g in gradients:
        server.step(torch.from_numpy(g))
        theta.grad = torch.from_numpy(g)
        reference.step()
    torch.testing.assert_close(server.theta, theta, rtol=1e-12, atol=1e-12)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(UserError, match=r"server\.optimizer: nesterov looks ahead along .*, and server\.momentum is 0"):
        configuration.resolve({"partition": {"name": "iid"}, "server": {"nesterov": True}})


def test_fedavg_of_one_client_takes_its_parameters_over() -> None:
    config = configuration.resolve({"partition": {"name": "iid"}})
    theta, client = torch.randn(1000), torch.randn(1000)
    server = ParameterState(theta, registry.choice("server_optimizers", "sgd")(config.server))
    server.step(theta.double() - client.double())
    assert torch.equal(server.theta, client)


def test_who_goes_on_removes_the_older_files_that_a_killed_run_left() -> None:
    before, after = ServerState(), ServerState()
    before.keep_versions([3], 2)
    before.keep_versions([5], 1)
    after.load(before.tensors())
    assert after.versions == {3: 2, 5: 1}
    assert after.renewed == {3, 5}
