"""verl's GAE, carried over masked places and whitened, against float64 sums."""

from __future__ import annotations

import math

import float64_oracle as oracle
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_cases import EPS, backends_for, close, masks, normal, random_mask
from torch import Tensor

from rlhf_kernels import backends
from rlhf_kernels.ops.whitened_gae import whitened_gae

pytestmark = pytest.mark.parametrize("backend", backends_for("gae_forward", "moments", "whiten"))

MASKS = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32]


def call(
    backend: str, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.ENVIRONMENT_VARIABLE, backend)
        return whitened_gae(rewards, values, mask, gamma, lam, 1e-8)


def definition(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Advantages before whitening, after it, and returns, in float64."""
    carried, _ = oracle.gae(rewards, values, mask, gamma, lam)
    valid = mask.bool().cpu().numpy()
    of_valid = carried[valid]
    for b in range(carried.shape[0]):
        following = 0.0
        for t in reversed(range(carried.shape[1])):
            following = carried[b, t] = carried[b, t] if valid[b, t] else following
    whitened = (carried - of_valid.mean()) / math.sqrt(of_valid.var(ddof=1) + 1e-8)
    return carried, whitened, carried + oracle.array(values)


def check(
    backend: str, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> None:
    advantages, returns, count = call(backend, rewards, values, mask, gamma, lam)
    carried, whitened, summed = definition(rewards, values, mask, gamma, lam)
    assert advantages.dtype == returns.dtype == torch.float32
    assert count == int((mask != 0).sum())
    # Four roundings a step that still counts, at the size of the running sum.
    length = mask.shape[1]
    steps = min(length, 1 / (1 - gamma * lam)) if gamma * lam < 1 else length
    error = 4 * EPS * steps * (1 + abs(summed).max() + abs(carried).max())
    close(returns, summed, error)
    # The deviation divides it, and is off by as much itself; then two roundings at that size.
    deviation = math.sqrt(carried[mask.bool().cpu().numpy()].var(ddof=1) + 1e-8)
    size = 1 + abs(whitened).max()
    close(advantages, whitened, (2 * error / deviation + 4 * EPS) * size)


@given(
    mask=masks(max_length=40),
    dtype=st.sampled_from(MASKS),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    seed=st.integers(0, 50),
)
def test_any_mask(backend, mask, dtype, gamma, lam, seed):
    assume(int(mask.sum()) >= 2)
    rewards, values = (normal(*mask.shape, seed=seed + i) for i in range(2))
    check(backend, rewards, values, mask.to(dtype), gamma, lam)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize(("rows", "length"), [(1, 2), (3, 63), (5, 64), (4, 65), (37, 130)])
def test_sizes(backend, rows, length, dtype):
    """Around the widths of vectors, with holes, empty rows and padding on both sides."""
    rewards, values = normal(rows, length, seed=1), normal(rows, length, seed=2)
    check(backend, rewards, values, random_mask(rows, length).to(dtype), 1.0, 0.95)
    lengths = torch.arange(rows)[:, None] * length // rows + 2
    padded = (torch.arange(length) < lengths).to(dtype)
    check(backend, rewards, values, padded | padded.flip(1) if rows > 1 else padded, 1.0, 0.95)


def test_a_large_batch_on_several_threads(backend):
    if backend != "cpu":
        pytest.skip("the loop over time that it is, or interpreted")
    mask = random_mask(300, 257).long()
    check(backend, normal(300, 257, seed=1), normal(300, 257, seed=2), mask, 1.0, 0.95)
    first = call(backend, normal(300, 257, seed=1), normal(300, 257, seed=2), mask, 1.0, 0.95)
    again = call(backend, normal(300, 257, seed=1), normal(300, 257, seed=2), mask, 1.0, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2]))


def test_a_number_in_any_of_its_bytes_is_valid(backend):
    """A mask of numbers whose lowest byte is 0, or that are negative."""
    mask = torch.tensor([[256, 0, -1, 2**40, 0], [0, 1, 0, 2**62, -(2**63)]])
    rewards, values = normal(2, 5, seed=1), normal(2, 5, seed=2)
    expected = call(backend, rewards, values, mask != 0, 1.0, 0.9)
    found = call(backend, rewards, values, mask, 1.0, 0.9)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    wide = torch.zeros(2, 70, dtype=torch.int64)
    wide[:, 60:65] = mask  # in whole vectors and in what is left
    rewards, values = normal(2, 70, seed=1), normal(2, 70, seed=2)
    expected = call(backend, rewards, values, wide != 0, 1.0, 0.9)
    found = call(backend, rewards, values, wide, 1.0, 0.9)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_masked_content_does_not_matter(backend):
    mask = random_mask(7, 20)
    rewards, values = normal(7, 20, seed=1), normal(7, 20, seed=2)
    clean = call(backend, rewards, values, mask, 1.0, 0.95)
    junk = torch.full((7, 20), math.nan)
    dirty = call(
        backend, torch.where(mask, rewards, junk), torch.where(mask, values, junk), mask, 1.0, 0.95
    )
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1][mask], dirty[1][mask])
    assert dirty[1][~mask].isnan().all()  # a return is the value and more


def test_layouts(backend):
    rewards, values = normal(8, 12, seed=1), normal(8, 12, seed=2)
    mask = random_mask(8, 12).long()
    expected = call(backend, rewards, values, mask, 1.0, 0.95)
    wider = torch.full((8, 20), 7.0)
    wider[:, 3:15] = values
    masks_apart = torch.ones(8, 30, dtype=torch.int64)
    masks_apart[:, 5:17] = mask
    found = call(
        backend,
        rewards.t().contiguous().t(),
        wider[:, 3:15],
        masks_apart[:, 5:17],
        1.0,
        0.95,
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    transposed = call(backend, rewards, values, mask.t().contiguous().t(), 1.0, 0.95)
    assert torch.equal(transposed[0], expected[0])


@pytest.mark.parametrize("valid", [0, 1])
def test_the_count_tells_that_there_is_nothing_to_whiten(backend, valid):
    mask = torch.arange(6).view(2, 3) < valid
    assert call(backend, torch.zeros(2, 3), torch.zeros(2, 3), mask, 1.0, 1.0)[2] == valid


def test_what_does_not_fit_is_named(backend):
    rewards = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"response_mask has shape \(2, 4\); expected \(2, 3\)"):
        call(backend, rewards, rewards, torch.ones(2, 4), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"token_level_rewards has shape \(6,\)"):
        call(backend, rewards.view(-1), rewards.view(-1), torch.ones(6), 1.0, 1.0)
    with pytest.raises(ValueError, match="gamma"):
        call(backend, rewards, rewards, torch.ones(2, 3), 1.5, 1.0)
