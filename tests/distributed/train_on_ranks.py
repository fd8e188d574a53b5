"""Run by torchrun: each training, whole; and once more in two halves, the second resumed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from small_trainings import TRAININGS

from rlhf.engine import Interrupted


def signal_at(trainer: Any, step: int) -> None:
    """Send SIGTERM to one rank alone, in the middle of a step: all of them must stop after it."""
    after_step = trainer._after_step

    def with_signal(**options: Any) -> None:
        if trainer.step == step and trainer.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(**options)

    trainer._after_step = with_signal


def main(parallel: str, folder: Path) -> None:
    torch.set_num_threads(1)
    figures = {}
    for name, make in TRAININGS.items():
        trainer = make(folder / name, parallel=parallel)
        figures[name] = trainer.train()
        halved = make(folder / f"{name}_halved", parallel=parallel)
        signal_at(halved, 2)
        try:
            halved.train()
        except Interrupted:
            halved = make(folder / f"{name}_halved", parallel=parallel)
            halved.resume()
            figures[f"{name}_halved"] = halved.train()
    if trainer.world.is_main:
        (folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
