"""The PPO loss and its gradients against TRL's, verl's and OpenRLHF's formulas: docs/peers.md."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import peer_oracles as peers
import pytest
import torch
from float64_oracle import array
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_cases import EPS, backends_for, close, masks, normal
from test_peer_formulas import SEEDS, flags, lengths_within
from torch import Tensor

from rlhf_kernels import PPOLossConfig, kl_penalty, masked_mean, ppo_loss

pytestmark = pytest.mark.parametrize("backend", backends_for("ppo_loss_forward"))

SHARED_MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
Series = dict[str, Tensor]


def inputs(rows: int, length: int, seed: int = 0) -> Series:
    """Ratios far outside of every clip, c = 3 of verl's included."""
    series = {name: normal(rows, length, seed=seed + i) for i, name in enumerate(NAMES)}
    series["logprobs"] = series["old_logprobs"] + 1.5 * series["logprobs"]
    return series


NAMES = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
OF_POLICY = ("logprobs", "old_logprobs", "advantages")
OF_VALUE = ("values", "old_values", "returns")


def policy_terms(formula: Callable[[float, float], float], x: Series, mask: Tensor) -> np.ndarray:
    logprobs, old, advantages = (array(x[name]) for name in OF_POLICY)
    return peers.per_token(formula, flags(mask), logprobs - old, advantages)


def value_terms(eps: float | None, x: Series, mask: Tensor) -> np.ndarray:
    def formula(value: float, old: float, target: float) -> float:
        return peers.clipped_value(value, old, target, eps)

    return peers.per_token(formula, flags(mask), *(array(x[name]) for name in OF_VALUE))


def gradient(loss: Callable[[Series], float], name: str, x: Series, mask: Tensor) -> np.ndarray:
    """Of a peer's loss by one of the series."""
    moved = {key: tensor.double() for key, tensor in x.items()}
    return peers.slopes(
        lambda at: loss(moved | {name: torch.as_tensor(at, device="cpu")}),
        array(x[name]),
        flags(mask),
    )


def tolerance(terms: np.ndarray, mask: Tensor) -> float:
    """A term takes about 16 roundings, its log-ratio is up to 8, and n of them add up like √n."""
    return (32 + math.sqrt(terms.size)) * EPS * float(abs(terms[flags(mask)]).sum() + EPS)


def check_gradient(
    actual: Tensor, loss: Callable[[Series], float], name: str, x: Series, mask: Tensor
) -> None:
    expected = gradient(loss, name, x, mask)
    # And the central differences' own error, of the loss's size.
    differences = 1e-9 * (1 + abs(loss(x)))
    close(actual, expected, 32 * EPS * abs(expected).max(initial=0.0) + differences)


def leaves(x: Series) -> Series:
    return {
        name: tensor.clone().requires_grad_(name in ("logprobs", "values"))
        for name, tensor in x.items()
    }


@given(
    mask=masks(),
    mode=st.sampled_from(SHARED_MODES),
    high=st.sampled_from([0.2, 0.28]),
    seed=SEEDS,
)
def test_verl_losses(backend, mask, mode, high, seed):
    """Actor and critic in one call; value_coef=1, since each has its own optimizer there."""
    assume(mask.any())
    x = inputs(*mask.shape, seed=seed)

    def policy(x: Series) -> float:
        terms = policy_terms(lambda d, a: peers.verl_policy(d, a, 0.2, high), x, mask)
        return peers.verl_aggregate(terms, flags(mask), mode)

    def value(x: Series) -> float:
        return peers.verl_aggregate(value_terms(0.5, x, mask), flags(mask), mode)

    config = PPOLossConfig(
        clip_range_high=high,
        dual_clip=3.0,
        value_clip_range=0.5,
        value_coef=1.0,
        entropy_coef=0.0,
        aggregation=mode,
    )
    ours = leaves(x)
    loss, stats = ppo_loss(mask=mask, **ours, config=config, backend=backend)
    loss.backward()
    of_policy = tolerance(policy_terms(peers.verl_policy, x, mask), mask)
    of_value = tolerance(value_terms(0.5, x, mask), mask)
    close(stats.policy_loss, policy(x), of_policy)
    close(stats.value_loss, value(x), of_value)
    close(loss, policy(x) + value(x), of_policy + of_value)
    check_gradient(ours["logprobs"].grad, policy, "logprobs", x, mask)
    check_gradient(ours["values"].grad, value, "values", x, mask)


