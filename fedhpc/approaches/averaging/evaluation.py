"""What is evaluated of an averaged payload: validation, the test at the end, and per-client results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhpc import registry
from fedhpc.approaches.averaging.poisoning import Poisoning
from fedhpc.config import Config
from fedhpc.data import Data
from fedhpc.data.population import Population
from fedhpc.data.tokens import Examples
from fedhpc.evaluation.evaluate import Evaluator, Outcome, subset
from fedhpc.methods.base import Method
from fedhpc.ranks.transport.base import LoopbackTransport, Transport
from fedhpc.registry import short_name
from fedhpc.rng import generator

#: The metric of a backdoor: the share of examples of other classes that get the attackers' class with the trigger.
ATTACK_SUCCESS = "attack_success"
_ENDS = ("", "_low", "_high")  # behind the name of a metric: its value, and the ends of its interval


class Evaluation:
    """What is measured of a payload, or of one payload per client. Every method is collective."""

    def __init__(
        self,
        config: Config,
        method: Method,
        data: Data,
        evaluator: Callable[[Transport], Evaluator],
        poisoning: Poisoning | None = None,
    ) -> None:
        """poisoning: of an attack whose success is measured too."""
        self.config, self.method, self.data, self.evaluator = config, method, data, evaluator
        self.poisoning = poisoning if poisoning is not None and poisoning.has_goal else None

    def validation(self, transport: Transport, payloads: Tensor) -> Outcome | None:
        """Of `payloads` (1 or M, P), on the validation split; with samples where a metric has texts written anyway."""
        options, examples = self.config.evaluation, self.data.validation
        indices = subset(len(examples), options.max_examples)
        samples = options.samples if writes_texts(options.metrics) else 0
        outcome = self.evaluator(transport).evaluate(self.method, payloads, examples, indices, options.metrics, samples)
        return self._with_success(outcome, transport, self.method, payloads, examples, indices)

    def _with_success(
        self,
        outcome: Outcome | None,
        transport: Transport,
        method: Method | None,
        payloads: Tensor,
        examples: Examples,
        indices: NDArray[np.int64],
    ) -> Outcome | None:
        """The outcome, and how often examples with the trigger get the attackers' class. Collective."""
        if self.poisoning is None:
            return outcome
        triggered = self.poisoning.triggered(examples, indices)
        rows, evaluator = np.arange(len(triggered)), self.evaluator(transport)
        attacked = evaluator.evaluate(method, payloads, triggered, rows, ["accuracy"], intervals=True)
        if outcome is None or attacked is None:
            return None
        metrics = {**outcome.metrics, ATTACK_SUCCESS: attacked.metrics["accuracy"]}
        sampling = {**outcome.sampling, ATTACK_SUCCESS: attacked.sampling["accuracy"]}
        return replace(outcome, metrics=metrics, sampling=sampling)

    def test(self, transport: Transport, payloads: Tensor) -> tuple[Outcome, Outcome] | None:
        """On the test split: of the untouched base, and of `payloads` (1 or M, P) with sample texts."""
        options, examples = self.config.evaluation, self.data.test
        indices = subset(len(examples), options.test_max_examples)
        evaluator, metrics = self.evaluator(transport), options.metrics_of_test
        untouched = evaluator.evaluate(None, payloads, examples, indices, metrics, intervals=True)
        final = evaluator.evaluate(self.method, payloads, examples, indices, metrics, options.samples, intervals=True)
        untouched = self._with_success(untouched, transport, None, payloads, examples, indices)
        final = self._with_success(final, transport, self.method, payloads, examples, indices)
        return None if untouched is None or final is None else (untouched, final)

    def clients_evaluated(self) -> list[int]:
        """Clients of the per-client evaluation: all, or a seeded sample of a large population."""
        return evaluated_clients(self.config, self.data.population)

    def of_clients(
        self, transport: Transport, payloads: Tensor, clients: Sequence[int]
    ) -> dict[str, np.ndarray] | None:
        """What `payloads` (1 or M, P) do on the clients' held-out examples (Evaluator.by_client)."""
        return self.evaluator(transport).by_client(
            self.method,
            payloads.to(self.method.base.device),
            self.data.train,
            clients,
            [self.data.population.held_out(c) for c in clients],
            self.config.evaluation.metrics_of_test,
        )

    def personalized(
        self,
        transport: Transport,
        personalize: Callable[[Sequence[int]], Tensor],
        clients: Sequence[int],
        block_size: int,
    ) -> dict[str, np.ndarray]:
        """Per-client results of the payloads (K, P) that `personalize` makes, `_personal` behind the metrics' names.

        Of meaning on rank 0 alone.
        """
        measured = dict.fromkeys(["loss", *map(short_name, self.config.evaluation.metrics_of_test)])
        names = [f"{metric}{end}" for metric in measured for end in _ENDS]
        # Blocks do not depend on the number of ranks, and each entry is filled by one of them.
        results = torch.zeros(len(names), len(clients), dtype=torch.float64)
        for number, begin in enumerate(range(0, len(clients), block_size)):
            if transport.evaluator(number) == transport.rank:
                block = clients[begin : begin + block_size]
                columns = self.of_clients(LoopbackTransport(), personalize(block), block)
                assert columns is not None
                results[:, begin : begin + block_size] = torch.from_numpy(np.stack([columns[name] for name in names]))
        transport.reduce_sum(results)
        personal = [f"{metric}_personal{end}" for metric in measured for end in _ENDS]
        return {name: result.numpy() for name, result in zip(personal, results, strict=True)}


def writes_texts(metrics: Sequence[str]) -> bool:
    """Whether one of the metrics is measured on texts that the model writes."""
    return any(registry.choice("metrics", name).needs == "texts" for name in metrics)


def evaluated_clients(config: Config, population: Population) -> list[int]:
    """The clients that are evaluated each by itself: all, or a seeded sample of `evaluation.max_clients`."""
    n, limit = population.num_clients, config.evaluation.max_clients
    if n <= limit:
        return list(range(n))
    chosen = generator(config.run.seed, "evaluated clients").choice(n, limit, replace=False)
    return sorted(int(c) for c in chosen)


def turn_lines(turns: Mapping[str, Any] | None) -> list[str]:
    """A line for the losses of the turns of chats: of the first ten, where there are more."""
    if turns is None:
        return []
    shown = [f"{turn}: {loss:.4f}" for turn, loss in list(zip(turns["turn"], turns["loss"], strict=True))[:10]]
    return [f"test loss by turn of the assistant: {', '.join(shown)}{', ...' * (len(turns['turn']) > 10)}"]


def client_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for each per-client result."""
    columns = dict.fromkeys(name.partition("/")[0] for name in summary)
    return [
        f"clients' {name.replace('_', ' ')}: mean {summary[f'{name}/mean']:.4f}, worst 10 % "
        f"{summary[f'{name}/worst_10_percent']:.4f}, standard deviation {summary[f'{name}/std']:.4f}"
        for name in columns
    ]
