"""Where the critic and the reference come from when they are not given."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, NoReturn

import torch

from rlhf.models import (
    ModelError,
    check_linear_head,
    disable_dropout,
    load_causal_lm,
    load_tokenizer,
    make_scalar_model,
    refuse_adapters,
    scalar_model_from_causal,
    score_head,
)
from rlhf.ppo.config import PPOConfig
from rlhf.reward_model import RewardModel

logger = logging.getLogger(__name__)


def make_critic(critic: Any, reward: Any, policy: Any, tokenizer: Any, config: PPOConfig) -> Any:
    """The critic: a scalar model of its own, never one that is also used for something else.

    Given: as it is (of a ``RewardModel`` its model; a causal model gets a new head). Else as
    ``config.critic`` says: a copy of the reward model, head included, which already judges
    unfinished responses well (Stiennon et al. 2020, arXiv 2009.01325), or the policy's trunk with a
    new head.

    Raises:
        ModelError: The given one has fewer token ids than the policy, reads them otherwise, has
            adapters, or is no scalar model; or a copy of the reward model was asked for, and it
            cannot be one.
    """
    if critic is not None:
        refuse_other_tokenizer(critic, tokenizer, "the critic")
        given = critic.model if isinstance(critic, RewardModel) else critic
        refuse_adapters(given, "the critic")
        model = make_scalar_model(given, seed=config.seed)
        if isinstance(reward, RewardModel) and model is reward.model:
            model = copy.deepcopy(model)  # the reward must not change while the critic learns
        if vocabulary_size(model) < vocabulary_size(policy):
            raise ModelError(
                f"the critic knows {vocabulary_size(model)} token ids and the policy "
                f"{vocabulary_size(policy)}; give a critic with the policy's tokenizer"
            )
    elif config.critic != "policy" and can_copy(reward, policy, tokenizer, config.critic):
        logger.info("the critic starts as a copy of the reward model")
        model = copy.deepcopy(reward.model).float()
    else:
        logger.info("the critic starts from the policy's trunk with a new value head")
        model = scalar_model_from_causal(policy, seed=config.seed)
        # Values of 0 rather than noise, which the first updates would take for advantages.
        torch.nn.init.zeros_(score_head(model).weight)
    model.requires_grad_(True)
    disable_dropout(model)
    return model


def can_copy(reward: Any, policy: Any, tokenizer: Any, choice: str) -> bool:
    """Whether the critic can start as a copy of the reward.

    Raises:
        ModelError: It must (``choice`` is "reward") and cannot.
    """
    possible = isinstance(reward, RewardModel) and same_vocabulary(reward, policy, tokenizer)
    if choice == "reward" and not possible:
        raise ModelError(
            "critic='reward' needs a RewardModel with the policy's tokenizer as the reward; "
            "choose critic='policy', or give a critic"
        )
    return possible


def refuse_critic(config: PPOConfig) -> NoReturn:
    """Say why a critic that was given would not be used."""
    if not config.estimator.needs_critic:
        raise ValueError(
            f"advantage_estimator={config.advantage_estimator!r} trains without a critic; "
            "leave the critic out, or choose gae"
        )
    raise ValueError(
        "a critic was given, and critic='shared' makes the policy its own; leave one of them out"
    )


def make_reference(reference: Any, policy: Any, tokenizer: Any) -> Any:
    """The frozen reference: the given model, else a copy of the policy as it now is.

    Raises:
        ModelError: It has other token ids than the policy, or reads them otherwise.
        ValueError: It is the policy itself, so the KL divergence would be 0 whatever happens.
    """
    if reference is policy:
        raise ValueError(
            "reference is the policy object itself; leave it out for a frozen copy, or give a "
            "model of its own"
        )
    refuse_other_tokenizer(reference, tokenizer, "the reference")
    model = copy.deepcopy(policy) if reference is None else load_causal_lm(reference)
    if vocabulary_size(model) != vocabulary_size(policy):
        raise ModelError(
            f"the reference has {vocabulary_size(model)} token ids and the policy "
            f"{vocabulary_size(policy)}; give a reference with the policy's tokenizer"
        )
    check_linear_head(model)
    disable_dropout(model)
    return model.requires_grad_(False).eval()


def refuse_other_tokenizer(given: Any, tokenizer: Any, what: str) -> None:
    """Raise ModelError if a model lies with a tokenizer for which ids are other tokens.

    A model object has none with it and is taken on trust.
    """
    if isinstance(given, RewardModel):
        own = given.tokenizer
    elif isinstance(given, str | Path):
        try:
            own = load_tokenizer(given)
        except (ModelError, ImportError, KeyError):  # none lies there, or none that loads
            return
    else:
        return
    here, there = (
        {index: token for token, index in one.get_vocab().items()} for one in (tokenizer, own)
    )
    for index in sorted(here.keys() & there.keys()):
        if here[index] != there[index]:
            raise ModelError(
                f"{what} has another tokenizer than the policy: token id {index} is "
                f"{there[index]!r} there and {here[index]!r} here. Give one with the policy's "
                "tokenizer."
            )


def same_vocabulary(reward: RewardModel, policy: Any, tokenizer: Any) -> bool:
    """Whether the reward model reads the policy's token ids as the policy does."""
    same = reward.tokenizer.get_vocab() == tokenizer.get_vocab()
    fits = vocabulary_size(reward.model) >= vocabulary_size(policy)
    if not (same and fits):
        logger.warning(
            "the reward model's tokenizer differs from the policy's, so it cannot start the critic"
        )
    return same and fits


def vocabulary_size(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]
