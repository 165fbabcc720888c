"""The evaluation of one payload, or of one per client, on a fixed list of items, spread over the ranks.

The batches follow from the items alone: sorted by length, cut into pieces of `evaluation.batch_size`, done
by the ranks in turn (not by a server on the CPU beside workers on GPUs). Every item has an entry of its own in a
vector of zeros; each rank fills the entries of its batches and one sum-reduce brings them to rank 0. An entry is only
ever added to zeros, so the result has the same bits on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc import registry
from fedhpc.config import Evaluation
from fedhpc.data.encoding import unmarked
from fedhpc.data.tokens import Examples, group_references, ranges
from fedhpc.evaluation.metrics._intervals import Interval, of_ratio
from fedhpc.evaluation.metrics.base import Metric, Outputs
from fedhpc.evaluation.metrics.loss import Loss
from fedhpc.lazy import Tensor, torch
from fedhpc.methods.base import Attached, Method, PerClient
from fedhpc.models.base import Base, Predictor
from fedhpc.models.generative import Generative
from fedhpc.models.load import autocast
from fedhpc.objectives._preference import Preference
from fedhpc.objectives.base import Objective
from fedhpc.ranks.transport.base import LoopbackTransport, Transport
from fedhpc.results.record import Sampling
from fedhpc.rng import EVALUATION, generator

Int64 = NDArray[np.int64]
Int32 = NDArray[np.int32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What rank 0 knows after an evaluation."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # prompt, references, text
    sampling: dict[str, Sampling]  # of the metrics
    turns: dict[str, NDArray[Any]] | None = None  # of chats: `by_turn` of the losses, where metrics need these


def subset(n: int, limit: int | None) -> Int64:
    """At most `limit` of the items 0 to n - 1 (None: all), the same ones for every `run.seed`, in ascending order."""
    if limit is None or n <= limit:
        return np.arange(n)
    return np.sort(generator(EVALUATION, "evaluation subset").choice(n, limit, replace=False))


@dataclass(frozen=True)
class Evaluator:
    """Measures payloads of a method on examples, with what all evaluations of a run have in common.

    label_targets: the rendered target of every label, for what chooses between labels.
    """

    base: Base
    objective: Objective
    options: Evaluation
    precision: str
    transport: Transport
    label_targets: Sequence[str] | None = None

    def evaluate(
        self,
        method: Method | None,
        payloads: Tensor,
        examples: Examples,
        indices: Int64,
        metrics: Sequence[str],
        samples: int = 0,
        intervals: bool = False,
    ) -> Outcome | None:
        """Metrics of `payloads` (M, P) on the examples `indices`; the outcome on rank 0, None elsewhere. Collective.

        With M > 1 the loss is over all pairs of payload and example; for labels and texts item i of the evaluated ones
        is answered by payload i mod M, so that this costs what one model costs. method None: the base as it is.

        For texts an item is a distinct prompt with all its references; as many as there are `indices` are drawn,
        and `samples` of them, evenly spaced, are in the outcome. Classifiers write no texts, so no samples.
        intervals: with those of the metrics over the drawing of the items.
        """
        base, rank = self.base, self.transport.rank
        chosen: dict[str, Metric] = {registry.short_name(name): registry.choice("metrics", name)() for name in metrics}
        needs = {metric.needs for metric in chosen.values()}
        count = 1 if method is None else len(payloads)
        shares = _Shares(self, method, payloads)
        outputs: dict[str, Any] = {}
        measured = {"losses": (len(indices), len(examples), "examples")}  # n, of, unit
        measured["labels"] = measured["preferences"] = measured["losses"]
        shown: list[dict[str, Any]] = []
        turns = None

        if needs & {"losses", "preferences"}:
            pairs = np.tile(indices, count)
            of_pair = np.repeat(np.arange(count), len(indices))
            if isinstance(self.objective, Preference):
                nll, margins = shares.preferences(examples, pairs, of_pair)
                outputs["margins"] = margins.reshape(count, -1)
            elif examples.spans is None:
                nll = shares.losses(examples, pairs, of_pair)
            else:
                losses = shares.token_losses(examples, pairs, of_pair)
                nll = np.zeros(len(pairs))
                np.add.at(nll, examples.supervised(pairs)[0], losses)
                turns = by_turn(examples.turns(pairs), losses)
            nll = nll.reshape(count, -1)
            supervised = count * self.objective.num_supervised(examples, indices)
            outputs |= {"nll_sum": float(nll.sum(axis=1).sum()), "tokens": int(supervised.sum())}
            prompt = _prompts(examples, indices)
            outputs["prompt_nll"] = np.bincount(prompt, weights=nll.sum(axis=0))
            outputs["prompt_tokens"] = np.bincount(prompt, weights=supervised).astype(np.int64)
        if "labels" in needs:
            if self.label_targets is None or examples.labels is None:
                raise ValueError("metrics on labels need the examples' labels and a target for each of them")
            scores = shares.label_scores(examples, indices, np.arange(len(indices)) % count)
            outputs |= {"labels": examples.labels[indices].astype(np.int64), "predictions": scores.argmax(axis=1)}
        samples = samples if "texts" in base.answers else 0
        if "texts" in needs or samples:
            groups = group_references(examples)
            items = subset(len(groups), len(indices))
            samples = min(samples, len(items))
            sampled = np.arange(samples) * len(items) // max(samples, 1)
            measured["texts"] = (len(items), len(groups), "prompts")
            payload = np.arange(len(items)) % count
            if "texts" not in needs:
                items, payload, sampled = items[sampled], payload[sampled], np.arange(samples)
            firsts = np.array([groups[i][0] for i in items], np.int64)
            generated = shares.texts(examples, firsts, payload)
            if rank == 0:
                assert isinstance(base, Generative)
                texts = [base.text(row) for row in generated]
                references = [[unmarked(target).strip() for target in groups[i][1]] for i in items]
                outputs |= {"texts": texts, "references": references}
                shown = [
                    {"prompt": _read(base, examples, int(firsts[i])), "references": references[i], "text": texts[i]}
                    for i in sampled
                ]
        if rank != 0:
            return None
        all_outputs = Outputs(**outputs)
        return Outcome(
            {name: float(metric.compute(all_outputs)) for name, metric in chosen.items()},
            shown,
            {
                name: sampling(metric, all_outputs, *measured[metric.needs], interval=intervals)
                for name, metric in chosen.items()
            },
            turns,
        )

    def likelihoods(self, method: Method | None, payloads: Tensor, examples: Examples) -> Float64 | None:
        """Negative log-likelihood of the target of each example under one payload (1, P); on rank 0. Collective."""
        shares = _Shares(self, method, payloads)
        summed = shares.losses(examples, np.arange(len(examples)), np.zeros(len(examples), np.int64))
        return summed if self.transport.rank == 0 else None

    def by_client(
        self,
        method: Method | None,
        payloads: Tensor,
        examples: Examples,
        clients: Sequence[int],
        held_out: Sequence[Int64],
        metrics: Sequence[str] = (),
    ) -> dict[str, NDArray[Any]] | None:
        """Metrics of every client on examples held out of its own training; on rank 0, None elsewhere. Collective.

        method None: of the base as it is. payloads (1, P), the same for all clients, or one row per client.
        held_out[i]: the examples of clients[i].
        Columns, one row per client: client_id, num_examples, tokens (supervised), loss (mean over them, NaN without
        any) and `metrics`, NaN without examples; of each the 95 % interval over the drawing of the client's examples,
        loss_low and loss_high; NaN where it is not known, as that of the loss of one example.
        """
        if len(payloads) not in (1, len(clients)):
            raise ValueError(f"{len(payloads)} payloads for {len(clients)} clients")
        sizes = np.array([len(part) for part in held_out], np.int64)
        indices = np.concatenate([np.empty(0, np.int64), *held_out])
        owner = np.repeat(np.arange(len(clients)), sizes)
        shares = _Shares(self, method, payloads)
        chosen: dict[str, Metric] = {registry.short_name(name): registry.choice("metrics", name)() for name in metrics}
        needs, margins = {metric.needs for metric in chosen.values()}, np.empty(0)
        if "preferences" in needs:
            nll, margins = shares.preferences(examples, indices, owner % len(payloads))
        else:
            nll = shares.losses(examples, indices, owner % len(payloads))
        outputs = self._of_clients(shares, examples, held_out, nll, margins, needs)
        if self.transport.rank != 0:
            return None
        supervised = self.objective.num_supervised(examples, indices)
        tokens = np.bincount(owner, weights=supervised, minlength=len(clients)).astype(np.int64)

        def per(values: NDArray[Any], counts: Int64) -> Float64:
            sums = np.bincount(owner, weights=values, minlength=len(clients))
            return np.divide(sums, counts, out=np.full(len(clients), np.nan), where=counts > 0)

        columns: dict[str, NDArray[Any]] = {
            "client_id": np.array(clients, np.int64),
            "num_examples": sizes,
            "tokens": tokens,
        }
        ends = np.cumsum(sizes)[:-1]
        columns["loss"] = per(nll, tokens)
        of_each = zip(np.split(nll, ends), np.split(supervised, ends), strict=True)
        columns |= _ends("loss", Loss(), [of_ratio(sums, counts) for sums, counts in of_each])
        for name, metric in chosen.items():
            if name != "loss":
                measured = [metric.compute(one) if size else math.nan for one, size in zip(outputs, sizes, strict=True)]
                intervals = [
                    metric.interval(one) if size else Interval() for one, size in zip(outputs, sizes, strict=True)
                ]
                columns[name] = np.array(measured, np.float64)
                columns |= _ends(name, metric, intervals)
        return columns

    def _of_clients(
        self,
        shares: _Shares,
        examples: Examples,
        held_out: Sequence[Int64],
        nll: Float64,
        margins: Float64,
        needs: Collection[str],
    ) -> list[Outputs]:
        """What the model of each client did with the client's examples, as far as metrics need it; of use on rank 0.

        nll, margins: of all examples, one client's after the other's; margins are there if metrics need preferences.
        Collective.
        """
        sizes = np.array([len(part) for part in held_out], np.int64)
        indices, ends = np.concatenate([np.empty(0, np.int64), *held_out]), np.cumsum(sizes)[:-1]
        model = np.arange(len(held_out)) % len(shares.payloads)  # of each client
        parts: list[dict[str, Any]] = [{} for _ in held_out]
        if "losses" in needs:
            supervised = self.objective.num_supervised(examples, indices)
            for part, losses, tokens in zip(parts, np.split(nll, ends), np.split(supervised, ends), strict=True):
                part |= {"nll_sum": float(losses.sum()), "tokens": int(tokens.sum())}
                part |= {"prompt_nll": losses, "prompt_tokens": tokens}
        if "preferences" in needs:
            for part, of_client in zip(parts, np.split(margins, ends), strict=True):
                part["margins"] = of_client[None]
        if "labels" in needs:
            if self.label_targets is None or examples.labels is None:
                raise ValueError("metrics on labels need the examples' labels and a target for each of them")
            predictions = shares.label_scores(examples, indices, np.repeat(model, sizes)).argmax(axis=1)
            labels = examples.labels[indices].astype(np.int64)
            for part, right, predicted in zip(parts, np.split(labels, ends), np.split(predictions, ends), strict=True):
                part |= {"labels": right, "predictions": predicted}
        if "texts" in needs:
            groups = [group_references(examples, of_client) for of_client in held_out]
            counts = [len(group) for group in groups]
            firsts = np.array([first for group in groups for first, _ in group], np.int64)
            generated = shares.texts(examples, firsts, np.repeat(model, counts))
            for part, group, rows in zip(parts, groups, np.split(generated, np.cumsum(counts)[:-1]), strict=True):
                assert isinstance(self.base, Generative)
                part["texts"] = [self.base.text(row) for row in rows] if self.transport.rank == 0 else []
                part["references"] = [[unmarked(target).strip() for target in targets] for _, targets in group]
        return [Outputs(**part) for part in parts]

    def mixed_probabilities(
        self,
        method: Method,
        payloads: Tensor,
        weights: Float64,
        examples: Examples,
        indices: Int64,
        labels: bool = False,
    ) -> tuple[Float64, Float64 | None]:
        """sum_i weights[i] p_i over the models `payloads` (M, P), on this rank alone.

        Of the supervised tokens of the examples `indices`, in their order: (S,). With `labels` of the labels too, p_i
        being the softmax of the model's scores: (len(indices), labels).
        """
        shares = _Shares(replace(self, transport=LoopbackTransport()), method, payloads)
        count = len(payloads)
        pairs, owner = np.tile(indices, count), np.repeat(np.arange(count), len(indices))
        losses = shares.token_losses(examples, pairs, owner).reshape(count, -1)
        tokens: Float64 = weights @ np.exp(-losses)
        if not labels:
            return tokens, None
        scores = shares.label_scores(examples, pairs, owner).reshape(count, len(indices), -1)
        exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed: Float64 = np.tensordot(weights, exponentials / exponentials.sum(axis=-1, keepdims=True), axes=1)
        return tokens, mixed


def sampling(metric: Metric, outputs: Outputs, n: int, of: int, unit: str, interval: bool = True) -> Sampling:
    """What `metric` was measured on, and with `interval` its interval, within what the metric can be."""
    if not interval:
        return Sampling(n, of, unit)
    low, high, by = metric.interval(outputs)
    low, high = np.clip((low, high), metric.lowest, metric.highest)
    return Sampling(n, of, unit, float(low), float(high), by)


def _ends(name: str, metric: Metric, intervals: Sequence[Interval]) -> dict[str, Float64]:
    """Two columns: the lower and upper ends of the intervals of a metric, within what it can be."""
    low, high = np.clip(np.array([one[:2] for one in intervals]).reshape(-1, 2).T, metric.lowest, metric.highest)
    return {f"{name}_low": low, f"{name}_high": high}


def _prompts(examples: Examples, indices: Int64) -> Int64:
    """Which prompt each example has, counted from 0: (n,). Without texts every example has its own."""
    if examples.prompts is None:
        return np.arange(len(indices))
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(examples.prompts[i], len(numbers)) for i in indices], np.int64)


def by_turn(spans: Int64, losses: Float64) -> dict[str, NDArray[Any]]:
    """The loss of the first, second, ... turn of chats, over those that have one.

    spans (n, 2): of each turn its number, counted from 0, and its tokens; losses: of all of these tokens in order.
    Columns: turn (from 1), num_examples, tokens, loss (mean over these) and its 95 % interval over the drawing of the
    chats, loss_low and loss_high.
    """
    number, counts = spans.T
    sums = np.add.reduceat(losses, np.cumsum(counts) - counts)
    of_turns = [(sums[number == turn], counts[number == turn]) for turn in range(int(number.max()) + 1)]
    return {
        "turn": np.arange(1, len(of_turns) + 1),
        "num_examples": np.array([len(part) for part, _ in of_turns], np.int64),
        "tokens": np.array([part.sum() for _, part in of_turns], np.int64),
        "loss": np.array([part.sum() / tokens.sum() for part, tokens in of_turns]),
        **_ends("loss", Loss(), [of_ratio(part, tokens) for part, tokens in of_turns]),
    }


def over_clients(columns: Mapping[str, NDArray[Any]], metrics: Sequence[str]) -> dict[str, float]:
    """Mean, mean of the worst tenth and standard deviation over clients: `<metric>/mean`, `/worst_10_percent`, `/std`.

    columns: of `Evaluator.by_client`, and others of the same metrics, as `loss_personal`; metrics: their names in the
    configuration, beside the loss. Every client with held-out examples counts once. The worst tenth is rounded up to
    whole clients: those with the highest loss or the lowest accuracy. All NaN where nobody has held-out examples.
    """
    summary: dict[str, float] = {}
    higher_is_better = {
        registry.short_name(m): registry.choice("metrics", m).higher_is_better for m in ("loss", *metrics)
    }
    for name in columns:
        metric = name.removesuffix("_personal")
        if metric not in higher_is_better:
            continue
        values = columns[name][columns["num_examples"] > 0]
        if not len(values):
            values = np.array([np.nan])
        worst_first = np.sort(values) if higher_is_better[metric] else -np.sort(-values)
        if np.isnan(values).any():
            worst_first = np.full(len(values), np.nan)  # a client whose fine-tuning diverged is not left out
        worst = worst_first[: math.ceil(len(values) / 10)]
        summary |= {f"{name}/mean": float(np.mean(values)), f"{name}/worst_10_percent": float(np.mean(worst))}
        summary[f"{name}/std"] = float(np.std(values))
    return summary


class _Shares:
    """Computes this rank's share of the batches, each row with its own payload attached, and adds up those of all.

    The methods take one example and one payload per row; what they return for each row is complete on rank 0 only.
    """

    def __init__(self, evaluator: Evaluator, method: Method | None, payloads: Tensor) -> None:
        self.base, self.objective, self.method, self.payloads = evaluator.base, evaluator.objective, method, payloads
        self.options, self.label_targets = evaluator.options, evaluator.label_targets
        self.precision, self.transport = evaluator.precision, evaluator.transport
        if self.base.parts is not None:  # all at once, since any of the ranks that hold the base may need any layer
            self.base.parts.hold({} if method is None else method.weights(method.received(payloads)))
        self._attached = np.empty(0, np.int64)  # the payloads of _received and _trained
        self._received: PerClient = {}
        self._trained: PerClient = {}

    def losses(self, examples: Examples, indices: Int64, payload: Int64) -> Float64:
        """Negative log-likelihood of every example, summed over its supervised tokens: (n,)."""
        results = torch.zeros(len(indices), dtype=torch.float64)
        for rows in self._batches(payload, examples.lengths[indices]):
            example, losses = self._losses(examples, indices[rows], payload[rows])
            results[rows] = torch.from_numpy(np.bincount(example, weights=losses, minlength=len(rows)))
        return self._sum(results)

    def preferences(self, examples: Examples, indices: Int64, payload: Int64) -> tuple[Float64, Float64]:
        """Loss and margin (n,) of every example, in one forward pass."""
        assert isinstance(self.objective, Preference) and isinstance(self.base, Predictor)
        results = torch.zeros(2, len(indices), dtype=torch.float64)
        for rows in self._batches(payload, examples.lengths[indices]):
            batch = self.objective.batch(self.base, examples, indices[rows], payload[rows])
            attach = self._attach(batch.per_row(payload[rows]))
            with attach as attached, torch.no_grad(), autocast(self.base, self.precision):
                results[:, rows] = torch.stack(self.objective.measured(self.base, attached, batch)).to(results)
        losses, margins = self._sum(results)
        return losses, margins

    def token_losses(self, examples: Examples, indices: Int64, payload: Int64) -> Float64:
        """Negative log-likelihood of every supervised token of the examples, one after the other: (S,)."""
        offsets = np.concatenate([[0], np.cumsum(self.objective.num_supervised(examples, indices))])
        results = torch.zeros(int(offsets[-1]), dtype=torch.float64)
        for rows in self._batches(payload, examples.lengths[indices]):
            _, losses = self._losses(examples, indices[rows], payload[rows])
            positions = ranges(offsets[rows], offsets[rows + 1])
            results[torch.from_numpy(positions)] = torch.from_numpy(losses)
        return self._sum(results)

    def label_scores(self, examples: Examples, indices: Int64, payload: Int64) -> Float64:
        """Score of every label for every example, the higher the likelier: (n, labels)."""
        base, targets = self.base, self.label_targets
        assert isinstance(base, Predictor) and targets is not None
        rows = base.label_rows(examples, indices, targets)
        payload = np.repeat(payload, len(rows.example) // max(len(indices), 1))
        results = torch.zeros(len(rows.example), rows.width, dtype=torch.float64)
        for part in self._batches(payload, rows.lengths):
            with self._attach(payload[part]) as attached, torch.no_grad(), autocast(base, self.precision):
                results[part] = base.label_scores(attached, examples, rows, part, targets)
        return self._sum(results).reshape(len(indices), len(targets))

    def texts(self, examples: Examples, indices: Int64, payload: Int64) -> Int64:
        """Greedy continuations of the prompts of the examples: (n, max_new_tokens), -1 after the end."""
        base, max_new_tokens = self.base, self.options.max_new_tokens
        assert isinstance(base, Generative)
        results = torch.zeros(len(indices), max_new_tokens, dtype=torch.int32)
        questions = [examples.question(int(i)) for i in indices]
        for rows in self._batches(payload, np.array([len(question) for question in questions])):
            prompts = [questions[row] for row in rows]
            with self._attach(payload[rows]) as attached, torch.no_grad(), autocast(base, self.precision):
                # Plus one: 0 stands for nothing yet.
                generated = base.generate(attached, prompts, max_new_tokens, examples.ends)
                results[rows] = generated.to("cpu", torch.int32) + 1
        return self._sum(results).astype(np.int64) - 1

    def _losses(self, examples: Examples, indices: Int64, payload: Int64) -> tuple[Int64, Float64]:
        """The example of each supervised token, counted among `indices`, and its loss."""
        batch = self.objective.batch(self.base, examples, indices, payload)
        attach = self._attach(batch.per_row(payload))
        with attach as attached, torch.no_grad(), autocast(self.base, self.precision):
            losses = self.objective.losses(self.base, attached, batch)
        return np.repeat(np.arange(len(indices)), batch.supervised), losses.to("cpu", torch.float64).numpy()

    def _batches(self, payload: Int64, lengths: NDArray[Any]) -> Iterator[Int64]:
        """The rows of this rank's batches, longest first.

        Batches hold one payload where the method cannot share the base, or where each payload has rows enough to fill
        one; else rows of several are mixed.
        """
        used = np.unique(payload)
        shared = self.method is None or self.method.shares_base
        apart = not shared or len(payload) >= len(used) * self.options.batch_size
        parts = [np.flatnonzero(payload == m) for m in used] if apart else [np.arange(len(payload))]
        number = 0
        for part in parts:
            order = part[np.argsort(-lengths[part], kind="stable")]
            for start in range(0, len(order), self.options.batch_size):
                if self.transport.evaluator(number) == self.transport.rank:
                    yield order[start : start + self.options.batch_size]
                number += 1

    def _attach(self, payload: Int64) -> AbstractContextManager[Attached]:
        """The base with row b of a batch behind payload[b]."""
        if self.method is None:
            return nullcontext(Attached())
        used, rows = np.unique(payload, return_inverse=True)
        if not np.array_equal(used, self._attached):
            index = torch.from_numpy(used).to(self.payloads.device)
            one = slice(int(used[0]), int(used[0]) + 1)  # a view: with full fine-tuning a payload is a whole model
            self._received = self.method.received(self.payloads[one if len(used) == 1 else index])
            self._trained = self.method.start(self._received)
            self._attached = used
        return self.method.attach(self._trained, self._received, torch.from_numpy(rows).to(self.base.device))

    def _sum(self, results: Tensor) -> NDArray[Any]:
        self.transport.reduce_sum(results)
        summed: NDArray[Any] = results.numpy()
        return summed


def _read(base: Generative, examples: Examples, example: int) -> str:
    """The prompt of an example for a reader: the text, or of one that was cut as much of it as the model reads."""
    if examples.lost is None or not examples.lost[example]:
        assert examples.prompts is not None
        return unmarked(examples.prompts[example], base.tokenizer)
    return base.decoded(examples.question(example))
