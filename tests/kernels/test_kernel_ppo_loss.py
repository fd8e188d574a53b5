"""ppo_loss against float64 loops: loss, statistics, gradients, aggregation, ties."""

from __future__ import annotations

import math

import float64_oracle as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    EPS,
    backends_for,
    close,
    masks,
    normal,
    packed,
    poisoned,
    ppo_inputs,
    random_mask,
)

from rlhf_kernels import PPOLossConfig, PPOLossStats, ppo_loss
from rlhf_kernels.ppo_types import PPO_STATS

pytestmark = pytest.mark.parametrize("backend", backends_for("ppo_loss_forward"))

AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
DIFFERENTIABLE = ("logprobs", "values", "entropy")


def run(inputs, mask, config, backend, normalizer=None, cu_seqlens=None):
    """(loss, stats, gradients of those inputs that have one)."""
    leaves = {
        name: tensor.detach().requires_grad_()
        for name, tensor in inputs.items()
        if tensor is not None
    }
    loss, stats = ppo_loss(
        mask=mask,
        **{name: leaves.get(name) for name in inputs},
        config=config,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    wanted = [name for name in DIFFERENTIABLE if name in leaves]
    gradients = torch.autograd.grad(3.0 * loss, [leaves[name] for name in wanted])
    return loss, stats, {n: g / 3.0 for n, g in zip(wanted, gradients)}


def check(inputs, mask, config, backend, normalizer=None):
    loss, stats, gradients = run(inputs, mask, config, backend, normalizer)
    number = float(normalizer) if normalizer is not None else None
    expected = oracle.ppo_loss(inputs, mask, config, number)
    # A term takes about 10 roundings (the ratio's argument is of order 1, exp is good to 2 ulp),
    # and n of them are added, which counts sqrt(n) times in effect.
    roundings = 16 + math.sqrt(mask.numel())
    close(loss, expected.loss, roundings * EPS * (expected.scale + EPS))
    for name in PPO_STATS:
        # Of order 1 or of the loss's terms; explained variance subtracts a quotient from 1.
        size = 1 + expected.scale + abs(expected.stats[name])
        close(getattr(stats, name), expected.stats[name], roundings * EPS * 2 * size)
    for name, gradient in gradients.items():
        size = 1e-30 + abs(expected.grads[name]).max(initial=0.0)
        close(gradient, expected.grads[name], 16 * EPS * size)
        assert (gradient[~mask.bool()] == 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_range_high": 0.4},
        {"dual_clip": 1.5},
        {"value_clip_range": None},
        {"kl_loss_coef": 0.3, "kl_loss_estimator": "k1"},
        {"kl_loss_coef": 0.3, "kl_loss_estimator": "k2"},
        {"kl_loss_coef": 3.0},
        {"clip_range": 0.1, "value_coef": 2.0, "entropy_coef": 0.3, "dual_clip": 3.0},
    ],
    ids=["default", "high", "dual", "free-value", "k1", "k2", "k3", "all"],
)
def test_agrees_with_float64(backend, aggregation, options):
    # 37 × 65 tokens: more than one block of any vector width, with tails in both directions.
    config = PPOLossConfig(aggregation=aggregation, **options)
    inputs, mask = ppo_inputs(37, 65), random_mask(37, 65)
    check(inputs, mask, config, backend)
    check(inputs, mask, config, backend, normalizer=torch.tensor(100.0))
    stats = run(inputs, mask, config, backend)[1]
    assert stats.clip_fraction > 0.1, "the case must reach the clipped branch"
    assert config.value_clip_range is None or stats.value_clip_fraction > 0.1
    assert config.dual_clip is None or stats.dual_clip_fraction > 0


@given(
    mask=masks(),
    aggregation=st.sampled_from(AGGREGATIONS),
    with_values=st.booleans(),
    optional=st.sets(st.sampled_from(["entropy", "ref_logprobs", "importance_weights"])),
    dual_clip=st.sampled_from([None, 1.3]),
    seed=st.integers(0, 50),
)
def test_any_mask(backend, mask, aggregation, with_values, optional, dual_clip, seed):
    inputs = ppo_inputs(*mask.shape, seed=seed)
    if not with_values:
        inputs |= {"values": None, "old_values": None, "returns": None}
    inputs |= dict.fromkeys(optional)
    config = PPOLossConfig(aggregation=aggregation, dual_clip=dual_clip)
    check(inputs, mask, config, backend)


