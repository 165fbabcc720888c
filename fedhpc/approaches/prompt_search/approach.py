"""Prompt engineering: searches for the best prompt among candidates that the clients score on their own data.

In a round the server sends the candidates as texts, every client of the cohort scores all of them on a few of its
examples, and the scores, a number per candidate, are summed. Rounds are rungs of successive halving (halving.py): a
generation begins with all candidates on few examples and ends with few candidates on many. The best of these, and
others that are proposed from them (proposers/), begin the next generation. The prompt that is evaluated and exported is
the best of the last complete generation; before there is one, it is the first hand-written prompt.

The demonstrations in a prompt are each client's own: a prompt says how many there are and by which rule they are
chosen, and they are not sent. When the server evaluates, the examples are given to clients in turn, and each client
puts its own demonstrations in front. With method.share_demonstrations every client sends one of its examples in a
round.

In /clients, steps is the number of candidates, loss_first the loss of the best one so far, loss_last that of the last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedhpc import registry
from fedhpc.approaches.base import BlockResult, accepted_indices
from fedhpc.approaches.inputs import Inputs
from fedhpc.approaches.prompt_search.halving import rungs
from fedhpc.approaches.prompt_search.proposers.base import Proposer
from fedhpc.approaches.scoring import likelihoods
from fedhpc.approaches.scoring.approach import NUMBER_BYTES, Rows, Scoring
from fedhpc.approaches.scoring.likelihoods import Float64, Int32, Int64, TokenCount
from fedhpc.approaches.scoring.prompts import Candidate, Shared, Space, label_words
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Outcome
from fedhpc.participation.plan import Plan
from fedhpc.ranks.transport.base import Transport
from fedhpc.results.record import FinalResults
from fedhpc.rng import generator
from fedhpc.server.state import ServerState

_TRIES = 20  # how often a proposer is asked for candidates that are new and fit
_POOL = 64  # how many shared examples are kept, the latest ones


class SearchState(ServerState):
    """The server's state: the candidates of the generation, their scores so far, and all that was tried before."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        super().__init__()
        self.alive = list(candidates)  # best first
        self.best = self.alive[0]
        self.rung = 0
        self.generation = 0
        self.sums = np.zeros(len(self.alive))  # of the scores, each times its number of examples
        self.examples = 0.0
        self.shared: list[Shared] = []
        self.known: dict[str, int] = {}  # every candidate that was ever scored -> its number
        self.scores: list[tuple[int, int, float, int]] = []  # round, candidate, score in that round, examples
        self.rounds: list[tuple[int, ...]] = []  # the columns of /tables/search
        self.enter(self.alive)

    def enter(self, candidates: Sequence[Candidate]) -> None:
        """Give new candidates their numbers."""
        for candidate in candidates:
            self.known.setdefault(candidate.to_json(), len(self.known))

    def tensors(self) -> dict[str, np.ndarray]:
        # One JSON text: it keeps every bit of a float.
        tree = {
            "alive": [self.known[c.to_json()] for c in self.alive],
            "best": self.best.to_json(),
            "rung": self.rung,
            "generation": self.generation,
            "sums": self.sums.tolist(),
            "examples": self.examples,
            "shared": [asdict(one) for one in self.shared],
            "known": list(self.known),
            "scores": self.scores,
            "rounds": self.rounds,
        }
        text = np.frombuffer(json.dumps(tree).encode(), dtype=np.uint8)
        return {"population": text.copy(), **super().tensors()}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        super().load(tensors)
        tree = json.loads(tensors["population"].tobytes())
        self.known = {text: number for number, text in enumerate(tree["known"])}
        self.alive = [Candidate.from_json(tree["known"][number]) for number in tree["alive"]]
        self.best = Candidate.from_json(tree["best"])
        self.rung, self.generation, self.examples = tree["rung"], tree["generation"], tree["examples"]
        self.sums = np.array(tree["sums"])
        self.shared = [Shared(**one) for one in tree["shared"]]
        self.scores = [tuple(row) for row in tree["scores"]]
        self.rounds = [tuple(row) for row in tree["rounds"]]


@dataclass(frozen=True)
class _Upload:
    """The scores and examples that a block of K clients sends."""

    means: Float64  # (K, n): the score of every candidate
    shared: list[Any]  # an example of each client, or none at all
    spent: tuple[int, int, int]  # pairs of candidate and example; tokens; tokens without shared computation


