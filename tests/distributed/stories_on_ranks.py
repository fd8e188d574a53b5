"""Run by torchrun, and by a test in one process: PPO on stories260k for two updates.

Writes the figures of both, the gradients of the first optimizer step, and the policy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rlhf.engine.world import leave
from rlhf.ppo import PPOConfig, PPOTrainer

PROMPTS = ["Once upon a time", "One day, Lily", "Tom", "The little girl was", "A big dog"]


def letter_share(prompts: list[Any], responses: list[str]) -> list[float]:
    return [10 * text.lower().count("h") / max(1, len(text)) for text in responses]


def whole(gradient: Any) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def first_gradients(engine: Any) -> dict[str, torch.Tensor]:
    """Filled with the gradients of an engine's first step, just before it is taken."""
    found: dict[str, torch.Tensor] = {}
    step = engine.step

    def noting() -> dict[str, float]:
        if not found:
            found.update({name: whole(p.grad) for name, p in engine.named_parameters.items()})
        return step()

    engine.step = noting
    return found


def train(stories: str, parallel: str, folder: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 10, "minibatch_size": 5, "micro_batch_size": 2}
    settings |= {"epochs": 2, "total_updates": 2, "max_new_tokens": 16, "learning_rate": 5e-4}
    config = PPOConfig(
        output_dir=str(folder / "run"),
        template="none",
        dtype="float32",
        trackers=[],
        parallel=parallel,
        **settings,
    )
    trainer = PPOTrainer(config, stories, stories, PROMPTS, letter_share)
    gradients = {name: first_gradients(engine) for name, engine in trainer.engines.items()}
    figures = [trainer.update(trainer.rollout(prompts)) for prompts in trainer.prompts]
    trainer.save()
    if trainer.world.is_main:
        (folder / "figures.json").write_text(json.dumps(figures))
        torch.save(gradients, folder / "gradients.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        train(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    finally:
        leave()
