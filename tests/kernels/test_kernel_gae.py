"""gae and rollout_advantages against float64 sums."""

from __future__ import annotations

import float64_oracle as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    EPS,
    backends_for,
    close,
    here,
    masks,
    normal,
    packed,
    poisoned,
    random_mask,
)

from rlhf_kernels import (
    gae,
    kl_penalty,
    masked_mean,
    masked_whiten,
    rollout_advantages,
    shaped_rewards,
)

pytestmark = pytest.mark.parametrize("backend", backends_for("gae_forward"))


def tolerance(length: int, gamma: float, lam: float, size: float) -> float:
    """Each of the steps that still count rounds 4 times at the size of the running sum."""
    steps = min(length, 1 / (1 - gamma * lam)) if gamma * lam < 1 else length
    return 4 * EPS * steps * size


def check(rewards, values, mask, gamma, lam, bootstrap, backend, **options):
    numbers = {"gamma": gamma, "lam": lam, "bootstrap_values": bootstrap, **options}
    result = gae(rewards, values, mask, **numbers, backend=backend)
    expected = oracle.gae(rewards, values, mask, **numbers)
    size = 1.0 + max((abs(array).max() for array in expected if array.size), default=0.0)
    slowest = max(float(torch.as_tensor(x).max()) for x in (lam, options.get("value_lam", 0.0)))
    largest = float(torch.as_tensor(gamma).max())
    for actual, wanted in zip(result, expected):
        assert actual.dtype == torch.float32 and not actual.requires_grad
        close(actual, wanted, tolerance(mask.shape[1], largest, slowest, size))
        assert (actual[~mask] == 0).all()
    return result


@given(
    mask=masks(),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
    bootstrap=st.booleans(),
    seed=st.integers(0, 50),
)
def test_agrees_with_float64(backend, mask, gamma, lam, bootstrap, seed):
    rows, length = mask.shape
    check(
        normal(rows, length, seed=seed),
        normal(rows, length, seed=seed + 1),
        mask,
        gamma,
        lam,
        normal(rows, seed=seed + 2) if bootstrap else None,
        backend,
    )


# More rows than a block of any vector width, with a tail; long enough for sums to build up.
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 1), (1, 300), (37, 130), (0, 5), (4, 0)])
def test_sizes(backend, rows, length):
    mask = random_mask(rows, length)
    check(
        normal(rows, length, seed=1),
        normal(rows, length, seed=2),
        mask,
        1.0,
        0.95,
        normal(rows, seed=3),
        backend,
    )


RATES = st.sampled_from([1.0, 0.95, 0.5, 0.0])


@given(
    mask=masks(),
    gamma=RATES,
    lam=RATES,
    value_lam=RATES,
    per_sequence=st.booleans(),
    masked=st.sampled_from(["skip", "decay"]),
    bootstrap=st.booleans(),
    seed=st.integers(0, 50),
)
def test_all_options_padded_and_packed(
    backend, mask, gamma, lam, value_lam, per_sequence, masked, bootstrap, seed
):
    rows, length = mask.shape
    rewards, values = normal(rows, length, seed=seed), normal(rows, length, seed=seed + 1)
    options = {"gamma": gamma, "lam": lam, "value_lam": value_lam}
    if per_sequence and rows:
        generator = torch.Generator().manual_seed(seed)
        options = {
            n: x * here(torch.rand(rows, generator=generator, device="cpu"))
            for n, x in options.items()
        }
    options["bootstrap"] = normal(rows, seed=seed + 2) if bootstrap else None
    result = check(rewards, values, mask, **options, masked=masked, backend=backend)
    options["bootstrap_values"] = options.pop("bootstrap")
    cu_seqlens, flat_mask, *series = packed(mask, rewards, values)
    flat = gae(*series, flat_mask, **options, masked=masked, cu_seqlens=cu_seqlens, backend=backend)
    for padded, dense in zip(result, flat):
        assert torch.equal(padded[mask], dense[flat_mask])
        assert (dense[~flat_mask] == 0).all()


@pytest.mark.parametrize("masked", ["skip", "decay"])
@pytest.mark.parametrize("length", [15, 16, 17, 63, 5000])
def test_holes_of_every_size(backend, masked, length):
    """Around the widths of vectors, and long: sums build up over all of it with λ = 1."""
    if length == 5000 and backend == "reference":
        pytest.skip("the loop over time that it is, for seconds")
    mask = torch.ones(4, length, dtype=torch.bool)
    mask[1, length // 3 : length // 2] = False
    mask[2, ::2] = False
    mask[3, : length - 1] = False
    options = {"value_lam": 1.0, "masked": masked}
    series = normal(4, length, seed=1), normal(4, length, seed=2)
    check(*series, mask, 0.99, 0.9, normal(4, seed=3), backend, **options)


def test_masked_content_does_not_matter(backend):
    mask = random_mask(7, 20)
    rewards, values, bootstrap = normal(7, 20, seed=1), normal(7, 20, seed=2), normal(7, seed=3)
    clean = gae(rewards, values, mask, bootstrap_values=bootstrap, backend=backend)
    dirty = gae(
        poisoned(rewards, mask),
        poisoned(values, mask),
        mask,
        # A row without valid tokens has no last one, so its bootstrap value is masked too.
        bootstrap_values=poisoned(bootstrap, mask.any(dim=1)),
        backend=backend,
    )
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b)


