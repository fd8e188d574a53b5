"""TRL 1.12.0's PPO on the work; runs in TRL's own environment."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.ppo_trainer.work import (
    ADAM_EPS,
    CLIP_RANGE,
    EOS,
    KL_COEF,
    LEARNING_RATE,
    PAD,
    TEMPERATURE,
    VALUE_COEF,
    Report,
    Work,
    force_lengths,
    now,
    run_side,
)


class Clock(TrainerCallback):
    """The time at the end of each update."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now(self.work))


def settings(work: Work, folder: str) -> PPOConfig:
    """One optimizer step an epoch, whatever num_mini_batches says."""
    return PPOConfig(
        output_dir=folder,
        use_cpu=work.device == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,  # does nothing here; the weights have the type
        gradient_checkpointing=False,
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=work.batch // work.micro_batch,
        num_mini_batches=1,
        num_ppo_epochs=work.epochs,
        total_episodes=work.batch * (1 + work.updates),
        num_sample_generations=0,
        response_length=work.response,
        stop_token_id=EOS if work.varied else None,
        missing_eos_penalty=None,
        temperature=TEMPERATURE,
        learning_rate=LEARNING_RATE,
        adam_epsilon=ADAM_EPS,
        kl_coef=KL_COEF,
        cliprange=CLIP_RANGE,
        cliprange_value=CLIP_RANGE,
        vf_coef=VALUE_COEF,
    )


def run(work: Work) -> Report:
    tokenizer = AutoTokenizer.from_pretrained(work.policy_folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in work.prompts(tokenizer)]
    dtype = getattr(torch, work.dtype)

    def load(auto_class: Any, folder: str) -> Any:
        return auto_class.from_pretrained(folder, dtype=dtype)

    policy = load(AutoModelForCausalLM, work.policy_folder)
    clock, steps = Clock(work), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            settings(work, folder),
            processing_class=tokenizer,
            model=policy,
            ref_model=load(AutoModelForCausalLM, work.policy_folder),
            reward_model=load(AutoModelForSequenceClassification, work.reward_folder),
            value_model=load(AutoModelForSequenceClassification, work.reward_folder),
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
        )
        lengths = force_lengths(policy, work)
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
        trainer.train()
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:])]
    return Report(seconds, len(steps) // (1 + work.updates), lengths[-1])


if __name__ == "__main__":
    run_side(run)