@dataclass(frozen=True)
class _Combined:
    """The sum of a round over all clients, as rank 0 has it."""

    scores: Float64  # (n,)
    examples: float
    spent: list[int]
    shared: list[Shared]


# The columns of /tables/search, one row a round.
_COLUMNS = ("round", "generation", "rung", "candidates", "evaluations", "tokens", "tokens_unshared", "best")


class PromptSearch(Scoring[SearchState, Any, _Upload, Any]):
    """Searches for a prompt: clients score candidates, the server proposes new ones from the best."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        options = self.config.method
        if options.label_words and self.writer.label is None:
            raise UserError(
                "method.label_words: the answers have no labels; give data.label, and make data.target of it alone, "
                f"like ' {{{self.config.data.label or 'label'}}}'"
            )
        words: tuple[tuple[str, ...], ...] = ()
        if self.writer.label is not None:
            words = label_words(options.label_words, self.data.train.label_names, self.writer)
        self.space = Space(
            self.writer,
            tuple(dict.fromkeys(options.instructions)),
            tuple(dict.fromkeys(options.cues)),
            words,
            options.demonstrations,
            tuple(dict.fromkeys(options.rules)),
        )
        self._check_lengths()
        self.rungs = rungs(options.population, options.survivors, options.eta, options.examples)
        self.proposers: list[Proposer] = [
            registry.choice("proposers", one.name)(one, self.space, self.base) for one in options.proposers
        ]
        #: The candidates of the first round.
        self.first = self._initial()
        #: The rung and the candidates of the round that is going on.
        self._rung, self._candidates = 0, self.first
        self._rewritten: tuple[str, Examples] | None = None

    def _check_lengths(self) -> None:
        options, limit = self.config.method, self.base.max_positions
        longest = self.config.data.max_length + options.max_prompt_tokens
        if limit is not None and longest > limit:
            raise UserError(
                f"method.max_prompt_tokens: with data.max_length there would be {longest} tokens, and "
                f"'{self.base.name}' has {limit} positions: lower one of them by {longest - limit}"
            )
        self.base.check_shared(longest)
        for i, one in enumerate(self.space.hand_written()):
            if (left := self.writer.tokens_left(one)) < 0:
                raise UserError(
                    f"method.instructions[{i}]: with the first cue and the longest label it has "
                    f"{options.max_prompt_tokens - left} tokens, method.max_prompt_tokens is "
                    f"{options.max_prompt_tokens}: shorten it or raise the limit"
                )

    def _initial(self) -> list[Candidate]:
        size = self.config.method.population
        bare = Candidate(cue=self.space.cues[0], words=self.space.first)
        # The empty prompt is among them, so that the result is never worse than no prompt.
        begin = list(dict.fromkeys([*self.space.hand_written(), bare, self.plain]))[:size]
        candidates = [*begin, *self._proposed(begin, [], size - len(begin), 0, {c.to_json() for c in begin})]
        if len(candidates) < 2:
            raise UserError(
                "method.instructions: there is no second candidate: give hand-written instructions, or more "
                "method.cues, method.label_words or method.demonstrations, within method.max_prompt_tokens"
            )
        return candidates

    # ---- a round

    def initial_state(self) -> SearchState:
        return SearchState(self.first)

    def _proposed(
        self, parents: Sequence[Candidate], shared: Sequence[Shared], count: int, generation: int, known: set[str]
    ) -> list[Candidate]:
        """Ask the proposers, each for its share, for at most `count` candidates that are new and fit."""
        candidates: list[Candidate] = []
        for number, proposer in enumerate(self.proposers):
            wanted = count * (number + 1) // len(self.proposers)
            for attempt in range(_TRIES):
                if len(candidates) >= wanted:
                    break
                draws = generator(self.config.run.seed, "proposals", generation, number, attempt)
                for proposed in proposer.propose(parents, shared, wanted - len(candidates), draws):
                    one = proposed.normal()
                    if one.to_json() not in known and self.space.fits(one):
                        known.add(one.to_json())
                        candidates.append(one)
        return candidates

    def download(self, transport: Transport, state: ServerState | None, plan: Plan) -> Any:
        """Send the rung and the candidates to be scored to every rank."""
        tree: dict[str, Any] = {}
        if state is not None:
            search = _search_state(state)
            tree = {"rung": search.rung, "candidates": [asdict(c) for c in search.alive]}
        tree = transport.broadcast_json(tree)
        self._rung, self._candidates = tree["rung"], [Candidate.from_tree(one) for one in tree["candidates"]]
        return self._rung, self._candidates

    def local(self, plan: Plan, clients: Sequence[int], down: Any) -> BlockResult[Any]:
        """Let every client score every candidate on its examples of the rung, all in the same forward passes."""
        rung, candidates = down
        train, spent = self.data.train, TokenCount()
        parts = [self.scored(plan.round, client, *self.budget(rung)) for client in clients]
        texts: list[Int32] = []
        rows = Rows()
        for c, candidate in enumerate(candidates):
            fixed, cue, labels = (
                self.writer.fixed(candidate),
                self.writer.written(candidate.cue),
                self.writer.answers(candidate),
            )
            for k, (client, (scored, pool)) in enumerate(zip(clients, parts, strict=True)):
                if candidate.demonstrations or k == 0:
                    prefix = np.concatenate([fixed, self.writer.demonstrations(candidate, train, pool, client)])
                    texts.append(prefix[:-1])
                for example in scored:
                    # The last token of the prefix begins the row, so that no row is empty.
                    ids = np.concatenate([prefix[-1:], self.writer.input(train, example), cue])
                    rows.add(k, c, len(texts) - 1, ids, *self.scored_answers(labels, example))
        with self.forward():
            prefixes = likelihoods.of_texts(self.base, texts, spent)
        scores = self.score(prefixes, rows, len(clients), len(candidates), spent)
        finite = np.isfinite(scores.means).all(axis=1)
        numbers = (int(scores.rows.sum()), spent.tokens, spent.unshared)
        sent = [self._sent(plan.round, c) for c in clients] if self.config.method.share_demonstrations else []
        upload = _Upload(scores.means, sent, numbers)
        bytes_up = np.full(len(clients), NUMBER_BYTES * len(candidates))
        if sent:
            bytes_up += [len(json.dumps(one).encode()) for one in sent]
        return self.report(clients, upload, finite, scores.means, [scores], spent, bytes_up)

    def budget(self, rung: int) -> tuple[int, int]:
        """On how many examples of a client a rung scores at most, and how many are left for demonstrations."""
        options = self.config.method
        return self.rungs[rung].examples, options.demonstrations

    def _sent(self, round_: int, client: int) -> dict[str, Any]:
        """Draw one of a client's examples to be sent, so that prompts can show it."""
        indices = self.data.population.indices(client)
        position = int(generator(self.config.run.seed, "shared", round_, client).integers(len(indices)))
        return asdict(self.writer.shared(self.data.train, int(indices[position])))

    def combine(
        self, transport: Transport, state: ServerState | None, plan: Plan, results: Sequence[BlockResult[Any]]
    ) -> Any:
        indices = accepted_indices(plan, results)
        accepted = [result.upload.means[result.accepted] for result in results]
        scores = np.concatenate([np.empty((0, len(self._candidates))), *accepted])
        training = set(plan.training)
        most, aside = self.budget(self._rung)
        rows = np.array([self.num_scored(c, most, aside) if c in training else 0 for c in plan.cohort])
        mean = self.mean_scores(transport, plan, indices, scores, rows)
        spent = self.spent_by_all(transport, np.sum([(0, 0, 0), *(result.upload.spent for result in results)], axis=0))
        shared = self._gathered(transport, indices, results) if self.config.method.share_demonstrations else []
        return None if mean is None else _Combined(*mean, spent, shared)

    def _gathered(self, transport: Transport, indices: Int64, results: Sequence[BlockResult[Any]]) -> list[Shared]:
        """The examples that the accepted clients have sent, in the order of the cohort."""
        sent = [
            one for result in results for one, used in zip(result.upload.shared, result.accepted, strict=True) if used
        ]
        parts = transport.gather_json([[int(index), one] for index, one in zip(indices, sent, strict=True)]) or []
        ordered = [one for _, one in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]
        return [Shared(**one) for one in ordered]

    def step(self, state: Any, plan: Plan, combined: Any) -> float:
        """Rank the candidates and, after the last rung of a generation, propose the next one.

        Returns 1.0 if the best prompt is another one now, otherwise 0.0.
        """
        rung, options = self.rungs[state.rung], self.config.method
        numbers = [state.known[c.to_json()] for c in state.alive]
        state.scores += [
            (plan.round, n, float(s), int(combined.examples)) for n, s in zip(numbers, combined.scores, strict=True)
        ]
        state.sums = state.sums + combined.scores * combined.examples
        state.examples += combined.examples
        state.shared = list(dict.fromkeys([*state.shared, *combined.shared]))[-_POOL:]
        order = np.argsort(state.sums, kind="stable")
        ranked = [state.alive[i] for i in order]
        before = state.best
        if rung.last:
            state.best = ranked[0]
            state.generation += 1
            survivors = ranked[: options.survivors]
            known = set(state.known)
            state.alive = [
                *survivors,
                *self._proposed(survivors, state.shared, options.population - len(survivors), state.generation, known),
            ]
            state.enter(state.alive)
            state.rung, state.sums, state.examples = 0, np.zeros(len(state.alive)), 0.0
        else:
            state.rung += 1
            size = self.rungs[state.rung].size
            state.alive, state.sums = ranked[:size], state.sums[order][:size]
        generation = state.generation - rung.last
        best = state.known[state.best.to_json()]
        state.rounds.append((plan.round, generation, rung.number, len(numbers), *combined.spent, best))
        return float(state.best != before)

    def bytes_down(self, plan: Plan, download: Any = None) -> int:
        """The candidates as JSON, to every client of the cohort."""
        if self.config.mode != "federated":
            return 0
        return len(encoded(*(download or (0, self.first)))) * len(plan.cohort)

    def bytes_up(self, plan: Plan) -> int:
        """A number for each candidate; the length of shared examples is not known before the round."""
        if self.config.mode != "federated":
            return 0
        return NUMBER_BYTES * len(self.first) * len(plan.training)

    # ---- results

    def evaluate(self, transport: Transport, state: ServerState | None, round_: int) -> Outcome | None:
        """Evaluate the best prompt of the last complete generation."""
        evaluation = self.config.evaluation
        return self._of_prompt(
            transport, self._best(transport, state), self.data.validation, evaluation.metrics, evaluation.max_examples
        )

    def _best(self, transport: Transport, state: ServerState | None) -> Candidate:
        text = transport.broadcast_json(None if state is None else _search_state(state).best.to_json())
        return Candidate.from_json(text)

    def _of_prompt(
        self,
        transport: Transport,
        candidate: Candidate,
        examples: Examples,
        metrics: Sequence[str],
        limit: int | None,
        samples: int = 0,
        intervals: bool = False,
    ) -> Outcome | None:
        """Evaluate the base on examples with the prompt around them. Collective."""
        key = candidate.to_json() + examples.fingerprint
        if self._rewritten is None or self._rewritten[0] != key:
            population = self.data.population
            clients = range(min(population.num_clients, self.config.evaluation.max_clients, len(examples)))
            train = self.data.train
            shown = [self.writer.demonstrations(candidate, train, population.indices(c), c) for c in clients]
            self._rewritten = key, self.writer.rewritten(candidate, examples, shown)
        targets = self.writer.answer_texts(candidate)
        return self.measured(
            transport, self._rewritten[1], metrics, limit, targets=targets, samples=samples, intervals=intervals
        )

    def finish(self, transport: Transport, state: ServerState | None) -> FinalResults | None:
        """Test the best prompt, the empty one, and the hand-written one that did best on the validation split."""
        evaluation = self.config.evaluation
        best, written = self._best(transport, state), self.space.hand_written()
        validated = [
            self._of_prompt(transport, c, self.data.validation, evaluation.metrics, evaluation.max_examples)
            for c in [self.plain, *written, best]
        ]
        first = evaluation.metrics[0]
        name, sign = registry.short_name(first), -1 if registry.choice("metrics", first).higher_is_better else 1
        order = np.argsort([sign * one.metrics[name] for one in validated[1:-1] if one], kind="stable")
        best_written = transport.broadcast_json([int(i) for i in order[:1]])  # empty where none is hand-written
        prompts = [self.plain, *(written[i] for i in best_written), best]
        on_test = [
            self._of_prompt(
                transport, c, self.data.test, evaluation.metrics_of_test, evaluation.test_max_examples, samples, True
            )
            for c, samples in zip(prompts, [*(0 for _ in prompts[1:]), evaluation.samples], strict=True)
        ]
        if state is None:
            return None
        outcomes = [one for one in on_test if one is not None]
        tested = [one.metrics for one in outcomes]
        self._export(best)
        by_hand = ", ".join(f"{n} {v:.4f}" for metrics in tested[1:-1] for n, v in metrics.items())
        search = _search_state(state)
        return FinalResults(
            test=tested[-1],
            base=tested[0],
            test_sampling=outcomes[-1].sampling,
            base_sampling=outcomes[0].sampling,
            tensors={"prompt": np.frombuffer(best.to_json().encode(), np.uint8)},
            samples=outcomes[-1].samples,
            tables={
                "search": _table(_COLUMNS, search.rounds),
                "scores": _table(("round", "candidate", "score", "examples"), search.scores),
                "candidates": {"prompt": np.array(list(search.known), dtype=object)},
                "prompts": {
                    "kind": np.array(["empty", *("hand_written" for _ in written), "searched"], dtype=object),
                    "prompt": np.array([c.to_json() for c in [self.plain, *written, best]], dtype=object),
                    **_columns("validation", [one.metrics for one in validated if one is not None]),
                    **_columns("test", self._rows_of_tests(best_written, tested, len(written))),
                },
            },
            lines=[f"prompt: {self._shown(best)}", *([f"the best hand-written prompt: {by_hand}"] if by_hand else [])],
        )

    def _rows_of_tests(
        self, best_written: Sequence[int], tested: Sequence[Mapping[str, float]], written: int
    ) -> list[Mapping[str, float]]:
        """The test metrics of every prompt of /tables/prompts, NaN for a prompt that was not tested."""
        nothing = dict.fromkeys(tested[0], float("nan"))
        by_hand = [tested[1] if i in best_written else nothing for i in range(written)]
        return [tested[0], *by_hand, tested[-1]]

    def _shown(self, candidate: Candidate) -> str:
        """A prompt as one line."""
        demonstrations = f"[{candidate.demonstrations} own, {candidate.rule}]" if candidate.demonstrations else ""
        shared = f"[{len(candidate.shared)} shared]" if candidate.shared else ""
        words = f" ({', '.join(candidate.words)})" if candidate.words else ""
        text = self.writer.separator.join(t for t in (candidate.instruction, demonstrations, shared, "{input}") if t)
        return json.dumps(f"{text}{candidate.cue}", ensure_ascii=False) + words

    def _export(self, candidate: Candidate) -> None:
        """Write adapter/prompt.json: the prompt, and all that is needed to write it around an input."""
        folder = self.config.run_dir / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        names = self.data.train.label_names if candidate.words else []
        tree = {
            **asdict(candidate),
            "words": dict(zip(names, candidate.words, strict=True)),
            "separator": self.writer.separator,
            "input": self.config.data.prompt,
            "answer": self.config.data.target,
            "base_model_name_or_path": self.base.source,
        }
        text = json.dumps(tree, indent=2, ensure_ascii=False)
        (folder / "prompt.json").write_text(text + "\n", encoding="utf-8")

    # ---- what is said of it

    def attributes(self) -> dict[str, Any]:
        return {
            "payload_parameters": 0,
            "trainable_parameters": 0,
            "population": len(self._candidates),
            "rounds_of_a_generation": len(self.rungs),
        }

    def summary(self) -> str:
        return f"{len(self._candidates)} prompts, a generation in {len(self.rungs)} rounds"

    def work(self, plan: Plan) -> str:
        return f"{len(self._candidates)} prompts on at most {self.rungs[0].examples} examples"

    def details(self, plan: Plan) -> list[str]:
        steps = ", ".join(f"{r.size} prompts on {r.examples} examples" for r in self.rungs)
        lines = [
            f"exchanged: {len(encoded(self._rung, self._candidates)):,} bytes of prompts down, "
            f"{NUMBER_BYTES * len(self._candidates):,} of scores up for each client of round 1",
            f"a generation: {steps} of every client",
        ]
        if self.rounds % len(self.rungs):
            lines.append(
                f"the last {self.rounds % len(self.rungs)} of {self.rounds} rounds complete no generation: they change "
                f"nothing; give a multiple of {len(self.rungs)}"
            )
        return lines


def _search_state(state: ServerState) -> SearchState:
    assert isinstance(state, SearchState)
    return state


def encoded(rung: int, candidates: Sequence[Candidate]) -> bytes:
    """The candidates as they are sent to a client."""
    tree = {"rung": rung, "candidates": [asdict(c) for c in candidates]}
    return json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()


def _table(columns: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    values = list(zip(*rows, strict=True)) if rows else [() for _ in columns]
    return {name: np.array(column) for name, column in zip(columns, values, strict=True)}


def _columns(split: str, rows: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    return {f"{split}_{name}": np.array([row[name] for row in rows]) for name in rows[0]}
