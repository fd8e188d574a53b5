"""`rlhf_kernels::row_attention` and its backward: causal attention in rows without padding.

Nothing of the size of a row squared is kept: the backward computes the probabilities again from the
log-sum-exps (Dao et al. 2022, "FlashAttention", https://arxiv.org/abs/2205.14135).

    floor: 2·length·heads·size operations a token forward, 5·length·heads·size backward
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backends, checks
from rlhf_kernels.ops import define

LARGEST_SIZE = 256  # of a head


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each token attends to itself and the earlier tokens of its own row; differentiable once.

    Arithmetic is float32, or float64 for float64 inputs, and the output is rounded once. A NaN
    stays in its row.

    Args:
        query: [tokens, heads, size], of any strides, like key and value; fastest with the last one
            1. size: up to 256.
        key, value: [tokens, kv_heads, size]; each serves heads / kv_heads query heads that are
            neighbours. The type and the device of query.
        row_starts: [rows + 1] int64 or int32 on the CPU: the token where each row begins, and the
            number of tokens. Rows may be empty.
        scale: Of the products of queries and keys; size**-0.5 by default.
        backend: See `rlhf_kernels.backends`.

    Returns:
        [tokens, heads, size], contiguous, in the type of query.

    Raises:
        TypeError: The types are not floating-point and alike, or row_starts holds no integers.
        ValueError: Shapes or devices do not fit, or row_starts does not go from 0 to the number of
            tokens without turning back.
    """
    _check(query, key, value, row_starts)
    scale = query.shape[2] ** -0.5 if scale is None else checks.finite("scale", scale)
    for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    row_starts = row_starts.to(torch.int64)
    return _row_attention(query, key, value, row_starts, scale, for_backward, backend)[0]


def _check(query: Tensor, key: Tensor, value: Tensor, row_starts: Tensor) -> None:
    checks.floating(query=query)
    checks.dimensions("query", query, 3, "[tokens, heads, size]")
    checks.dimensions("key", key, 3, "[tokens, kv_heads, size]")
    tokens, heads, size = query.shape
    checks.shape("key", key, (tokens, key.shape[1], size), "query's but for the heads")
    checks.like("key", key, value=value)
    checks.same_device("query", query, key=key)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"key and value are {key.dtype} and {value.dtype}; expected {query.dtype}")
    if key.shape[1] == 0 or heads == 0 or heads % key.shape[1] != 0:
        raise ValueError(f"query has {heads} heads; expected a multiple of key's {key.shape[1]}")
    if not 0 < size <= LARGEST_SIZE:
        raise ValueError(f"heads are of size {size}; expected 1 to {LARGEST_SIZE}")
    if row_starts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"row_starts has dtype {row_starts.dtype}; expected int32 or int64")
    if row_starts.dim() != 1 or row_starts.numel() == 0 or row_starts.device.type != "cpu":
        raise ValueError(
            f"row_starts has shape {tuple(row_starts.shape)} on {row_starts.device}; expected "
            "[rows + 1] on the CPU"
        )


def _check_starts(row_starts: Tensor, tokens: int) -> None:
    """A kernel would read and write beyond its tensors."""
    starts = row_starts.tolist()
    if starts[0] != 0 or starts[-1] != tokens:
        raise ValueError(
            f"row_starts goes from {starts[0]} to {starts[-1]}; expected 0 to {tokens}"
        )
    if any(begin > end for begin, end in itertools.pairwise(starts)):
        raise ValueError("row_starts turns back; expected rows one behind the other")


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor,
    scale: float,
    for_backward: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_starts(row_starts, query.shape[0])
    chosen = backends.choose("row_attention_forward", query, backend)
    out, log_sums, exact = chosen.row_attention_forward(
        query, key, value, row_starts, scale, for_backward
    )
    # An operator returns tensors, so "none" is an empty one.
    return out, log_sums, log_sums.new_empty(0) if exact is None else exact


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor,
    scale: float,
    for_backward: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = checks.compute_dtype(query)
    rounded = for_backward and query.dtype != wide
    return (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:2], dtype=wide),
        query.new_empty(query.shape if rounded else (0,), dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, row_starts, scale, _, backend = inputs
    out, log_sums, exact = output
    ctx.mark_non_differentiable(log_sums, exact)
    ctx.set_materialize_grads(False)
    rounded = query.dtype != checks.compute_dtype(query)
    ctx.save_for_backward(query, key, value, row_starts, exact if rounded else out, log_sums)
    ctx.options = scale, backend


def _autograd_backward(
    ctx: Any, grad_out: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    query, key, value, row_starts, exact, log_sums = ctx.saved_tensors
    scale, backend = ctx.options
    grads = _row_attention_backward(
        grad_out, query, key, value, row_starts, scale, exact, log_sums, backend
    )
    return (*grads, None, None, None, None)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor,
    scale: float,
    exact: Tensor,
    log_sums: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_starts(row_starts, query.shape[0])
    chosen = backends.choose("row_attention_backward", query, backend)
    return chosen.row_attention_backward(
        grad_out, query, key, value, row_starts, scale, exact, log_sums
    )


def _backward_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_row_attention_backward = define("row_attention_backward", _backward, _backward_fake)
_row_attention = define(
    "row_attention", _forward, _forward_fake, _setup_context, _autograd_backward
)
