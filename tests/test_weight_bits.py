"""The checksum of weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf.engine.weight_bits import sum_of_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (7,), ()])
@pytest.mark.parametrize("layout", ["whole", "strided", "offset"])
def test_the_sum_of_bits_sees_the_last_bit_of_any_number(
    dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> None:
    x = (torch.arange(math.prod(shape)).reshape(shape) % 3).to(dtype)
    if layout == "strided":
        x = torch.stack([x, x], dim=-1)[..., 0]
    if layout == "offset":
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
    before = sum_of_bits(x)
    assert before == sum_of_bits(x.contiguous().clone())
    assert before.dtype == torch.int64 and before.shape == ()
    bits = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    for place in itertools.product(*map(range, shape)):
        bits[place] ^= 1
        assert sum_of_bits(x) != before
        bits[place] ^= 1
        assert sum_of_bits(x) == before
