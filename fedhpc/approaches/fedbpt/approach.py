"""Black-box prompt tuning: FedBPT (Sun et al. 2023, arXiv 2310.01467). The search is over z in R^d by CMA-ES.

exchange scores: the server draws popsize candidates, every client of the cohort scores all of them on its examples, and
CMA-ES is told the aggregated scores: what one process would do that had all these examples.

exchange moments: the paper's (section 3; step sizes as its authors' implementation has them). Every client begins with
the server's distribution N(m, sigma^2 C), makes `iterations` of CMA-ES on its own examples, and sends the mean m_k that
it ends with, its score f_k there, and the step sizes sigma_{k,i} of its iterations. The means are candidates that are
told to the server's own CMA-ES; all are its parents, weighted by the rank of f_k. They were spread by random walks of
the clients' means, so the step size that it is told with is

    sigma = sqrt(sum_k sum_i sigma_{k,i}^2 / (K mu)),    mu: parents of a client's iteration;

by as much as that update changes it, the step size that clients begin with changes.

A client's steps in /clients are the candidates that it has scored; loss_first is the loss of the first of them,
loss_last that of the last, which with exchange moments is m_k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhpc.approaches.base import BlockResult, accepted_indices
from fedhpc.approaches.export import export
from fedhpc.approaches.fedbpt import cmaes
from fedhpc.approaches.fedbpt.cmaes import Key, Moments
from fedhpc.approaches.fedbpt.subspace import subspace
from fedhpc.approaches.inputs import Inputs
from fedhpc.approaches.scoring import likelihoods
from fedhpc.approaches.scoring.approach import NUMBER_BYTES, Rows, Scores, Scoring
from fedhpc.approaches.scoring.likelihoods import Float64, Int64, TokenCount
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Outcome
from fedhpc.methods.prompt import PROMPT, Prompt
from fedhpc.models.load import check_length
from fedhpc.participation.plan import Plan
from fedhpc.participation.sampling import cohort_size
from fedhpc.ranks.transport.base import Transport
from fedhpc.results.record import FinalResults
from fedhpc.server.state import ServerState

_SERVER, _CLIENT = 0, 1  # tell the draws of the server from those of clients
_SIGMA = 1.0  # the first step size; any value would do, since the subspace is scaled by it (`alpha` says how far)
# The columns of /tables/search, one row a round.
_COLUMNS = ("round", "evaluations", "tokens", "tokens_unshared", "sigma", "best")


class Distribution(ServerState):
    """The server's state: the distribution of its CMA-ES."""

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.moments = moments
        self.rounds: list[tuple[float, ...]] = []  # the columns of /tables/search

    def tensors(self) -> dict[str, np.ndarray]:
        rounds = np.array(self.rounds, np.float64).reshape(-1, len(_COLUMNS))
        return {**self.moments.tensors(), "rounds": rounds, **super().tensors()}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        super().load(tensors)
        self.moments = Moments.from_tensors(tensors)
        self.rounds = [tuple(row) for row in tensors["rounds"].tolist()]


@dataclass(frozen=True)
class _Upload:
    """The numbers that a block of K clients sends."""

    numbers: Float64  # (K, popsize): scores; with exchange moments (K, d + 2): m_k, f_k, sum of sigma_{k,i}^2
    spent: tuple[int, int, int]  # pairs of candidate and example; tokens; tokens without shared computation


