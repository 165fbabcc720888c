"""The forward of the Llama family written out, for training a frozen model of float32 on a CPU.

transformers' own forward computes the same; there every norm, rotation, mask and gate is a handful of operators, each
with a pass through memory and a node for autograd. Here a step of a layer is one node with its gradient by hand. Linear
layers are called as the modules that they are, so hooks on them (LoRA, IA3, adapters) act as everywhere else.

Shapes: B rows, T positions, W of them wanted, D hidden size, H query heads, G key and value heads, d head size, n
virtual positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedhpc.kernels import product
from fedhpc.models.hooks import called_as, is_hooked

_STRETCH = 64  # queries at a time
_SCORES = 2**19  # at a time: 2 MiB, which stay in a core's cache from one operator to the next
_MOST_WANTED = 0.75  # share of the positions: if the last layer can leave out fewer, leaving them out costs more
# By module, not by the configuration's model_type: code that comes with a model may call itself llama too.
_DECODERS = frozenset(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2"))


def written_out(network: Any) -> bool:
    """Whether `hidden_at` computes what this transformers model does, as it is attached to now."""
    config, decoder = network.config, network.base_model
    return (
        type(decoder).__module__ in _DECODERS
        and config.hidden_act == "silu"
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and network.dtype == torch.float32
        and network.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and _plain(decoder)
    )


def _plain(decoder: Any) -> bool:
    """Whether nothing but linear layers was changed or is trained."""
    norms, others = [decoder.norm], [decoder]
    for layer in decoder.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        others += [layer, layer.self_attn, layer.mlp]
    return not any(norm.weight.requires_grad for norm in norms) and not any(
        is_hooked(part) or "forward" in part.__dict__ for part in (*norms, *others)
    )


def hidden_at(
    network: Any,
    inputs: Tensor,
    past: Sequence[tuple[Tensor, Tensor]],
    rows: Tensor,
    positions: Tensor,
    everywhere: bool = False,
) -> Tensor:
    """Last hidden states (S, D) at `positions` (S,) of `rows` (S,), of embedded inputs (B, T, D).

    past: as for `last_hidden`. everywhere: every layer must see all positions. Of the last layer what lies between the
    first and the last position of a row is computed.
    """
    batch, length = inputs.shape[:2]
    first = positions.new_full((batch,), length).scatter_reduce_(0, rows, positions, "amin")
    width = int((positions - first.index_select(0, rows)).max()) + 1
    if everywhere or width > _MOST_WANTED * length:
        return last_hidden(network, inputs, past).flatten(0, 1).index_select(0, rows * length + positions)
    first.clamp_(max=length - width)
    wanted = first.unsqueeze(1) + torch.arange(width, device=inputs.device)
    states = last_hidden(network, inputs, past, wanted)
    return states.flatten(0, 1).index_select(0, rows * width + positions - first.index_select(0, rows))


def last_hidden(
    network: Any, inputs: Tensor, past: Sequence[tuple[Tensor, Tensor]], wanted: Tensor | None = None
) -> Tensor:
    """Last hidden states (B, W, D) of embedded `inputs` (B, T, D), right-padded.

    past: per layer (key, value), each (B, G, n, d), in front of the layer's own, or empty. wanted: W different
    positions of each row (B, W), or None for all: of the last layer only keys and values are computed at others.
    """
    decoder = network.base_model
    n, length = (past[0][0].shape[2] if past else 0), inputs.shape[1]
    positions = torch.arange(n, n + length, device=inputs.device).unsqueeze(0)
    cos, sin = (table[0] for table in decoder.rotary_emb(inputs, position_ids=positions))
    last = len(decoder.layers) - 1

    hidden = inputs
    change: Tensor | None = None  # what the last sublayer adds; its norm and the sum are one step
    for i, layer in enumerate(decoder.layers):
        of_layer = wanted if i == last else None
        hidden, change = called_as(
            layer, _layer, hidden, change, *(past[i] if past else (None, None)), cos, sin, of_layer
        )
    return _norm(hidden, change, decoder.norm)[1]


def _layer(
    layer: Any, hidden: Tensor, change: Tensor | None, past_k: Tensor | None, past_v: Tensor | None,
    cos: Tensor, sin: Tensor, wanted: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One layer: the states in front of its last sublayer, and what that adds to them."""
    hidden, normed = _norm(hidden, change, layer.input_layernorm)
    attention, mlp = layer.self_attn, layer.mlp
    key, value = attention.k_proj(normed), attention.v_proj(normed)
    if wanted is not None:
        hidden, normed = _Take.apply(hidden, wanted), _Take.apply(normed, wanted)
    heads = _Attention.apply(attention.q_proj(normed), key, value, past_k, past_v, cos, sin, attention.scaling, wanted)
    hidden, normed = _norm(hidden, attention.o_proj(heads), layer.post_attention_layernorm)
    return hidden, mlp.down_proj(_Gate.apply(mlp.gate_proj(normed), mlp.up_proj(normed)))


