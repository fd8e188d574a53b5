"""Advantage estimators: from the scores of a batch to the advantage of each token.

An estimator is an object that is called with ``Episodes`` and returns an ``Estimate``. A new one is
registered under a name, which the setting ``advantage_estimator`` then takes::

    class MeanBaseline(CriticFree):
        def advantages(self, rewards, episodes):
            totals = rewards.sum(1)
            return episodes.for_each_token(totals - totals.mean())

    ESTIMATORS["mean"] = MeanBaseline()
    config = PPOConfig(advantage_estimator="mean")
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import (
    gae,
    kl_penalty,
    masked_mean,
    masked_whiten,
    rollout_advantages,
    shaped_rewards,
)

if TYPE_CHECKING:
    from rlhf.ppo.config import PPOConfig

EPS = 1e-8  # added to variances, as rlhf_kernels does


@dataclass(frozen=True)
class Episodes:
    """A batch of responses as estimators see it: B rows, T response positions.

    Attributes:
        scores: fp32 [B], shaped (see ``rlhf.ppo.score_shaping``).
        logprobs, ref_logprobs: fp32 [B, T]. values: fp32 [B, T], or None without a critic.
        mask: bool [B, T], the trained tokens; elsewhere the others may hold anything.
        kl_coef: Weight of the KL penalty in the reward; 0 where it stands in the loss.
        config: The settings; a prompt's ``responses_per_prompt`` rows follow one another.
    """

    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    mask: Tensor
    kl_coef: float
    config: PPOConfig

    def by_prompt(self, per_response: Tensor) -> Tensor:
        """[B] as [prompts, responses_per_prompt].

        Raises:
            ValueError: B is no multiple of ``responses_per_prompt``.
        """
        size = self.config.responses_per_prompt
        if len(per_response) % size:
            raise ValueError(
                f"{len(per_response)} responses are no multiple of responses_per_prompt={size}; "
                "keep all responses to a prompt, one after another"
            )
        return per_response.view(-1, size)

    def for_each_token(self, per_response: Tensor) -> Tensor:
        """[B] or [prompts, responses_per_prompt] as [B, T]: each response's number at each of its
        valid tokens, 0 elsewhere.
        """
        return per_response.reshape(-1, 1) * self.mask


class Estimate(NamedTuple):
    """What an estimator returns, each fp32 [B, T] and 0 where masked.

    Attributes:
        advantages: Whitened where ``config.whitens_advantages``.
        returns: The critic's targets; None without a critic.
        rewards: KL penalty and scores, before any whitening.
        kl: The estimate of the KL divergence from the reference.
    """

    advantages: Tensor
    returns: Tensor | None
    rewards: Tensor
    kl: Tensor


class AdvantageEstimator(ABC):
    """From episodes to advantages.

    Attributes:
        needs_critic: Whether values are estimated, and a critic trained, for it.
        min_responses: Responses to a prompt that it needs at least.
        whitens: Whether its advantages are whitened unless ``whiten_advantages`` says otherwise.
    """

    needs_critic: bool = False
    min_responses: int = 1
    whitens: bool = False

    @abstractmethod
    def __call__(self, episodes: Episodes) -> Estimate: ...


class GAE(AdvantageEstimator):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

    The episode ends with the response, whether with EOS or cut off: nothing is bootstrapped.
    """

    needs_critic = True
    whitens = True

    def __call__(self, episodes: Episodes) -> Estimate:
        assert episodes.values is not None
        config = episodes.config
        result = rollout_advantages(
            episodes.scores,
            episodes.logprobs,
            episodes.ref_logprobs,
            episodes.values,
            episodes.mask,
            kl_coef=episodes.kl_coef,
            kl_estimator=config.kl_estimator,
            gamma=config.gamma,
            lam=config.lam,
            value_lam=config.critic_lam,
            whiten_rewards=config.whiten_rewards,
            whiten_advantages=config.whitens_advantages,
        )
        return Estimate(result.advantages, result.returns, result.rewards, result.kl)


class CriticFree(AdvantageEstimator):
    """An estimator that needs rewards alone; a subclass only says how."""

    @torch.no_grad()
    def __call__(self, episodes: Episodes) -> Estimate:
        mask, config = episodes.mask, episodes.config
        kl = kl_penalty(
            episodes.logprobs, episodes.ref_logprobs, estimator=config.kl_estimator
        ).masked_fill(~mask, 0.0)
        rewards = shaped_rewards(episodes.scores, kl, mask, kl_coef=episodes.kl_coef)
        used = masked_whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
        advantages = self.advantages(used, episodes)
        if config.whitens_advantages:
            advantages = masked_whiten(advantages, mask)
        return Estimate(advantages, None, rewards, kl)

    @abstractmethod
    def advantages(self, rewards: Tensor, episodes: Episodes) -> Tensor:
        """The advantages fp32 [B, T], 0 where masked, of rewards fp32 [B, T], 0 where masked."""


class RLOO(CriticFree):
    """REINFORCE, leave one out (Ahmadian et al. 2024, arXiv 2402.14740).

    A response is one action, with all of its rewards, the KL penalty's too; its baseline is the
    mean of the prompt's other responses.
    """

    min_responses = 2

    def advantages(self, rewards: Tensor, episodes: Episodes) -> Tensor:
        totals = episodes.by_prompt(rewards.sum(1))
        others = (totals.sum(1, keepdim=True) - totals) / (totals.shape[1] - 1)
        return episodes.for_each_token(totals - others)


class GRPO(CriticFree):
    """Rewards normalised over a prompt's responses (DeepSeekMath, arXiv 2402.03300).

    The deviation is the population's, as in whitening. Without it (``grpo_divide_by_std``) prompts
    that are nearly always, or never, answered well do not count more than others: Dr. GRPO (arXiv
    2503.20783).
    """

    min_responses = 2

    def advantages(self, rewards: Tensor, episodes: Episodes) -> Tensor:
        totals = episodes.by_prompt(rewards.sum(1))
        centred = totals - totals.mean(1, keepdim=True)
        if episodes.config.grpo_divide_by_std:
            centred = centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()
        return episodes.for_each_token(centred)


class ReinforcePlusPlus(CriticFree):
    """REINFORCE++ (arXiv 2501.03262): each token's rewards to go, less their mean over the batch.

    Whitening, on by default, divides them by their deviation over the batch, as the paper does.
    """

    whitens = True

    def advantages(self, rewards: Tensor, episodes: Episodes) -> Tensor:
        mask = episodes.mask
        # Without values and with a decay of 1, GAE is the discounted sum of what follows.
        to_go, _ = gae(
            rewards, torch.zeros_like(rewards), mask, gamma=episodes.config.gamma, lam=1.0
        )
        return (to_go - masked_mean(to_go, mask)) * mask


ESTIMATORS: dict[str, AdvantageEstimator] = {
    "gae": GAE(),
    "rloo": RLOO(),
    "reinforce++": ReinforcePlusPlus(),
    "grpo": GRPO(),
}
