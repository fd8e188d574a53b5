"""Run as a process of its own: kill a training with SIGKILL again and again, always resume it.

Usage: ``kill_loop.py FOLDER KILLS SEED``. Children are forked, so that they start at once. Most are
killed while a checkpoint is being written: as soon as its partial folder is there, or a little
later; the others anywhere. Prints how often each happened.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from small_trainings import ppo

SETTINGS = {"total_updates": 400, "save_every": 1, "epochs": 1, "max_new_tokens": 3}


def train(folder: Path, total: int | None = None) -> None:
    """Take the training up where it is, and go on; with ``total`` only as far as that."""
    trainer = ppo(folder, **SETTINGS)
    trainer.resume_if_possible()
    if total is not None:
        finish = trainer._after_step

        def stop(**options: object) -> None:
            finish(**options)
            if trainer.step >= total:
                os._exit(0)

        trainer._after_step = stop
    trainer.train()


def run_child(folder: Path, total: int | None = None) -> int:
    """Train in a child process; its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(folder, total)
            code = 0
        finally:
            os._exit(code)
    return child


def kill_sometime(child: int, folder: Path, draw: random.Random) -> str:
    """Kill the child at a random moment; what it was doing: saving or anything else."""
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0.2, 0.8))
    else:
        for _ in range(draw.randrange(1, 4)):  # the first, second or third save from now
            wait_for(lambda: not partial(folder))
            wait_for(lambda: partial(folder))
        time.sleep(draw.choice([0, 0.001, 0.003, 0.01]))
    doing = "saving" if partial(folder) else "other"
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the training ended by itself: it is too short for this test"
    return doing


def partial(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".partial-*"))


def wait_for(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0002)


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw, found = random.Random(seed), {"saving": 0, "other": 0}
    killed = folder / "killed"
    for _ in range(kills):
        found[kill_sometime(run_child(killed), killed, draw)] += 1
    reached = ppo(killed, **SETTINGS)
    reached.resume_if_possible()  # all kills may have come before the first checkpoint
    # Two more steps after the last kill, and as many in all without one.
    for name in ("killed", "whole"):
        _, status = os.waitpid(run_child(folder / name, reached.step + 2), 0)
        assert status == 0
    print(json.dumps({**found, "steps": reached.step + 2}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