def _norm(hidden: Tensor, change: Tensor | None, module: Any) -> tuple[Tensor, Tensor]:
    """hidden + change, and its norm."""
    summed, normed = _AddNorm.apply(hidden, change, module.weight, module.variance_epsilon)
    return summed, normed


class _Take(torch.autograd.Function):
    """x (B, T, D) at the positions wanted (B, W), which differ within a row: (B, W, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wanted: Tensor) -> Tensor:
        flat = (wanted + x.shape[1] * torch.arange(len(x), device=x.device).unsqueeze(1)).flatten()
        ctx.save_for_backward(flat)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, flat).view(*wanted.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (flat,) = ctx.saved_tensors
        # Adding them up, as index_select's own gradient does, takes as long as a product.
        of_x = grad.new_zeros(ctx.shape)
        of_x.flatten(0, 1)[flat] = grad.flatten(0, 1)
        return of_x, None


class _AddNorm(torch.autograd.Function):
    """x = hidden + change and y = w * x / rms(x) (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4), w frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, change: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = hidden if change is None else hidden + change
        inverse = x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        ctx.set_materialize_grads(False)
        # An input may not be an output as it is.
        return x if change is not None else x.view_as(x), (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor | None, of_norm: Tensor | None) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        if of_norm is None:
            grad = of_sum
        else:
            # d/dx of x r(x): r g - x r^3 mean(g x), with g behind the weight.
            grad = of_norm * weight
            along = torch.mul(grad, x).mean(dim=-1, keepdim=True).mul_(inverse).mul_(inverse).mul_(inverse)
            grad.mul_(inverse).addcmul_(x, along, value=-1.0)
            if of_sum is not None:
                grad.add_(of_sum)
        return grad, grad if ctx.needs_input_grad[1] else None, None, None


