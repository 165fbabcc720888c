"""Retrieval-augmented generation over passages that stay with their clients.

A round is a batch of questions. The server sends them to the clients; each worker searches the indexes of its clients;
lists of the best passages, all of the same length, are merged in a tree on their way to the server, which then asks for
the texts of the passages that won, and stores them. At the end the base model answers every question four times: with
the passages found in the rounds (`federated`), with those that one index of all passages would have found (`central`),
with those of a single client (`own`), and with none (`none`).

A client is searched by the same worker for the whole run, so its index is made once. All scores are integers and all
orders total (ranking.py), so lists do not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.approaches.base import Approach, BlockResult
from fedhpc.approaches.inputs import Inputs
from fedhpc.approaches.rag.context import context
from fedhpc.approaches.rag.dense import require
from fedhpc.approaches.rag.encoder import Encoder
from fedhpc.approaches.rag.lexical import statistics, terms
from fedhpc.approaches.rag.passages import Columns, Corpus, load_passages
from fedhpc.approaches.rag.ranking import CLIENT, KEY, SCORE, Int64, best, filled, first_hits, nothing
from fedhpc.approaches.rag.routing import centroids, closeness
from fedhpc.approaches.rag.shard import Questions, Shard, score_of
from fedhpc.config import Config
from fedhpc.data.templates import parse
from fedhpc.data.tokens import Examples, examples_from, group_references, tokenize
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Outcome, sampling, subset
from fedhpc.evaluation.metrics._answers import within, words
from fedhpc.evaluation.metrics.base import Metric, Outputs
from fedhpc.methods import make_method
from fedhpc.methods.base import Method
from fedhpc.models.base import Base
from fedhpc.participation.blocks import assign, form_blocks
from fedhpc.participation.plan import Block, Plan
from fedhpc.ranks.collectives import broadcast_bytes, gather_bytes, tree_merge
from fedhpc.ranks.transport.base import Transport
from fedhpc.results.record import FinalResults, Sampling
from fedhpc.results.results_file import Results
from fedhpc.rng import generator
from fedhpc.server.state import ServerState

ARMS = ("federated", "central", "own", "none")
_AT_ONCE = 256  # how many questions one search at the end has: bounds the memory of scores
_ENTRY_BYTES = 12  # protocol bytes of an entry of a list: a 4-byte score and the key of the passage
_COUNT_BYTES = 8
_UNIT_BYTES = 2  # of one coordinate of a vector


@dataclass(frozen=True)
class Asked:
    """The questions that the server asks in a round, and whom."""

    numbers: Int64  # (Q,): the numbers of the questions
    questions: Questions
    routed: Int64 | None  # (Q, m): the clients that each question is sent to, -1 where there are fewer; None: all

    def rows(self, client: int) -> Int64:
        """The rows of the questions that are sent to a client."""
        if self.routed is None:
            return np.arange(len(self.numbers))
        return np.flatnonzero((self.routed == client).any(axis=1))


class Answers(ServerState):
    """The server's state: the lists of passages for the questions asked so far, and the texts of these passages."""

    def __init__(self, questions: int, candidates: int) -> None:
        super().__init__()
        self.ranked = nothing(questions, candidates)
        self.rounds = np.zeros(questions, np.int64)  # the round in which each question was answered; 0: not yet
        self.texts: dict[tuple[int, int], str] = {}  # (client, key) -> chunk

    def tensors(self) -> dict[str, np.ndarray]:
        content = [text.encode() for text in self.texts.values()]
        return {
            "ranked": self.ranked,
            "rounds": self.rounds,
            "text_names": np.array(list(self.texts), np.int64).reshape(-1, 2),
            "text_sizes": np.array([len(c) for c in content], np.int64),
            "text_bytes": np.frombuffer(b"".join(content), np.uint8),
            **super().tensors(),
        }

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        super().load(tensors)
        self.ranked, self.rounds = tensors["ranked"].copy(), tensors["rounds"].copy()
        ends = np.cumsum(tensors["text_sizes"])
        content = tensors["text_bytes"].tobytes()
        self.texts = {
            (int(client), int(key)): content[end - size : end].decode()
            for (client, key), end, size in zip(tensors["text_names"], ends, tensors["text_sizes"], strict=True)
        }


