"""The forward of the Llama family written out, for training a frozen model of float32 on a CPU.

transformers' own forward computes the same; there every norm, rotation, mask and gate is a handful of operators, each
with a pass through memory and a node for autograd. Here a step of a layer is one node with its gradient by hand. Linear
layers are called as the modules that they are, so hooks on them (LoRA, IA3, adapters) act as everywhere else.

Shapes: B rows, T positions, D hidden size, H query heads, G key and value heads, d head size, n virtual positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_STRETCH = 64  # queries at a time
# By module, not by the configuration's model_type: code that comes with a model may call itself llama too.
_DECODERS = frozenset(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2"))


def written_out(network: Any) -> bool:
    """Whether `last_hidden` computes what this transformers model does, as it is attached to now."""
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
        part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__ for part in (*norms, *others)
    )


def last_hidden(network: Any, inputs: Tensor, past: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Last hidden states (B, T, D) of embedded `inputs` (B, T, D), right-padded.

    past: per layer (key, value), each (B, G, n, d), in front of the layer's own, or empty.
    """
    decoder = network.base_model
    n, length = (past[0][0].shape[2] if past else 0), inputs.shape[1]
    positions = torch.arange(n, n + length, device=inputs.device).unsqueeze(0)
    cos, sin = (table[0] for table in decoder.rotary_emb(inputs, position_ids=positions))

    hidden = inputs
    change: Tensor | None = None  # what the last sublayer adds; its norm and the sum are one step
    for i, layer in enumerate(decoder.layers):
        hidden, normed = _norm(hidden, change, layer.input_layernorm)
        attention = layer.self_attn
        heads = _Attention.apply(
            attention.q_proj(normed),
            attention.k_proj(normed),
            attention.v_proj(normed),
            *(past[i] if past else (None, None)),
            cos,
            sin,
            attention.scaling,
        )
        hidden, normed = _norm(hidden, attention.o_proj(heads), layer.post_attention_layernorm)
        mlp = layer.mlp
        change = mlp.down_proj(_Gate.apply(mlp.gate_proj(normed), mlp.up_proj(normed)))
    return _norm(hidden, change, decoder.norm)[1]


def _norm(hidden: Tensor, change: Tensor | None, module: Any) -> tuple[Tensor, Tensor]:
    """hidden + change, and its norm."""
    summed, normed = _AddNorm.apply(hidden, change, module.weight, module.variance_epsilon)
    return summed, normed


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
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_up = torch.nn.functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), of_up


class _Attention(torch.autograd.Function):
    """Rotated queries on rotated keys behind a prefix (Vaswani et al. 2017, equation 1; Su et al. 2021).

    q (B, T, H * d); k, v (B, T, G * d); prefix of keys and values (B, G, n, d) or None; cos, sin (T, d).
    Returns (B, T, H * d). A stretch of queries at a time looks at the keys up to its own end, and the H / G query heads
    of a key head look at the same ones: but for corners nothing is computed that is masked away, and no key repeated.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None,
        cos: Tensor, sin: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        rows, length, head = len(q), q.shape[1], cos.shape[-1]
        groups, shared = k.shape[-1] // head, q.shape[-1] // k.shape[-1]
        n = 0 if past_k is None else past_k.shape[2]
        queries = q.new_empty(rows, groups, length, shared, head)
        keys, values = k.new_empty(2, rows, groups, n + length, head)
        _rotate(_split(q, groups, shared), cos.unsqueeze(1), sin.unsqueeze(1), queries)
        _rotate(_split(k, groups, 1).squeeze(3), cos, sin, keys[:, :, n:])
        values[:, :, n:] = _split(v, groups, 1).squeeze(3)
        if past_k is not None:
            keys[:, :, :n], values[:, :, :n] = past_k, past_v
        # Scaled here, where they are few, and not their products.
        queries = queries.view(rows * groups, length * shared, head).mul_(scale)
        keys, values = (t.view(rows * groups, n + length, head) for t in (keys, values))
        shares, seen = [], torch.empty_like(queries)
        for near, far in _stretches(length):
            own = slice(near * shared, far * shared)
            scores = torch.bmm(queries[:, own], keys[:, : n + far].mT)
            scores[:, :, n + near :] += _corner(scores, far - near, shared)
            shares.append(scores.softmax(dim=-1))
            seen[:, own] = torch.bmm(shares[-1], values[:, : n + far])
        ctx.save_for_backward(queries, keys, values, cos, sin, *shares)
        ctx.sizes = rows, length, groups, shared, n, scale
        return seen.view(rows, groups, length, shared, head).transpose(1, 2).reshape(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, cos, sin, *shares = ctx.saved_tensors
        rows, length, groups, shared, n, scale = ctx.sizes
        of_seen = _split(grad, groups, shared).reshape(queries.shape)
        of_queries, of_keys, of_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for (near, far), share in zip(_stretches(length), shares, strict=True):
            own, before = slice(near * shared, far * shared), slice(n + far)
            of_share = torch.bmm(of_seen[:, own], values[:, before].mT)
            of_scores = torch._softmax_backward_data(of_share, share, -1, share.dtype)
            # baddbmm_ on such a slice would be one product after another.
            of_values[:, before] += torch.bmm(share.mT, of_seen[:, own])
            of_keys[:, before] += torch.bmm(of_scores.mT, queries[:, own])
            if ctx.needs_input_grad[0]:
                of_queries[:, own] = torch.bmm(of_scores, keys[:, before])
        of_q = of_k = of_v = None
        of_keys, of_values = (t.view(rows, groups, n + length, -1) for t in (of_keys, of_values))
        if ctx.needs_input_grad[0]:
            of_q = torch.empty_like(grad)
            turned = of_queries.mul_(scale).view(rows, groups, length, shared, -1)
            _rotate(turned, cos.unsqueeze(1), -sin.unsqueeze(1), _split(of_q, groups, shared))
        if ctx.needs_input_grad[1]:
            of_k = grad.new_empty(rows, length, groups * cos.shape[-1])
            _rotate(of_keys[:, :, n:], cos, -sin, _split(of_k, groups, 1).squeeze(3))
        if ctx.needs_input_grad[2]:
            of_v = of_values[:, :, n:].transpose(1, 2).reshape(rows, length, -1)
        prefix = (of_keys[:, :, :n], of_values[:, :, :n]) if ctx.needs_input_grad[3] else (None, None)
        return of_q, of_k, of_v, *prefix, None, None, None


def _split(x: Tensor, groups: int, shared: int) -> Tensor:
    """(B, T, G * shared * d) as (B, G, T, shared, d), without a copy."""
    return x.view(*x.shape[:2], groups, shared, -1).transpose(1, 2)


def _stretches(length: int) -> list[tuple[int, int]]:
    """Bounds of the stretches of queries."""
    return [(near, min(near + _STRETCH, length)) for near in range(0, length, _STRETCH)]


def _corner(like: Tensor, length: int, shared: int) -> Tensor:
    """What hides from each query of a stretch the keys behind it: (length * shared, length), to be added to scores."""
    hidden = torch.full((length, length), -torch.inf, dtype=like.dtype, device=like.device).triu_(1)
    return hidden.repeat_interleave(shared, dim=0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate the two halves of the last dimension into each other, by angles (T, d); with -sin, back again."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1.0)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