class _Gate(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202, equation 6)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        share = gate.sigmoid()
        silu = gate * share
        out = silu * up
        if any(ctx.needs_input_grad):
            # silu' = s (1 + x - x s), while its parts are in the cache: later it would take the exponential again.
            slope = (gate - silu).add_(1.0).mul_(share)
            ctx.save_for_backward(silu, slope, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        silu, slope, up = ctx.saved_tensors
        return slope.mul_(up).mul_(grad), silu.mul_(grad)


class _Attention(torch.autograd.Function):
    """Rotated queries on rotated keys behind a prefix (Vaswani et al. 2017, equation 1; Su et al. 2021).

    q (B, W, H * d); k, v (B, T, G * d); prefix of keys and values (B, G, n, d) or None; cos, sin (T, d). Returns
    (B, W, H * d). wanted (B, W): positions of the queries; None where each position has one, and W is T: then a stretch
    of queries at a time looks at the keys up to its own end, so but for corners nothing is computed to be masked away.
    The H / G query heads of a key head look at the same keys: none is repeated.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None,
        cos: Tensor, sin: Tensor, scale: float, wanted: Tensor | None,
    ) -> Tensor:  # fmt: skip
        rows, width, length, head = len(q), q.shape[1], k.shape[1], cos.shape[-1]
        groups, shared = k.shape[-1] // head, q.shape[-1] // k.shape[-1]
        n = 0 if past_k is None else past_k.shape[2]
        queries = q.new_empty(rows, groups, width, shared, head)
        keys, values = k.new_empty(2, rows, groups, n + length, head)
        cos_q, sin_q = _of_queries(cos, wanted), _of_queries(sin, wanted)
        _rotate(_split(q, groups, shared), cos_q, sin_q, queries)
        _rotate(_split(k, groups, 1).squeeze(3), cos, sin, keys[:, :, n:])
        values[:, :, n:] = _split(v, groups, 1).squeeze(3)
        if past_k is not None:
            keys[:, :, :n], values[:, :, :n] = past_k, past_v
        # Scaled here, where they are few, and not their products.
        queries = queries.view(rows * groups, width * shared, head).mul_(scale)
        keys, values = (t.view(rows * groups, n + length, head) for t in (keys, values))
        shares, seen = [], torch.empty_like(queries)
        stretches = _stretches(width) if wanted is None else [(0, width, length)]
        pieces = _pieces(rows, groups * shared * (n + length), stretches)
        corners = {far - near: _corner(q, far - near, shared) for near, far, _ in stretches} if wanted is None else {}
        for first, last, near, far, end in pieces:
            part, stretch = slice(first * groups, last * groups), slice(near * shared, far * shared)
            scores = torch.bmm(queries[part, stretch], keys[part, : n + end].mT)
            if wanted is None:
                scores[:, :, n + near :] += corners[far - near]
            else:
                hidden = _behind(scores, wanted[first:last], length)
                scores.view(last - first, groups, width, shared, -1)[..., n:] += hidden
            shares.append(scores.softmax(dim=-1))
            seen[part, stretch] = product(shares[-1], values[part, : n + end])
        ctx.save_for_backward(queries, keys, values, cos, sin, cos_q, sin_q, *shares)
        ctx.sizes = rows, width, length, groups, shared, n, scale
        ctx.pieces = pieces
        return seen.view(rows, groups, width, shared, head).transpose(1, 2).reshape(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, cos, sin, cos_q, sin_q, *shares = ctx.saved_tensors
        rows, width, length, groups, shared, n, scale = ctx.sizes
        of_seen = _split(grad, groups, shared).reshape(queries.shape)
        of_queries, of_keys, of_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for (first, last, near, far, end), share in zip(ctx.pieces, shares, strict=True):
            part = slice(first * groups, last * groups)
            stretch, before = slice(near * shared, far * shared), slice(n + end)
            of_share = torch.bmm(of_seen[part, stretch], values[part, before].mT)
            of_scores = torch._softmax_backward_data(of_share, share, -1, share.dtype)
            # baddbmm_ on such a slice would be one product after another.
            of_values[part, before] += product(share.mT, of_seen[part, stretch])
            of_keys[part, before] += product(of_scores.mT, queries[part, stretch])
            if ctx.needs_input_grad[0]:
                of_queries[part, stretch] = product(of_scores, keys[part, before])
        of_q = of_k = of_v = None
        of_keys, of_values = (t.view(rows, groups, n + length, -1) for t in (of_keys, of_values))
        if ctx.needs_input_grad[0]:
            of_q = torch.empty_like(grad)
            turned = of_queries.mul_(scale).view(rows, groups, width, shared, -1)
            _rotate(turned, cos_q, -sin_q, _split(of_q, groups, shared))
        if ctx.needs_input_grad[1]:
            of_k = grad.new_empty(rows, length, groups * cos.shape[-1])
            _rotate(of_keys[:, :, n:], cos, -sin, _split(of_k, groups, 1).squeeze(3))
        if ctx.needs_input_grad[2]:
            of_v = of_values[:, :, n:].transpose(1, 2).reshape(rows, length, -1)
        prefix = (of_keys[:, :, :n], of_values[:, :, :n]) if ctx.needs_input_grad[3] else (None, None)
        return of_q, of_k, of_v, *prefix, None, None, None, None


def _split(x: Tensor, groups: int, shared: int) -> Tensor:
    """(B, T, G * shared * d) as (B, G, T, shared, d), without a copy."""
    return x.view(*x.shape[:2], groups, shared, -1).transpose(1, 2)


def _of_queries(table: Tensor, wanted: Tensor | None) -> Tensor:
    """table (T, d) for queries as _split has them: (T, 1, d), or (B, 1, W, 1, d) for those at the positions wanted."""
    return table.unsqueeze(1) if wanted is None else table[wanted].unsqueeze(1).unsqueeze(3)


def _stretches(length: int) -> list[tuple[int, int, int]]:
    """Bounds of the stretches of queries, and where the keys that they see end."""
    return [(near, end := min(near + _STRETCH, length), end) for near in range(0, length, _STRETCH)]


def _pieces(
    rows: int, scores_of_query: int, stretches: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int, int, int, int]]:
    """The bounds of some of the rows, and one of the stretches, for all that are computed one after the other.

    scores_of_query: how many a row has for a position, of all heads. Pieces of rows change no bit.
    """
    longest = max(far - near for near, far, _ in stretches)
    at_once = max(1, _SCORES // (longest * scores_of_query))
    return [(first, min(first + at_once, rows), *stretch) for first in range(0, rows, at_once) for stretch in stretches]


def _corner(like: Tensor, length: int, shared: int) -> Tensor:
    """What hides from each query of a stretch the keys behind it: (length * shared, length), to be added to scores."""
    hidden = torch.full((length, length), -torch.inf, dtype=like.dtype, device=like.device).triu_(1)
    return hidden.repeat_interleave(shared, dim=0)


def _behind(like: Tensor, wanted: Tensor, length: int) -> Tensor:
    """What hides the keys behind each query at the positions wanted: (B, 1, W, 1, length), to be added to scores."""
    hidden = torch.arange(length, device=like.device) > wanted.unsqueeze(2)
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf).unsqueeze(1).unsqueeze(3)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate the two halves of the last dimension into each other, by angles (..., T, d); with -sin, back again."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1.0)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
