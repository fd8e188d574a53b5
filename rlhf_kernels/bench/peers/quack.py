"""Quack (CuTe DSL; Hopper and later)."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels.bench.peers import Offer

DISTRIBUTION = "quack-kernels"
DEVICES = frozenset({"cuda"})
OPERATIONS = frozenset({"token_logprobs", "linear_cross_entropy"})


def offers() -> dict[str, list[Offer]]:
    from quack.cross_entropy import cross_entropy
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
        return -cross_entropy(logits, targets, reduction="none")

    def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden, weight, targets)

    return {
        "token_logprobs": [Offer("quack cross_entropy", logprobs)],
        "linear_cross_entropy": [Offer("quack chunked_linear_cross_entropy", linear_cross_entropy)],
    }
