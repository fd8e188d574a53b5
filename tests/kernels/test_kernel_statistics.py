"""kl_penalty, shaped_rewards, masked_mean, masked_whiten: formulas, masks, gradients, ranks."""

from __future__ import annotations

import math
from pathlib import Path

import float64_oracle as oracle
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import EPS, backends_for, close, masks, normal, poisoned, random_mask

from rlhf_kernels import kl_penalty, masked_mean, masked_whiten, shaped_rewards
from rlhf_kernels.ops.whiten import moments

FORMULAS = {
    "k1": lambda r: r,
    "k2": lambda r: r * r / 2,
    "k3": lambda r: math.exp(-r) - 1 + r,
    "abs": abs,
}


@pytest.mark.parametrize("estimator", FORMULAS)
def test_kl_penalty(estimator):
    logprobs, reference = normal(4, 9, seed=1), normal(4, 9, seed=2)
    r = oracle.array(logprobs) - oracle.array(reference)
    # r rounds once at its size; exp(-r) up to e^4 carries that on.
    close(
        kl_penalty(logprobs, reference, estimator=estimator),
        np.vectorize(FORMULAS[estimator])(r),
        4 * EPS * math.exp(abs(r).max()),
    )
    assert kl_penalty(logprobs.bfloat16(), reference).dtype == torch.float32


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty_gradient(estimator):
    inputs = [normal(5, seed=s).double().requires_grad_() for s in (1, 2)]
    assert torch.autograd.gradcheck(lambda a, b: kl_penalty(a, b, estimator=estimator), inputs)


@given(mask=masks(), seed=st.integers(0, 50))
def test_shaped_rewards(mask, seed):
    rows, length = mask.shape
    scores, kl = normal(rows, seed=seed), normal(rows, length, seed=seed + 1)
    rewards = shaped_rewards(
        poisoned(scores, mask.any(dim=1)), poisoned(kl, mask), mask, kl_coef=0.3
    )
    # A product and a sum of numbers of order 1 to 4.
    close(rewards, oracle.shaped_rewards(scores, kl, mask, 0.3), 8 * EPS)


def test_shaped_rewards_add_up_to_score_minus_kl():
    """The seed formula: reward_score - kl_coef · sum of log-ratios."""
    scores, kl, mask = normal(6, seed=1), normal(6, 8, seed=2), random_mask(6, 8)
    total = shaped_rewards(scores, kl, mask.long(), kl_coef=0.1).sum(dim=1)
    expected = torch.where(mask.any(dim=1), scores - 0.1 * torch.where(mask, kl, 0).sum(dim=1), 0)
    close(total, expected, 16 * EPS)


@pytest.mark.parametrize("dim", [None, 0, 1, (0, 1)])
def test_masked_mean(dim):
    x, mask = normal(4, 7, seed=1), random_mask(4, 7)
    dirty = poisoned(x, mask).requires_grad_()
    kept = np.where(mask.numpy(), oracle.array(x), 0.0)
    counts = np.maximum(mask.numpy().sum(axis=dim), 1)
    result = masked_mean(dirty, mask, dim=dim)
    close(result, kept.sum(axis=dim) / counts, 8 * EPS)
    (grad,) = torch.autograd.grad(result.sum(), dirty)
    assert (grad[~mask] == 0).all() and grad.isfinite().all() and (grad[0] > 0).all()


@given(mask=masks(max_rows=6, max_length=8), shift_mean=st.booleans(), seed=st.integers(0, 50))
def test_masked_whiten(mask, shift_mean, seed):
    x = normal(*mask.shape, seed=seed) + 3.0
    result = masked_whiten(poisoned(x, mask), mask, shift_mean=shift_mean)
    # Rounding of x (size 8) divided by the deviation, at least 1e-4 by way of eps.
    deviation = float(x[mask].double().var(correction=0)) if mask.any() else 1.0
    atol = 16 * EPS * (8 / math.sqrt(deviation + 1e-8) + 8)
    close(result, oracle.whiten(x, mask, shift_mean), atol)
    assert result.dtype == torch.float32 and (result[~mask] == 0).all()


