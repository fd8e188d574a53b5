"""PyTorch's own chunked cross-entropy over a linear layer (torch 2.13 and later)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.bench.peers import Offer

DISTRIBUTION = "torch"
DEVICES = frozenset({"cpu", "cuda"})
OPERATIONS = frozenset({"linear_cross_entropy"})


def offers() -> dict[str, list[Offer]]:
    from torch.nn import LinearCrossEntropyOptions

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        options = LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets, options=options)

    return {"linear_cross_entropy": [Offer("torch F.linear_cross_entropy", cross_entropy)]}