_Ranked = tuple[Int64, dict[tuple[int, int], str]]  # the best passages of each question, and their texts


class Rag(Approach[Answers, Asked, Int64, _Ranked]):
    """Clients search their passages for the server's questions; the base model answers with what they find."""

    reasons = ("", "there is no word in its passages")
    answers = frozenset({"rankings"})

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        options = self.options = inputs.config.method
        assert isinstance(self.data, Corpus)
        self.corpus: Corpus = self.data
        if "texts" not in self.base.answers:
            raise UserError(f"model.name: '{self.base.name}' writes no texts; method.name rag needs a language model")
        self._template = parse(options.context, "method.context")
        if set(self._template.columns) != {"passage"}:
            raise UserError(f"method.context: must hold {{passage}} and no other column, got {options.context!r}")
        metrics = {*self.config.evaluation.metrics, *self.config.evaluation.metrics_of_test}
        ranking = {name for name in metrics if registry.choice("metrics", name).needs == "rankings"}
        if self.corpus.gold is None and ranking:
            raise UserError(
                f"evaluation.metrics: {min(ranking)} needs method.gold, the column of data.test that names the right "
                "passage"
            )
        #: A question is a distinct prompt: (its first row, all its references).
        self.questions = group_references(self.data.test)
        if self.rounds > len(self.questions):
            raise UserError(
                f"federation.rounds is {self.rounds}, but there are only {len(self.questions)} questions to share out: "
                "lower it"
            )
        if options.index != "lexical":
            require()
        if options.index == "lexical" and not any(terms(text) for text in self.corpus.passages):
            raise UserError(f"method.passage: not one of the {len(self.corpus.passages)} passages has a word to search")
        if options.rerank == "likelihood":
            queries = [self.corpus.queries[first] for first, _ in self.questions]
            try:
                self._examples([""] * len(queries), queries, "question")
            except UserError as error:
                raise UserError(f"method.rerank: likelihood takes a question for a target: {error}") from error
        self._encoder = None
        if options.encoder is not None:
            self._encoder = Encoder(options.encoder, options.retriever, self.base.device)
        self._tuned = None if options.adapter is None else _tuned(Path(options.adapter), self)
        #: client -> the index of its passages, as long as something is searched.
        self.shards: dict[int, Shard] = {}
        self._centroids: dict[int, np.ndarray] = {}
        self._vectors: dict[int, np.ndarray] = {}  # of questions

    @classmethod
    def read(cls, config: Config, tokenizer: Any, model: type[Base], write_cache: bool) -> Corpus:
        options = config.method
        columns = Columns(options.passage, options.passage_id, options.query, options.gold)
        return load_passages(config, columns, tokenizer, model, write_cache)

    @property
    def fingerprint(self) -> str:
        """A hash of the weights of the base, the encoder and the adapter."""
        parts = [self.base.fingerprint]
        parts += [self._encoder.fingerprint] if self._encoder else []
        parts += [_hash(self._tuned[1])] if self._tuned else []
        return "+".join(parts)

    @property
    def candidates(self) -> int:
        """How many passages the server collects for each question."""
        return int(self.options.candidates or self.options.k)

    # ---- who searches what

    @cached_property
    def _home(self) -> tuple[Block, ...]:
        """All clients with passages, in blocks, each of which one worker searches in every round."""
        population, lengths = self.data.population, self.data.train.lengths
        costs = {
            c: float(lengths[indices].sum())
            for c in range(population.num_clients)
            if len(indices := population.indices(c))
        }
        blocks = form_blocks(costs, self.block_size, self.config.runtime.workers)
        members = self.topology.group_size
        return tuple(assign(blocks, [sum(costs[c] for c in b) for b in blocks], self.workers, members))

    def plan(self, round_: int) -> Plan:
        # Every client at the worker that has its index.
        plan = super().plan(round_)
        active = set(plan.training)
        blocks = [replace(block, clients=tuple(c for c in block.clients if c in active)) for block in self._home]
        return replace(plan, blocks=tuple(block for block in blocks if block.clients))

    def _searched_by(self, rank: int, clients: Sequence[int]) -> list[int]:
        """Which of `clients` a rank searches, in ascending order."""
        wanted, rank_of = set(clients), self.topology.rank_of
        here = [block for block in self._home if rank_of(block.worker, block.member) == rank]
        return sorted(c for block in here for c in block.clients if c in wanted)

    def _shard(self, client: int) -> Shard:
        if client not in self.shards:
            passages = [self.corpus.passages[i] for i in self.data.population.indices(client)]
            self.shards[client] = Shard(client, passages, self.options, self._encoder)
        return self.shards[client]

    # ---- a round

    def initial_state(self) -> Answers:
        return Answers(len(self.questions), self.candidates)

    def _batch(self, round_: int) -> Int64:
        """The questions of a round."""
        return np.array_split(np.arange(len(self.questions)), self.rounds)[round_ - 1]

    def download(self, transport: Transport, state: ServerState | None, plan: Plan) -> Asked:
        numbers = self._batch(plan.round)
        questions = self._questions(transport, numbers, plan.training)
        return Asked(numbers, questions, self._routed(transport, questions, self._reachable(plan)))

    def _reachable(self, plan: Plan) -> list[int]:
        """The clients of the round that have passages, also those that drop out of it later."""
        return [c for c in plan.cohort if self.data.population.num_examples(c)]

    @cached_property
    def _registered(self) -> dict[int, int]:
        """The first round of each client, in which it sends its centroids."""
        first: dict[int, int] = {}
        for round_ in range(1, self.rounds + 1):
            for client in self._reachable(self.plan(round_)):
                first.setdefault(client, round_)
        return first

    def _query(self, number: int) -> str:
        """The text that is searched for to answer a question."""
        return self.corpus.queries[self.questions[number][0]]

    def _questions(self, transport: Transport, numbers: Int64, clients: Sequence[int]) -> Questions:
        """Make the questions ready for the clients' search: vectors, terms, statistics. Collective."""
        asked = [self._query(i) for i in numbers]
        vectors = None
        if self._encoder is not None:
            # Each question is embedded by one rank.
            numbered = [
                (row, i) for row, i in enumerate(numbers.tolist()) if transport.evaluator(row) == transport.rank
            ]
            new = [i for _, i in numbered if i not in self._vectors]
            if new:
                embedded = self._encoder.queries([self._query(i) for i in new])
                self._vectors.update(zip(new, embedded, strict=True))
            width = self._encoder.width
            total = torch.zeros(len(numbers), width, dtype=torch.int64)
            for row, i in numbered:
                total[row] = torch.from_numpy(self._vectors[i].astype(np.int64))
            transport.reduce_sum(total)
            transport.broadcast(total)
            vectors = total.numpy().astype(np.int16)
        if self.options.index == "dense":
            return Questions(vectors, None, None)
        in_terms = [terms(text) for text in asked]
        distinct = sorted({term for question in in_terms for term in question})
        counts = torch.zeros(len(distinct) + 2, dtype=torch.int64)
        for client in self._searched_by(transport.rank, clients):
            shard = self._shard(client)
            if shard.lexical is not None:
                counts += torch.from_numpy(shard.lexical.counts(distinct))
        transport.reduce_sum(counts)
        transport.broadcast(counts)
        return Questions(vectors, in_terms, statistics(counts.numpy(), distinct))

    def _routed(self, transport: Transport, questions: Questions, clients: Sequence[int]) -> Int64 | None:
        """Choose the clients that each question is sent to; None means all. Collective.

        Every rank compares the questions with the centroids of its clients, and the lists of the closest clients are
        merged as lists of passages are.
        """
        m = self.options.route
        if m is None:
            return None
        assert questions.vectors is not None
        for client in self._searched_by(transport.rank, clients):
            shard = self._shard(client)
            if client not in self._centroids and shard.dense is not None:
                self._centroids[client] = centroids(
                    shard.dense.vectors, self.options.centroids, self.config.run.seed, client
                )
        known = {c: self._centroids[c] for c in self._searched_by(transport.rank, clients) if c in self._centroids}
        mine = best(closeness(questions.vectors, known), m)
        routed = torch.from_numpy(np.ascontiguousarray(_merged(transport, mine, m, False)[..., CLIENT]))
        transport.broadcast(routed)
        return routed.numpy()

    def local(self, plan: Plan, clients: Sequence[int], down: Asked) -> BlockResult[Any]:
        """Search the indexes of the clients: one merged list for the block."""
        options = self.options
        width = min(options.per_client or self.candidates, self.candidates)
        lists = []
        answered = np.zeros(len(clients), np.int64)
        reason = np.zeros(len(clients), np.int64)
        for i, client in enumerate(clients):
            shard, rows = self._shard(client), down.rows(client)
            reason[i] = 0 if len(shard) else 1
            ranked = nothing(len(down.numbers), width)
            ranked[rows] = shard.search(down.questions[rows], len(rows), width, options.merge)
            answered[i] = len(rows)
            lists.append(ranked)
        zeros, unknown = np.zeros(len(clients)), np.full(len(clients), np.nan)
        return BlockResult(
            clients=tuple(clients),
            upload=best(np.concatenate(lists, axis=1), self.candidates, options.distinct),
            reason=reason,
            tokens=np.zeros(len(clients), np.int64),
            steps=answered,
            loss_sum=zeros,
            loss_first=unknown,
            loss_last=unknown,
            norms=zeros,
            bytes_up=self._answer_bytes(plan, answered),
        )

    def combine(
        self, transport: Transport, state: ServerState | None, plan: Plan, results: Sequence[BlockResult[Any]]
    ) -> _Ranked:
        """Merge the lists of all clients, and fetch the texts of the passages in the result."""
        numbers = self._batch(plan.round)
        mine = np.concatenate([nothing(len(numbers), 1), *(result.upload for result in results)], axis=1)
        ranked = _merged(
            transport, best(mine, self.candidates, self.options.distinct), self.candidates, self.options.distinct
        )
        texts = self._texts(transport, ranked)
        return ranked, texts

    def _texts(self, transport: Transport, ranked: Int64) -> dict[tuple[int, int], str]:
        """Fetch the chunks in rank 0's lists: (client, key) -> text, on rank 0. Collective."""
        wanted = torch.from_numpy(np.ascontiguousarray(ranked[..., [CLIENT, KEY]].reshape(-1, 2)))
        transport.broadcast(wanted)
        names = np.unique(wanted.numpy()[wanted.numpy()[:, 0] >= 0], axis=0).tolist()
        owned = set(self._searched_by(transport.rank, [client for client, _ in names]))
        mine = {i: self._shard(client).text(key).encode() for i, (client, key) in enumerate(names) if client in owned}
        texts = gather_bytes(transport, len(names), mine)
        return {(client, key): text.decode() for (client, key), text in zip(names, texts, strict=False)}

    def step(self, state: Any, plan: Plan, combined: Any) -> float:
        """Store the lists and texts of the round in the state."""
        ranked, texts = combined
        numbers = self._batch(plan.round)
        state.ranked[numbers] = ranked
        state.rounds[numbers] = plan.round
        state.texts |= texts
        return 0.0

    def _count_bytes(self, plan: Plan) -> tuple[int, int]:
        """Bytes of the distinct terms of a round's questions, and of a count for each; 0 for a dense index."""
        if self.options.index == "dense":
            return 0, 0
        asked = {term for number in self._batch(plan.round) for term in terms(self._query(number))}
        return sum(len(term.encode()) + 1 for term in asked), _COUNT_BYTES * (len(asked) + 2)

    def _answer_bytes(self, plan: Plan, questions: Int64) -> Int64:
        """Bytes of the lists and counts of terms that clients send; `questions` says how many each was asked."""
        if self.config.mode != "federated":
            return np.zeros_like(questions)
        entries = min(self.options.per_client or self.candidates, self.candidates)
        return questions * entries * _ENTRY_BYTES + self._count_bytes(plan)[1]

    def _estimated_questions(self, plan: Plan, clients: int) -> int:
        """An estimate, before the round, of how many questions `clients` clients of the cohort are asked in all."""
        asked = min(self.options.route or len(plan.cohort), len(plan.cohort))
        return round(len(self._batch(plan.round)) * clients * asked / len(plan.cohort))

    def bytes_down(self, plan: Plan, download: Asked | None = None) -> int:
        """The questions: their vectors, and for every client the terms with their counts."""
        if self.config.mode != "federated":
            return 0
        size = len(plan.cohort)
        total = sum(self._count_bytes(plan)) * size
        if self._encoder is not None:
            questions = (
                self._estimated_questions(plan, size)
                if download is None
                else sum(len(download.rows(c)) for c in plan.cohort)
            )
            total += questions * self._encoder.width * _UNIT_BYTES
        return total

    def bytes_up(self, plan: Plan) -> int:
        """Lists, counts and centroids; how long the texts are is not known before the round."""
        clients = len(plan.training)
        if self.config.mode != "federated" or not clients:
            return self._centroid_bytes(plan)
        questions = np.array([self._estimated_questions(plan, clients), *([0] * (clients - 1))])
        return int(self._answer_bytes(plan, questions).sum()) + self._centroid_bytes(plan)

    def bytes_fetched(self, plan: Plan, combined: _Ranked) -> int:
        """The texts of the passages that won and, in a client's first round with a router, its centroids."""
        texts = sum(len(text.encode()) for text in combined[1].values()) if self.config.mode == "federated" else 0
        return texts + self._centroid_bytes(plan)

    def _centroid_bytes(self, plan: Plan) -> int:
        if self.config.mode != "federated" or self.options.route is None or self._encoder is None:
            return 0
        new = sum(round_ == plan.round for round_ in self._registered.values())
        return new * self.options.centroids * self._encoder.width * _UNIT_BYTES

    # ---- results

    @property
    def _asked(self) -> list[str]:
        """The question of every test example."""
        prompts = self.data.test.prompts
        assert prompts is not None  # the test split keeps its texts
        return prompts

    @cached_property
    def _gold(self) -> list[set[int]]:
        """The numbers of the right passages of every question."""
        item_of = {self._asked[first]: i for i, (first, _) in enumerate(self.questions)}
        gold_of: list[set[int]] = [set() for _ in self.questions]
        for prompt, gold in zip(self._asked, self.corpus.gold or [], strict=False):
            gold_of[item_of[prompt]].add(gold)
        return gold_of

    @cached_property
    def budgets(self) -> list[int]:
        """How many tokens of passages fit in front of each question and its longest answer, at most context_tokens."""
        test = self.data.test
        longest: dict[str, int] = {}
        for prompt, length in zip(self._asked, test.lengths.tolist(), strict=True):
            longest[prompt] = max(longest.get(prompt, 0), length)
        left = [self.config.data.max_length - longest[self._asked[first]] for first, _ in self.questions]
        return [max(0, min(self.options.context_tokens, tokens)) for tokens in left]

    def _context(self, number: int, passages: Sequence[str]) -> tuple[str, int, bool]:
        """The passages in front of a question, as `context` gives them, cut so that both together fit."""
        budget, prompt = self.budgets[number], (self.data.test.prompts or [])[self.questions[number][0]]

        def length(text: str) -> int:
            return len(self.base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        allowed = length(prompt) + budget
        while True:
            made = context(self.base.tokenizer, passages, self._template, budget)
            # Two texts together may have more tokens than each by itself.
            over = length(made[0] + prompt) - allowed
            if over <= 0 or not made[0]:
                return made
            budget = max(0, budget - over)

    def _rankings(self, names: Sequence[str], ranks: Int64) -> dict[str, float]:
        """Compute those of the metrics `names` that are about rankings."""
        return {name: float(metric.compute(Outputs(ranks=ranks))) for name, metric in _of_rankings(names).items()}

    def _sampling(self, names: Sequence[str], ranks: Int64, intervals: bool) -> dict[str, Sampling]:
        """How many questions these metrics were measured on."""
        sizes = (len(ranks), len(self.questions), "questions")
        return {
            name: sampling(metric, Outputs(ranks=ranks), *sizes, interval=intervals)
            for name, metric in _of_rankings(names).items()
        }

    def evaluate(self, transport: Transport, state: ServerState | None, round_: int) -> Outcome | None:
        """Compute metrics of rankings over the questions asked so far; texts are written only at the end."""
        if not isinstance(state, Answers) or not (done := state.rounds > 0).any():
            return None
        ranks = first_hits(state.ranked[:, : self.options.k], self._gold)[done]
        metrics = self.config.evaluation.metrics
        return Outcome(self._rankings(metrics, ranks), [], self._sampling(metrics, ranks, intervals=False))

    def finish(self, transport: Transport, state: ServerState | None) -> FinalResults | None:
        """Answer every question with the passages of each arm, and with none."""
        by_arm: dict[str, _Ranked] = {}
        if isinstance(state, Answers):
            by_arm["federated"] = (state.ranked, state.texts)
        for arm in ("central", "own"):
            ranked = self._searched(transport, arm)
            texts = self._texts(transport, ranked)
            if isinstance(state, Answers):
                by_arm[arm] = (ranked, texts)
        notes = transport.gather_json(sorted({note for shard in self.shards.values() for note in shard.notes}))
        self.shards.clear()  # the indexes are not needed any more, and answering takes memory
        if self.options.rerank == "likelihood":
            for arm in ARMS[:-1]:
                before = by_arm.get(arm)
                by_arm[arm] = (self._reranked(transport, *(before or (None, {}))), before[1] if before else {})
        lists = {arm: ranked[:, : self.options.k] for arm, (ranked, _) in by_arm.items()} if state else {}
        # For each question: its text, how many passages are in it, whether one is cut.
        contexts = {
            arm: [
                self._context(number, [by_arm[arm][1][int(e[CLIENT]), int(e[KEY])] for e in entries[filled(entries)]])
                for number, entries in enumerate(ranked)
            ]
            for arm, ranked in lists.items()
        }
        contexts["none"] = [("", 0, False)] * len(self.questions)
        outcomes = {
            # Every rank needs the texts, to answer its share of the questions.
            arm: self.answered(transport, _on_every_rank(transport, [text for text, *_ in contexts.get(arm, ())]), arm)
            for arm in ARMS
        }
        federated, none = outcomes["federated"], outcomes["none"]
        if not isinstance(state, Answers) or federated is None or none is None or notes is None:
            return None
        ranks = {arm: first_hits(ranked, self._gold) for arm, ranked in lists.items()}
        arms = {arm: self._summary(arm, contexts[arm], ranks.get(arm), outcomes[arm]) for arm in ARMS}
        missed = int((state.rounds == 0).sum())
        chosen = self.config.evaluation.metrics_of_test
        return FinalResults(
            test={**federated.metrics, **self._rankings(chosen, ranks["federated"])},
            base=none.metrics,
            test_sampling={**federated.sampling, **self._sampling(chosen, ranks["federated"], intervals=True)},
            base_sampling=none.sampling,
            samples=federated.samples,
            tensors={
                "passages": lists["federated"][..., KEY],
                "clients": lists["federated"][..., CLIENT],
                "scores": score_of(lists["federated"][..., SCORE]),
            },
            tables={
                "retrieval": {"arm": np.array(ARMS, dtype=object)}
                | {name: np.array([arms[arm][name] for arm in ARMS]) for name in arms["none"]},
                "questions": {
                    "question": np.arange(len(self.questions)),
                    "round": state.rounds,
                    "asker": self._askers,
                    **{f"rank_{arm}": first_hit for arm, first_hit in ranks.items()},
                    "passages_in_context": np.array([n for _, n, _ in contexts["federated"]]),
                    "cut": np.array([cut for *_, cut in contexts["federated"]]),
                },
            },
            lines=[
                *sorted({note for several in notes for note in several}),
                *([f"{missed} questions were not answered: their rounds had too few clients"] if missed else []),
                *(f"{arm}: " + ", ".join(f"{n} {v:.4f}" for n, v in arms[arm].items() if v == v) for arm in ARMS),
            ],
        )

    @cached_property
    def _askers(self) -> Int64:
        """For each question, the client that asks it in the arm `own`: drawn among those with passages."""
        clients = sorted(c for block in self._home for c in block.clients)
        return generator(self.config.run.seed, "askers").choice(np.array(clients), len(self.questions))

    def _searched(self, transport: Transport, arm: str) -> Int64:
        """Search for the arm `central` or `own`: lists (questions, candidates, 5) on rank 0. Collective.

        central: plain scores over the passages of all clients, as one index of all of them would give. own: the asking
        client's passages, with the statistics of these passages alone.
        """
        everyone = [c for block in self._home for c in block.clients]
        mine = self._searched_by(transport.rank, everyone)
        options, parts = self.options, []
        for begin in range(0, len(self.questions), _AT_ONCE):
            numbers = np.arange(begin, min(begin + _AT_ONCE, len(self.questions)))
            questions = self._questions(transport, numbers, everyone)
            ranked = nothing(len(numbers), self.candidates)
            for client in mine:
                shard, rows = self._shard(client), np.arange(len(numbers))
                asked = questions
                if arm == "own":
                    rows = np.flatnonzero(self._askers[numbers] == client)
                    asked = questions[rows]
                    if shard.lexical is not None and asked.statistics is not None:
                        distinct = list(asked.statistics.holding)
                        asked = replace(asked, statistics=statistics(shard.lexical.counts(distinct), distinct))
                of_client = shard.search(asked, len(rows), self.candidates, "score")
                ranked[rows] = best(
                    np.concatenate([ranked[rows], of_client], axis=1), self.candidates, options.distinct
                )
            parts.append(_merged(transport, ranked, self.candidates, options.distinct))
        return np.concatenate(parts)

    def _reranked(self, transport: Transport, ranked: Int64 | None, texts: Mapping[tuple[int, int], str]) -> Int64:
        """Sort candidates by the likelihood of the question after each of them, on rank 0. Collective.

        This is the reranking of Sachan et al. (2022, arXiv 2204.07496, equation 3) with the base model.
        """
        pairs: list[str] = []  # a passage, the question, a passage, ...
        if ranked is not None:
            for i, entries in enumerate(ranked):
                for e in entries[filled(entries)]:
                    passage = texts[int(e[CLIENT]), int(e[KEY])]
                    pairs += [self._template.render({"passage": passage}), self._query(i)]
        pairs = _on_every_rank(transport, pairs)
        if pairs:
            examples = self._examples(pairs[::2], pairs[1::2], "candidate")
            losses = self.evaluator(transport).likelihoods(*self._model, examples)
        if ranked is None or not pairs:
            return nothing(len(self.questions), self.candidates)
        values = np.full(ranked.shape[:2], np.inf)
        values[filled(ranked)] = losses
        return np.take_along_axis(ranked, np.argsort(values, axis=1, kind="stable")[..., None], axis=1)

    @property
    def _model(self) -> tuple[Method | None, Tensor]:
        """The model that answers, as `evaluate` takes it: the base, with the adapter if there is one."""
        return self._tuned or (None, torch.empty(1, 0))

    def _examples(self, prompts: list[str], targets: list[str], name: str) -> Examples:
        locations = [f"{name} {i}" for i in range(len(prompts))]
        data, base = self.config.data, self.base
        # Of questions whose answers do not fit none is left but those that lose their ends.
        overlong: configuration.Overlong = "truncate" if data.overlong == "truncate" else "error"
        tokens = tokenize(prompts, targets, locations, base.tokenizer, data.max_length, type(base), overlong=overlong)
        return examples_from(tokens, prompts=prompts, targets=targets)

    def answered(self, transport: Transport, contexts: Sequence[str], arm: str) -> Outcome | None:
        """Test the model with a text in front of each question; the outcome on rank 0. Collective."""
        options, test = self.config.evaluation, self.data.test
        context_of = {self._asked[first]: text for (first, _), text in zip(self.questions, contexts, strict=True)}
        prompts = [context_of[prompt] + prompt for prompt in self._asked]
        metrics = [m for m in options.metrics_of_test if registry.choice("metrics", m).needs != "rankings"]
        return self.evaluator(transport).evaluate(
            *self._model,
            self._examples(prompts, list(test.targets or []), "question"),
            subset(len(test), options.test_max_examples),
            metrics,
            options.samples if arm == "federated" else 0,
            intervals=True,
        )

    def _summary(
        self, arm: str, contexts: Sequence[tuple[str, int, bool]], ranks: Int64 | None, outcome: Outcome | None
    ) -> dict[str, float]:
        """A row of /tables/retrieval."""
        assert outcome is not None
        hits = {"recall_at_1": float("nan"), "recall": float("nan"), "mrr": float("nan")}
        if ranks is not None and self.corpus.gold is not None:
            hits = {"recall_at_1": float(np.mean(ranks == 1)), **self._rankings(("recall", "mrr"), ranks)}
        held = [
            any(within(words(reference), words(text)) for reference in references)
            for (text, *_), (_, references) in zip(contexts, self.questions, strict=True)
        ]
        return {
            **hits,
            "answer_in_context": float(np.mean(held)),
            "passages_in_context": float(np.mean([n for _, n, _ in contexts])),
            **outcome.metrics,
        }

    # ---- what is said of it

    def attributes(self) -> dict[str, Any]:
        return {"payload_parameters": 0, "questions": len(self.questions), "encoder": self.options.encoder or ""}

    def summary(self) -> str:
        return f"{self.options.index} search of {len(self.corpus.passages):,} passages, k {self.options.k}"

    def work(self, plan: Plan) -> str:
        return f"one search for {len(self._batch(plan.round))} questions"

    def details(self, plan: Plan) -> list[str]:
        questions = len(self._batch(plan.round))
        route = f", each asked of {self.options.route} clients" if self.options.route else ""
        return [
            f"exchanged: {questions} questions of {len(self.questions):,} in round {plan.round}{route}; up to "
            f"{self.candidates} passages each come up"
        ]


def _of_rankings(names: Sequence[str]) -> dict[str, Metric]:
    """Make those of the metrics that are about rankings, by name."""
    classes = {registry.short_name(name): registry.choice("metrics", name) for name in names}
    return {name: cls() for name, cls in classes.items() if cls.needs == "rankings"}


def _merged(transport: Transport, mine: Int64, k: int, distinct: bool) -> Int64:
    """Merge the lists of all ranks, on rank 0. Collective."""

    def merge(one: Tensor, other: Tensor) -> Tensor:
        return torch.from_numpy(best(np.concatenate([one.numpy(), other.numpy()], axis=1), k, distinct))

    return tree_merge(transport, torch.from_numpy(np.ascontiguousarray(mine)), merge).numpy()


def _on_every_rank(transport: Transport, texts: Sequence[str]) -> list[str]:
    """Send rank 0's texts to every rank. Collective."""
    return [item.decode() for item in broadcast_bytes(transport, [text.encode() for text in texts])]


def _tuned(path: Path, approach: Rag) -> tuple[Method, Tensor]:
    """Read the method and payload (1, P) of another run's adapter. UserError where it does not fit this base.

    They are read from that run's own files, not from the export: this works for every method, and the model answers as
    in that run's test.
    """
    folder = path.parent
    if not (folder / "results.h5").is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"method.adapter: '{path}' is not the adapter/ of a run: {folder} has no results.h5")
    config, results = configuration.load(str(folder / "config.yaml"), []), Results.read(folder / "results.h5")
    if not results.complete or registry.is_approach(config.method.name) or config.mode == "local":
        raise UserError(f"method.adapter: '{folder}' is not a complete run that customized one model")
    if results.attributes["fingerprint_model"] != approach.base.fingerprint:
        raise UserError(
            f"method.adapter: '{path}' was trained on another base ({config.model.name}) than '{approach.base.name}'"
        )
    method = make_method(config.method, approach.base, config.run.seed, approach.config.data.max_length)
    final = {name: torch.from_numpy(results.groups["final"][name]) for name in method.payload.shapes}
    return method, method.payload.flatten(final).unsqueeze(0).to(approach.base.device)


def _hash(payload: Tensor) -> str:
    return hashlib.sha256(payload.cpu().numpy().tobytes()).hexdigest()[:32]
