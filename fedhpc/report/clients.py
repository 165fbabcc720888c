"""What a report says of single clients: who is worst, and what goes with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fedhpc.report.runs import LoadedRun
from fedhpc.report.text import Grid, Number, as_number, as_range
from fedhpc.results.record import OK

_WORST = 20  # clients in the table


class Factor(NamedTuple):
    """A property of clients that may go with their losses: its title with the unit, and a value for each client."""

    title: str
    values: np.ndarray

    def shown(self, row: int) -> Number:
        """The value of one client; whole where all are."""
        value, known = float(self.values[row]), self.values[np.isfinite(self.values)]
        return as_number(value, 0 if (known == known.round()).all() else None)


@dataclass(frozen=True)
class Clients:
    """The clients of a run that have a loss, the largest first."""

    names: Sequence[str]
    loss: np.ndarray  # nats per token
    loss_of: str  # which loss it is
    low: np.ndarray  # ends of the 95 % interval over the client's held-out examples; NaN: not known
    high: np.ndarray
    attackers: np.ndarray  # bool
    factors: Sequence[Factor] = field(default_factory=list)


def clients_of(run: LoadedRun) -> Clients | None:
    """The clients of a run that trained or were tested; None where there is none.

    The loss is that of the final state on the client's held-out examples where the run has it
    (evaluation.client_fraction), else that of the last local step in the client's last round.
    """
    rows, tested, partition = run.results.clients, run.results.groups["client_eval"], run.results.groups["partition"]
    used = np.flatnonzero((rows["status"] == OK) & np.isfinite(rows["loss_last"]))
    of_test = "loss" in tested and bool(np.isfinite(tested["loss"]).any())
    if of_test:
        measured = np.flatnonzero(np.isfinite(tested["loss"]))
        ids, loss = tested["client_id"][measured], tested["loss"][measured]
        low, high = (
            tested.get(f"loss_{end}", np.full(len(tested["loss"]), np.nan))[measured] for end in ("low", "high")
        )
    else:
        ids = np.unique(rows["client_id"][used])
        loss, low, high = (np.full(len(ids), np.nan) for _ in range(3))
        loss[np.searchsorted(ids, rows["client_id"][used])] = rows["loss_last"][used]  # in the order of rounds
    if not len(ids):
        return None
    worst_first = np.argsort(-loss, kind="stable")
    ids, loss, low, high = (values[worst_first] for values in (ids, loss, low, high))
    names = partition.get("client_names")
    attacks = np.unique(rows["client_id"][rows["attacker"] > 0]) if "attacker" in rows else ids[:0]
    return Clients(
        names=[str(i) if names is None else str(names[i]) for i in ids],
        loss=loss,
        loss_of="of the final state on held-out examples" if of_test else "of the last local step",
        low=low,
        high=high,
        attackers=np.isin(ids, attacks),
        factors=_factors(run, ids, used),
    )


def _factors(run: LoadedRun, ids: np.ndarray, used: np.ndarray) -> list[Factor]:
    """What may go with the losses of the clients `ids`; used: the rows of /clients whose updates were used."""
    rows, partition = run.results.clients, run.results.groups["partition"]
    of_client: dict[int, list[int]] = {}
    for row in used:
        of_client.setdefault(int(rows["client_id"][row]), []).append(row)

    def over_rounds(column: str, statistic: Callable[[np.ndarray], float]) -> np.ndarray:
        mine = (rows[column][of_client.get(int(i), [])] for i in ids)
        return np.array([statistic(values) if len(values) else np.nan for values in mine])

    sizes, counts = partition.get("num_examples"), partition.get("label_counts")
    factors = [
        Factor("training examples", over_rounds("num_examples", np.max) if sizes is None else sizes[ids].astype(float)),
        *([] if counts is None else [Factor("label skew [0 to 1]", skew_of(counts)[ids])]),
        Factor("number of rounds", np.array([len(of_client.get(int(i), [])) for i in ids], float)),
        *([Factor("staleness [server steps]", over_rounds("staleness", np.mean))] if "staleness" in rows else []),
        Factor("update's L2 norm, median", over_rounds("update_norm", np.median)),
    ]
    return [factor for factor in factors if len(np.unique(factor.values[np.isfinite(factor.values)])) > 1]


def skew_of(counts: np.ndarray) -> np.ndarray:
    """How far each client's labels are from those of all: total variation distance, 0 the same, 1 nothing in common.

    counts: (N, C), examples of each client with each label. NaN for clients without examples.
    """
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    return np.asarray(np.abs(shares - counts.sum(axis=0) / max(counts.sum(), 1)).sum(axis=1) / 2)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs; NaN below 3 pairs."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3:
        return float("nan")
    ranks = []
    for values in (x[both], y[both]):
        _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[index])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def clients_grids(clients: Clients) -> list[Grid]:
    """The worst clients, and how closely each property goes with the loss."""
    shown = len(clients.names[:_WORST])
    intervals, attacked = bool(np.isfinite(clients.low).any()), bool(clients.attackers.any())
    rows = [
        [
            clients.names[i],
            as_number(float(clients.loss[i])),
            *([as_range(float(clients.low[i]), float(clients.high[i]))] if intervals else []),
            *(factor.shown(i) for factor in clients.factors),
            *([Number("yes" if clients.attackers[i] else "no", float(clients.attackers[i]))] if attacked else []),
        ]
        for i in range(shown)
    ]
    factors = [factor.title for factor in clients.factors]
    header = ["client", "loss [nats per token]", *(["95 % over its items"] if intervals else []), *factors]
    title = f"Clients by their loss {clients.loss_of}, the worst first"
    title += f" ({shown} of {len(clients.names)})" if shown < len(clients.names) else ""
    goes_with = [
        [factor.title, as_number(rank_correlation(factor.values, clients.loss)), Number(str(n), n)]
        for factor in clients.factors
        for n in [int(np.isfinite(factor.values).sum())]
    ]
    return [
        Grid(title, [*header, *(["attacks"] if attacked else [])], rows, long=True),
        Grid(
            "What goes with a client's loss (1: rises with it, -1: falls, 0: neither; no proof of a cause)",
            ["property", "Spearman's rank correlation", "clients"],
            goes_with,
            long=True,
        ),
    ]