def test_padding_and_holes_do_not_matter(backend):
    """The same valid tokens with padding on either side, and spread apart: the same bits.

    Triton's kernels combine the steps by their places, so that holes change the order of rounding.
    """
    rewards, values = normal(3, 10, seed=1), normal(3, 10, seed=2)
    full = torch.ones(3, 10, dtype=torch.bool)
    expected = gae(rewards, values, full, gamma=0.99, backend=backend)
    places = {
        "left": torch.arange(10) + 4,
        "right": torch.arange(10),
        "apart": torch.arange(10) * 2 + 1,
    }
    atol = tolerance(10, 0.99, 0.95, 1.0 + max(float(x.abs().max()) for x in expected))
    for name, where in places.items():
        wide = [torch.full((3, 24), 7.0) for _ in range(2)]
        wide[0][:, where], wide[1][:, where] = rewards, values
        mask = torch.zeros(3, 24, dtype=torch.bool)
        mask[:, where] = True
        result = gae(*wide, mask, gamma=0.99, backend=backend)
        for actual, wanted in zip(result, expected):
            rounded = backend == "triton" and name == "apart"
            close(actual[:, where], wanted, atol if rounded else 0.0)


def test_layouts_and_dtypes(backend):
    rewards, values = normal(8, 12, seed=1), normal(8, 12, seed=2)
    mask = random_mask(8, 12)
    expected = gae(rewards, values, mask, backend=backend)
    strided = gae(rewards.t().contiguous().t(), values[:, ::1], mask.long(), backend=backend)
    assert torch.equal(expected[0], strided[0]) and torch.equal(expected[1], strided[1])
    half = gae(rewards.bfloat16(), values.bfloat16(), mask, backend=backend)
    wide = gae(rewards.bfloat16().float(), values.bfloat16().float(), mask, backend=backend)
    assert torch.equal(half[0], wide[0]) and half[0].dtype == torch.float32
    same = gae(
        rewards[:1].expand(8, 12), values[:1].expand(8, 12), mask[:1].expand(8, 12), backend=backend
    )
    assert torch.equal(same[0], same[0][:1].expand(8, 12))


def test_carries_no_gradient(backend):
    values = normal(2, 5, seed=1).requires_grad_()
    for result in gae(values, values, torch.ones(2, 5, dtype=torch.bool), backend=backend):
        assert not result.requires_grad


@given(
    mask=masks(),
    masked=st.sampled_from(["skip", "decay"]),
    estimator=st.sampled_from(["k1", "k2", "k3", "abs"]),
    whiten=st.booleans(),
    seed=st.integers(0, 20),
)
def test_rollout_packed_is_rollout_padded(backend, mask, masked, estimator, whiten, seed):
    rows, length = mask.shape
    series = [normal(rows, length, seed=seed + i) for i in range(3)]
    scores, bootstrap = normal(rows, seed=seed + 3), normal(rows, seed=seed + 4)
    options = {
        "kl_coef": 0.3,
        "kl_estimator": estimator,
        "gamma": 0.9,
        "value_lam": 1.0,
        "bootstrap_values": bootstrap,
        "masked": masked,
        "whiten_rewards": whiten,
        "whiten_scores": whiten,
        "score_clip": 0.8,
        "backend": backend,
    }
    result = rollout_advantages(scores, *series, mask, **options)
    cu_seqlens, flat_mask, *flat = packed(mask, *series)
    dense = rollout_advantages(scores, *flat, flat_mask, cu_seqlens=cu_seqlens, **options)
    # Sums over all tokens may add up in another order, in float64.
    for a, b in zip(result[:4], dense[:4]):
        close(b[flat_mask], a[mask], 8 * EPS * (1 + float(a.abs().sum())))
        assert (b[~flat_mask] == 0).all() and (a[~mask] == 0).all()
    for a, b in zip(result[4:], dense[4:]):
        close(b, a, 8 * EPS * (1 + float(a.abs())))
    again = rollout_advantages(scores, *series, mask, **options)
    assert all(torch.equal(a, b) for a, b in zip(result, again))