def test_whitening_small_deviations_around_a_large_mean():
    """A sum of squares in float32 would lose the variance altogether."""
    x = 1000.0 + normal(50, 20, seed=1, scale=0.01)
    mask = torch.ones(50, 20, dtype=torch.bool)
    close(masked_whiten(x, mask), oracle.whiten(x, mask), 2 * EPS * 1000 / 0.01)
    result = masked_whiten(x, mask)
    assert abs(result.std(correction=0) - 1) < 0.01 and abs(result.mean()) < 0.01


@pytest.mark.parametrize("backend", backends_for("moments"))
@pytest.mark.parametrize("first", [0.0, 1e4])
def test_a_long_series_whose_first_number_stands_apart(backend: str, first: float):
    """Deviations from it alone would be a million times as large as those from the mean."""
    x = torch.full((1 << 20,), 0.1)
    x[0] = first
    count, mean, squares = moments(x, torch.ones_like(x, dtype=torch.bool), backend).tolist()
    exact = oracle.array(x)
    around = ((exact - exact.mean()) ** 2).sum()
    assert count == len(exact)
    if backend == "triton":  # rounds to float32 in a block of 1024, by the size of its largest
        largest = abs(exact).reshape(-1, 1024).max(axis=1)
        of_mean, of_squares = 2 * EPS * largest.mean(), 16 * EPS * around
    else:  # sums of 4096 numbers, whose squares lose as much again against those around the mean
        rounding = 4096**2 * torch.finfo(torch.float64).eps
        of_mean, of_squares = rounding * abs(exact.mean()), rounding * around
    assert abs(mean - exact.mean()) <= of_mean
    assert abs(squares - around) <= of_squares


def test_whitening_detaches_and_has_an_eps():
    x = torch.full((2, 3), 5.0, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    result = masked_whiten(x, mask)
    assert not result.requires_grad and (result == 0).all()
    assert (masked_whiten(x, mask, shift_mean=False) == 5).all()
    x, mask = normal(3, 4, seed=1), random_mask(3, 4)
    close(masked_whiten(x, mask, eps=0.5), oracle.whiten(x, mask, eps=0.5), 64 * EPS)


@pytest.mark.parametrize("backend", backends_for("whiten"))
@pytest.mark.parametrize("shift", [True, False])
def test_what_is_not_finite_stays_out_of_masked_places(backend: str, shift: bool):
    mask = torch.tensor([[True, True, True, False]])
    for bad in (math.nan, math.inf):
        x = torch.tensor([[1.0, bad, 2.0, 5.0]])
        whitened = masked_whiten(x, mask, shift_mean=shift, backend=backend)
        assert whitened[0, :3].isnan().all() and whitened[0, 3] == 0


@pytest.mark.parametrize("backend", backends_for("whiten"))
def test_a_single_number_is_whitened_too(backend: str):
    whitened = masked_whiten(torch.tensor(3.0), torch.tensor(True), backend=backend)
    assert whitened.shape == () and whitened == 0


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
def test_an_eps_that_is_not_positive_is_refused(eps: float):
    with pytest.raises(ValueError, match="eps is"):
        masked_whiten(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), eps=eps)


# The mask, and where the second rank's rows begin: there it holds some valid ones, or none at all.
RANK_CASES = [(random_mask(9, 6), 4), (random_mask(3, 6), 2)]


def rank_input(mask: torch.Tensor) -> torch.Tensor:
    return normal(*mask.shape, seed=3) * 2 + 5


def _whiten_on_a_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for case, (mask, border) in enumerate(RANK_CASES):
            part = slice(0, border) if rank == 0 else slice(border, None)
            x = rank_input(mask)[part]
            for shift in (True, False):
                out = masked_whiten(x, mask[part], shift_mean=shift, group=dist.group.WORLD)
                torch.save(out, f"{folder}/{case}-{shift}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_ranks_whiten_as_one(tmp_path: Path):
    torch.multiprocessing.spawn(_whiten_on_a_rank, (str(tmp_path),), nprocs=2)
    for case, (mask, _) in enumerate(RANK_CASES):
        for shift in (True, False):
            files = [tmp_path / f"{case}-{shift}-{rank}.pt" for rank in (0, 1)]
            joined = torch.cat([torch.load(file, weights_only=True) for file in files])
            # The sums are float64 in a different order; one rounding to float32 of up to 12.
            close(joined, masked_whiten(rank_input(mask), mask, shift_mean=shift), 16 * EPS)
