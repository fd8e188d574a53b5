"""A value head on the policy's own trunk: one forward for log-probabilities and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

HEAD = "value_head"


def add_value_head(policy: Any) -> None:
    """Give a causal model a value head of zeros: the first values are 0, not noise."""
    hidden = policy.config.get_text_config().hidden_size
    head = nn.Linear(hidden, 1, bias=False, device=next(policy.parameters()).device)
    nn.init.zeros_(head.weight)
    setattr(policy, HEAD, head)


def shares_trunk(model: Any) -> bool:
    """Whether the model has a value head."""
    return hasattr(model, HEAD)


def values_of(model: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    """Values fp32 [B, T] of the states that hidden [B, T, H] predicts from; 0 where masked.

    In float32 also under autocast: bfloat16 keeps two to three digits.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        values = nn.functional.linear(hidden.float(), getattr(model, HEAD).weight.float())
    return values.squeeze(-1).masked_fill(~mask, 0.0)


def split_weights(
    policy: Any, weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a policy with a value head as those of a causal model and of a critic.

    Args:
        policy: The model, for the names of its parts.
        weights: Its weights, whole, by name.

    Returns:
        ``(policy, critic)``, the second with the names of ``critic_like``.
    """
    causal = {name: w for name, w in weights.items() if not name.startswith(HEAD)}
    trunk = f"{policy.base_model_prefix}."
    critic = {name: w for name, w in causal.items() if name.startswith(trunk)}
    critic["score.weight"] = weights[f"{HEAD}.weight"]
    return causal, critic


def critic_like(policy: Any) -> Any:
    """A sequence classifier on the policy's architecture, without weights: to save with."""
    config = type(policy.config).from_dict({**policy.config.to_dict(), "num_labels": 1})
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)
