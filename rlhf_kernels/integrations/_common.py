"""What the adapters of several peers share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import rlhf_kernels


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of PyTorch's arithmetic between them; an integer mask changes none.

    Raises:
        TypeError: None is floating-point.
    """
    dtypes = [each.dtype for each in tensors if each is not None and each.is_floating_point()]
    if not dtypes:
        raise TypeError(
            "all tensors given hold integers; expected floating-point numbers (.float())"
        )
    return functools.reduce(torch.promote_types, dtypes)


def entropy(logits: Tensor) -> Tensor:
    """Entropies [...] of softmax(logits [..., V]), float32 or float64, differentiable."""
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return rlhf_kernels.token_logprobs(logits, targets, return_entropy=True)[1]


def or_nan(loss: Tensor, divisor: float | Tensor) -> Tensor:
    """NaN where a peer would divide by 0, whatever our kernel gives for an empty mask."""
    if isinstance(divisor, Tensor):
        return loss + 0.0 / divisor.to(loss.dtype)
    return loss
