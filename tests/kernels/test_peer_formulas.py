"""KL, rewards, GAE and whitening against TRL's, verl's and OpenRLHF's formulas: docs/peers.md.

Where a peer differs, a test gives the option or the line that leads to its numbers, or pins by how
much they are apart. The losses are in test_peer_losses.py.
"""

from __future__ import annotations

import math

import numpy as np
import peer_oracles as peers
import pytest
import torch
from float64_oracle import array
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_cases import EPS, backends_for, close, masks, normal
from test_kernel_gae import tolerance
from torch import Tensor

from rlhf_kernels import (
    gae,
    kl_penalty,
    masked_mean,
    masked_whiten,
    rollout_advantages,
    shaped_rewards,
)

of_gae = pytest.mark.parametrize("backend", backends_for("gae_forward"))
of_whitening = pytest.mark.parametrize("backend", backends_for("moments", "whiten"))
of_kl = pytest.mark.parametrize("backend", backends_for("kl_penalty"))
of_rollout = pytest.mark.parametrize(
    "backend", backends_for("gae_forward", "rollout_forward", "moments", "whiten")
)
RATES = st.sampled_from([1.0, 0.95, 0.5])
SEEDS = st.integers(0, 50)


def flags(mask: Tensor) -> np.ndarray:
    return mask.cpu().numpy()


def bessel(mask: Tensor) -> float:
    """What turns a result whitened here into TRL's and verl's."""
    n = int(mask.sum())
    return math.sqrt((n - 1) / n)


def whitened_tolerance(raw: np.ndarray, mask: np.ndarray, error: float = 0.0) -> float:
    """For `raw`, each number off by `error`, whitened and scaled by `bessel`.

    Its error and 16 roundings at its size are divided by the deviation, which they move in turn,
    and that counts at the size of the result. Scaling the 10⁻⁸ too is the last term.
    """
    n, variance = int(mask.sum()), float(raw[mask].var())
    deviation = math.sqrt(variance + 1e-8)
    size = float(abs(raw[mask]).max())
    largest = float(abs(raw[mask] - raw[mask].mean()).max()) / deviation
    one = (error + 16 * EPS * (1 + size)) / deviation
    return one * (1 + largest) + largest * 1e-8 / (2 * (variance + 1e-8) * max(n - 1, 1))


