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

Function = Callable[..., Any]

_ROWS, _LENGTH, _VOCABULARY = 4, 6, 11
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
    logits = _normal(_ROWS, _LENGTH, _VOCABULARY).requires_grad_()
    labels = torch.arange(_ROWS * _LENGTH, device="cpu").view(_ROWS, _LENGTH) % _VOCABULARY
    return _with_gradients(function(logits, labels), logits)


def entropy(function: Function) -> Sequence[Tensor]:
    logits = _normal(_ROWS * _LENGTH, _VOCABULARY).requires_grad_()
    return _with_gradients(function(logits), logits)


def mean(function: Function) -> Sequence[Tensor]:
    x = _normal(_ROWS, _LENGTH).requires_grad_()
    return [
        *_with_gradients(function(x, _mask()), x),
        *_with_gradients(function(x, _mask().float(), axis=-1), x),
    ]


def whitening(function: Function) -> Sequence[Tensor]:
    x = _normal(_ROWS, _LENGTH)
    leaf = x.clone().requires_grad_()
    return [
        function(x, _mask()),
        function(x, _mask(), shift_mean=False),
        *_with_gradients(function(leaf, _mask()), leaf),
    ]


def advantages(function: Function) -> Sequence[Tensor]:
    rewards, values = _normal(_ROWS, _LENGTH), _normal(_ROWS, _LENGTH, seed=1)
    return [
        each
        for mask in (_mask(), _padding())
        for each in function(rewards, values, mask.long(), gamma=0.9, lam=0.8)
    ]


def aggregation(function: Function) -> Sequence[Tensor]:
    x = _normal(_ROWS, _LENGTH).requires_grad_()
    whole = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 7, "loss_scale_factor": 5}
    return [
        each
        for mode in _AGGREGATIONS
        for of_the_batch in ({}, whole)
        for each in _with_gradients(function(x, _mask(), mode, **of_the_batch), x)
    ]


def policy_loss(function: Function) -> Sequence[Tensor]:
    new, old = 2 * _normal(_ROWS, _LENGTH), _normal(_ROWS, _LENGTH, seed=1)
    new.requires_grad_()
    config = _ActorConfig(
        clip_ratio=0.2,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=2.5,
        global_batch_info={},
    )
    weights = _normal(_ROWS, _LENGTH, seed=3).exp()
    outputs = []
    for mode in _AGGREGATIONS:
        for given in (None, weights):
            series = (old, new, _normal(_ROWS, _LENGTH, seed=2), _mask())
            loss, metrics = function(
                *series, loss_agg_mode=mode, config=config, rollout_is_weights=given
            )
            numbers = [metrics[name] for name in sorted(metrics)]
            outputs += [*_with_gradients(loss, new), torch.tensor(numbers, device="cpu")]
    return outputs


def value_loss(function: Function) -> Sequence[Tensor]:
    new = _normal(_ROWS, _LENGTH).requires_grad_()
    returns, old = _normal(_ROWS, _LENGTH, seed=1), _normal(_ROWS, _LENGTH, seed=2)
    outputs = []
    for mode in _AGGREGATIONS:
        loss, clipped = function(new, returns, old, _mask(), 0.5, loss_agg_mode=mode)
        outputs += [*_with_gradients(loss, new), clipped]
    return outputs


def kl(function: Function) -> Sequence[Tensor]:
    new = (4 * _normal(_ROWS, _LENGTH)).requires_grad_()
    reference = _normal(_ROWS, _LENGTH, seed=1).requires_grad_()
    return [
        each
        for name in _ESTIMATORS
        for each in _with_gradients(function(new, reference, name), new, reference)
    ]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def _mask() -> Tensor:
    rows = [[1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1], [0] * _LENGTH, [1] * _LENGTH]
    return torch.tensor(rows, dtype=torch.bool, device="cpu")


def _padding() -> Tensor:
    ends = torch.tensor([[3], [6], [0], [1]], device="cpu")
    return torch.arange(_LENGTH, device="cpu") < ends


def _with_gradients(output: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Under an upstream gradient that differs from place to place."""
    upstream = torch.linspace(0.5, 1.5, output.numel(), device="cpu").view(output.shape)
    return [output, *torch.autograd.grad(output, leaves, upstream, allow_unused=False)]
