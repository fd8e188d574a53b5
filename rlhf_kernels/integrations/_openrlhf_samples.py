"""What OpenRLHF's functions and ours are compared on before one takes the other's place.

A few float32 numbers on the CPU, in which every branch is taken: masks with holes and an empty row,
clipped and unclipped ratios of either sign, each correction with its threshold between them. Each
gives outputs and gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.integrations._samples import SHAPE, VOCABULARY, mask, normal, with_gradients

Function = Callable[..., Any]

_FLASH_ATTENTION = "flash_attn.ops.triton.cross_entropy"
_POLICY_LOSSES: tuple[dict[str, Any], ...] = (
    {},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 2.5},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo"},
    {"policy_loss_type": "gspo", "dual_clip": 1.5, "is_correction_level": "token"},
    {"is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_mode": "clip", "token_level_loss": False},
    {"is_correction_level": "seq", "is_correction_threshold": [0.9, 2.0]},
    *(
        {
            "is_correction_level": level,
            "is_correction_gating": gating,
            "is_correction_threshold": [0.0, 0.1],
        }
        for level in ("token", "seq")
        for gating in ("binary_kl", "tv")
    ),
)
_ESTIMATORS = ("k1", "k2", "k3")


def logprobs(function: Function) -> Sequence[Tensor]:
    labels = torch.arange(24, device="cpu").view(SHAPE) % VOCABULARY
    leaf = normal(*SHAPE, VOCABULARY).requires_grad_()
    with _without_flash_attention():
        return [
            each
            for temperature in (1.0, 0.7)
            # A copy, which OpenRLHF's divides by the temperature in place.
            for each in with_gradients(function(leaf.clone(), labels, temperature), leaf)
        ]


def entropy(function: Function) -> Sequence[Tensor]:
    leaf = normal(*SHAPE, VOCABULARY).requires_grad_()
    # OpenRLHF's is compiled, which takes seconds: what it was compiled from says the same.
    return with_gradients(getattr(function, "__wrapped__", function)(leaf), leaf)


def kl(function: Function) -> Sequence[Tensor]:
    new = (4 * normal(*SHAPE)).requires_grad_()
    base = normal(*SHAPE, seed=1).requires_grad_()
    old = normal(*SHAPE, seed=2)
    calls: list[dict[str, Any]] = [{"kl_estimator": name} for name in _ESTIMATORS]
    calls += [{**call, "unbiased_gradient": True} for call in calls]
    calls.append({"log_probs_old": old, "unbiased_gradient": True})
    return [
        each for call in calls for each in with_gradients(function(new, base, **call), new, base)
    ]


def policy_loss(function: Function) -> Sequence[Tensor]:
    """`function` is a forward of OpenRLHF's own PolicyLoss, which has its settings."""
    owner = sys.modules["openrlhf.models.loss"].PolicyLoss
    old, advantages = -2 * normal(*SHAPE).abs(), normal(*SHAPE, seed=1)
    new = (old + normal(*SHAPE, seed=2)).requires_grad_()
    rollout = old + 0.7 * normal(*SHAPE, seed=3)
    outputs: list[Tensor] = []
    for settings in _POLICY_LOSSES:
        for of_the_batch in _batches():
            series = (new, old, advantages, mask(), rollout)
            loss, *metrics = function(owner(**settings), *series, **of_the_batch)
            outputs += with_gradients(loss, new)
            outputs += [metric for metric in metrics if metric is not None]
    return outputs


def value_loss(function: Function) -> Sequence[Tensor]:
    """`function` is a forward of OpenRLHF's own ValueLoss, which has its settings."""
    owner = sys.modules["openrlhf.models.loss"].ValueLoss
    new = normal(*SHAPE).requires_grad_()
    old, returns = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    return [
        each
        for clip_eps in (None, 0.5)
        for token_level in (True, False)
        for of_the_batch in _batches()
        for each in with_gradients(
            function(owner(clip_eps, token_level), new, old, returns, mask(), **of_the_batch), new
        )
    ]


def advantages(function: Function) -> Sequence[Tensor]:
    rewards, values = normal(*SHAPE), normal(*SHAPE, seed=1)
    return [
        each
        for kept in (mask(), mask().long(), None)
        for each in function(None, values, rewards, kept, 0.9, 0.8)
    ]


def _batches() -> list[dict[str, Any]]:
    """Without the whole batch's counts and with them, as numbers and as tensors."""
    numbers = {"dp_size": 2, "batch_num_tokens": 31.0, "global_batch_size": 7.0}
    tensors = {
        name: torch.tensor(number, device="cpu") if isinstance(number, float) else number
        for name, number in numbers.items()
    }
    return [{}, numbers, tensors]


@contextmanager
def _without_flash_attention() -> Iterator[None]:
    """OpenRLHF looks for its kernel, a GPU's, at each call; here it shall not find one."""
    found = sys.modules.get(_FLASH_ATTENTION)
    sys.modules[_FLASH_ATTENTION] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_FLASH_ATTENTION]
        if found is not None:
            sys.modules[_FLASH_ATTENTION] = found