@given(
    mask=masks(),
    token_level=st.booleans(),
    dual_clip=st.sampled_from([None, 1.5]),
    value_clip=st.sampled_from([None, 0.5]),
    seed=SEEDS,
)
def test_openrlhf_losses(backend, mask, token_level, dual_clip, value_clip, seed):
    """Per sequence only the policy's loss: the critic's is a call of its own, per token."""
    assume(mask.any())
    x = inputs(*mask.shape, seed=seed)

    def formula(d: float, a: float) -> float:
        return peers.openrlhf_policy(d, a, dual_clip=dual_clip)

    def policy(x: Series) -> float:
        return peers.openrlhf_aggregate(policy_terms(formula, x, mask), flags(mask), token_level)

    def value(x: Series) -> float:
        return peers.openrlhf_aggregate(value_terms(value_clip, x, mask), flags(mask))

    ours = leaves(x)
    series = [ours[name] for name in OF_POLICY]
    aggregation = "token-mean" if token_level else "seq-mean-token-mean"
    config = PPOLossConfig(dual_clip=dual_clip, aggregation=aggregation)
    actor, _ = ppo_loss(*series, mask, config=config, backend=backend)
    critic = value_alone(ours, mask, backend, value_coef=1.0, value_clip_range=value_clip)
    (actor + critic).backward()
    close(actor, policy(x), tolerance(policy_terms(formula, x, mask), mask))
    close(critic, value(x), tolerance(value_terms(value_clip, x, mask), mask))
    check_gradient(ours["logprobs"].grad, policy, "logprobs", x, mask)
    check_gradient(ours["values"].grad, value, "values", x, mask)


def value_alone(x: Series, mask: Tensor, backend: str, **options: float | None) -> Tensor:
    """The value loss by itself: without advantages the policy has none."""
    old, series = x["old_logprobs"], {name: x[name] for name in OF_VALUE}
    none = torch.zeros_like(old)
    config = PPOLossConfig(**options)
    return ppo_loss(old, old, none, mask, **series, config=config, backend=backend)[0]


@given(shape=lengths_within(), seed=SEEDS)
def test_trl_losses(backend, shape, seed):
    """The critic's mask is one place longer than the policy's: a call for each."""
    lengths, width = shape
    policy_mask, critic_mask = (
        torch.as_tensor(mask).to(torch.empty(0).device) for mask in peers.trl_masks(lengths, width)
    )
    x = inputs(len(lengths), width, seed=seed)

    def policy(x: Series) -> float:
        terms = policy_terms(peers.trl_policy, x, policy_mask)
        return peers.trl_aggregate(terms, flags(policy_mask))

    def value(x: Series) -> float:
        terms = value_terms(0.2, x, critic_mask)
        return 0.1 * peers.trl_aggregate(terms, flags(critic_mask))

    ours = leaves(x)
    series = [ours[name] for name in OF_POLICY]
    actor, _ = ppo_loss(*series, policy_mask, backend=backend)
    critic = value_alone(ours, critic_mask, backend, value_coef=0.1)
    (actor + critic).backward()
    of_policy = tolerance(policy_terms(peers.trl_policy, x, policy_mask), policy_mask)
    of_value = tolerance(value_terms(0.2, x, critic_mask), critic_mask)
    close(actor, policy(x), of_policy)
    close(critic, value(x), of_value)
    check_gradient(ours["logprobs"].grad, policy, "logprobs", x, policy_mask)
    check_gradient(ours["values"].grad, value, "values", x, critic_mask)
    if min(lengths) == width:
        config = PPOLossConfig(value_coef=0.1)
        loss, _ = ppo_loss(mask=policy_mask, **x, config=config, backend=backend)
        close(loss, policy(x) + value(x), of_policy + of_value)


