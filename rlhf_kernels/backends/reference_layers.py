"""The reference backend's layers of Llama-like transformers: see `reference.py`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up of tensors [..., N]."""
    wide = _wide(gate)
    return _stored(wide * wide.sigmoid() * _wide(up), gate)


def swiglu_backward(
    gate: Tensor, up: Tensor, grad_hidden: Tensor, need_hidden: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate and up [..., N], and silu(gate)·up again (or None)."""
    wide, wide_up, grad = _wide(gate), _wide(up), _wide(grad_hidden)
    sigmoid = wide.sigmoid()
    # Of -gate, as 1 - sigmoid would lose the digits of what is left.
    slope = sigmoid * (1.0 + wide * (-wide).sigmoid())
    silu = wide * sigmoid
    grad_gate, grad_up = grad * wide_up * slope, grad * silu
    hidden = _stored(silu * wide_up, gate) if need_hidden else None
    return _stored(grad_gate, gate), _stored(grad_up, gate), hidden


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x·rstd·weight [..., N], and rstd = rsqrt(mean(x²) + eps) [rows]."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _stored(wide * rstd * weight.to(wide.dtype), x), rstd.flatten()


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [..., N] and of the weight [N] (or None), rstd as the forward gave it."""
    rstd = rstd.view(*x.shape[:-1], 1)
    normalized, wide_grad = _wide(x) * rstd, _wide(grad)
    weighted = wide_grad * weight.to(rstd.dtype)
    mean = (weighted * normalized).mean(-1, keepdim=True)
    grad_x = _stored(rstd * (weighted - normalized * mean), x)
    if not need_weight:
        return grad_x, None
    columns = (wide_grad * normalized).reshape(rstd.numel(), weight.numel())
    return grad_x, columns.sum(0).to(weight.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool, out: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin of x [B, H, T, D] into `out`, or the adjoint: a gradient's."""
    wide = _wide(x)
    cos, sin = (table.to(wide.dtype).unsqueeze(1) for table in (cos, sin))
    turned = -_rotate_half(wide * sin) if adjoint else _rotate_half(wide) * sin
    return out.copy_(wide * cos + turned)


def _rotate_half(x: Tensor) -> Tensor:
    lower, upper = x.chunk(2, dim=-1)
    return torch.cat([-upper, lower], dim=-1)


def row_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor,
    scale: float,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output [tokens, heads, size], log-sum-exps [tokens, heads], and in 16 bits, for the backward,
    the output in float32."""
    exact = _wide(query).new_empty(query.shape)
    log_sums = exact.new_empty(query.shape[:2])
    for row in _rows(row_starts):
        scores = _causal_scores(query[row], key[row], scale)
        sums = scores.logsumexp(-1)  # [heads, tokens]
        probabilities = (scores - sums[..., None]).exp()
        exact[row] = (probabilities @ _for_heads(value[row], query.shape[1])).transpose(0, 1)
        log_sums[row] = sums.T
    rounded = exact.to(query.dtype)
    return rounded, log_sums, exact if for_backward and rounded is not exact else None


def row_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor,
    scale: float,
    exact: Tensor,
    log_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, contiguous. exact: the output before its rounding."""
    heads, kv_heads = query.shape[1], key.shape[1]
    grads = [x.new_empty(x.shape) for x in (query, key, value)]
    grad_query, grad_key, grad_value = grads
    for row in _rows(row_starts):
        upstream = _for_heads(grad_out[row], heads)
        scores = _causal_scores(query[row], key[row], scale)
        probabilities = (scores - log_sums[row].T[..., None]).exp()
        products = upstream @ _for_heads(value[row], heads).mT
        dots = (upstream * exact[row].transpose(0, 1)).sum(-1, keepdim=True)
        grad_scores = probabilities * (products - dots) * scale
        wide_query, wide_key = _for_heads(query[row], heads), _for_heads(key[row], heads)
        grad_query[row] = (grad_scores @ wide_key).transpose(0, 1)
        grad_key[row] = _summed_groups(grad_scores.mT @ wide_query, kv_heads)
        grad_value[row] = _summed_groups(probabilities.mT @ upstream, kv_heads)
    return grad_query, grad_key, grad_value


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Output [B, heads, size] of one query a row against keys [B, kv_heads, keys, size]."""
    groups = _wide(query).unflatten(1, (key.shape[1], -1)) * scale  # [B, kv_heads, group, size]
    wide_key, wide_value = _wide(key), _wide(value)
    if mask is not None:
        seen = mask[:, None, :, None]
        wide_key, wide_value = (torch.where(seen, x, 0.0) for x in (wide_key, wide_value))
    scores = groups @ wide_key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    none_seen = (scores == -torch.inf).all(-1, keepdim=True)
    probabilities = torch.where(none_seen, 0.0, scores.softmax(-1))
    return _stored((probabilities @ wide_value).flatten(1, 2), query)


def _rows(row_starts: Tensor) -> list[slice]:
    starts = row_starts.tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(starts) if begin < end]


def _for_heads(row: Tensor, heads: int) -> Tensor:
    """[heads, tokens, size] of [tokens, kv_heads, size], in float32 or wider."""
    return _wide(row).transpose(0, 1).repeat_interleave(heads // row.shape[1], dim=0)


def _causal_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[heads, tokens, tokens] of a row's queries and keys; -inf for later keys."""
    heads, tokens = query.shape[1], query.shape[0]
    scores = _for_heads(query, heads) * scale @ _for_heads(key, heads).mT
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(later, -torch.inf)


def _summed_groups(x: Tensor, kv_heads: int) -> Tensor:
    """[tokens, kv_heads, size] of [heads, tokens, size]."""
    return x.unflatten(0, (kv_heads, -1)).sum(1).transpose(0, 1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _stored(result: Tensor, like: Tensor) -> Tensor:
    """In the dtype of the input, without gaps: operations keep the strides of theirs."""
    return result.to(like.dtype).contiguous()
