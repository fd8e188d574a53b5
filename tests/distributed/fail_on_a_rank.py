"""Run by torchrun: a reward that fails on one rank ends both, with a checkpoint to go on from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from small_trainings import ppo, word_count

from rlhf.ppo import RewardError


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    trainer = ppo(folder / "run")

    def failing(prompts: list[Any], responses: list[str]) -> list[float]:
        if trainer.step == 1 and trainer.world.rank == 1:
            raise ConnectionError("the judge is away")
        return word_count(prompts, responses)

    trainer.reward = failing
    try:
        trainer.train()
    except RewardError as error:
        (folder / f"rank{trainer.world.rank}").write_text(str(error))
        # Without taking the process down in order: after an error PyTorch's threads now and then
        # abort it there, one time in ten, and what counts is on the disk.
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