def test_trl_in_one_call_where_responses_fill_the_width(backend):
    x, mask = inputs(3, 5), torch.ones(3, 5, dtype=torch.bool)
    policy, value = policy_terms(peers.trl_policy, x, mask), value_terms(0.2, x, mask)
    expected = policy.mean() + 0.1 * value.mean()
    loss, _ = ppo_loss(mask=mask, **x, config=PPOLossConfig(value_coef=0.1), backend=backend)
    close(loss, expected, tolerance(policy, mask) + tolerance(value, mask))


def test_clip_fractions(backend):
    """TRL, verl and OpenRLHF count a token where its clipped branch is the worse one, as here."""
    x, mask = inputs(20, 30), torch.ones(20, 30, dtype=torch.bool)
    pairs = list(
        zip((array(x["logprobs"]) - array(x["old_logprobs"])).flat, array(x["advantages"]).flat)
    )
    clipped = [a * (math.exp(d) - peers.clip(math.exp(d), 0.8, 1.2)) > 0 for d, a in pairs]
    dual = [a < 0 and math.exp(d) > 3.0 for d, a in pairs]
    config = PPOLossConfig(dual_clip=3.0, value_clip_range=0.5)
    _, stats = ppo_loss(mask=mask, **x, config=config, backend=backend)
    close(stats.clip_fraction, np.mean(clipped), EPS)
    close(stats.dual_clip_fraction, np.mean(dual), EPS)
    bounded, free = value_terms(0.5, x, mask), value_terms(None, x, mask)
    close(stats.value_clip_fraction, (bounded > free).mean(), EPS)
    assert min(np.mean(clipped), np.mean(dual), (bounded > free).mean()) > 0.05


# Aggregation


def ragged(rows: int, length: int) -> tuple[Series, Tensor]:
    """Sequences of 1, 2, ... valid tokens and one without."""
    mask = torch.arange(length) < torch.arange(rows)[:, None]
    return inputs(rows, length), mask


@pytest.mark.parametrize(
    ("mode", "scale", "aggregation"),
    [
        ("token-sum", None, "token-mean"),
        ("seq-mean-token-sum-norm", None, "seq-mean-token-sum"),
        ("seq-mean-token-sum-norm", 100.0, "seq-mean-token-sum"),
    ],
)
def test_verls_other_modes_are_a_normalizer(backend, mode, scale, aggregation):
    x, mask = ragged(5, 6)
    sequences = float(mask.any(dim=1).sum())
    normalizer = 1.0 if mode == "token-sum" else sequences * (scale or mask.shape[1])
    config = PPOLossConfig(dual_clip=3.0, aggregation=aggregation)
    loss, _ = ppo_loss(
        *(x[name] for name in OF_POLICY),
        mask,
        config=config,
        normalizer=normalizer,
        backend=backend,
    )
    terms = policy_terms(peers.verl_policy, x, mask)
    expected = peers.verl_aggregate(terms, flags(mask), mode, scale)
    close(loss, expected, tolerance(terms, mask))


def test_micro_batches(backend):
    """TRL takes the mean of their means; verl and OpenRLHF divide by the whole count."""
    x, mask = ragged(6, 6)
    terms = policy_terms(peers.trl_policy, x, mask)
    parts = [slice(0, 3), slice(3, 6)]
    series = [[x[name][part] for name in OF_POLICY] for part in parts]
    own = [ppo_loss(*s, mask[part], backend=backend)[0] for s, part in zip(series, parts)]
    of_trl = np.mean([peers.trl_aggregate(terms[part], flags(mask[part])) for part in parts])
    close(sum(own) / 2, of_trl, tolerance(terms, mask))
    # Two ranks, whose gradients are averaged: each divides by the whole count over the ranks.
    normalizer = mask.sum() / 2
    whole = [
        ppo_loss(*s, mask[part], normalizer=normalizer, backend=backend)[0]
        for s, part in zip(series, parts)
    ]
    of_verl = peers.verl_aggregate(terms, flags(mask), "token-mean")
    close(sum(whole) / 2, of_verl, tolerance(terms, mask))
    assert abs(of_trl - of_verl) > 0.01, "the case must tell them apart"


