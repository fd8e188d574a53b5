"""What verl's functions and ours are compared on before one takes the other's place.

A few float32 numbers on the CPU, in which every branch is taken: masks with holes and an empty row,
clipped and unclipped ratios of either sign. Each gives outputs and gradients.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.integrations._samples import SHAPE, VOCABULARY, mask, normal, with_gradients

Function = Callable[..., Any]

_AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
_ESTIMATORS = ("kl", "abs", "mse", "low_var_kl", "k1+", "k3+")


class _ActorConfig(SimpleNamespace):
    """What the policy loss reads of verl's, whose own refuses to be built without a model's."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def logprobs(function: Function) -> Sequence[Tensor]:
    module = sys.modules["verl.utils.torch_functional"]
    on_flash_attention = getattr(module, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)
    if on_flash_attention and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1":
        return []  # a GPU's kernel: no such process needs one to be patched
    logits = normal(*SHAPE, VOCABULARY).requires_grad_()
    labels = torch.arange(24, device="cpu").view(SHAPE) % VOCABULARY
    return with_gradients(function(logits, labels), logits)


def entropy(function: Function) -> Sequence[Tensor]:
    logits = normal(24, VOCABULARY).requires_grad_()
    return with_gradients(function(logits), logits)


def mean(function: Function) -> Sequence[Tensor]:
    x = normal(*SHAPE).requires_grad_()
    return [
        *with_gradients(function(x, mask()), x),
        *with_gradients(function(x, mask().float(), axis=-1), x),
    ]


def whitening(function: Function) -> Sequence[Tensor]:
    x = normal(*SHAPE)
    leaf = x.clone().requires_grad_()
    return [
        function(x, mask()),
        function(x, mask(), shift_mean=False),
        *with_gradients(function(leaf, mask()), leaf),
    ]


def advantages(function: Function) -> Sequence[Tensor]:
    rewards, values = normal(*SHAPE), normal(*SHAPE, seed=1)
    return [
        each
        for kept in (mask(), _padding())
        for each in function(rewards, values, kept.long(), gamma=0.9, lam=0.8)
    ]


def aggregation(function: Function) -> Sequence[Tensor]:
    x = normal(*SHAPE).requires_grad_()
    whole = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 7, "loss_scale_factor": 5}
    return [
        each
        for mode in _AGGREGATIONS
        for of_the_batch in ({}, whole)
        for each in with_gradients(function(x, mask(), mode, **of_the_batch), x)
    ]


def policy_loss(function: Function) -> Sequence[Tensor]:
    new, old = 2 * normal(*SHAPE), normal(*SHAPE, seed=1)
    new.requires_grad_()
    config = _ActorConfig(
        clip_ratio=0.2,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=2.5,
        global_batch_info={},
    )
    weights = normal(*SHAPE, seed=3).exp()
    outputs = []
    for mode in _AGGREGATIONS:
        for given in (None, weights):
            series = (old, new, normal(*SHAPE, seed=2), mask())
            loss, metrics = function(
                *series, loss_agg_mode=mode, config=config, rollout_is_weights=given
            )
            numbers = [metrics[name] for name in sorted(metrics)]
            outputs += [*with_gradients(loss, new), torch.tensor(numbers, device="cpu")]
    return outputs


def value_loss(function: Function) -> Sequence[Tensor]:
    new = normal(*SHAPE).requires_grad_()
    returns, old = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    outputs = []
    for mode in _AGGREGATIONS:
        loss, clipped = function(new, returns, old, mask(), 0.5, loss_agg_mode=mode)
        outputs += [*with_gradients(loss, new), clipped]
    return outputs


def kl(function: Function) -> Sequence[Tensor]:
    new = (4 * normal(*SHAPE)).requires_grad_()
    reference = normal(*SHAPE, seed=1).requires_grad_()
    return [
        each
        for name in _ESTIMATORS
        for each in with_gradients(function(new, reference, name), new, reference)
    ]


def _padding() -> Tensor:
    ends = torch.tensor([[3], [6], [0], [1]], device="cpu")
    return torch.arange(6, device="cpu") < ends
