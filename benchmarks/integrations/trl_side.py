"""A training by TRL 1.12.0's PPOTrainer, patched or not; runs in TRL's own environment."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOTrainer

from benchmarks.integrations.training import SEED, Trained, Training
from benchmarks.ppo_trainer.trl_side import Clock, settings
from benchmarks.ppo_trainer.work import PAD, TEMPERATURE, Work, force_lengths, peak_mib
from rlhf_kernels.integrations import trl as adapters


class Logged(TrainerCallback):
    """What the trainer logs at each update."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.metrics.append(dict(kwargs["logs"]))


def trainer_of(training: Training, folder: str, callbacks: list[TrainerCallback]) -> PPOTrainer:
    work = training.work
    tokenizer = AutoTokenizer.from_pretrained(work.policy_folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in work.prompts(tokenizer)]

    def load(auto_class: Any, folder: str) -> Any:
        return auto_class.from_pretrained(folder, dtype=getattr(torch, work.dtype))

    policy = load(AutoModelForCausalLM, work.policy_folder)
    options = settings(work, folder)
    options.learning_rate = training.learning_rate
    trainer = PPOTrainer(
        options,
        processing_class=tokenizer,
        model=policy,
        ref_model=load(AutoModelForCausalLM, work.policy_folder),
        reward_model=load(AutoModelForSequenceClassification, work.reward_folder),
        value_model=load(AutoModelForSequenceClassification, work.reward_folder),
        train_dataset=Dataset.from_list(rows),
        callbacks=callbacks,
    )
    force_lengths(policy, work)
    return trainer


def run(training: Training) -> Trained:
    torch.manual_seed(SEED)
    np.random.seed(SEED)  # TRL shuffles the sequences of each epoch with numpy's
    clock, logged = Clock(training.work), Logged()
    patch: AbstractContextManager[list[str]] = nullcontext([])
    if training.patched:
        patch = adapters.patched()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(training, folder, [clock, logged])
        with patch as replaced:
            trainer.train()
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:])]
    peak = peak_mib(training.work)  # before logits are looked at
    return Trained(logged.metrics, seconds, peak, replaced, logit_size(trainer))


@torch.no_grad()
def logit_size(trainer: PPOTrainer) -> float:
    """Of the trained policy, on the first prompts."""
    rows = [trainer.train_dataset[row]["input_ids"] for row in range(8)]
    logits = trainer.model.policy(torch.tensor(rows, device=trainer.accelerator.device)).logits
    return float(logits.abs().amax(-1).mean()) / TEMPERATURE


def main() -> None:
    """The training as JSON in the first argument, what came of it in the last line."""
    asked = json.loads(sys.argv[1])
    trained = run(Training(**{**asked, "work": Work(**asked["work"])}))
    print("\n" + json.dumps(asdict(trained)), flush=True)


if __name__ == "__main__":
    main()
