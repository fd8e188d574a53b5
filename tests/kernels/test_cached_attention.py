"""cached_attention against float64: any keys, heads, masks and strides."""

from __future__ import annotations

import math

import attention_oracle as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import backends_for, normal, within
from torch import Tensor

from rlhf_kernels.ops.cached_attention import cached_attention

BACKENDS = backends_for("cached_attention")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around vectors of 4, 8 and 16.
KEYS = [1, 3, 16, 17, 50, 130]
SIZES = [1, 8, 20, 64, 80, 256]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def case(
    rows: int,
    kv_heads: int,
    group: int,
    keys: int,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Query, key and value."""
    shapes = [(rows, kv_heads * group, size), *[(rows, kv_heads, keys, size)] * 2]
    return [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]


def hiding(rows: int, keys: int, seed: int = 0) -> Tensor:
    """bool [rows, keys]: about a third hidden, never all."""
    seen = normal(rows, keys, seed=seed) > -0.4
    seen[torch.arange(rows), torch.arange(rows) % keys] = True
    return seen


def expected(
    inputs: list[Tensor], mask: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Exact results and bounds: those of the last token of a row of the keys that are seen."""
    results = []
    for row, (query, key, value) in enumerate(zip(*inputs)):
        seen = slice(None) if mask is None else mask[row]
        k, v = (x[:, seen].transpose(0, 1) for x in (key, value))
        q = torch.zeros(len(k), *query.shape)
        q[-1] = query
        factor = query.shape[1] ** -0.5 if scale is None else scale
        out, bound = oracle.row(q, k, v, torch.zeros_like(q), factor)[0]
        results.append((out[-1], bound[-1]))
    exact, bounds = zip(*results)
    return torch.stack(exact), torch.stack(bounds)


def check(
    inputs: list[Tensor], mask: Tensor | None, backend: str, scale: float | None = None
) -> None:
    out = cached_attention(*inputs, mask, scale, backend)
    assert out.dtype == inputs[0].dtype and out.shape == inputs[0].shape and out.is_contiguous()
    within(out, *expected(inputs, mask, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_float64(backend, size, dtype):
    for keys in KEYS:
        inputs = case(3, 2, 3, keys, size, dtype)
        check(inputs, None, backend)
        check(inputs, hiding(3, keys), backend)


@given(
    rows=st.integers(0, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    keys=st.sampled_from(KEYS),
    size=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 1.0, -0.3, 0.0]),
    seed=st.integers(0, 20),
)
def test_any_shape(backend, rows, kv_heads, group, keys, size, dtype, scale, seed):
    inputs = case(rows, kv_heads, group, keys, size, dtype)
    if rows == 0:
        assert cached_attention(*inputs, None, scale, backend).shape == inputs[0].shape
    else:
        check(inputs, hiding(rows, keys, seed), backend, scale)


def test_a_row_is_pytorchs_attention(backend):
    query, key, value = inputs = case(4, 3, 3, 40, 64)
    mask = hiding(4, 40)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], key, value, attn_mask=mask[:, None, None], enable_gqa=True
    )[:, :, 0]
    within(cached_attention(*inputs, mask, None, backend), theirs, 2 * expected(inputs, mask)[1])


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_strided_views(backend, dtype):
    """A cache with room behind it, as projections leave a query, and numbers of a head apart."""
    query, key, value = inputs = case(3, 2, 2, 20, 16, dtype)
    mask = hiding(3, 20)
    whole, (exact, bound) = cached_attention(*inputs, mask, None, backend), expected(inputs, mask)
    roomy = [torch.cat([x, torch.full_like(x, math.nan)], dim=2)[:, :, :20] for x in (key, value)]
    by_tokens = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)]
    apart = [x.mT.contiguous().mT for x in (key, value)]
    cut = torch.cat([query, query], dim=2)[..., 16:]
    wide = torch.cat([mask, ~mask], dim=1)[:, :20]
    for k, v in (roomy, by_tokens, apart):
        for q in (query, cut, query.mT.contiguous().mT):
            for m in (mask, wide, mask.T.contiguous().T):
                found = cached_attention(q, k, v, m, None, backend)
                within(found, exact, bound)
                assert backend != "cpu" or torch.equal(found, whole)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_hidden_keys_do_not_matter(backend, junk):
    query, key, value = inputs = case(3, 2, 2, 30, 20)
    mask = hiding(3, 30)
    hidden = ~mask[:, None, :, None]
    dirty = [x.masked_fill(hidden, junk) for x in (key, value)]
    clean = cached_attention(*inputs, mask, None, backend)
    assert torch.equal(cached_attention(query, *dirty, mask, None, backend), clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_keys_is_zero(backend, dtype):
    inputs = case(3, 2, 2, 18, 20, dtype)
    mask = torch.ones(3, 18, dtype=torch.bool)
    mask[1] = False
    out = cached_attention(*inputs, mask, None, backend)
    assert (out[1] == 0).all()
    within(out[::2], *expected([x[::2] for x in inputs], None))
    none = [inputs[0], *(x[:, :, :0] for x in inputs[1:])]
    assert (cached_attention(*none, None, None, backend) == 0).all()


@pytest.mark.parametrize("place", range(3))
def test_a_nan_that_is_seen_is_not_hidden(backend, place):
    inputs = case(3, 2, 2, 30, 20)
    clean = cached_attention(*inputs, None, None, backend)
    broken = [x.clone() for x in inputs]
    broken[place][1, 1, ..., 3] = math.nan  # of the second head: a query's, or keys' and values'
    found = cached_attention(*broken, None, None, backend)
    heads = slice(1, 2) if place == 0 else slice(2, 4)
    assert found[1, heads].isnan().any(-1).all()
    kept = torch.ones(3, 4, dtype=torch.bool)
    kept[1, heads] = False
    assert torch.equal(found[kept], clean[kept])


def test_large_scores_leave_one_key(backend):
    query, key, value = case(3, 2, 2, 50, 16)
    check([60 * query, 60 * key, value], hiding(3, 50), backend)
