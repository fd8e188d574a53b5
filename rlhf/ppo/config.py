"""Settings of PPO, with the values of the published recipes as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.engine import TrainingConfig, check_choice, check_number
from rlhf_kernels import PPOLossConfig


@dataclass
class PPOConfig(TrainingConfig):
    """Settings of PPO; see ``docs/ppo.md`` for the algorithm line by line.

    Attributes:
        learning_rate: Highest learning rate of the policy's Adam.
        critic_learning_rate: The critic's; null takes learning_rate.
        adam_eps: Adam's epsilon; 1e-5 is PPO's customary value.
        total_updates: How often to sample a batch and train on it.
        batch_size: Prompts, and so responses, per update.
        minibatch_size: Responses per optimizer step; divides batch_size, or is all of it if larger.
        epochs: Passes over each batch of responses.
        max_new_tokens: Longest response, in tokens.
        temperature: Divides the logits when sampling, and in every log-probability.
        top_p: Sample among the likeliest tokens that together have this probability.
        top_k: Sample among so many likeliest tokens; 0 for all.
        generation_batch_size: Responses sampled side by side; null for the whole batch.
        template: How a prompt becomes token ids: auto (the tokenizer's chat template, else
            instruction), instruction, none (the text as it stands).
        kl_coef: Weight of the per-token penalty on the KL divergence from the reference.
        kl_estimator: Estimator of that divergence: k1, k2, k3 or abs.
        missing_eos_penalty: Subtracted from the score of a response that did not end by itself;
            null for none.
        gamma: Discount of later rewards.
        lam: GAE's decay, from 0 (one-step) to 1 (Monte Carlo).
        whiten_rewards: Scale the rewards of a batch to variance 1, keeping their mean.
        whiten_advantages: Scale and shift the advantages of a batch to variance 1 and mean 0.
        clip_range: The policy's probability ratio is clipped to 1 - clip_range and 1 + clip_range.
        clip_range_high: Upper side of that range where it differs; null takes clip_range.
        dual_clip: Bound on the loss of bad actions, above 1 (arXiv 1912.09729); null for none.
        value_clip_range: How far a value may move from the old one; null for no clipping.
        value_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        aggregation: What the loss is averaged over: token-mean (all tokens of a minibatch),
            seq-mean-token-mean or seq-mean-token-sum (first each response, then their mean).
    """

    output_dir: str = "runs/ppo"
    learning_rate: float = 1e-5
    critic_learning_rate: float | None = None
    adam_eps: float = 1e-5
    total_updates: int = 100
    batch_size: int = 64
    minibatch_size: int = 16
    epochs: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    generation_batch_size: int | None = None
    template: Literal["auto", "instruction", "none"] = "auto"
    kl_coef: float = 0.1
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    missing_eos_penalty: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    value_clip_range: float | None = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.01
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "critic_learning_rate", above=0, optional=True)
        for name in ("total_updates", "batch_size", "minibatch_size", "epochs", "max_new_tokens"):
            check_number(self, name, at_least=1, integer=True)
        self.minibatch_size = min(self.minibatch_size, self.batch_size)
        if self.batch_size % self.minibatch_size:
            raise ValueError(
                f"minibatch_size={self.minibatch_size} does not divide "
                f"batch_size={self.batch_size}; choose one that does"
            )
        check_number(self, "temperature", above=0)
        check_number(self, "top_p", above=0, at_most=1)
        check_number(self, "top_k", at_least=0, integer=True)
        check_number(self, "generation_batch_size", at_least=1, integer=True, optional=True)
        check_choice(self, "template", ("auto", "instruction", "none"))
        check_number(self, "kl_coef", at_least=0)
        check_choice(self, "kl_estimator", ("k1", "k2", "k3", "abs"))
        check_number(self, "missing_eos_penalty", at_least=0, optional=True)
        check_number(self, "gamma", at_least=0, at_most=1)
        check_number(self, "lam", at_least=0, at_most=1)
        check_number(self, "value_coef", at_least=0)
        check_number(self, "entropy_coef", at_least=0)
        self.loss_config()  # checks the clip ranges and the aggregation

    def loss_config(self) -> PPOLossConfig:
        """The part of the settings that ``rlhf_kernels.ppo_loss`` takes."""
        return PPOLossConfig(
            clip_range=self.clip_range,
            clip_range_high=self.clip_range_high,
            dual_clip=self.dual_clip,
            value_clip_range=self.value_clip_range,
            value_coef=self.value_coef,
            entropy_coef=self.entropy_coef,
            aggregation=self.aggregation,
        )

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps per update: epochs times minibatches."""
        return self.epochs * (self.batch_size // self.minibatch_size)