def test_no_valid_token_is_zero_here(backend):
    """0/0 in the three peers."""
    x, mask = inputs(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with np.errstate(invalid="ignore"):
        assert math.isnan(peers.trl_aggregate(np.zeros((2, 3)), flags(mask)))
        assert math.isnan(peers.verl_aggregate(np.zeros((2, 3)), flags(mask), "token-mean"))
        assert math.isnan(peers.openrlhf_aggregate(np.zeros((2, 3)), flags(mask)))
    assert ppo_loss(mask=mask, **x, backend=backend)[0] == 0


# Log-ratios beyond ±20, which verl and OpenRLHF bound and TRL and this package do not.


def far_apart() -> tuple[Series, Tensor]:
    logprobs = torch.tensor([[25.0, 25.0, -25.0, -25.0, 1.0]])
    x = {"logprobs": logprobs, "old_logprobs": torch.zeros(1, 5)}
    return x | {"advantages": torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0]])}, torch.ones(1, 5).bool()


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_bounded_log_ratios_are_a_clamp(backend, dual_clip):
    x, mask = far_apart()
    ours = leaves(x)
    old = ours["old_logprobs"]
    bounded = old + (ours["logprobs"] - old).clamp(-20.0, 20.0)
    config = PPOLossConfig(dual_clip=dual_clip)
    loss, _ = ppo_loss(bounded, old, x["advantages"], mask, config=config, backend=backend)
    loss.backward()

    def policy(x: Series) -> float:
        terms = policy_terms(lambda d, a: peers.openrlhf_policy(d, a, dual_clip=dual_clip), x, mask)
        return peers.openrlhf_aggregate(terms, flags(mask))

    terms = policy_terms(lambda d, a: peers.openrlhf_policy(d, a, dual_clip=dual_clip), x, mask)
    close(loss, policy(x), tolerance(terms, mask))
    check_gradient(ours["logprobs"].grad, policy, "logprobs", x, mask)


def test_unbounded_log_ratios(backend):
    """By how much: e²⁵ for e²⁰ where the advantage is negative; with the dual clip nothing."""
    x, mask = far_apart()
    ours = leaves(x)
    free = PPOLossConfig(aggregation="token-mean")
    loss, _ = ppo_loss(*(ours[name] for name in OF_POLICY), mask, config=free, backend=backend)
    loss.backward()
    rest = policy_terms(peers.openrlhf_policy, x, mask)
    assert rest[0, 1] == pytest.approx(math.exp(20.0))
    rest[0, 1] = math.exp(25.0)
    close(loss, rest.mean(), tolerance(rest, mask))
    close(ours["logprobs"].grad[0, 1], math.exp(25.0) / 5, 32 * EPS * math.exp(25.0))
    dual = PPOLossConfig(dual_clip=3.0)
    loss, _ = ppo_loss(*(x[name] for name in OF_POLICY), mask, config=dual, backend=backend)
    terms = policy_terms(peers.verl_policy, x, mask)
    close(loss, terms.mean(), tolerance(terms, mask))


@pytest.mark.parametrize("formula", [peers.verl_policy, peers.openrlhf_policy])
def test_vanishing_ratios(backend, formula):
    """By how much: e⁻²⁵ for e⁻²⁰, and its slope for none."""
    mask, new = torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), -25.0, requires_grad=True)
    old, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss, _ = ppo_loss(new, old, one, mask, backend=backend)
    (slope,) = torch.autograd.grad(loss, new)
    close(loss, -math.exp(-25.0), 32 * EPS * math.exp(-25.0))
    close(slope, [[-math.exp(-25.0)]], 32 * EPS * math.exp(-25.0))
    loss, _ = ppo_loss(new.clamp(-20.0, 20.0), old, one, mask, backend=backend)
    (slope,) = torch.autograd.grad(loss, new)
    close(loss, formula(-25.0, 1.0), 32 * EPS * math.exp(-20.0))
    assert slope == 0