@given(
    mask=masks(),
    aggregation=st.sampled_from(AGGREGATIONS),
    given_normalizer=st.booleans(),
    seed=st.integers(0, 50),
)
def test_packed_sequences_are_as_padded_ones(backend, mask, aggregation, given_normalizer, seed):
    inputs = ppo_inputs(*mask.shape, seed=seed)
    config = PPOLossConfig(aggregation=aggregation, dual_clip=1.3, kl_loss_coef=0.2)
    normalizer = 7.0 if given_normalizer else None
    padded = run(inputs, mask, config, backend, normalizer)
    cu_seqlens, flat_mask, *flat = packed(mask, *inputs.values())
    series = dict(zip(inputs, flat))
    dense = run(series, flat_mask, config, backend, normalizer, cu_seqlens=cu_seqlens.int())
    # Only the order of addition may differ: sqrt(n) roundings of terms of order 1.
    close(dense[0], padded[0], 32 * EPS)
    close(torch.stack(dense[1]), torch.stack(padded[1]), 64 * EPS)
    for name, gradient in padded[2].items():
        close(dense[2][name][flat_mask], gradient[mask], 8 * EPS)
        assert (dense[2][name][~flat_mask] == 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl_loss_estimator", ["k1", "k2", "k3"])
def test_oracle_gradients_are_those_of_its_loss(backend, aggregation, kl_loss_estimator):
    """The float64 loops themselves, by central differences, so that they can be trusted above."""
    config = PPOLossConfig(
        aggregation=aggregation,
        dual_clip=1.5,
        entropy_coef=0.1,
        kl_loss_coef=0.3,
        kl_loss_estimator=kl_loss_estimator,
    )
    inputs = {name: tensor.double() for name, tensor in ppo_inputs(3, 4).items()}
    mask = random_mask(3, 4)
    grads = oracle.ppo_loss(inputs, mask, config).grads
    step = 1e-6
    for name in DIFFERENTIABLE:
        for place in mask.nonzero().tolist():
            around = []
            for sign in (1, -1):
                moved = inputs[name].clone()
                moved[tuple(place)] += sign * step
                around.append(oracle.ppo_loss(inputs | {name: moved}, mask, config).loss)
            slope = (around[0] - around[1]) / (2 * step)
            # Second-order error step², rounding eps64/step: about 1e-10 each.
            assert slope == pytest.approx(grads[name][tuple(place)], abs=1e-8)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_content_does_not_matter(backend, aggregation):
    config = PPOLossConfig(aggregation=aggregation, dual_clip=1.5)
    inputs, mask = ppo_inputs(6, 15), random_mask(6, 15)
    clean = run(inputs, mask, config, backend)
    dirty = run({n: poisoned(t, mask) for n, t in inputs.items()}, mask, config, backend)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(torch.stack(clean[1]), torch.stack(dirty[1]))
    for name, gradient in clean[2].items():
        assert torch.equal(gradient, dirty[2][name])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padding_does_not_matter(backend, aggregation):
    config = PPOLossConfig(aggregation=aggregation)
    inputs, mask = ppo_inputs(4, 10), torch.rand(4, 10) < 2
    mask[1, 6:] = False
    loss, stats, gradients = run(inputs, mask, config, backend)
    for left, right in ((0, 7), (5, 0), (3, 2)):
        padded = {
            n: torch.nn.functional.pad(t, (left, right), value=9.0) for n, t in inputs.items()
        }
        wide = torch.nn.functional.pad(mask, (left, right))
        other = run(padded, wide, config, backend)
        # Only the order of addition may differ: sqrt(n) roundings of terms of order 1.
        close(other[0], loss, 16 * EPS)
        close(torch.stack(other[1]), torch.stack(stats), 32 * EPS)
        for name, gradient in gradients.items():
            cut = other[2][name][:, left : left + 10]
            close(cut, gradient, 4 * EPS)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up(backend, aggregation, as_tensor):
    """With the whole batch's divisor, losses and gradients of parts are those of the whole."""
    config = PPOLossConfig(aggregation=aggregation)
    inputs, mask = ppo_inputs(9, 12), random_mask(9, 12)
    whole = run(inputs, mask, config, backend)
    count = mask.sum() if aggregation == "token-mean" else mask.any(dim=1).sum()
    normalizer = count if as_tensor else float(count)
    # The part 2:3 holds no valid token at all.
    slices = [slice(0, 2), slice(2, 3), slice(3, 9)]
    parts = [
        run({n: t[s] for n, t in inputs.items()}, mask[s], config, backend, normalizer)
        for s in slices
    ]
    close(sum(p[0] for p in parts), whole[0], 32 * EPS)
    close(sum(p[1].policy_loss for p in parts), whole[1].policy_loss, 32 * EPS)
    close(sum(p[1].value_loss for p in parts), whole[1].value_loss, 32 * EPS)
    for name, gradient in whole[2].items():
        joined = torch.cat([p[2][name] for p in parts])
        close(joined, gradient, 4 * EPS * float(gradient.abs().max()))


def test_gradient_stops_at_what_was_sampled(backend):
    inputs = {n: t.requires_grad_() for n, t in ppo_inputs(3, 5).items()}
    loss, stats = ppo_loss(mask=random_mask(3, 5), **inputs, backend=backend)
    loss.backward()
    assert all(inputs[name].grad is not None for name in DIFFERENTIABLE)
    for name in set(inputs) - set(DIFFERENTIABLE):
        assert inputs[name].grad is None
    assert isinstance(stats, PPOLossStats) and stats._fields == PPO_STATS
    assert not any(stat.requires_grad or stat.dim() for stat in stats)


def test_no_valid_tokens(backend):
    inputs = {n: torch.full((2, 3), math.nan) for n in ppo_inputs(1, 1)}
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for normalizer in (None, torch.tensor(0.0), 5.0):
        loss, stats, gradients = run(inputs, mask, PPOLossConfig(), backend, normalizer)
        assert loss == 0 and all(stat == 0 for stat in stats)
        assert all((gradient == 0).all() for gradient in gradients.values())


def test_ties_follow_the_unclipped_branch(backend):
    """Value 2 from old 0 with range 1, return 1.5: errors 0.5 and -0.5, equal squares."""
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    inputs = {
        "logprobs": zero,
        "old_logprobs": zero,
        "advantages": one,
        "values": 2 * one,
        "old_values": zero,
        "returns": 1.5 * one,
        "entropy": None,
    }
    config = PPOLossConfig(value_clip_range=1.0, value_coef=1.0)
    _, stats, gradients = run(inputs, one.bool(), config, backend)
    assert gradients["values"] == 0.5 and stats.value_clip_fraction == 0
    # At ratio 1 both branches are one: the gradient is the policy gradient, whole.
    assert gradients["logprobs"] == -1.0 and stats.clip_fraction == 0


def test_explained_variance_of_constant_returns_is_zero(backend):
    inputs = ppo_inputs(3, 4) | {"returns": torch.full((3, 4), 0.1)}
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert run(inputs, mask, PPOLossConfig(), backend)[1].explained_variance == 0
    perfect = ppo_inputs(3, 4)
    perfect["values"] = perfect["returns"]
    assert run(perfect, mask, PPOLossConfig(), backend)[1].explained_variance == 1


def test_a_valid_nan_is_not_hidden(backend):
    """It reaches the loss, its gradient and the statistics it takes part in, on every backend."""
    shown = {
        "logprobs": ("logprobs", "ratio_max"),
        "old_logprobs": ("logprobs", "ratio_max"),
        "advantages": ("logprobs", "policy_loss"),
        "values": ("values", "explained_variance"),
        "old_values": ("values", "value_loss"),
        "returns": ("values", "explained_variance"),
        "entropy": (None, "entropy"),
        "ref_logprobs": ("logprobs", "ref_kl"),
        "importance_weights": ("logprobs", "policy_loss"),
    }
    mask = torch.ones(3, 70, dtype=torch.bool)
    for name, (gradient, statistic) in shown.items():
        for place in ((0, 0), (1, 40), (2, 69)):
            inputs = ppo_inputs(3, 70)
            inputs[name][place] = math.nan
            loss, stats, gradients = run(inputs, mask, PPOLossConfig(), backend)
            assert loss.isnan() and getattr(stats, statistic).isnan(), name
            assert gradient is None or gradients[gradient][place].isnan(), name
            expected = run(inputs, mask, PPOLossConfig(), "reference")[1]
            for field, a, b in zip(PPO_STATS, stats, expected):
                assert a.isnan() == b.isnan(), (name, field)


def test_layouts_and_dtypes(backend):
    inputs, mask = ppo_inputs(8, 12), random_mask(8, 12)
    config = PPOLossConfig()
    plain = run(inputs, mask, config, backend)
    turned = {n: t.t().contiguous().t() for n, t in inputs.items()}
    other = run(turned, mask.t().contiguous().t().long(), config, backend)
    # Strides may change the order in which terms are added, but no gradient.
    close(other[0], plain[0].detach(), 16 * EPS)
    for name in DIFFERENTIABLE:
        assert torch.equal(plain[2][name], other[2][name])
    low = {n: t.bfloat16() for n, t in inputs.items()}
    half = run(low, mask, config, backend)
    wide = run({n: t.float() for n, t in low.items()}, mask, config, backend)
    assert torch.equal(half[0], wide[0]) and half[0].dtype == torch.float32
    assert half[2]["logprobs"].dtype == torch.bfloat16
    rows = {n: t[:1].expand(4, 12) for n, t in inputs.items()}
    same = run(rows, mask[:1].expand(4, 12), config, backend)
    alone = run({n: t[:1] for n, t in inputs.items()}, mask[:1], config, backend)
    close(same[0], alone[0], 16 * EPS)


def test_leaves_its_inputs_alone(backend):
    inputs, mask = ppo_inputs(3, 7), random_mask(3, 7)
    before = {n: t.clone() for n, t in inputs.items()}
    run(inputs, mask, PPOLossConfig(), backend)
    assert all(torch.equal(before[n], t) for n, t in inputs.items())


def test_backward_twice_through_a_retained_graph(backend):
    inputs, mask = ppo_inputs(3, 7), random_mask(3, 7)
    logprobs = inputs.pop("logprobs").requires_grad_()
    loss, _ = ppo_loss(logprobs, mask=mask, **inputs, backend=backend)
    first = torch.autograd.grad(loss, logprobs, retain_graph=True)[0]
    second = torch.autograd.grad(loss, logprobs, grad_outputs=torch.tensor(2.0))[0]
    assert torch.equal(second, 2 * first)


def test_the_kl_of_close_policies_keeps_its_digits(backend):
    """Where policies differ by 1e-4, exp(-r) - 1 + r is 5e-9: a difference would have no digits."""
    zero = torch.zeros(2, 33)
    r = normal(2, 33, seed=3, scale=1e-4)
    inputs = dict.fromkeys(ppo_inputs(1, 1), None)
    inputs |= {"logprobs": r, "old_logprobs": r, "advantages": zero, "ref_logprobs": zero}
    config = PPOLossConfig(kl_loss_coef=1.0)
    loss, stats, gradients = run(inputs, zero == 0, config, backend)
    exact = torch.expm1(-r.double()) + r.double()
    # The reference subtracts expm1, right to a unit of r: the others do better.
    close(loss, exact.mean(), EPS * float(r.abs().max()))
    close(stats.ref_kl, exact.mean(), EPS * float(r.abs().max()))
    close(gradients["logprobs"], -torch.expm1(-r.double()) / 66, 4 * EPS * float(r.abs().max()))


def test_values_inside_the_range_are_never_clipped(backend):
    """old + (value - old) rounds away from value: that must not decide which branch is larger."""
    inputs, mask = ppo_inputs(37, 65), torch.ones(37, 65, dtype=torch.bool)
    inputs["old_values"] = normal(37, 65, seed=9, scale=10.0)
    _, stats, gradients = run(inputs, mask, PPOLossConfig(value_clip_range=100.0), backend)
    assert stats.value_clip_fraction == 0 and (gradients["values"] != 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_long_rows(backend, aggregation):
    """Longer than what a count in one byte per eight tokens can hold (2040)."""
    inputs, mask = ppo_inputs(3, 4200), random_mask(3, 4200)
    check(inputs, mask, PPOLossConfig(aggregation=aggregation), backend)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_mask_of_other_bytes_than_1(backend, aggregation):
    """Bytes viewed as bool: valid is what is not 0."""
    inputs, mask = ppo_inputs(4, 21), random_mask(4, 21)
    config = PPOLossConfig(aggregation=aggregation)
    loss = run(inputs, mask, config, backend)[0]
    for byte in (2, 128, 255):
        viewed = (mask.to(torch.uint8) * byte).view(torch.bool)
        assert torch.equal(run(inputs, viewed, config, backend)[0], loss)