@st.composite
def lengths_within(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths of responses padded on the right, 0 and the whole width among them, and the width."""
    width = draw(st.integers(2, 9))
    lengths = draw(st.lists(st.integers(0, width), min_size=1, max_size=4))
    assume(sum(lengths) >= 2)
    return lengths, width


# GAE


@of_gae
@given(mask=masks(), gamma=RATES, lam=RATES, seed=SEEDS)
def test_verl_gae_is_skip(backend, mask, gamma, lam, seed):
    rewards, values = normal(*mask.shape, seed=seed), normal(*mask.shape, seed=seed + 1)
    expected = peers.verl_gae(array(rewards), array(values), flags(mask), gamma, lam)
    result = gae(rewards, values, mask, gamma=gamma, lam=lam, masked="skip", backend=backend)
    check_at_valid(result, expected, mask, gamma, lam)


@of_gae
@given(mask=masks(), gamma=RATES, lam=RATES, seed=SEEDS)
def test_openrlhf_gae_is_decay(backend, mask, gamma, lam, seed):
    rewards, values = normal(*mask.shape, seed=seed), normal(*mask.shape, seed=seed + 1)
    expected = peers.openrlhf_gae(array(rewards), array(values), flags(mask), gamma, lam)
    result = gae(rewards, values, mask, gamma=gamma, lam=lam, masked="decay", backend=backend)
    check_at_valid(result, expected, mask, gamma, lam)


def check_at_valid(result, expected, mask, gamma, lam):
    size = 1.0 + max((abs(x).max() for x in expected if x.size), default=0.0)
    for actual, wanted in zip(result, expected):
        wanted = np.where(flags(mask), wanted, 0.0)
        close(actual, wanted, tolerance(mask.shape[1], gamma, lam, size))


@of_gae
def test_masked_places_hold_zero_here(backend):
    """verl repeats the next valid advantage there, OpenRLHF goes on counting; both with returns."""
    mask = torch.tensor([[0, 1, 0, 1, 0]], dtype=torch.bool)
    rewards, values = torch.ones(1, 5), torch.full((1, 5), 0.5)
    of_verl = peers.verl_gae(array(rewards), array(values), flags(mask), 0.5, 0.5)
    of_openrlhf = peers.openrlhf_gae(array(rewards), array(values), flags(mask), 0.5, 0.5)
    # δ: 1 + 0.25 − 0.5 and 1 − 0.5; then 0.25·δ of the next one.
    assert of_verl[0].tolist() == [[0.875, 0.875, 0.5, 0.5, 0.0]]
    assert of_verl[1].tolist() == [[1.375, 1.375, 1.0, 1.0, 0.5]]
    # Steps: δ = 0.25 before, 0.5 (no value follows), 0.25, 0.5, 0.
    assert of_openrlhf[0].tolist() == [[0.3984375, 0.59375, 0.375, 0.5, 0.0]]
    assert of_openrlhf[1].tolist() == [[0.3984375, 1.09375, 0.375, 1.0, 0.0]]
    for masked, expected in (("skip", of_verl), ("decay", of_openrlhf)):
        result = gae(rewards, values, mask, gamma=0.5, lam=0.5, masked=masked, backend=backend)
        for actual, wanted in zip(result, expected):
            assert (actual[~mask] == 0).all()
            close(actual[mask], wanted[flags(mask)], 8 * EPS)


# Whitening


@of_whitening
@given(mask=masks(), shift_mean=st.booleans(), seed=SEEDS)
def test_trl_and_verl_whiten_with_bessels_correction(backend, mask, shift_mean, seed):
    assume(mask.sum() >= 2)
    x = normal(*mask.shape, seed=seed) + 1.0
    expected = peers.bessel_whiten(array(x), flags(mask), shift_mean)
    result = masked_whiten(x, mask, backend=backend) * bessel(mask)
    if not shift_mean:
        result = result + masked_mean(x, mask)
    atol = whitened_tolerance(array(x), flags(mask))
    close(result[mask], expected[flags(mask)], atol)


@of_whitening
def test_bessels_correction_is_the_whole_difference(backend):
    """By how much: √(4/3) with 4 tokens."""
    x, mask = torch.tensor([[1.0, 2.0, 3.0, 7.0]]), torch.ones(1, 4, dtype=torch.bool)
    theirs = peers.bessel_whiten(array(x), flags(mask))
    ours = array(masked_whiten(x, mask, backend=backend))
    close(ours / theirs, np.full((1, 4), math.sqrt(4 / 3)), 16 * EPS)


@of_whitening
@pytest.mark.parametrize("valid", [0, 1])
def test_whitening_too_few_tokens_is_zero_here(backend, valid):
    x, mask = torch.full((2, 2), 3.0), torch.zeros(2, 2, dtype=torch.bool)
    mask[0, :valid] = True
    with pytest.raises(ValueError, match="fewer than two"):
        peers.bessel_whiten(array(x), flags(mask))
    assert (masked_whiten(x, mask, backend=backend) == 0).all()


@of_whitening
@given(mask=masks(), scale=st.sampled_from([1.0, 1e-3, 1e-5]), seed=SEEDS)
def test_openrlhf_bounds_the_variance_where_we_add_to_it(backend, mask, scale, seed):
    """√(var + 10⁻⁸) here, √max(var, 10⁻⁸) there: at most √2 apart, where var is 10⁻⁸."""
    assume(mask.any())
    x = normal(*mask.shape, seed=seed, scale=scale)
    expected = peers.openrlhf_normalize(array(x), flags(mask))[flags(mask)]
    variance = float(array(x)[flags(mask)].var())
    factor = math.sqrt((variance + 1e-8) / max(variance, 1e-8))
    assert 1 <= factor <= math.sqrt(2) * (1 + EPS)
    result = masked_whiten(x, mask, backend=backend)[mask]
    # Roundings at the numbers' size, divided by the deviation, and those of the result.
    largest = float(abs(array(x)).max())
    atol = 16 * EPS * (largest / math.sqrt(variance + 1e-8) + abs(expected).max())
    close(result * factor, expected, atol)
    if variance > 0.1:
        close(result, expected, atol)


@of_rollout
def test_openrlhf_no_std_norm(backend):
    """`advantage_mean` is there to be taken off."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    zeros, values = torch.zeros(2, 3), normal(2, 3, seed=1)
    raw, _ = peers.openrlhf_gae(np.zeros((2, 3)), array(values), flags(mask), 1.0, 0.95)
    expected = peers.openrlhf_normalize(raw, flags(mask), no_std_norm=True)
    options = {"kl_coef": 0.0, "masked": "decay", "whiten_advantages": False}
    rollout = rollout_advantages(
        torch.zeros(2), zeros, zeros, values, mask, **options, backend=backend
    )
    centred = rollout.advantages - rollout.advantage_mean
    atol = 2 * tolerance(3, 1.0, 0.95, 1 + abs(raw).max())
    close(centred[mask], expected[flags(mask)], atol)


# KL estimates

KINDS = [
    ("verl", peers.verl_kl, "kl", "k1"),
    ("verl", peers.verl_kl, "abs", "abs"),
    ("verl", peers.verl_kl, "mse", "k2"),
    ("verl", peers.verl_kl, "low_var_kl", "k3"),
    ("openrlhf", peers.openrlhf_kl, "k1", "k1"),
    ("openrlhf", peers.openrlhf_kl, "k2", "k2"),
    ("openrlhf", peers.openrlhf_kl, "k3", "k3"),
    ("trl", peers.trl_kl, "k1", "k1"),
    ("trl", peers.trl_kl, "k3", "k3"),
]
of_kinds = pytest.mark.parametrize(
    ("peer", "formula", "kind", "estimator"), KINDS, ids=[f"{x[0]}-{x[2]}" for x in KINDS]
)


@of_kl
@of_kinds
@given(seed=SEEDS)
def test_kl_estimators(backend, peer, formula, kind, estimator, seed):
    """Within ±2, where no peer bounds anything, as they are."""
    logprobs, reference = normal(3, 5, seed=seed), normal(3, 5, seed=seed + 1)
    r = (array(logprobs) - array(reference)).clip(-2.0, 2.0)
    logprobs, reference = torch.as_tensor(r, dtype=torch.float32), torch.zeros(3, 5)
    expected = np.vectorize(formula)(kind, array(logprobs))
    result = kl_penalty(logprobs, reference, estimator=estimator, backend=backend)
    close(result, expected, 4 * EPS * math.exp(2.0))


@of_kl
@of_kinds
def test_bounded_kl_is_a_clamp(backend, peer, formula, kind, estimator):
    """verl bounds low_var_kl to 10, OpenRLHF each estimator to ±10, TRL none."""
    r = torch.tensor([-40.0, -25.0, -15.0, -3.0, -1.0, 0.0, 1.0, 9.0, 12.0, 40.0])
    expected = np.vectorize(formula)(kind, array(r))
    result = kl_penalty(r, torch.zeros(10), estimator=estimator, backend=backend)
    bounded = peer == "openrlhf" or kind == "low_var_kl"
    assert bounded == (result.abs() > 10).logical_and(torch.as_tensor(abs(expected) <= 10)).any()
    if bounded:
        result = result.clamp(-10.0, 10.0)
    # exp is good to 2 ulp of its argument's exponential.
    close(result, expected, 8 * EPS, rtol=4 * EPS)


# Rewards, and all of it in a row


@of_kl
@given(mask=masks(), seed=SEEDS)
def test_openrlhf_rewards(backend, mask, seed):
    """At valid places; an empty row's score stands at its end there, where GAE's mask drops it."""
    scores, kl = normal(len(mask), seed=seed, scale=20.0), normal(*mask.shape, seed=seed + 1)
    expected = peers.openrlhf_rewards(array(scores), array(kl), flags(mask), 0.1)
    result = shaped_rewards(scores.clamp(-10, 10), kl, mask, kl_coef=0.1, backend=backend)
    close(result[mask], expected[flags(mask)], 12 * EPS)
    expected = peers.openrlhf_rewards(array(scores), array(kl), flags(mask), -0.1)
    result = shaped_rewards(scores.clamp(-10, 10), kl, mask, kl_coef=0.0, backend=backend)
    close(result[mask], expected[flags(mask)], 12 * EPS)


@of_rollout
@given(mask=masks(), seed=SEEDS)
def test_openrlhf_rollout(backend, mask, seed):
    assume(mask.sum() >= 2)
    series, scores = rollout_inputs(*mask.shape, seed)
    kl = peers.per_token(
        lambda a, b: peers.openrlhf_kl("k1", a - b), flags(mask), *(array(x) for x in series[:2])
    )
    rewards = peers.openrlhf_rewards(array(scores), kl, flags(mask), 0.05)
    raw, returns = peers.openrlhf_gae(rewards, array(series[2]), flags(mask), 1.0, 1.0)
    assume(raw[flags(mask)].var() > 0.1)
    expected = peers.openrlhf_normalize(raw, flags(mask))
    options = {"kl_coef": 0.05, "lam": 1.0, "score_clip": 10.0, "masked": "decay"}
    result = rollout_advantages(scores, *series, mask, **options, backend=backend)
    error = tolerance(mask.shape[1], 1.0, 1.0, 1 + max(abs(raw).max(), abs(returns).max()))
    close(result.returns[mask], returns[flags(mask)], error)
    atol = whitened_tolerance(raw, flags(mask), error)
    close(result.advantages[mask], expected[flags(mask)], atol)


def rollout_inputs(
    rows: int, length: int, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(logprobs, ref_logprobs, values), and scores that reach a bound of 10."""
    series = tuple(normal(rows, length, seed=seed + i) for i in range(3))
    return series, normal(rows, seed=seed + 3, scale=8.0)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(mask, present): tokens padded on the right, some of them a tool's, maybe the last one."""
    lengths, width = draw(lengths_within())
    present = torch.arange(width) < torch.tensor([max(n, 1) for n in lengths])[:, None]
    size = present.numel()
    own = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    mask = present & own.reshape(present.shape)
    assume(mask.sum() >= 2)
    return mask, present


@of_rollout
@given(tokens=conversations(), gamma=RATES, lam=RATES, seed=SEEDS)
def test_verl_rollout(backend, tokens, gamma, lam, seed):
    """Without the scores at a tool's token, which never reach verl's advantages."""
    mask, present = tokens
    series, scores = rollout_inputs(*mask.shape, seed)
    kl = peers.per_token(
        lambda a, b: peers.verl_kl("kl", a - b), flags(mask), *(array(x) for x in series[:2])
    )
    rewards = peers.verl_rewards(array(scores), kl, flags(mask), flags(present), 0.05)
    raw, returns = peers.verl_gae(rewards, array(series[2]), flags(mask), gamma, lam)
    expected = peers.bessel_whiten(raw, flags(mask))
    last = present.sum(dim=1, keepdim=True) - 1
    ends_with_own = mask.gather(1, last).squeeze(1)
    result = rollout_advantages(
        scores.masked_fill(~ends_with_own, 0.0),
        *(*series, mask),
        kl_coef=0.05,
        gamma=gamma,
        lam=lam,
        backend=backend,
    )
    error = tolerance(mask.shape[1], gamma, lam, 10 + max(abs(raw).max(), abs(returns).max()))
    close(result.returns[mask], returns[flags(mask)], error)
    atol = whitened_tolerance(raw, flags(mask), error)
    close(result.advantages[mask] * bessel(mask), expected[flags(mask)], atol)


@of_rollout
def test_a_score_after_a_tools_token(backend):
    """By how much: the whole score, for every token before."""
    mask = torch.tensor([[1, 1, 0]], dtype=torch.bool)
    zeros, score = torch.zeros(1, 3), torch.tensor([2.0])
    present = np.ones((1, 3), dtype=bool)
    rewards = peers.verl_rewards(array(score), np.zeros((1, 3)), flags(mask), present, 0.0)
    assert peers.verl_gae(rewards, np.zeros((1, 3)), flags(mask), 1.0, 1.0)[0].tolist() == [
        [0, 0, 0]
    ]
    options = {"kl_coef": 0.0, "lam": 1.0, "whiten_advantages": False}
    result = rollout_advantages(score, zeros, zeros, zeros, mask, **options, backend=backend)
    assert result.advantages.tolist() == [[2.0, 2.0, 0.0]]


@of_rollout
@given(
    shape=lengths_within(),
    gamma=RATES,
    lam=RATES,
    estimator=st.sampled_from(["k1", "k3"]),
    whiten_rewards=st.booleans(),
    seed=SEEDS,
)
def test_trl_rollout(backend, shape, gamma, lam, estimator, whiten_rewards, seed):
    """With a mask one place longer, TRL's critic's, for rewards and GAE."""
    lengths, width = shape
    policy, critic = (
        torch.as_tensor(m).to(torch.empty(0).device) for m in peers.trl_masks(lengths, width)
    )
    assume(policy.sum() >= 2 and critic.sum() >= 2)
    (logprobs, reference, values), scores = rollout_inputs(len(lengths), width, seed)
    exact_kl = np.vectorize(peers.trl_kl)(estimator, array(logprobs) - array(reference))
    rates = (gamma, lam)
    expected = peers.trl_rollout(
        array(scores), exact_kl, array(values), lengths, 0.05, *rates, whiten_rewards
    )
    kl = kl_penalty(logprobs, reference, estimator=estimator).masked_fill(~policy, 0.0)
    rewards = shaped_rewards(scores, kl, critic, kl_coef=0.05)
    close(rewards, expected.rewards, 16 * EPS * (1 + abs(expected.rewards).max()))
    error = 0.0
    if whiten_rewards:
        error = whitened_tolerance(expected.rewards, flags(critic))
        whitened = masked_whiten(rewards, critic, backend=backend) * bessel(critic)
        rewards = torch.where(critic, whitened + masked_mean(rewards, critic), 0.0)
    advantages, returns = gae(rewards, values, critic, gamma=gamma, lam=lam, backend=backend)
    # The error of the rewards, and of exp(r) in a KL of k3, adds up over the steps.
    size = (
        10 + abs(exact_kl).max() + abs(expected.returns).max() + abs(expected.raw_advantages).max()
    )
    error = tolerance(width, gamma, lam, size) + width * error
    close(returns, np.where(flags(critic), expected.returns, 0.0), error)
    result = masked_whiten(advantages, policy, backend=backend) * bessel(policy)
    close(
        result,
        expected.advantages,
        whitened_tolerance(expected.raw_advantages, flags(policy), error),
    )


@of_rollout
@given(shape=lengths_within(), gamma=RATES, lam=RATES, seed=SEEDS)
def test_without_trls_value_after_the_end(backend, shape, gamma, lam, seed):
    """By how much: γ·V + γλ·(score − V) in place of the score, V that value.

    Nothing where γ = λ = 1, or where responses fill the width.
    """
    lengths, width = shape
    policy = torch.as_tensor(peers.trl_masks(lengths, width)[0]).to(torch.empty(0).device)
    (logprobs, _, values), scores = rollout_inputs(len(lengths), width, seed)
    kl = np.zeros((len(lengths), width))
    theirs = peers.trl_rollout(array(scores), kl, array(values), lengths, 0.0, gamma, lam)
    ours = rollout_advantages(
        *(scores, logprobs, logprobs, values, policy),
        kl_coef=0.0,
        gamma=gamma,
        lam=lam,
        whiten_advantages=False,
        backend=backend,
    )
    error = tolerance(width, gamma, lam, 10 + abs(theirs.raw_advantages).max())
    for b, n in enumerate(lengths):
        score, following = float(scores[b]), float(values[b, n]) if n < width else 0.0
        gap = gamma * following + gamma * lam * (score - following) - score if n < width else 0.0
        for t in range(n):
            expected = theirs.raw_advantages[b, t] - (gamma * lam) ** (n - 1 - t) * gap
            close(ours.advantages[b, t], expected, error)
    if gamma == lam == 1:
        at = flags(policy)
        close(ours.advantages[policy], theirs.raw_advantages[at], error)
