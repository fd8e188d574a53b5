"""Log-probabilities and values of responses: one forward, used before and during training.

That old log-probabilities come from the same function as the new ones is what makes the first
ratio of an update 1; those that generation computes differ by its KV cache and its padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.models import hidden_states, lm_head, token_scores
from rlhf.ppo.experience import Sequences
from rlhf.ppo.shared_trunk import values_of
from rlhf_kernels import linear_token_logprobs

IGNORED = -100


def response_logprobs(model: Any, batch: Sequences, temperature: float) -> Tensor:
    """Log-probability of each response token, fp32 [B, T], 0 where masked.

    The trunk reads everything but each row's last token, whose prediction nobody needs; the head
    runs on the trained response positions alone.
    """
    hidden, weight, bias, targets = head_inputs(model, batch)
    return linear_token_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, ignore_index=IGNORED
    )


def head_inputs(model: Any, batch: Sequences) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states [B, T, H] that predict the response tokens, the head, and the targets."""
    ids, mask = _inputs(batch)
    hidden = hidden_states(model, ids, mask)[:, batch.prompt_ids.shape[1] - 1 :]
    weight, bias = lm_head(model)
    return hidden, weight, bias, batch.responses.masked_fill(~batch.response_mask, IGNORED)


def response_logprobs_and_values(model: Any, batch: Sequences, temperature: float) -> Tensor:
    """Both, of a policy with a value head, from one forward of its trunk: fp32 [B, T, 2]."""
    hidden, weight, bias, targets = head_inputs(model, batch)
    logprobs = linear_token_logprobs(
        hidden, weight, targets, bias=bias, temperature=temperature, ignore_index=IGNORED
    )
    return torch.stack([logprobs, values_of(model, hidden, batch.response_mask)], dim=-1)


def response_values(critic: Any, batch: Sequences) -> Tensor:
    """The critic's value of the state before each response token, fp32 [B, T], 0 where masked.

    Read at the position whose logits predict the token: the one before it.
    """
    ids, mask = _inputs(batch)
    values = token_scores(critic, ids, mask)[:, batch.prompt_ids.shape[1] - 1 :]
    return values.masked_fill(~batch.response_mask, 0.0)


def _inputs(batch: Sequences) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, P + T - 1]; a response token is read where another one follows."""
    ids = torch.cat([batch.prompt_ids, batch.responses[:, :-1]], dim=1)
    return ids, torch.cat([batch.prompt_mask, batch.attended()[:, 1:]], dim=1)