class FedBPT(Scoring[Distribution, Any, _Upload, Any]):
    """Black-box prompt tuning: CMA-ES on the server, or on clients and server, searches for a soft prompt."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        options, seed = self.config.method, self.config.run.seed
        self.method = Prompt(options, self.base, seed)
        check_length(self.base, self.config.data.max_length, self.method.virtual_tokens)
        self.base.check_shared(self.config.data.max_length + self.method.virtual_tokens)
        origin = self.method.initial()[PROMPT].double().numpy()
        if options.dimension > origin.size:
            raise UserError(
                f"method.dimension: {options.dimension} is more than the {origin.size:,} numbers of "
                f"{options.num_virtual_tokens} virtual tokens: lower it"
            )
        self.subspace = subspace(self.base, origin, options.dimension, _SIGMA, options.alpha, seed)
        self.first = cmaes.initial(options.dimension, _SIGMA)
        self.labels = self.writer.answers(self.plain)
        self.by_moments = options.exchange == "moments"
        size = cohort_size(self.config, self.data.population)
        if size < self.min_cohort:
            raise UserError(
                f"method.exchange moments: the server's CMA-ES needs {self.min_cohort} distributions in a round and "
                f"federation.cohort_size is {size}: raise it, or use exchange scores"
            )

    @property
    def min_cohort(self) -> int:
        # With exchange moments the clients are the population of the server's CMA-ES, which needs at least 3.
        return max(super().min_cohort, 3 if self.config.method.exchange == "moments" else 1)

    # ---- a round

    def initial_state(self) -> Distribution:
        return Distribution(self.first)

    def _key(self, *numbers: int) -> Key:
        return (self.config.run.seed, *numbers)

    def download(self, transport: Transport, state: ServerState | None, plan: Plan) -> Any:
        """Send the candidates (popsize, d), or with exchange moments the mean, the covariance and the step size."""
        options, d = self.config.method, self.config.method.dimension
        values = np.empty((d + 1, d) if self.by_moments else (options.popsize, d))
        sigma = np.empty(1)
        if state is not None:
            now = _distribution(state).moments
            sigma[0] = now.sigma
            values = (
                np.vstack([now.mean, now.covariance])
                if self.by_moments
                else cmaes.ask(now, options.popsize, _SIGMA, self._key(_SERVER, plan.round))
            )
        numbers = torch.from_numpy(np.concatenate([values.ravel(), sigma]))
        transport.broadcast(numbers)
        values = numbers[:-1].numpy().reshape(values.shape)
        if not self.by_moments:
            return values
        zero = np.zeros(d)
        return Moments(values[0], numbers[-1].numpy(), values[1:], zero, zero, np.array(0))

    def local(self, plan: Plan, clients: Sequence[int], down: Any) -> BlockResult[Any]:
        """Score the candidates, or search, for all clients of the block together in the same forward passes."""
        spent = TokenCount()
        examples = [self.scored(plan.round, c, self.config.method.examples)[0] for c in clients]
        if self.by_moments:
            return self._search(plan, clients, down, examples, spent)
        scores = self._scores(np.repeat(down[None], len(clients), axis=0), examples, spent, shared=True)
        return self._report(clients, scores.means, np.isfinite(scores.means).all(axis=1), [scores], spent)

    def _search(
        self, plan: Plan, clients: Sequence[int], start: Moments, examples: Sequence[Int64], spent: TokenCount
    ) -> BlockResult[Any]:
        """Run the CMA-ES of every client, one iteration of all of them at a time."""
        options = self.config.method
        now, done = [start for _ in clients], []
        squares = np.zeros(len(clients))
        finite = np.ones(len(clients), bool)
        for i in range(options.iterations):
            keys = [self._key(_CLIENT, plan.round, client, i) for client in clients]
            drawn = [cmaes.ask(one, options.popsize, _SIGMA, k) for one, k in zip(now, keys, strict=True)]
            scores = self._scores(np.stack(drawn), examples, spent)
            done.append(scores)
            finite &= np.isfinite(scores.means).all(axis=1)
            squares += [float(one.sigma) ** 2 for one in now]
            now = [
                cmaes.tell(one, losses, _SIGMA, key) if ok else one
                for one, losses, key, ok in zip(now, scores.means, keys, finite, strict=True)
            ]
        means = np.stack([one.mean for one in now])
        done.append(self._scores(means[:, None], examples, spent))
        finite &= np.isfinite(done[-1].means[:, 0])
        return self._report(clients, np.column_stack([means, done[-1].means[:, 0], squares]), finite, done, spent)

    def _scores(self, z: Float64, examples: Sequence[Int64], spent: TokenCount, shared: bool = False) -> Scores:
        """The scores of z (K, n, d), client k's candidates on its examples[k]; shared: all clients have the same."""
        clients, count = z.shape[:2]
        prompts = self.subspace.prompts(z[0] if shared else z.reshape(-1, z.shape[-1]))
        with self.forward():
            prefixes = likelihoods.of_embeddings(self.base, prompts.to(self.base.device, self.base.dtype), spent)
        rows = Rows()
        for k, of_client in enumerate(examples):
            for example in of_client:
                ids, answers = self.data.train.prompt(int(example)), self.scored_answers(self.labels, int(example))
                for c in range(count):
                    rows.add(k, c, c if shared else k * count + c, ids, *answers)
        return self.score(prefixes, rows, clients, count, spent)

    def _report(
        self, clients: Sequence[int], numbers: Float64, finite: Any, done: Sequence[Scores], spent: TokenCount
    ) -> BlockResult[Any]:
        rows = sum(int(scores.rows.sum()) for scores in done)
        upload = _Upload(numbers, (rows, spent.tokens, spent.unshared))
        bytes_up = np.full(len(clients), NUMBER_BYTES * self._numbers_up)
        return self.report(clients, upload, finite, numbers, done, spent, bytes_up)

    def combine(
        self, transport: Transport, state: ServerState | None, plan: Plan, results: Sequence[BlockResult[Any]]
    ) -> Any:
        """The mean scores (popsize,), or the numbers (A, d + 2) of A accepted clients; and what was spent."""
        options, indices = self.config.method, accepted_indices(plan, results)
        width = options.dimension + 2 if self.by_moments else options.popsize
        accepted = [result.upload.numbers[result.accepted] for result in results]
        numbers = np.concatenate([np.empty((0, width)), *accepted])
        spent = self.spent_by_all(transport, np.sum([(0, 0, 0), *(result.upload.spent for result in results)], axis=0))
        if not self.by_moments:
            training = set(plan.training)
            rows = np.array([self.num_scored(c, options.examples) if c in training else 0 for c in plan.cohort])
            mean = self.mean_scores(transport, plan, indices, numbers, rows)
            return None if mean is None else (mean[0], spent)
        # A row for each client of the cohort, filled by one rank: the sum is exact, and d is small.
        sent = torch.zeros(len(plan.cohort), width + 1, dtype=torch.float64)
        sent[torch.from_numpy(indices)] = torch.from_numpy(np.column_stack([numbers, np.ones(len(numbers))]))
        transport.reduce_sum(sent)
        rows_sent = sent.numpy()
        return rows_sent[rows_sent[:, -1] > 0, :-1], spent

    def step(self, state: Any, plan: Plan, combined: Any) -> float:
        """Do one iteration of the server's CMA-ES; returns how far its mean moves."""
        numbers, spent = combined
        options, key, before = self.config.method, self._key(_SERVER, plan.round), state.moments
        if self.by_moments:
            after = aggregate(before, numbers, options.popsize, _SIGMA, key)
            best = float(numbers[:, -2].min())
        else:
            after, best = cmaes.tell(before, numbers, _SIGMA, key), float(numbers.min())
        state.moments = after
        state.rounds.append((plan.round, *spent, float(after.sigma), best))
        return float(np.linalg.norm(after.mean - before.mean))

    @property
    def _numbers_up(self) -> int:
        """How many numbers a client sends: a score for each candidate, or its mean, its loss and its step sizes."""
        return self.config.method.dimension + 2 if self.by_moments else self.config.method.popsize

    def bytes_down(self, plan: Plan, download: Any = None) -> int:
        """The candidates, or with exchange moments the mean, the triangle of the covariance and the step size."""
        if self.config.mode != "federated":
            return 0
        d = self.config.method.dimension
        each = d + d * (d + 1) // 2 + 1 if self.by_moments else self.config.method.popsize * d
        return NUMBER_BYTES * each * len(plan.cohort)

    def bytes_up(self, plan: Plan) -> int:
        return NUMBER_BYTES * self._numbers_up * len(plan.training) if self.config.mode == "federated" else 0

    # ---- results

    def _payload(self, transport: Transport, state: ServerState | None) -> Tensor:
        """The soft prompt of the distribution's mean as a payload of method prompt (1, n * D). Collective."""
        mean = torch.from_numpy(_distribution(state).moments.mean.copy() if state else np.empty_like(self.first.mean))
        transport.broadcast(mean)
        prompt = self.subspace.prompts(mean.numpy()).to(self.base.dtype)
        return prompt.reshape(1, -1).to(self.base.device)

    def evaluate(self, transport: Transport, state: ServerState | None, round_: int) -> Outcome | None:
        """Evaluate the soft prompt of the distribution's mean."""
        options, payload = self.config.evaluation, self._payload(transport, state)
        return self.measured(
            transport, self.data.validation, options.metrics, options.max_examples, self.method, payload
        )

    def finish(self, transport: Transport, state: ServerState | None) -> FinalResults | None:
        """Test the soft prompt, and export it as method prompt does."""
        options, payload = self.config.evaluation, self._payload(transport, state)
        args = (transport, self.data.test, options.metrics_of_test, options.test_max_examples)
        untouched = self.measured(*args, intervals=True)
        start = self.subspace.prompts(self.first.mean).to(self.base.dtype).reshape(1, -1).to(self.base.device)
        first = self.measured(*args, self.method, start)
        final = self.measured(*args, self.method, payload, samples=options.samples, intervals=True)
        if state is None or final is None or untouched is None or first is None:
            return None
        tensors = self.method.payload.views(payload[0].cpu())
        export(self.method, tensors, self.config.run_dir / "adapter", self.config)
        now = _distribution(state)
        columns = np.array(now.rounds, np.float64).reshape(-1, len(_COLUMNS)).T
        return FinalResults(
            test=final.metrics,
            base=untouched.metrics,
            test_sampling=final.sampling,
            base_sampling=untouched.sampling,
            samples=final.samples,
            tensors={
                **{name: view.float().numpy() for name, view in tensors.items()},
                **{f"cma/{name}": array for name, array in now.moments.tensors().items()},
            },
            tables={"search": dict(zip(_COLUMNS, columns, strict=True))},
            lines=["the prompt it began with: " + ", ".join(f"{n} {v:.4f}" for n, v in first.metrics.items())],
        )

    # ---- what is said of it

    def attributes(self) -> dict[str, Any]:
        return {"payload_parameters": self.method.payload.size, "trainable_parameters": self.config.method.dimension}

    def summary(self) -> str:
        options = self.config.method
        return f"{options.dimension} dimensions of {self.method.payload.size:,} parameters, exchange {options.exchange}"

    def work(self, plan: Plan) -> str:
        options = self.config.method
        candidates = options.popsize * (options.iterations if self.by_moments else 1) + self.by_moments
        on = "all their" if options.examples is None else f"at most {options.examples}"
        return f"{candidates} soft prompts on {on} examples"

    def details(self, plan: Plan) -> list[str]:
        d, popsize = self.config.method.dimension, self.config.method.popsize
        if self.by_moments:
            return [f"exchanged: mean, step size and covariance in {d} dimensions down; mean, its loss, step sizes up"]
        return [f"exchanged: {popsize} points in {d} dimensions down, {popsize} scores up"]


def aggregate(before: Moments, numbers: Float64, popsize: int, sigma_0: float, key: Key) -> Moments:
    """Do the server's iteration of exchange moments.

    numbers (K, d + 2): the mean m_k, the loss f_k and the sum over iterations of sigma_{k,i}^2 of each of K clients.
    """
    means, losses, squares = numbers[:, :-2], numbers[:, -2], numbers[:, -1]
    spread = np.sqrt(squares.sum() / (len(numbers) * cmaes.parents_of(popsize)))
    told = cmaes.tell(replace(before, sigma=spread), losses, sigma_0, key, means, parents=len(numbers))
    return replace(told, sigma=np.array(before.sigma * told.sigma / spread))


def _distribution(state: ServerState) -> Distribution:
    assert isinstance(state, Distribution)
    return state