def test_a_ratio_that_overflows_beside_an_advantage_of_zero(backend):
    """0·∞ in float32, as in TRL; a bounded log-ratio has none."""
    x, mask = far_apart()
    old, none = x["old_logprobs"], torch.zeros(1, 5)
    assert ppo_loss(old + 100.0, old, none, mask, backend=backend)[0].isnan()
    bounded = old + torch.full((1, 5), 100.0).clamp(-20.0, 20.0)
    assert ppo_loss(bounded, old, none, mask, backend=backend)[0] == 0


# Importance weights: q = old_logprob − rollout_logprob


@given(mask=masks(), per_sequence=st.booleans(), seed=SEEDS)
def test_verl_rollout_correction(backend, mask, per_sequence, seed):
    assume(mask.any())
    x, q = inputs(*mask.shape, seed=seed), normal(*mask.shape, seed=seed + 9)
    exponents = q.where(mask, 0.0).sum(dim=1, keepdim=True) if per_sequence else q
    weights = exponents.clamp(-20, 20).exp().clamp(max=2.0).expand_as(q)
    expected = peers.verl_importance_weights(array(q), flags(mask), per_sequence)
    check_weighted(x, mask, weights, expected, peers.verl_policy, 3.0, backend)


@pytest.mark.parametrize("mode", ["mask", "clip"])
@given(mask=masks(), seed=SEEDS)
def test_openrlhf_correction(backend, mode, mask, seed):
    assume(mask.any())
    x, q = inputs(*mask.shape, seed=seed), normal(*mask.shape, seed=seed + 9)
    weights = q.exp()
    if mode == "clip":
        weights = weights.clamp(0.5, 5.0)
    else:
        weights = weights.where((weights >= 0.5) & (weights <= 5.0), 0.0)
    expected = peers.per_token(
        lambda q: peers.openrlhf_importance_weight(q, mode), flags(mask), array(q)
    )
    check_weighted(x, mask, weights, expected, peers.openrlhf_policy, None, backend)


def check_weighted(x, mask, weights, exact, formula, dual_clip, backend):
    def policy(x: Series) -> float:
        return peers.trl_aggregate(exact * policy_terms(formula, x, mask), flags(mask))

    ours = leaves(x)
    series = [ours[name] for name in OF_POLICY]
    options = {"config": PPOLossConfig(dual_clip=dual_clip), "backend": backend}
    loss, _ = ppo_loss(*series, mask, importance_weights=weights, **options)
    loss.backward()
    close(loss, policy(x), tolerance(exact * policy_terms(formula, x, mask), mask))
    check_gradient(ours["logprobs"].grad, policy, "logprobs", x, mask)


# The KL divergence to the reference in the loss

IN_LOSS = [
    (peers.verl_kl, "kl", "k1"),
    (peers.verl_kl, "mse", "k2"),
    (peers.verl_kl, "low_var_kl", "k3"),
    (peers.openrlhf_kl, "k1", "k1"),
    (peers.openrlhf_kl, "k2", "k2"),
    (peers.openrlhf_kl, "k3", "k3"),
]


def kl_alone(
    x: Series, reference: Tensor, mask: Tensor, backend: str, **options: float | str
) -> Tensor:
    """Without advantages nothing else is left of the loss."""
    config = PPOLossConfig(**options)
    series = x["logprobs"], x["old_logprobs"], torch.zeros_like(reference)
    return ppo_loss(*series, mask, ref_logprobs=reference, config=config, backend=backend)[0]


