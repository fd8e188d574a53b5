"""How a peer's functions are compared with ours: inputs, and what may differ by rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 50)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@st.composite
def masks(draw: st.DrawFn, valid: int = 1, longest: int = 9) -> Tensor:
    """Holes, empty rows, padding on both sides; bool, int64 or float32; `valid` entries or more."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, longest))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor(draw(st.lists(flags, min_size=rows, max_size=rows)))
    assume(int(mask.sum()) >= valid)
    return mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))


def normal(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def eps(dtype: torch.dtype) -> float:
    """Of the arithmetic."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def close(actual: Tensor, expected: Tensor, arithmetic: float) -> None:
    """Within the arithmetic's error, and half an eps (or subnormal) where it is stored."""
    info = torch.finfo(actual.dtype)
    stored = info.smallest_normal * info.eps
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach().double(),
        atol=arithmetic + stored,
        rtol=info.eps,
        equal_nan=True,
    )


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies that gradients are taken of."""
    return [tensor.to(dtype or tensor.dtype, copy=True).requires_grad_() for tensor in tensors]


def close_gradients(
    actual: Tensor,
    own: list[Tensor],
    expected: Tensor,
    wide: list[Tensor],
    upstream: Tensor,
    arithmetic: float,
) -> None:
    """Of our output with regard to its leaves, and of the peer's in float64."""
    found = torch.autograd.grad(actual, own, upstream)
    meant = torch.autograd.grad(expected, wide, upstream.to(expected.dtype))
    for one, other, leaf in zip(found, meant, own, strict=True):
        assert one.dtype == leaf.dtype
        close(one, other, arithmetic)
