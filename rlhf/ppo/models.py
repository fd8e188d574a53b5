"""The models of a PPO training: policy, critic, reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.engine import Engine, Frozen, save_model
from rlhf.engine.lora import add_lora, has_lora, without_adapters, without_lora
from rlhf.engine.resume import model_fingerprint
from rlhf.models import (
    check_linear_head,
    context_length,
    disable_dropout,
    load_causal_lm,
    refuse_adapters,
)
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.critic import make_critic, make_reference, refuse_critic
from rlhf.ppo.generation import eos_token_ids
from rlhf.ppo.scoring import reward_models
from rlhf.ppo.shared_trunk import (
    add_value_head,
    critic_like,
    shares_trunk,
    split_weights,
)


class WithoutAdapters:
    """The reference of a policy with adapters: the same model with them switched off."""

    def __init__(self, policy: Engine) -> None:
        self.policy = policy

    @property
    def model(self) -> Any:
        return self.policy.model

    @torch.no_grad()
    def run(self, function: Callable[[Any], Any]) -> Any:
        """``function(model)``, with the model's weights at hand."""

        def without(model: Any) -> Any:
            with without_lora(model):
                return function(model)

        return self.policy.run(without)


@dataclass
class PPOModels:
    """Policy, critic and reference, each ready to run on this rank.

    Attributes:
        policy: Trained; has a value head where it is its own critic.
        critic: A model of its own, trained; None where there is none, or the policy is its own.
        reference: What the KL penalty keeps the policy near.
        context: Positions that all of them have; None if unknown.
        fingerprints: Of each model as it was given, and of what ends a response, to notice a change
            on a resume.
    """

    policy: Engine
    critic: Engine | None
    reference: Frozen | WithoutAdapters
    context: int | None
    fingerprints: dict[str, Any]

    @classmethod
    def build(
        cls,
        config: PPOConfig,
        policy: Any,
        tokenizer: Any,
        reward: Any,
        critic: Any,
        reference: Any,
    ) -> PPOModels:
        """From what ``PPOTrainer`` was given; see there.

        Raises:
            ModelError: A model cannot be loaded or does not fit the others.
            ValueError: A critic was given that the settings have no use for.
        """
        policy = load_causal_lm(policy)
        refuse_adapters(policy, "the policy")
        check_linear_head(policy)
        disable_dropout(policy)
        if config.has_own_critic:
            critic = make_critic(critic, reward, policy, tokenizer, config)
            critic.config.pad_token_id = tokenizer.pad_token_id
        elif critic is not None:
            refuse_critic(config)
        adapted = config.lora_rank is not None and reference is None
        reference = None if adapted else make_reference(reference, policy, tokenizer)
        models = {"policy": policy, "critic": critic, "reference": reference}
        given = {name: model for name, model in models.items() if model is not None}
        fingerprints: dict[str, Any] = {
            "eos_token_ids": eos_token_ids(policy, tokenizer),
            **{name: model_fingerprint(model) for name, model in given.items()},
        }
        for number, part in enumerate(reward_models(reward), start=1):
            made_from = {**model_fingerprint(part.model), "template": part.template}
            fingerprints[f"reward model {number}"] = made_from
        lengths = [context_length(model) for model in given.values()]
        if config.lora_rank is not None:
            add_lora(policy, config.lora_rank, config.lora_alpha, seed=config.seed)
        if critic is not None and config.critic_lora_rank is not None:
            add_lora(critic, config.critic_lora_rank, config.lora_alpha, seed=config.seed)
        if config.estimator.needs_critic and config.critic == "shared":
            add_value_head(policy)
        parked_in = config.output_dir if config.frozen_on_disk else None
        if config.parallel in ("fsdp", "hybrid") or parked_in is not None:
            for part in reward_models(reward):
                part.freeze(config, parked_in)
        steps = config.total_updates * config.steps_per_update
        warmup = config.critic_warmup_updates * config.steps_per_update
        engine = Engine(policy, config, steps - warmup, name="the policy")
        rate = config.critic_learning_rate
        return cls(
            policy=engine,
            critic=critic and Engine(critic, config, steps, learning_rate=rate, name="the critic"),
            reference=WithoutAdapters(engine)
            if adapted
            else Frozen(reference, config, parked_in=parked_in),
            context=min((length for length in lengths if length is not None), default=None),
            fingerprints=fingerprints,
        )

    @property
    def trained(self) -> dict[str, Engine]:
        """The engines of the models that are trained, by name."""
        critic = {} if self.critic is None else {"critic": self.critic}
        return {"policy": self.policy, **critic}

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Write the policy to ``folder`` and the critic, if any, to ``folder/critic``.

        Both are plain Hugging Face folders, with adapters merged in. Every rank must call it.
        """
        policy = self.policy.model
        weights = self.policy.whole_weights()
        critic_weights = {} if self.critic is None else self.critic.whole_weights()
        if not self.policy.world.is_main:
            return
        plain = without_adapters(policy) if has_lora(policy) else policy
        if shares_trunk(policy):
            weights, values = split_weights(policy, weights)
            save_model(critic_like(policy), tokenizer, folder / "critic", values)
        elif self.critic is not None:
            model = self.critic.model
            own = without_adapters(model) if has_lora(model) else model
            save_model(own, tokenizer, folder / "critic", critic_weights)
        save_model(plain, tokenizer, folder, weights)