@pytest.mark.parametrize(("formula", "kind", "estimator"), IN_LOSS)
@given(mask=masks(), mode=st.sampled_from(SHARED_MODES), seed=SEEDS)
def test_kl_losses(backend, formula, kind, estimator, mask, mode, seed):
    """Where they are not bounded, at |r| ≤ 2. In OpenRLHF the mode is always token-mean."""
    assume(mask.any())
    x = inputs(*mask.shape, seed=seed)
    reference = x["logprobs"] - normal(*mask.shape, seed=seed + 9).clamp(-2.0, 2.0)

    def kl(x: Series) -> np.ndarray:
        r = array(x["logprobs"]) - array(reference)
        return peers.per_token(lambda r: formula(kind, r), flags(mask), r)

    def loss(x: Series) -> float:
        return 0.1 * peers.verl_aggregate(kl(x), flags(mask), mode)

    ours = leaves(x)
    options = {"kl_loss_coef": 0.1, "kl_loss_estimator": estimator, "aggregation": mode}
    result = kl_alone(ours, reference, mask, backend, **options)
    result.backward()
    # r is a difference of numbers up to 8, which exp(2) carries on into each term and slope.
    error = 0.1 * 16 * EPS * math.exp(2.0)
    close(result, loss(x), error * peers.verl_aggregate(np.ones(mask.shape), flags(mask), mode))
    expected = gradient(loss, "logprobs", x, mask)
    close(ours["logprobs"].grad, expected, error + 1e-9 * (1 + abs(loss(x))))


def test_the_kl_loss_is_not_bounded_here(backend):
    """By how much: e⁴ − 5 for 10, and its slope for none; a clamp of `kl_penalty` bounds it."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    logprobs = torch.tensor([[-4.0, -1.0]]).requires_grad_()
    x, reference = {"logprobs": logprobs, "old_logprobs": torch.zeros(1, 2)}, torch.zeros(1, 2)
    free = kl_alone(x, reference, mask, backend, kl_loss_coef=1.0)
    (slope,) = torch.autograd.grad(free, logprobs)
    terms = [math.exp(4.0) - 5.0, math.exp(1.0) - 2.0]
    close(free, sum(terms) / 2, 16 * EPS * sum(terms))
    close(slope, [[(1 - math.exp(4.0)) / 2, (1 - math.exp(1.0)) / 2]], 16 * EPS * math.exp(4.0))

    theirs = [peers.verl_kl("low_var_kl", r) for r in (-4.0, -1.0)]
    assert theirs == [peers.openrlhf_kl("k3", r) for r in (-4.0, -1.0)] and theirs[0] == 10.0
    bounded = masked_mean(kl_penalty(logprobs, reference, estimator="k3").clamp(max=10.0), mask)
    (slope,) = torch.autograd.grad(bounded, logprobs)
    close(bounded, sum(theirs) / 2, 16 * EPS * sum(theirs))
    close(slope, [[0.0, (1 - math.exp(1.0)) / 2]], 16 * EPS * math.exp(1.0))


@given(mask=masks(), seed=SEEDS)
def test_unbiased_kl_gradients(backend, mask, seed):
    """verl's "k3+" has the slope of k2; OpenRLHF's `unbiased_gradient` weighs it by min(ρ, 10)."""
    assume(mask.any())
    x, n = inputs(*mask.shape, seed=seed), int(mask.sum())
    reference = normal(*mask.shape, seed=seed + 9)
    r = array(x["logprobs"]) - array(reference)
    ours = leaves(x)
    kl_alone(ours, reference, mask, backend, kl_loss_coef=1.0, kl_loss_estimator="k2").backward()
    of_verl = peers.per_token(lambda r: peers.openrlhf_unbiased_slope(r, 0.0), flags(mask), r)
    close(ours["logprobs"].grad, of_verl / n, 32 * EPS * 8 / n)

    d = array(x["logprobs"]) - array(x["old_logprobs"])
    of_openrlhf = peers.per_token(peers.openrlhf_unbiased_slope, flags(mask), r, d)
    leaf = x["logprobs"].clone().requires_grad_()
    weights = (x["logprobs"] - x["old_logprobs"]).exp().clamp(max=10.0)
    masked_mean(weights * kl_penalty(leaf, reference, estimator="k2"), mask).backward()
    close(leaf.grad, of_openrlhf / n, 32 * EPS * 80 / n)
