"""flash-attention's cross-entropy (Triton)."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels.bench.peers import Offer

DISTRIBUTION = "flash-attn"
DEVICES = frozenset({"cuda"})
OPERATIONS = frozenset({"token_logprobs"})


def offers() -> dict[str, list[Offer]]:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
        losses, _ = cross_entropy_loss(logits, targets)
        return -losses

    return {"token_logprobs": [Offer("flash-attn cross_entropy_loss", logprobs)]}
