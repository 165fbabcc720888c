"""Prefix-tuning whose virtual tokens are matched before they are averaged; needs scipy.

Attention reads a prefix as a set: its keys carry no position of their own, so a prefix whose tokens change order is the
same prefix, and a mean taken token by token may mix unlike ones. As in federated matched averaging (Wang et al. 2020,
arXiv 2002.06440, which matches units of a layer) each client puts its tokens in the order in which they are closest, in
sum of squares, to those that it received: the assignment problem, solved by scipy.
"""

from __future__ import annotations

from scipy.optimize import linear_sum_assignment

from fedhpc.lazy import torch
from fedhpc.methods.prefix import PREFIX, Prefix


class MatchedPrefix(Prefix):
    """Prefix-tuning with virtual tokens in the order that fits the received prefix best."""

    class Options(Prefix.Options):
        def conflict(self, config):
            """Why this method cannot go with another section; None where it can."""
            if config.beside_updates:
                return f"{config.beside_updates[0]} is of each virtual token, and here they change order: give one"
            return super().conflict(config)

    def finish(self, trained, received):
        finished = super().finish(trained, received)
        if PREFIX not in finished:
            return finished  # a network is exchanged, whose tokens have numbers
        prefixes = finished[PREFIX]  # (K, n, width)
        distances = torch.cdist(received[PREFIX], prefixes).square()  # (K, received, trained)
        distances = distances.nan_to_num().cpu().numpy()  # clients that diverged are rejected later
        orders = [linear_sum_assignment(distance)[1] for distance in distances]
        ordered = [prefix[order] for prefix, order in zip(prefixes, orders, strict=True)]
        return {**finished, PREFIX: torch.stack(ordered)}
