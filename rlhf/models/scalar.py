"""Models with one score per position: reward models and critics.

They are ordinary ``AutoModelForSequenceClassification`` models with one label. What differs here is
where the score is read: at positions that the attention mask names, never by comparing token ids.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf.engine.world import World
from rlhf.models.loading import ModelError, load, load_causal_lm, load_model, model_name
from rlhf.models.trunk import hidden_states


def load_scalar_model(name_or_model: str | Path | nn.Module) -> Any:
    """A trained float32 model with one score, from an id, a folder or an object.

    What is loaded comes onto this rank's device.

    Raises:
        ModelError: It cannot be loaded, or has no score yet: a causal model, or a classifier with
            several labels. A head drawn at random here would be taken for a judgement.
    """
    return _load(name_or_model, convert=None)


def make_scalar_model(name_or_model: str | Path | nn.Module, *, seed: int = 0) -> Any:
    """As ``load_scalar_model``, for training: a causal model gets a new head.

    See ``scalar_model_from_causal``; the seed is the head's.

    Raises:
        ModelError: It cannot be loaded, or is a classifier with several labels.
    """
    return _load(name_or_model, convert=partial(scalar_model_from_causal, seed=seed))


def _load(name_or_model: Any, convert: Callable[[Any], Any] | None) -> Any:
    is_object = isinstance(name_or_model, nn.Module)
    if is_object:
        config, classes = name_or_model.config, [type(name_or_model).__name__]
        name = model_name(name_or_model)
    else:
        config = load(AutoConfig, name_or_model, "model")
        classes, name = config.architectures or [], str(name_or_model)
    if not any("ForSequenceClassification" in class_name for class_name in classes):
        if convert is None:
            raise ModelError(
                f"{name} is no reward model: {', '.join(classes) or 'its config'} has no trained "
                "score. Train it with `rlhf reward` (RewardTrainer) first."
            )
        return convert(name_or_model if is_object else load_causal_lm(name_or_model))
    if config.num_labels != 1:
        raise ModelError(
            f"{name} is a classifier with {config.num_labels} labels; "
            "a reward model or critic has one (num_labels=1)"
        )
    if is_object:
        return name_or_model.float()
    model = load_model(
        AutoModelForSequenceClassification, name_or_model, "reward model", dtype=torch.float32
    )
    return model.to(World().device)


def scalar_model_from_causal(model: Any, *, seed: int = 0) -> Any:
    """A sequence classifier with one label on a copy of a causal model's trunk.

    The head's weights are drawn from N(0, 1/(d+1)) (Stiennon et al. 2020, arXiv 2009.01325), with a
    generator of its own, so that the result depends on the seed alone.

    Raises:
        ModelError: transformers has no sequence classifier of this architecture with a linear head.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    try:
        scalar = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ModelError(
            f"{model_name(model)}: transformers has no sequence classifier for "
            f"{config.model_type!r}, so it cannot become a reward model or critic"
        ) from error
    scalar.base_model.load_state_dict(model.base_model.state_dict())
    head = score_head(scalar)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()
    return scalar.to(next(model.parameters()).device)


def score_head(model: Any) -> nn.Linear:
    """The linear layer that turns a hidden state into the score.

    Raises:
        ModelError: The model has no linear layer named ``score`` with one output.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(f"{model_name(model)} has no linear score head with one output")
    return head


def token_scores(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """The score at every position from the column ``first`` on, fp32 [B, L - first], minus
    ``config.reward_mean`` (0 if absent).
    """
    return _apply_head(model, hidden_states(model, input_ids, attention_mask, position_ids, first))


def last_token_scores(
    model: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """The score at each row's last attended position, fp32 [B], minus ``config.reward_mean``.

    The position comes from the mask, so the padding's side, amount and id do not matter.
    """
    hidden = hidden_states(model, input_ids, attention_mask, position_ids)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return _apply_head(model, hidden[rows, last_positions(attention_mask)])


def last_positions(attention_mask: Tensor) -> Tensor:
    """Index [B] int64 of each row's last attended position."""
    positions = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return (attention_mask.bool() * positions).argmax(-1)


def _apply_head(model: Any, hidden: Tensor) -> Tensor:
    head = score_head(model)
    # In float32 also under autocast: bfloat16 keeps two to three digits of a score.
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        scores = nn.functional.linear(hidden.float(), head.weight.float(), bias)
    return scores.squeeze(-1) - getattr(model.config, "reward_mean", 0.0)
