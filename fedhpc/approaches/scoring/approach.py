"""The common part of approaches whose clients score candidates: examples, answers, rejections, sums of scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from fedhpc.approaches.base import Approach, BlockResult, CombinedT, DownloadT, StateT, UploadT
from fedhpc.approaches.inputs import Inputs
from fedhpc.approaches.scoring.likelihoods import Float64, Int32, Int64, Prefixes, TokenCount, log_likelihoods
from fedhpc.approaches.scoring.objective import row_losses
from fedhpc.approaches.scoring.prompts import Candidate, Writer
from fedhpc.data.load import template
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Outcome, subset
from fedhpc.methods.base import Method
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.load import autocast
from fedhpc.participation.plan import Plan
from fedhpc.participation.sampling import cohort_size
from fedhpc.ranks.transport.base import Transport
from fedhpc.rng import generator
from fedhpc.server.aggregation import Aggregation
from fedhpc.updates.cohort import Cohort
from fedhpc.updates.layout import Layout

NUMBER_BYTES = 8  # of a score, or of any other number that is sent


@dataclass
class Rows:
    """Rows to be scored: each belongs to a client of the block, a candidate and a prefix, all given as indices."""

    client: list[int] = field(default_factory=list)
    candidate: list[int] = field(default_factory=list)
    prefix: list[int] = field(default_factory=list)
    ids: list[Int32] = field(default_factory=list)
    answers: list[list[Int32]] = field(default_factory=list)
    right: list[int] = field(default_factory=list)  # the index of the right answer

    def add(self, client: int, candidate: int, prefix: int, ids: Int32, answers: list[Int32], right: int) -> None:
        """Add one row."""
        for values, value in zip(vars(self).values(), (client, candidate, prefix, ids, answers, right), strict=True):
            values.append(value)


@dataclass
class Scores:
    """The scores that K clients give to n candidates."""

    means: Float64  # (K, n): the score of a candidate, the smaller the better
    losses: Float64  # (K, n): negative log-likelihood of the right answers, summed over their tokens
    tokens: Int64  # (K, n): how many tokens the right answers have
    rows: Int64  # (K, n): how many rows were scored


class Scoring(Approach[StateT, DownloadT, UploadT, CombinedT]):
    """An approach in which clients score candidates and train nothing."""

    base: CausalLM

    reasons: ClassVar[tuple[str, ...]] = ("", "its scores are not finite")

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        name, options = self.config.method.name, self.config.method
        sampled = cohort_size(self.config, self.data.population)
        self.aggregation = Aggregation(self.config.server, self.config.run.seed, sampled)
        if not isinstance(self.base, CausalLM):
            raise UserError(
                f"method.name: {name} scores answers of a decoder-only model, and '{self.base.name}' is used for "
                f"{self.base.task}: take a decoder-only model, or another method such as prefix"
            )
        target = template(self.config.data.target, "data.target", self.base.tokenizer)
        label = self.config.data.label
        labelled = label is not None and list(target.columns) == [label]
        if options.objective != "loss" and not labelled:
            raise UserError(
                f"method.objective: {options.objective} chooses between labels, so data.target must be made of the "
                f"label alone, like ' {{{label}}}'"
            )
        self.writer = Writer(
            self.base.tokenizer,
            self.config.run.seed,
            getattr(options, "separator", ""),
            target,
            label if labelled else None,
            getattr(options, "max_prompt_tokens", 0),
            template(self.config.data.prompt, "data.prompt", self.base.tokenizer).texts[-1] or "a",
        )
        #: The prompt of the data's templates alone.
        self.plain = Candidate(words=tuple(self.data.train.label_names) if labelled else ())

    @property
    def min_cohort(self) -> int:
        return max(super().min_cohort, self.aggregation.fewest)

    # ---- scores

    def num_scored(self, client: int, most: int | None, aside: int = 0) -> int:
        """On how many of its examples a client scores: at most `most`.

        `aside` examples are left out, but never more than half of them.
        """
        size = self.data.population.num_examples(client)
        count = size - min(aside, size // 2)
        return count if most is None else min(most, count)

    def scored(self, round_: int, client: int, most: int | None, aside: int = 0) -> tuple[Int64, Int64]:
        """Draw the examples of a client that a round scores on, `num_scored` of them; returns them and the others."""
        indices = self.data.population.indices(client)
        drawn = generator(self.config.run.seed, "scored", round_, client).permutation(indices)
        count = self.num_scored(client, most, aside)
        return np.sort(drawn[:count]), np.sort(drawn[count:])

    def scored_answers(self, labels: list[Int32], example: int) -> tuple[list[Int32], int]:
        """The answers whose likelihoods an example's score needs, and the index of the right one.

        labels: the answer of each label; empty where the data have none.
        """
        train = self.data.train
        if not labels:
            return [train.target(example)], 0
        assert train.labels is not None
        right = int(train.labels[example])
        return ([labels[right]], 0) if self.config.method.objective == "loss" else (labels, right)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A context for forward passes: without gradients, in the precision of the run."""
        with torch.no_grad(), autocast(self.base, self.config.runtime.precision):
            yield

    def score(self, prefixes: Prefixes, rows: Rows, clients: int, candidates: int, spent: TokenCount) -> Scores:
        """Score all rows in a few forward passes."""
        with self.forward():
            likelihoods = log_likelihoods(self.base, prefixes, np.array(rows.prefix), rows.ids, rows.answers, spent)
        right = np.array(rows.right)
        cell = np.array(rows.client) * candidates + np.array(rows.candidate)

        def summed(values: Any) -> Any:
            return np.bincount(cell, weights=values, minlength=clients * candidates).reshape(clients, candidates)

        lengths = [len(answers[index]) for answers, index in zip(rows.answers, rows.right, strict=True)]
        counts = summed(None)
        with np.errstate(invalid="ignore"):  # the caller rejects scores that are not finite
            scores = row_losses(self.config.method.objective, likelihoods, right)
            means = summed(scores) / np.maximum(counts, 1)
        return Scores(means, summed(row_losses("loss", likelihoods, right)), summed(lengths).astype(np.int64), counts)

    def report(
        self,
        clients: Sequence[int],
        upload: Any,
        finite: Any,
        sent: Float64,
        scores: Sequence[Scores],
        spent: TokenCount,
        bytes_up: Int64,
    ) -> BlockResult[Any]:
        """Make the result of a block of K clients.

        sent: the numbers that the clients send, (K, m). scores: all that they have scored, in order. bytes_up: the
        bytes that each client sends in mode federated, (K,).
        """
        tokens = sum(one.tokens.sum(axis=1) for one in scores)

        def per_token(losses: Float64, tokens: Int64) -> Float64:
            return np.asarray(losses / np.maximum(tokens, 1))

        return BlockResult(
            clients=tuple(clients),
            upload=upload,
            reason=np.where(finite, 0, 1),
            tokens=np.asarray(tokens),
            steps=np.full(len(finite), sum(one.means.shape[1] for one in scores)),
            loss_sum=np.asarray(sum(one.losses.sum(axis=1) for one in scores)),
            loss_first=per_token(scores[0].losses[:, 0], scores[0].tokens[:, 0]),
            loss_last=per_token(scores[-1].losses[:, -1], scores[-1].tokens[:, -1]),
            norms=np.linalg.norm(sent, axis=1),
            bytes_up=bytes_up if self.config.mode == "federated" else np.zeros(len(finite), np.int64),
            padded_tokens=spent.padded,
        )

    def mean_scores(
        self, transport: Transport, plan: Plan, indices: Int64, scores: Float64, rows: Int64
    ) -> tuple[Float64, float] | None:
        """Aggregate the scores of the accepted clients with server.aggregator; None where there are none. Collective.

        scores: of this rank's accepted clients, (c, n). indices: their indices in the cohort, (c,). rows: how many
        examples each client of the cohort scores on, (C,), which is its weight if server.weighting is "examples".
        Returns the aggregated scores (n,) and their examples; the result is undefined above rank 0.
        """
        config, count = self.config, scores.shape[1]
        counted = rows.astype(np.float64) if config.server.weighting == "examples" else (rows > 0).astype(np.float64)
        shares = counted / max(counted.sum(), 1.0)
        layout = Layout({"scores": (count,)})
        cohort = Cohort(transport, layout, plan.cohort, shares, indices, torch.from_numpy(scores))
        if len(cohort) < self.aggregation.fewest:
            return None
        total = self.aggregation.combine(cohort, plan.round)
        scored = dict(zip(plan.cohort, rows, strict=True))
        return total.numpy(), float(sum(scored[c] for c in cohort.clients))

    def spent_by_all(self, transport: Transport, numbers: Sequence[int]) -> list[int]:
        """The sum of these numbers over all ranks, on rank 0; undefined on the others. Collective."""
        total = torch.tensor(numbers, dtype=torch.int64)
        transport.reduce_sum(total)
        return [int(n) for n in total]

    # ---- results

    def measured(
        self,
        transport: Transport,
        examples: Examples,
        metrics: Sequence[str],
        limit: int | None,
        method: Method | None = None,
        payload: Any = None,
        targets: Sequence[str] | None = None,
        samples: int = 0,
        intervals: bool = False,
    ) -> Outcome | None:
        """Metrics on a fixed subset of `examples`; targets: of the labels, in place of the data's. Collective."""
        evaluator = self.evaluator(transport)
        if targets is not None and self.label_targets is not None:
            evaluator = replace(evaluator, label_targets=targets)
        payload = torch.empty(1, 0) if payload is None else payload
        indices = subset(len(examples), limit)
        return evaluator.evaluate(method, payload, examples, indices, metrics, samples, intervals)
