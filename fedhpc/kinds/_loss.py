"""The loss of a supervised token: cross-entropy with its target, or the distance to what a teacher holds likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhpc.kinds.base import Soft
from fedhpc.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

# Logits that exist at once behind a frozen output layer: on a CPU about what its cache holds.
_LOGITS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}


def token_losses(logits: Tensor, targets: Tensor, soft: Soft | None) -> Tensor:
    """The loss of each token (S,). logits (S, V), targets int64 (S,).

    With a teacher's `soft` it is (1 - w) T^2 KL(p || q) + w CE, with w its hard_weight (Hinton, Vinyals and Dean 2015,
    arXiv 1503.02531, section 2); q is the softmax of logits / T. Of p the k likeliest classes are known; all others are
    one more class with what is left of the probability, in p and q alike. By the log-sum inequality this KL is never
    more than that of the whole distributions, and it is the same where k is V.
    """
    if soft is None:
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    q = (logits / soft.temperature).log_softmax(dim=-1)
    p = soft.probability.to(q)
    losses = (torch.xlogy(p, p) - p * q.gather(-1, soft.index)).sum(dim=-1)
    if p.shape[-1] < q.shape[-1]:
        left = (1 - p.sum(dim=-1)).clamp(min=0)  # probabilities in 16 bits may add up to a little more than 1
        others = q.scatter(-1, soft.index, -torch.inf).logsumexp(dim=-1)
        losses = losses + torch.xlogy(left, left) - left * others
    losses = (1 - soft.hard_weight) * soft.temperature**2 * losses
    if soft.hard_weight:
        losses = losses + soft.hard_weight * torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses


def frozen_head(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (S,) behind an output layer that is not trained, and its gradient, weighted, by `hidden`: (S, D).

    hidden (S, D), weight (V, D), targets int64 (S,), weights (S,). The gradient of a token's loss by its logits is its
    softmax less the target (Bridle 1990), so logits are gone again while they are still in the processor's cache.
    """
    gradient, losses = torch.empty_like(hidden), hidden.new_empty(len(hidden))
    size = max(16, _LOGITS_AT_ONCE[hidden.device.type] // len(weight))
    for start in range(0, len(hidden), size):
        piece = slice(start, start + size)
        logits = hidden[piece] @ weight.mT
        logits.sub_(logits.amax(dim=-1, keepdim=True))
        target = targets[piece].unsqueeze(1)
        of_target = logits.gather(1, target)
        total = logits.exp_().sum(dim=-1, keepdim=True)
        losses[piece] = (total.log() - of_target).squeeze(1)
        scale = weights[piece].unsqueeze(1)
        torch.mm(logits.mul_(scale / total).scatter_add_(1, target, -scale), weight, out=gradient[piece])
    return losses, gradient