@pytest.mark.parametrize("masked", ["skip", "decay"])
def test_rollout_is_its_parts(backend, masked):
    """One pass, or the functions that existing code calls one by one."""
    mask = random_mask(6, 40)
    logprobs, reference, values = (normal(6, 40, seed=s) for s in (1, 2, 3))
    scores = 3 * normal(6, seed=4)
    result = rollout_advantages(
        scores,
        *(logprobs, reference, values, mask),
        kl_coef=0.2,
        kl_estimator="k3",
        gamma=0.97,
        masked=masked,
        score_clip=2.0,
        backend=backend,
    )
    kl = kl_penalty(logprobs, reference, estimator="k3")
    rewards = shaped_rewards(scores.clamp(-2, 2), kl, mask, kl_coef=0.2)
    advantages, returns = gae(rewards, values, mask, gamma=0.97, masked=masked, backend=backend)
    close(result.kl, kl.masked_fill(~mask, 0.0), 8 * EPS * float(kl.abs().max()))
    close(result.rewards, rewards, 8 * EPS * float(rewards.abs().max()))
    atol = 2 * tolerance(40, 0.97, 0.95, 10.0)
    close(result.returns, returns, atol)
    close(result.advantages, masked_whiten(advantages, mask, backend=backend), atol)
    close(result.advantage_mean, masked_mean(advantages, mask), atol)
    close(result.advantage_std, advantages[mask].std(correction=0), atol)


@pytest.mark.parametrize("masked", ["skip", "decay"])
def test_a_small_deviation_beside_a_large_mean(backend, masked):
    """Sums of squares would lose it: 1e6 squared has no digits left for 0.1 squared."""
    mask = random_mask(9, 50)
    noise = 0.1 * normal(9, 50, seed=1)
    zeros = torch.zeros(9, 50)
    options = {"kl_coef": -1.0, "gamma": 0.0, "masked": masked, "backend": backend}
    # With γ = 0 the advantages are the rewards, and those the log-ratios.
    result = rollout_advantages(zeros[:, 0], 1e6 + noise, zeros, zeros, mask, **options)
    exact = (1e6 + noise)[mask].double()
    close(result.advantage_std, exact.std(correction=0), 8 * EPS)
    whitened = (exact - exact.mean()) / exact.std(correction=0)
    close(result.advantages[mask], whitened, 16 * EPS * float(whitened.abs().max()))


def test_scores_are_whitened_then_clipped(backend):
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[2] = False  # without a token, so its score does not count
    zeros = torch.zeros(5, 3)
    scores = torch.tensor([1.0, 2.0, 1e9, 3.0, 10.0])
    options = {"kl_coef": 0.0, "whiten_scores": True, "backend": backend}
    arguments = (scores, zeros, zeros, zeros, mask)
    rewards = rollout_advantages(*arguments, **options).rewards[:, 2]
    kept = scores[[0, 1, 3, 4]].double()
    expected = (kept - kept.mean()) / kept.std(correction=0)
    close(rewards[[0, 1, 3, 4]], expected, 8 * EPS)
    assert rewards[2] == 0
    clipped = rollout_advantages(*arguments, score_clip=0.5, **options).rewards[:, 2]
    assert torch.equal(clipped, rewards.clamp(-0.5, 0.5))


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_rollout_advantages(backend, estimator, whiten_rewards):
    mask = random_mask(5, 14)
    logprobs, reference, values = (normal(5, 14, seed=s) for s in (1, 2, 3))
    scores = normal(5, seed=4)
    result = rollout_advantages(
        poisoned(scores, mask.any(dim=1)),
        poisoned(logprobs, mask).requires_grad_(),
        poisoned(reference, mask),
        poisoned(values, mask),
        mask,
        kl_coef=0.2,
        kl_estimator=estimator,
        gamma=0.97,
        whiten_rewards=whiten_rewards,
        backend=backend,
    )
    kl = torch.where(
        mask, kl_penalty(logprobs.double(), reference.double(), estimator=estimator), 0
    )
    rewards = torch.as_tensor(oracle.shaped_rewards(scores, kl, mask, 0.2))
    used = rewards
    if whiten_rewards:
        used = torch.as_tensor(oracle.whiten(rewards, mask, shift_mean=False))
    advantages, returns = oracle.gae(used, values, mask, 0.97, 0.95)
    # Sizes are of order 10; the steps are those of gae's tolerance, then one division.
    atol = 2 * tolerance(14, 0.97, 0.95, 10.0)
    close(result.kl, kl, 8 * EPS * float(kl.abs().max()))
    close(result.rewards, rewards, 8 * EPS * float(rewards.abs().max()))
    close(result.returns, returns, atol)
    close(result.advantages, oracle.whiten(torch.as_tensor(advantages), mask), atol)
    assert not any(part.requires_grad for part in result)


def test_rollout_without_valid_tokens(backend):
    nan = torch.full((2, 3), float("nan"))
    mask = torch.zeros(2, 3, dtype=torch.bool)
    result = rollout_advantages(nan[:, 0], nan, nan, nan, mask, kl_coef=0.1, backend=backend)
    assert all((part == 0).all() for part in result)
