"""Run by torchrun: PPO and SFT on bfloat16 weights with 8-bit moments, whole and in two halves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from small_trainings import ppo_with_a_reward_model, sft
from train_on_ranks import signal_at

from rlhf.engine import Interrupted

SETTINGS: dict[str, Any] = {"optimizer": "adamw_8bit", "weights": "bfloat16"}
TRAININGS_8BIT = {
    "sft": lambda folder, **settings: sft(folder, **SETTINGS, **settings),
    "ppo": lambda folder, **settings: ppo_with_a_reward_model(
        folder, frozen_on_disk=True, **SETTINGS, **settings
    ),
}


def held(trainer: Any) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of every model that is trained."""
    found = {}
    for model, engine in trainer.engines.items():
        for name, parameter in engine.named_parameters.items():
            state = engine.optimizer.state[parameter]
            tensors = {"weight": parameter.detach(), **state}
            found |= {f"{model} {name} {key}": tensor for key, tensor in tensors.items()}
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, make in TRAININGS_8BIT.items():
        trainer = make(folder / name, parallel="ddp")
        trainer.train()
        torch.save(held(trainer), folder / f"{name}{trainer.world.rank}.pt")
        halved = make(folder / f"{name}_halved", parallel="ddp")
        signal_at(halved, 2)
        try:
            halved.train()
        except Interrupted:
            halved = make(folder / f"{name}_halved", parallel="ddp")
            halved.resume()
            halved.train()
            torch.save(held(halved), folder / f"{name}_halved{halved.world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
