"""Cut cross-entropy (Triton), with its filter of small gradients as it comes."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels.bench.peers import Offer

DISTRIBUTION = "cut-cross-entropy"
DEVICES = frozenset({"cuda"})
OPERATIONS = frozenset({"linear_token_logprobs", "linear_cross_entropy"})


def offers() -> dict[str, list[Offer]]:
    from cut_cross_entropy import linear_cross_entropy

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none")

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets)

    return {
        "linear_token_logprobs": [Offer("cut-cross-entropy", logprobs)],
        "linear_cross_entropy": [Offer("cut-cross-entropy", cross_entropy)],
    }
