"""verl's losses of the policy and the critic on our kernels, and how they are aggregated."""

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
from verl_peer import WHOLE_BATCH, actor_config, algorithms

from rlhf_kernels.integrations import verl

MODES = [
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]
OF_BATCHES = st.sampled_from([{}, WHOLE_BATCH])


@given(mask=masks(), mode=st.sampled_from(MODES), whole=OF_BATCHES, dtype=DTYPES, seed=SEEDS)
def test_agg_loss(
    mask: Tensor, mode: str, whole: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    x = normal(*mask.shape, seed=seed, dtype=dtype)
    terms = algorithms.agg_loss(x.double().abs(), mask, mode, **whole)
    summed = torch.promote_types(dtype, mask.dtype) if mask.is_floating_point() else dtype
    rounding = 4 * (2 + math.sqrt(mask.numel())) * torch.finfo(summed).eps
    check(
        lambda x: verl.agg_loss(x, mask, mode, **whole),
        lambda x: algorithms.agg_loss(x, mask, mode, **whole),
        [x],
        rounding * float(terms),
        rounding,
        seed,
    )


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "token-sum"])
def test_an_empty_mask_is_nan_as_in_verl(mode: str) -> None:
    zeros, mask = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    for module in (verl, algorithms):
        assert module.agg_loss(zeros, mask, mode).isnan()
        assert module.compute_value_loss(zeros, zeros, zeros, mask, 0.5, mode)[0].isnan()
        policy, _ = module.compute_policy_loss_vanilla(
            zeros, zeros, zeros, mask, mode, actor_config({})
        )
        assert policy.isnan()


def test_modes_and_counts_that_do_not_fit_are_errors_as_in_verl() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for module in (verl, algorithms):
        with pytest.raises(ValueError):
            module.agg_loss(x, mask, "mean")
        for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"):
            with pytest.raises(ValueError):
                module.agg_loss(x, mask, mode, dp_size=2)


@given(
    mask=masks(),
    mode=st.sampled_from(MODES),
    whole=OF_BATCHES,
    weighted=st.booleans(),
    dtype=DTYPES,
    scale=st.sampled_from([0.0, 0.3, 1.5, 30.0]),
    seed=SEEDS,
)
def test_policy_loss(
    mask: Tensor,
    mode: str,
    whole: dict[str, Any],
    weighted: bool,
    dtype: torch.dtype,
    scale: float,
    seed: int,
) -> None:
    old = normal(*mask.shape, seed=seed, dtype=dtype)
    new = old + normal(*mask.shape, seed=seed + 1, dtype=dtype, scale=scale)
    advantages = normal(*mask.shape, seed=seed + 2, dtype=dtype)
    weights = normal(*mask.shape, seed=seed + 3, dtype=dtype).exp() if weighted else None
    config = actor_config(whole)

    def call(module: Any, new: Tensor, metrics: dict[str, Any] | None = None) -> Tensor:
        fixed = [
            None if each is None else each.to(new.dtype) for each in (old, advantages, weights)
        ]
        loss, found = module.compute_policy_loss_vanilla(
            fixed[0], new, fixed[1], mask, mode, config, fixed[2]
        )
        if metrics is not None:
            metrics.update(found)
        return loss

    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    call(verl, new, ours), call(algorithms, new.double(), theirs)
    assert ours.keys() == theirs.keys()
    log_ratios = (new.double() - old.double()).abs().clamp(max=20)
    size = 1 + float(log_ratios.max())
    for name, number in ours.items():
        # verl counts what was clipped in float32, also where the losses are float64.
        rounding = max(eps(dtype), eps(torch.float32) if "clipfrac" in name else 0)
        assert number == pytest.approx(theirs[name], abs=64 * rounding * size)
    # A term is at most the dual clip's, and a log-ratio's rounding that much in its ratio.
    bound = 2.5 * advantages.double().abs() * (1 if weights is None else weights.double())
    terms = float(algorithms.agg_loss(bound * (1 + log_ratios.clamp(max=1)), mask, mode, **whole))
    rounding = (64 + math.sqrt(mask.numel())) * eps(dtype)
    check(
        lambda new: call(verl, new),
        lambda new: call(algorithms, new),
        [new],
        rounding * terms,
        rounding * terms,
        seed,
    )


def test_an_overflowing_ratio_beside_an_advantage_of_zero_is_zero() -> None:
    new, old = torch.full((1, 2), 200.0, requires_grad=True), torch.zeros(1, 2)
    for module in (verl, algorithms):
        loss, metrics = module.compute_policy_loss_vanilla(
            old, new, old, torch.ones(1, 2), config=actor_config({})
        )
        (gradient,) = torch.autograd.grad(loss, new)
        assert loss == 0 and (gradient == 0).all()
        assert metrics["actor/ppo_kl"] == -20.0


@given(mask=masks(), mode=st.sampled_from(MODES), whole=OF_BATCHES, dtype=DTYPES, seed=SEEDS)
def test_value_loss(
    mask: Tensor, mode: str, whole: dict[str, Any], dtype: torch.dtype, seed: int
) -> None:
    new, returns, old = (normal(*mask.shape, seed=seed + i, dtype=dtype) for i in range(3))

    def call(module: Any, new: Tensor, fractions: list[Tensor] | None = None) -> Tensor:
        series = (new, returns.to(new.dtype), old.to(new.dtype), mask)
        loss, clipped = module.compute_value_loss(*series, 0.3, mode, **whole)
        if fractions is not None:
            fractions.append(clipped)
        return loss

    fractions: list[Tensor] = []
    call(verl, new, fractions), call(algorithms, new.double(), fractions)
    close(fractions[0], fractions[1], 8 * torch.finfo(torch.float32).eps)
    assert not fractions[0].requires_grad
    sizes = (new.double().abs() + returns.double().abs() + old.double().abs() + 0.3).square()
    terms = float(algorithms.agg_loss(sizes, mask, mode, **whole))
    rounding = (32 + math.sqrt(mask.numel())) * eps(dtype)
    check(
        lambda new: call(verl, new),
        lambda new: call(algorithms, new),
        [new],
        rounding * terms,
        rounding * (1 + terms),
        seed,
    )
