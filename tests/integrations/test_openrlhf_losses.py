"""OpenRLHF's losses of the policy and the critic on our kernels, against its peers."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparisons import DTYPES, SEEDS, close, eps, leaves, masks, normal
from hypothesis import assume, given
from hypothesis import strategies as st
from openrlhf_check import Call, check
from openrlhf_definitions import aggregated, clip, gates
from torch import Tensor

from rlhf_kernels.integrations import openrlhf

WHOLE_BATCH: dict[str, Any] = {"dp_size": 2, "batch_num_tokens": 31.0, "global_batch_size": 7.0}
AS_TENSORS = {
    name: torch.tensor(number) if isinstance(number, float) else number
    for name, number in WHOLE_BATCH.items()
}
OF_BATCHES = st.sampled_from([{}, WHOLE_BATCH, AS_TENSORS])
PLAIN: list[dict[str, Any]] = [
    {},
    {"token_level_loss": False},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 2.5},
    {"policy_loss_type": "gspo"},
    {"policy_loss_type": "gspo", "dual_clip": 1.5, "is_correction_level": "token"},
]
CORRECTED: list[dict[str, Any]] = [
    {"is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_mode": "clip", "dual_clip": 2.5},
    {"is_correction_level": "seq", "token_level_loss": False},
    *(
        {
            "is_correction_level": level,
            "is_correction_gating": gating,
            "is_correction_threshold": [0.0, 0.1],
        }
        for level, gating in itertools.product(("token", "seq"), ("binary_kl", "tv"))
    ),
]


def named(settings: dict[str, Any]) -> str:
    return " ".join(str(each) for each in settings.values()) or "defaults"


@pytest.mark.parametrize("settings", PLAIN + CORRECTED, ids=named)
@given(
    mask=masks(longest=7),
    whole=OF_BATCHES,
    scale=st.sampled_from([0.0, 0.3, 1.5, 30.0]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_policy_loss(
    peer: SimpleNamespace,
    settings: dict[str, Any],
    mask: Tensor,
    whole: dict[str, Any],
    scale: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    old = (-0.05 - normal(*mask.shape, seed=seed, dtype=torch.float32).abs()).to(dtype)
    new = old + normal(*mask.shape, seed=seed + 1, dtype=dtype, scale=scale)
    advantages = normal(*mask.shape, seed=seed + 2, dtype=dtype)
    rollout = old + normal(*mask.shape, seed=seed + 3, dtype=dtype, scale=0.7)
    if settings in CORRECTED:
        assume(away_from_the_threshold(settings, old, rollout, mask))

    def call(module: Any) -> Call:
        def of(new: Tensor) -> tuple[Tensor | None, ...]:
            fixed = [each.to(new.dtype) for each in (old, advantages)]
            return module.PolicyLoss(**settings)(new, *fixed, mask, rollout.to(new.dtype), **whole)

        return of

    # A log-ratio's rounding is as much, times its size, in the ratio, and so in a term.
    log_ratios = clip(new.double() - old.double(), -20, 20)
    if settings.get("policy_loss_type") == "gspo":
        behind = rollout if "is_correction_level" in settings else old
        log_ratios = new.double() - behind.double()
        log_ratios = log_ratios.abs().max(dim=1, keepdim=True).values.expand_as(log_ratios)
        assume(float(log_ratios.max()) < 80)  # e to the power of it overflows float32
    weights = (old.double() - rollout.double()).exp() if settings in CORRECTED else 1.0
    sizes = (1 + log_ratios.exp()) * advantages.double().abs() * weights
    size = 1 + float((new.double() - old.double()).abs().max())
    token_level = settings.get("token_level_loss", True) and "policy_loss_type" not in settings
    terms = float(aggregated(sizes, mask, token_level, **whole))
    assume(terms < torch.finfo(dtype).max)
    rounding = (64 + math.sqrt(mask.numel())) * eps(dtype) * size
    metric = 64 * eps(dtype) * size
    check(
        *(call, peer, (new,), (rounding * terms, metric, metric, metric, metric)),
        rounding * terms,
    )


def away_from_the_threshold(
    settings: dict[str, Any], old: Tensor, rollout: Tensor, mask: Tensor
) -> bool:
    """Where rounding cannot move a gate to its other side."""
    found = gates(settings, old.double(), rollout.double(), mask)
    bounds = settings.get("is_correction_threshold", (0.5, 5.0))
    bounds = [bound for bound in bounds if bound > 0]
    pairs = itertools.product(itertools.chain(*found), bounds)
    return all(not abs(float(gate) - bound) < 1e-4 for gate, bound in pairs)


@pytest.mark.parametrize("settings", PLAIN + CORRECTED, ids=named)
def test_masked_places_have_no_effect(settings: dict[str, Any]) -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    series = [-normal(3, 4, seed=seed, dtype=torch.float32).abs() for seed in range(4)]

    def outcome() -> list[Tensor | None]:
        (new,) = leaves((series[0],))
        loss, *metrics = openrlhf.PolicyLoss(**settings)(new, *series[1:3], mask, series[3])
        return [loss, *torch.autograd.grad(loss, new), *metrics]

    before = outcome()
    for each in series:
        each[mask == 0] = math.nan
    for found, expected in zip(outcome(), before, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("token_level", [True, False])
def test_an_empty_mask_is_nan_as_in_openrlhf(peer: SimpleNamespace, token_level: bool) -> None:
    zeros, mask = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    for module in (openrlhf, peer):
        policy = module.PolicyLoss(token_level_loss=token_level)
        assert all(each.isnan() for each in policy(zeros, zeros, zeros, mask)[:3])
        assert module.ValueLoss(token_level_loss=token_level)(zeros, zeros, zeros, mask).isnan()
        # The whole batch's count makes it 0; the metrics know this call's tokens alone.
        loss, clipped, *_ = policy(zeros, zeros, zeros, mask, **WHOLE_BATCH)
        assert loss == 0 and clipped.isnan()


def test_an_overflowing_ratio_beside_an_advantage_of_zero_is_zero(peer: SimpleNamespace) -> None:
    for module in (openrlhf, peer):
        new = torch.full((1, 2), 200.0, requires_grad=True)
        zeros = torch.zeros(1, 2)
        loss, _, kl, *_ = module.PolicyLoss()(new, zeros, zeros, torch.ones(1, 2))
        assert loss == 0 and (torch.autograd.grad(loss, new)[0] == 0).all()
        assert kl == -200.0


def test_without_a_mask_all_is_valid(peer: SimpleNamespace) -> None:
    new, old, advantages = (normal(3, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    everywhere = torch.ones(3, 4)
    for token_level in (True, False):
        policy = openrlhf.PolicyLoss(token_level_loss=token_level)
        value = openrlhf.ValueLoss(0.5, token_level)
        for loss in (policy, value):
            without, found = loss(new, old, advantages), loss(new, old, advantages, everywhere)
            torch.testing.assert_close(without, found, rtol=0, atol=0)
    # OpenRLHF's own needs one for the others.
    expected = peer.PolicyLoss()(new, old, advantages)
    for found, meant in zip(openrlhf.PolicyLoss()(new, old, advantages)[:3], expected[:3]):
        close(found, meant, 64 * eps(torch.float64))


@pytest.mark.parametrize(
    "settings",
    [
        {"dual_clip": 1.0},
        {"is_correction_level": "batch"},
        {"is_correction_mode": "drop"},
        {"is_correction_gating": "kl"},
        {"is_correction_level": "seq", "is_correction_mode": "clip"},
        {"is_correction_mode": "clip", "is_correction_gating": "tv"},
        {"is_correction_level": "token", "is_correction_gating": "binary_kl"},
    ],
    ids=named,
)
def test_settings_that_do_not_fit_are_errors_as_in_openrlhf(
    real_openrlhf: SimpleNamespace, settings: dict[str, Any]
) -> None:
    kind = AssertionError if "dual_clip" in settings else ValueError
    for module in (openrlhf, real_openrlhf):
        with pytest.raises(kind):
            module.PolicyLoss(**settings)


def test_errors_of_the_policy_loss() -> None:
    zeros = torch.zeros(1, 2)
    with pytest.raises(AssertionError, match="dual_clip"):
        openrlhf.PolicyLoss(dual_clip=0.5)
    with pytest.raises(ValueError, match="is_correction_mode"):
        openrlhf.PolicyLoss(is_correction_level="seq", is_correction_mode="clip")
    with pytest.raises(ValueError, match="is_correction_threshold"):
        openrlhf.PolicyLoss(is_correction_level="seq", is_correction_gating="tv")
    with pytest.raises(ValueError, match="policy_loss_type is 'grpo'"):
        openrlhf.PolicyLoss(policy_loss_type="grpo")(zeros, zeros, zeros)
    with pytest.raises(TypeError, match="rollout_log_probs is None"):
        openrlhf.PolicyLoss(is_correction_level="token")(zeros, zeros, zeros)


# The critic's loss


@given(
    mask=masks(longest=7),
    whole=OF_BATCHES,
    clip_eps=st.sampled_from([None, 0.3]),
    token_level=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_value_loss(
    peer: SimpleNamespace,
    mask: Tensor,
    whole: dict[str, Any],
    clip_eps: float | None,
    token_level: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    values, old, returns = (normal(*mask.shape, seed=seed + i, dtype=dtype) for i in range(3))
    settings = {"clip_eps": clip_eps, "token_level_loss": token_level}

    def call(module: Any) -> Call:
        loss = module.ValueLoss(**settings)
        return lambda new: (loss(new, old.to(new.dtype), returns.to(new.dtype), mask, **whole),)

    sizes = (values.double().abs() + returns.double().abs() + old.double().abs() + 0.3).square()
    terms = float(aggregated(sizes, mask, token_level, **whole))
    rounding = (32 + math.sqrt(mask.numel())) * eps(dtype)
    check(call, peer, (values,), (rounding * terms,), rounding * (1 + terms))
