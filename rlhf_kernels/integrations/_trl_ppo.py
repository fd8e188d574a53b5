"""What TRL 1.12's PPOTrainer looks up by name: its rollout and its models' forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlhf_kernels.fast_attention import fast_attention
from rlhf_kernels.fast_layers import fast_layers
from rlhf_kernels.fast_rotary import fast_rotary
from rlhf_kernels.fast_sampling import fast_sampling
from rlhf_kernels.integrations._deferred_logits import NEVER, deferred_head
from rlhf_kernels.logprobs import token_logprobs


@dataclass(frozen=True)
class KeptLogprobs:
    """In the place of the logits of sampled tokens, [B, T, V].

    Attributes:
        tokens: [B, T], int64.
        logprobs: [B, T], float32.
    """

    tokens: Tensor
    logprobs: Tensor

    def __getitem__(self, rows: slice) -> KeptLogprobs:
        return KeptLogprobs(self.tokens[rows], self.logprobs[rows])

    def token_logprobs(self, tokens: Tensor) -> Tensor:
        """The log-probabilities of the tokens that were sampled, [B, T].

        Raises:
            ValueError: These are others, whose log-probabilities were not kept.
        """
        if not torch.equal(tokens, self.tokens):
            raise ValueError(
                "the rollout kept the log-probabilities of the tokens that it sampled, and others "
                f"are asked for: {tuple(tokens.shape)} tokens, {tuple(self.tokens.shape)} sampled"
            )
        return self.logprobs


class _KeepsLogprobs:
    """A stopping criterion, which stops nothing: it is what `generate` calls after each token.

    It puts the token's log-probability in the place of the step's scores. A logits processor would
    come before the temperature's.
    """

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...], **_: Any) -> Tensor:
        chosen = token_logprobs(scores[-1], input_ids[:, -1], ignore_index=NEVER)
        scores[-1].data = chosen[:, None]
        return torch.zeros_like(input_ids[:, 0], dtype=torch.bool)


@torch.no_grad()
def batch_generation(
    model: nn.Module,
    queries: Tensor,
    local_rollout_forward_batch_size: int,
    pad_token_id: int,
    generation_config: Any,
) -> tuple[Tensor, KeptLogprobs]:
    """Responses of a policy, sampled a number of queries at a time, as TRL 1.12.0's.

    Args:
        model: with the `generate` of Hugging Face's causal models.
        queries: [B, P], int64, padded.
        local_rollout_forward_batch_size: queries at a time.
        pad_token_id: stands where there is no token.
        generation_config: of `generate`; it samples, without beams.

    Returns:
        Queries and responses [B, P + T], and, where TRL has the scores [B, T, V] that the tokens
        were drawn from, what `selective_log_softmax` needs of them.
    """
    found = []
    for query in queries.split(local_rollout_forward_batch_size):
        valid = query != pad_token_id
        with fast_sampling(model, len(query)), fast_rotary(model):
            output = model.generate(  # type: ignore[operator]
                input_ids=query.masked_fill(~valid, 0),
                attention_mask=valid,
                generation_config=generation_config,
                return_dict_in_generate=True,
                output_scores=True,
                stopping_criteria=[_KeepsLogprobs()],
            )
        found.append((output.sequences[:, queries.shape[1] :], torch.cat(output.scores, dim=1)))
    width = max(tokens.shape[1] for tokens, _ in found)
    tokens = torch.cat([_widen(tokens, width, pad_token_id) for tokens, _ in found])
    logprobs = torch.cat([_widen(logprobs, width, 0.0) for _, logprobs in found])
    return torch.cat([queries, tokens], dim=1), KeptLogprobs(tokens, logprobs)


def _widen(rows: Tensor, width: int, filler: float) -> Tensor:
    return F.pad(rows, (0, width - rows.shape[1]), value=filler)


def forward(model: nn.Module, query_responses: Tensor, pad_token_id: int) -> Any:
    """A model's output for padded sequences, as TRL 1.12.0's, with logits that are not computed.

    Args:
        model: a Hugging Face causal model, or TRL's pair of policy and critic.
        query_responses: [B, L], int64, padded on either side.
        pad_token_id: stands where there is no token.

    Returns:
        The model's output, hidden states included, whose logits are `DeferredLogits` where the head
        is a plain linear layer; with the critic's values [B, L, 1] from a pair.
    """
    valid = query_responses != pad_token_id
    with deferred_head(model), fast_layers(model), fast_rotary(model), fast_attention(model):
        return model(
            input_ids=query_responses.masked_fill(~valid, 0),
            attention_mask=valid,
            position_ids=valid.cumsum(1) - valid.long(),
            return_dict=True,
            output_hidden_states=True,
        )


def get_reward(
    model: nn.Module, query_responses: Tensor, pad_token_id: int, context_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of padded sequences by a reward model or critic, as TRL 1.12.0's.

    Args:
        model: a Hugging Face sequence classifier whose head is called `score`.
        query_responses: [B, L], int64, padded on either side.
        pad_token_id: stands where there is no token.
        context_length: where the responses begin.

    Returns:
        The scores [B, L, 1] at every place; those [B] at each response's last token before its
        first padding; and the places [B] of these tokens, int64.
    """
    valid = query_responses != pad_token_id
    prefix: Any = model.base_model_prefix
    trunk = getattr(model, prefix)
    with fast_layers(model), fast_rotary(model), fast_attention(model):
        hidden = trunk(
            input_ids=query_responses.masked_fill(~valid, 0),
            attention_mask=valid,
            position_ids=valid.cumsum(1) - valid.long(),
            return_dict=True,
            use_cache=False,
        ).last_hidden_state
        scores = model.score(hidden)  # type: ignore[operator]
    padded = ~valid[:, context_length:]
    width = padded.shape[1]
    before = torch.where(padded.any(1), padded.long().argmax(1), width)
    last = before - 1 + context_length
    rows = torch.arange(len(last), device=last.device)
    return scores, scores[rows, last].squeeze(-1), last
