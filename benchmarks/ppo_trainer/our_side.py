"""Our PPOTrainer on the work."""

from __future__ import annotations

import tempfile

from benchmarks.ppo_trainer.work import (
    ADAM_EPS,
    CLIP_RANGE,
    KL_COEF,
    LEARNING_RATE,
    TEMPERATURE,
    VALUE_COEF,
    Report,
    Work,
    force_lengths,
    run_side,
    timed_updates,
)
from rlhf import PPOConfig, PPOTrainer, RewardModel
from rlhf.models import load_tokenizer


def settings(work: Work, folder: str) -> PPOConfig:
    return PPOConfig(
        output_dir=folder,
        trackers=[],
        template="none",
        total_updates=1 + work.updates,
        batch_size=work.batch,
        minibatch_size=work.batch,
        micro_batch_size=work.micro_batch,
        epochs=work.epochs,
        max_new_tokens=work.response,
        dtype=work.dtype,
        weights=work.weights,
        optimizer=work.optimizer,
        frozen_on_disk=True,
        critic="shared" if work.critic == "shared" else "reward",
        temperature=TEMPERATURE,
        learning_rate=LEARNING_RATE,
        adam_eps=ADAM_EPS,
        max_grad_norm=None,
        kl_coef=KL_COEF,
        clip_range=CLIP_RANGE,
        value_clip_range=CLIP_RANGE,
        value_coef=VALUE_COEF,
        entropy_coef=0.0,
    )


def run(work: Work) -> Report:
    tokenizer = load_tokenizer(work.policy_folder, work.policy_folder)
    # In the precision that TRL's reward model has.
    reward = RewardModel(
        work.reward_folder,
        tokenizer,
        template="none",
        dtype=work.dtype,
        weights=work.weights,
    )
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            settings(work, folder),
            work.policy_folder,
            tokenizer,
            work.prompts(tokenizer),
            reward,
        )
        lengths = force_lengths(trainer.policy, work)

        def update() -> None:
            metrics.update(trainer.update(trainer.rollout(next(trainer.prompts))))

        seconds = timed_updates(update, work)
    phases = {
        name.removeprefix("seconds/"): value
        for name, value in metrics.items()
        if name.startswith("seconds/")
    }
    return Report(seconds, int(metrics["optimizer_steps"]), lengths[-1], phases)


if __name__ == "__main__":
    run_side(run)
