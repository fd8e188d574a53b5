"""verl's masked mean and whitening on our kernels, and its GAE, which is whitened."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparisons import DTYPES, SEEDS, close, eps, masks, normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from verl_check import check
from verl_peer import algorithms, functional

from rlhf_kernels.integrations import verl

# verl takes n/(n - 1), of two integers, in float32 whatever the numbers are.
BESSEL = 2 * torch.finfo(torch.float32).eps


def spread(x: Tensor, mask: Tensor) -> float:
    """How much whitening enlarges an error of the numbers."""
    return float(1 / (x.double()[mask.bool()].var() + 1e-8).sqrt())


@given(mask=masks(valid=0), axis=st.sampled_from([None, -1, 0, (0, 1)]), dtype=DTYPES, seed=SEEDS)
def test_masked_mean(mask: Tensor, axis: Any, dtype: torch.dtype, seed: int) -> None:
    x = normal(*mask.shape, seed=seed, dtype=dtype)
    # In verl as here the sum is taken, and rounded, in this dtype.
    summed = torch.promote_types(dtype, mask.dtype) if mask.is_floating_point() else dtype
    tolerance = 4 * mask.numel() * torch.finfo(summed).eps
    check(
        lambda x: verl.masked_mean(x, mask, axis),
        lambda x: functional.masked_mean(x, mask, axis),
        [x],
        tolerance,
        tolerance,
        seed,
    )


def test_masked_mean_weighs_by_the_mask() -> None:
    x, weights = torch.tensor([1.0, 2.0, math.nan]), torch.tensor([0.5, 2.0, 0.0])
    close(verl.masked_mean(x, weights), functional.masked_mean(x, weights), 1e-6)


@given(
    mask=masks(valid=2),
    shift_mean=st.booleans(),
    dtype=DTYPES,
    with_gradient=st.booleans(),
    seed=SEEDS,
)
def test_masked_whiten(
    mask: Tensor, shift_mean: bool, dtype: torch.dtype, with_gradient: bool, seed: int
) -> None:
    x = normal(*mask.shape, seed=seed, dtype=dtype)
    # 16 roundings of numbers, divided by the deviation, which they move in turn.
    size = 1 + float(x.abs().max()) * spread(x, mask)
    tolerance = 16 * eps(dtype) * size**2 + BESSEL * size
    if with_gradient:
        check(
            lambda x: verl.masked_whiten(x, mask, shift_mean),
            lambda x: functional.masked_whiten(x, mask, shift_mean),
            [x],
            tolerance,
            tolerance * size * mask.numel(),
            seed,
        )
    else:
        expected = functional.masked_whiten(x.double(), mask, shift_mean)
        actual = verl.masked_whiten(x, mask, shift_mean)
        assert actual.dtype == functional.masked_whiten(x, mask, shift_mean).dtype
        close(actual, expected, tolerance)


@pytest.mark.parametrize("valid", [0, 1])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_too_few_to_whiten_is_an_error_as_in_verl(valid: int, requires_grad: bool) -> None:
    x = torch.zeros(2, 3, requires_grad=requires_grad)
    mask = torch.arange(6).view(2, 3) < valid
    for function in (verl.masked_whiten, functional.masked_whiten):
        with pytest.raises(ValueError):
            function(x, mask)
    with pytest.raises(ValueError):
        verl.compute_gae_advantage_return(x, x, mask, 1.0, 1.0)


@given(
    mask=masks(valid=2),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    padded=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_gae(
    mask: Tensor, gamma: float, lam: float, padded: bool, dtype: torch.dtype, seed: int
) -> None:
    if padded:  # on the right alone, which takes a shorter way
        mask = mask.sort(dim=1, descending=True).values
    rewards = normal(*mask.shape, seed=seed, dtype=dtype)
    values = normal(*mask.shape, seed=seed + 1, dtype=dtype)
    theirs = mask.long() if mask.dtype == torch.bool else mask  # verl's takes no bool
    call = algorithms.compute_gae_advantage_return
    expected, returns = call(rewards.double(), values.double(), theirs, gamma, lam)
    found, found_returns = verl.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    same_type = call(rewards, values, theirs, gamma, lam)
    assert [found.dtype, found_returns.dtype] == [each.dtype for each in same_type]
    # Each step rounds four times, at the size of what has been summed at most.
    length = mask.shape[1]
    summed = float((rewards.double().abs() + 2 * values.double().abs()).sum(1).max())
    error = 4 * length * eps(dtype) * summed
    close(found_returns, returns, error)
    raw = returns - values.double()
    enlarged = 1 + float(raw.abs().max()) * spread(raw, mask)
    tolerance = (error * spread(raw, mask) + 16 * eps(dtype) * enlarged) * enlarged
    close(found, expected, tolerance + BESSEL * enlarged)


def test_gae_of_integers_alone_is_an_error_that_says_so() -> None:
    whole = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"integers; expected floating-point"):
        verl.compute_gae_advantage_return(whole, whole, whole, 1.0, 1.0)


def test_gae_ignores_what_stands_at_masked_places() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]])
    rewards = normal(2, 4, seed=0, dtype=torch.float32)
    values = normal(2, 4, seed=1, dtype=torch.float32)
    expected, _ = verl.compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)
    rewards[mask == 0] = values[mask == 0] = math.nan
    found, _ = verl.compute_gae_advantage_return(rewards, values, mask, 0.9, 0.8)
    assert torch.equal(found, expected)
