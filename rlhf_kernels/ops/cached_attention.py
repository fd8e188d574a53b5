"""`rlhf_kernels::cached_attention`: attention of a step of sampling, one query a row of a batch.

floor: the bytes of keys and values over the memory's bandwidth
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backends, checks
from rlhf_kernels.ops import define


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale · query · keyᵀ) · value for one query a row and head; not differentiable.

    Arithmetic is float32, or float64 for float64 inputs, and the output is rounded once. What the
    mask hides is not read. A row that sees no key gets 0.

    Args:
        query: [B, heads, size], of any strides, like key and value; fastest with the last one 1.
        key, value: [B, kv_heads, keys, size]; each head serves heads / kv_heads query heads that
            are neighbours. The type and the device of query.
        mask: bool [B, keys], False for keys to hide; None: all are seen.
        scale: Of the products of queries and keys; size**-0.5 by default.
        backend: See `rlhf_kernels.backends`.

    Returns:
        [B, heads, size], contiguous, in the type of query.

    Raises:
        TypeError: The types are not floating-point and alike, or the mask is not bool.
        ValueError: Shapes or devices do not fit.
    """
    _check(query, key, value, mask)
    scale = query.shape[2] ** -0.5 if scale is None else checks.finite("scale", scale)
    return _cached_attention(query, key, value, mask, scale, backend)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    checks.floating(query=query)
    checks.dimensions("query", query, 3, "[B, heads, size]")
    checks.dimensions("key", key, 4, "[B, kv_heads, keys, size]")
    rows, heads, size = query.shape
    kv_heads, keys = key.shape[1:3]
    checks.shape("key", key, (rows, kv_heads, keys, size), "query's rows and size")
    checks.like("key", key, value=value)
    checks.same_device("query", query, key=key, mask=mask)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"key and value are {key.dtype} and {value.dtype}; expected {query.dtype}")
    if kv_heads == 0 or heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"query has {heads} heads; expected a multiple of key's {kv_heads}")
    if size == 0:
        raise ValueError("heads are of size 0; expected at least 1")
    if mask is None:
        return
    checks.shape("mask", mask, (rows, keys), "one a key")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool")


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    chosen = backends.choose("cached_attention", query, backend)
    return chosen.cached_attention(query, key, value, mask, scale)


def _fake(query: Tensor, *others: Any) -> Tensor:
    return query.new_empty(query.shape)


_cached_attention = define("cached_attention", _forward, _fake)
