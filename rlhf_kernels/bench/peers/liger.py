"""Liger kernels (Triton)."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels import PPOLossConfig
from rlhf_kernels.bench.peers import Offer

DISTRIBUTION = "liger-kernel"
DEVICES = frozenset({"cuda"})
OPERATIONS = frozenset({"token_logprobs", "linear_cross_entropy", "linear_ppo_loss"})


def offers() -> dict[str, list[Offer]]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.transformers.functional import (
        liger_cross_entropy,
        liger_fused_linear_cross_entropy,
    )

    def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
        return -liger_cross_entropy(logits, targets, reduction="none")

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return liger_fused_linear_cross_entropy(hidden, weight, targets)

    losses: dict[PPOLossConfig, LigerFusedLinearGRPOLoss] = {}

    # Its advantages are one a sequence, and it has no entropy bonus: less work than ours.
    def ppo_loss(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        config: PPOLossConfig,
    ) -> Tensor:
        if config not in losses:
            clip = config.clip_range
            losses[config] = LigerFusedLinearGRPOLoss(
                beta=0.0, use_ref_model=False, epsilon_low=clip, epsilon_high=clip
            )
        loss, _ = losses[config](
            hidden,
            weight,
            targets,
            mask,
            advantages[:, 0].contiguous(),
            old_per_token_logps=old_logprobs,
        )
        return loss

    return {
        "token_logprobs": [Offer("liger cross_entropy", logprobs, destroys=True)],
        "linear_cross_entropy": [Offer("liger fused_linear_cross_entropy", cross_entropy)],
        "linear_ppo_loss": [Offer("liger GRPO, no entropy", ppo_loss, comparable=False)],
    }
