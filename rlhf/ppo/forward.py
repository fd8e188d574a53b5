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
from rlhf_kernels import linear_token_logprobs

IGNORED = -100


def response_logprobs(model: Any, batch: Sequences, temperature: float) -> Tensor:
    """Log-probability of each response token, fp32 [B, T], 0 where masked.

    The trunk reads everything but each row's last token, whose prediction nobody needs; the head
    runs on the trained response positions alone.
    """
    return logprobs_of(model, response_hidden(model, batch), batch, temperature)


def response_hidden(model: Any, batch: Sequences) -> Tensor:
    """The trunk's hidden states [B, T, H] that predict the response tokens."""
    ids, mask = _inputs(batch)
    return hidden_states(model, ids, mask, first=batch.prompt_ids.shape[1] - 1)


def logprobs_of(model: Any, hidden: Tensor, batch: Sequences, temperature: float) -> Tensor:
    """What the model's head makes of ``response_hidden``: fp32 [B, T], 0 where masked."""
    weight, bias = lm_head(model)
    return linear_token_logprobs(
        hidden,
        weight,
        batch.responses.masked_fill(~batch.response_mask, IGNORED),
        bias=bias,
        temperature=temperature,
        ignore_index=IGNORED,
    )


def response_values(critic: Any, batch: Sequences) -> Tensor:
    """The critic's value of the state before each response token, fp32 [B, T], 0 where masked.

    Read at the position whose logits predict the token: the one before it.
    """
    ids, mask = _inputs(batch)
    values = token_scores(critic, ids, mask, first=batch.prompt_ids.shape[1] - 1)
    return values.masked_fill(~batch.response_mask, 0.0)


def _inputs(batch: Sequences) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, P + T - 1]; a response token is read where another one follows."""
    ids = torch.cat([batch.prompt_ids, batch.responses[:, :-1]], dim=1)
    return ids, torch.cat([batch.prompt_mask, batch.attended()[:, 1:]], dim=1)
