"""How far a round has come while it is under way: what the screen shows between two rounds.

Each rank counts its own clients. The others' counts reach rank 0 beside the heartbeats (fedhpc.ranks.liveness), once a
second at most and outside of all collectives, so that nobody waits for them and no bits hang on them.
"""

from __future__ import annotations

from collections.abc import Sequence


class RoundProgress:
    """The clients of a round that are done, on this rank and, as far as rank 0 has heard, on all of them.

    A block counts by parts: a client with three of its six steps behind it is half a client.
    """

    def __init__(self) -> None:
        self.round = 0
        self.clients = 0  # those that train in the round, on all ranks
        self.activity = ""  # what goes on beside local training: "evaluation"
        self._done = 0.0
        self._finished = 0  # clients of this rank's blocks that are done
        self._of_others: dict[int, tuple[int, float]] = {}  # rank -> its round, and its clients that are done

    def begin(self, round_: int, clients: int) -> None:
        """A round begins, in which this number of clients train on all ranks together."""
        self.activity = ""
        self.clients, self._finished, self._done = clients, 0, 0.0
        self.round = round_

    def add(self, clients: float) -> None:
        """Parts of clients of this rank's block are done."""
        self._done += clients

    def finish(self, clients: int) -> None:
        """A block of this rank is done, however much of it was counted."""
        self._finished += clients
        self._done = float(self._finished)

    @property
    def done(self) -> float:
        """Clients that are done in this round, on all ranks that rank 0 has heard of."""
        of_others = list(self._of_others.values())  # at once: the liveness thread adds ranks meanwhile
        others = sum(done for round_, done in of_others if round_ == self.round)
        return min(self._done + others, float(self.clients))

    def report(self) -> list[float]:
        """What rank 0 is told of this rank."""
        return [self.round, round(self._done, 2)]

    def hear(self, rank: int, report: Sequence[float]) -> None:
        """Take what another rank has told."""
        round_, done = report
        self._of_others[rank] = int(round_), float(done)
