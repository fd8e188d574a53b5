"""The demo's settings, with the reason of each, and the trainers' settings made from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf.ppo import GenerationSettings, PPOConfig
from rlhf.reward import RewardConfig
from rlhf.sft import SFTConfig


@dataclass(frozen=True)
class DemoSettings:
    """What decides the demo's results.

    Sized for two CPU cores without bfloat16: there, this 135M model trains on about 300 tokens a
    second, and the whole demo has to end within 15 minutes.

    Attributes:
        seed: Seed of everything random.
        max_new_tokens: Longest response. The demonstrations have 15 to 40 tokens, so most responses
            end by themselves before it.
        temperature: Of all sampling. Below 1, as in everyday use: at 1 a model this small often
            loses the thread.
        sft_learning_rate: High, since there are only some twenty steps.
        sft_epochs: One pass suffices to learn brevity; a second begins to learn answers by heart.
        training_prompts: Prompts for the comparisons, and again for PPO; null for all 409.
        pairs_per_prompt: Pairs of responses sampled and compared for each of them.
        heldout_prompts: Prompts for the evaluation at the end; null for all 96.
        heldout_pairs: Comparisons, at least, kept from the reward model, to measure its accuracy.
        reward_learning_rate: For one pass over some 400 pairs.
        reward_epochs: One: on so few pairs a second pass learns labels by heart.
        ppo_learning_rate: Higher than PPOConfig's default: there are only some ten updates.
        ppo_critic_learning_rate: The critic starts as the reward model and must keep up.
        ppo_updates: As many as the time allows.
        ppo_batch_size: Responses per update.
        ppo_minibatch_size: Four optimizer steps per epoch and update.
        ppo_epochs: Passes over each batch of responses.
        ppo_kl_coef: Low enough that ten updates move the policy, high enough that its text stays
            sensible; the KL divergence is in the results.
        best_of: Responses per held-out prompt of the policy before PPO; best-of-n picks among them.
        after_samples: Responses per held-out prompt of the policy after PPO.
    """

    seed: int = 0
    max_new_tokens: int = 40
    temperature: float = 0.8
    sft_learning_rate: float = 1e-4
    sft_epochs: int = 1
    training_prompts: int | None = 320
    pairs_per_prompt: int = 2
    heldout_prompts: int | None = None
    heldout_pairs: int = 96
    reward_learning_rate: float = 5e-5
    reward_epochs: int = 1
    ppo_learning_rate: float = 3e-5
    ppo_critic_learning_rate: float = 3e-5
    ppo_updates: int = 10
    ppo_batch_size: int = 32
    ppo_minibatch_size: int = 8
    ppo_epochs: int = 1
    ppo_kl_coef: float = 0.03
    best_of: int = 4
    after_samples: int = 1

    def generation(self) -> GenerationSettings:
        # Decoding reads all weights for every token, so a wide batch costs little more.
        return GenerationSettings(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, batch_size=128
        )

    def sft(self, folder: Path) -> SFTConfig:
        return SFTConfig(
            output_dir=str(folder),
            learning_rate=self.sft_learning_rate,
            epochs=self.sft_epochs,
            batch_size=8,
            micro_batch_size=16,
            eval_fraction=0.1,
            warmup_ratio=0.1,
            seed=self.seed,
        )

    def reward(self, folder: Path) -> RewardConfig:
        return RewardConfig(
            output_dir=str(folder),
            learning_rate=self.reward_learning_rate,
            epochs=self.reward_epochs,
            batch_size=16,
            micro_batch_size=32,
            reference_pairs=64,
            warmup_ratio=0.1,
            seed=self.seed,
        )

    def ppo(self, folder: Path) -> PPOConfig:
        return PPOConfig(
            output_dir=str(folder),
            learning_rate=self.ppo_learning_rate,
            critic_learning_rate=self.ppo_critic_learning_rate,
            total_updates=self.ppo_updates,
            batch_size=self.ppo_batch_size,
            minibatch_size=self.ppo_minibatch_size,
            micro_batch_size=self.ppo_minibatch_size,
            epochs=self.ppo_epochs,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            kl_coef=self.ppo_kl_coef,
            # The reward says nothing about length; without a penalty for not ending, the policy
            # would learn to go on praising until it is cut off.
            missing_eos_penalty=0.5,
            entropy_coef=0.0,
            seed=self.seed,
        )
