"""Loading models, running their trunk alone, and models with one score in place of a vocabulary."""

from __future__ import annotations

from rlhf.models.loading import (
    ModelError,
    causal_config,
    check_token_ids,
    context_length,
    length_limit,
    load_causal_lm,
    load_tokenizer,
    model_name,
    refuse_adapters,
)
from rlhf.models.scalar import (
    last_token_scores,
    load_scalar_model,
    make_scalar_model,
    scalar_model_from_causal,
    score_head,
    token_scores,
)
from rlhf.models.trunk import (
    check_linear_head,
    disable_dropout,
    hidden_states,
    lm_head,
    position_ids_from_mask,
)

__all__ = [
    "ModelError",
    "causal_config",
    "check_linear_head",
    "check_token_ids",
    "context_length",
    "disable_dropout",
    "hidden_states",
    "last_token_scores",
    "length_limit",
    "lm_head",
    "load_causal_lm",
    "load_scalar_model",
    "load_tokenizer",
    "make_scalar_model",
    "model_name",
    "position_ids_from_mask",
    "refuse_adapters",
    "scalar_model_from_causal",
    "score_head",
    "token_scores",
]
