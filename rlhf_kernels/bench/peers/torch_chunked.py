"""PyTorch's own chunked cross-entropy over a linear layer (torch 2.13 and later)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.bench.peers import Offer
from rlhf_kernels.ops.chunks import default_chunk_size

DISTRIBUTION = "torch"
DEVICES = frozenset({"cpu", "cuda"})
OPERATIONS = frozenset({"linear_cross_entropy"})


def offers() -> dict[str, list[Offer]]:
    from torch.nn import LinearCrossEntropyOptions

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # Of its own accord it takes a few rows at a time, which suits GPUs: on a CPU, where each
        # chunk reads the whole weight, it would need 30 to 50 times as long as with ours.
        rows = None
        if hidden.device.type == "cpu":
            rows = default_chunk_size(weight.shape[0], hidden.dtype, "cpu")
        options = LinearCrossEntropyOptions(batch_chunk_size=rows)
        return F.linear_cross_entropy(hidden, weight, targets, options=options)

    return {"linear_cross_entropy": [Offer("torch F.linear_cross_entropy", cross_entropy)]}
