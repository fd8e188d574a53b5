"""Run by torchrun: PPO with a checkpoint after every update, taken up wherever it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from small_trainings import ppo

SETTINGS: dict[str, Any] = {"total_updates": 400, "save_every": 1, "epochs": 1, "max_new_tokens": 3}


def main(parallel: str, last: int, folder: Path) -> None:
    """Train, and leave without a word when a number of updates is done."""
    torch.set_num_threads(1)
    trainer = ppo(folder, parallel=parallel, **SETTINGS)
    (folder / f"rank{trainer.world.rank}.pid").write_text(str(os.getpid()))
    trainer.resume_if_possible()
    after_step = trainer._after_step

    def stop(**options: Any) -> None:
        after_step(**options)
        if trainer.step >= last:
            trainer.world.barrier()
            os._exit(0)

    trainer._after_step = stop  # type: ignore[method-assign]
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
