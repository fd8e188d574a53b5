"""row_attention against the float64 formula: values, gradients, any rows, heads and strides."""

from __future__ import annotations

import attention_oracle as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import backends_for, normal, within
from torch import Tensor

from rlhf_kernels.ops.row_attention import row_attention

BACKENDS = backends_for("row_attention_forward", "row_attention_backward")
pytestmark = pytest.mark.parametrize("backend", BACKENDS)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around a tile (64), over several; blocks of 6 and vectors of 4, 8 and 16 with tails.
LENGTHS = [0, 1, 7, 63, 64, 65, 130, 300]
SIZES = [1, 8, 16, 20, 64, 80, 128, 256]


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def case(
    lengths: list[int], heads: int, kv_heads: int, size: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and an upstream gradient."""
    tensors = [
        normal(sum(lengths), n, size, seed=seed).to(dtype)
        for seed, n in enumerate((heads, kv_heads, kv_heads, heads))
    ]
    return tensors[:3], tensors[3]


def with_gradients(
    inputs: list[Tensor],
    upstream: Tensor,
    lengths: list[int],
    backend: str,
    scale: float | None = None,
) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = row_attention(*leaves, starts_of(lengths), scale, backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def check(
    inputs: list[Tensor],
    upstream: Tensor,
    lengths: list[int],
    backend: str,
    scale: float | None = None,
) -> None:
    found = with_gradients(inputs, upstream, lengths, backend, scale)
    scale = inputs[0].shape[2] ** -0.5 if scale is None else scale
    expected = oracle.rows(inputs, upstream, lengths, scale)
    for x, like, (exact, bound) in zip(found, (inputs[0], *inputs), expected):
        assert x.dtype == like.dtype and x.shape == like.shape and x.is_contiguous()
        within(x, exact, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_float64(backend, size, dtype):
    lengths = [65, 0, 1, 130, 7]
    check(*case(lengths, 4, 2, size, dtype), lengths, backend)


@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    size=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 1.0, -0.3, 0.0]),
)
def test_any_rows_and_heads(backend, lengths, kv_heads, group, size, dtype, scale):
    check(*case(lengths, kv_heads * group, kv_heads, size, dtype), lengths, backend, scale)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_strided_views(backend, dtype):
    """As transformers has them, cut out of a wider tensor, and with numbers of a head apart."""
    lengths = [70, 5]
    inputs, upstream = case(lengths, 4, 2, 16, dtype)
    expected = with_gradients(inputs, upstream, lengths, backend)
    of_heads = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    cut = [torch.cat([x, x], dim=2)[..., 16:] for x in inputs]
    apart = [x.mT.contiguous().mT for x in inputs]
    for views in (of_heads, cut, apart):
        for g in (upstream, upstream.mT.contiguous().mT, upstream[:1, :1, :1].expand_as(upstream)):
            found = with_gradients(views, g, lengths, backend)
            whole = with_gradients(inputs, g.contiguous(), lengths, backend)
            assert all(torch.equal(a, b) for a, b in zip(found, whole))
            assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("size", [8, 64])
def test_a_row_is_pytorchs_causal_attention(backend, size):
    lengths = [63, 64, 3]
    inputs, upstream = case(lengths, 6, 2, size)
    found = with_gradients(inputs, upstream, lengths, backend)
    leaves = [x.requires_grad_() for x in inputs]
    rows = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in row), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for row in zip(*(x.split(lengths) for x in leaves))
    ]
    out = torch.cat(rows)
    expected = [out, *torch.autograd.grad(out, leaves, upstream)]
    bounds = oracle.rows(inputs, upstream, lengths, size**-0.5)
    for a, b, (_, bound) in zip(found, expected, bounds):
        within(a, b, 2 * bound)


@pytest.mark.parametrize("place", [0, 70, 95])
def test_a_nan_stays_in_its_row(backend, place):
    """Also where scratch memory is used again: rows before and after are as without it."""
    lengths = [70, 30, 66, 1]
    inputs, upstream = case(lengths, 2, 1, 20)
    clean = with_gradients(inputs, upstream, lengths, backend)
    for number in range(3):
        broken = [x.clone() for x in inputs]
        broken[number][place] = float("nan")
        found = with_gradients(broken, upstream, lengths, backend)
        assert found[0][place].isnan().any()
        row = 0 if place < 70 else 1
        for a, b in zip(found, clean):
            for i, (x, y) in enumerate(zip(a.split(lengths), b.split(lengths))):
                assert i == row or torch.equal(x, y)


def test_large_scores_and_infinite_ones(backend):
    """Scores of some thousands leave one key a query; -inf hides a key like the later ones."""
    lengths = [130]
    (query, key, value), upstream = case(lengths, 2, 2, 16)
    check([60 * query, 60 * key, value], upstream, lengths, backend)
    query[..., 0] = 1.0
    hidden = key.clone()
    hidden[40:100, :, 0] = -torch.inf
    out = row_attention(query, hidden, value, starts_of(lengths), backend=backend)
    first = row_attention(query[:40], key[:40], value[:40], starts_of([40]), backend=backend)
    assert torch.equal(out[:40], first) if backend == "cpu" else torch.allclose(out[:40], first)
    kept = [torch.cat([x[:40], x[100:]]) for x in (query, key, value)]
    rest = row_attention(*kept, starts_of([70]), backend=backend)
    torch.testing.assert_close(out[100:], rest[40:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_opcheck(backend, dtype):
    inputs, upstream = case([3, 2], 2, 1, 4, dtype)
    starts, operators = starts_of([3, 2]), torch.ops.rlhf_kernels
    leaves = [x.requires_grad_() for x in inputs]
    arguments = (*leaves, starts, 0.5, True, backend)
    torch.library.opcheck(operators.row_attention.default, arguments)
    details = [x.detach() for x in inputs]
    out, log_sums, exact = operators.row_attention(*details, starts, 0.5, True, backend)
    exact = exact if exact.numel() else out
    torch.library.opcheck(
        operators.row_attention_backward.default,
        (upstream, *details, starts, 0.5, exact, log_sums, backend),
    )


def test_without_gradients_it_is_the_same(backend):
    inputs, _ = case([9, 70], 2, 2, 8, torch.bfloat16)
    plain = row_attention(*inputs, starts_of([9, 70]), backend=backend)
    inputs[1].requires_grad_()
    assert torch.equal(row_attention(*inputs, starts_of([9, 70]), backend=backend), plain)
