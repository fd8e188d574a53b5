"""TRL 1.16 and later: Triton kernels on a GPU, PyTorch elsewhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_kernels import PPOLossConfig
from rlhf_kernels.bench import formulas
from rlhf_kernels.bench.peers import Offer

DISTRIBUTION = "trl"
DEVICES = frozenset({"cpu", "cuda"})
OPERATIONS = frozenset(
    {"token_logprobs", "linear_token_logprobs", "linear_cross_entropy", "linear_ppo_loss"}
)

_HEAD_CHUNK = 32768  # columns at a time, the number that `add_fused_lm_head` passes


def offers() -> dict[str, list[Offer]]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
        return selective_log_softmax(*_as_batch(logits, targets)).reshape(-1)

    def logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        found, entropy = selective_log_softmax_and_entropy(*_as_batch(logits, targets))
        return found.reshape(-1), entropy.reshape(-1)

    # The function under `add_fused_lm_head`, whose own face takes a whole model.
    def head(hidden: Tensor, weight: Tensor, targets: Tensor, *outputs: str) -> Any:
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, _HEAD_CHUNK, None, 1.0, outputs
        )

    def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return head(hidden, weight, targets)[0]

    def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -head(hidden, weight, targets)[0].mean()

    def ppo_loss(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        config: PPOLossConfig,
    ) -> Any:
        flat = hidden.reshape(-1, hidden.shape[-1])
        found, entropy = head(flat, weight, targets.reshape(-1), "entropy")[:2]
        shape = targets.shape
        return formulas.policy_loss(
            found.view(shape), entropy.view(shape), old_logprobs, advantages, mask, config
        )

    return {
        "token_logprobs": [
            Offer("trl selective_log_softmax", logprobs),
            Offer("trl selective_log_softmax_and_entropy", logprobs_and_entropy, entropy=True),
        ],
        "linear_token_logprobs": [Offer("trl fused head", linear_logprobs)],
        "linear_cross_entropy": [Offer("trl fused head, mean", cross_entropy)],
        "linear_ppo_loss": [Offer("trl fused head + eager loss", ppo_loss)],
    }


def _as_batch(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Eight sequences, where they come out even: without Triton its loop runs over sequences."""
    rows = targets.numel()
    batch = 8 if rows % 8 == 0 else 1
    return logits.view(batch, rows // batch, -1), targets.view(batch, -1)
