"""Two processes killed while they write a checkpoint go on as two that were left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import figures
from test_two_ranks import environment, torchrun

KILLS = 6


def start(parallel: str, last: int, folder: Path) -> subprocess.Popen[bytes]:
    for old in folder.glob("rank*.pid"):
        old.unlink()
    command = torchrun("kill_on_ranks.py", parallel, str(last), str(folder))
    return subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)


def kill_both(folder: Path) -> None:
    for number in [int(path.read_text()) for path in sorted(folder.glob("rank*.pid"))]:
        os.kill(number, signal.SIGKILL)


def partial(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".partial-*"))


def wait_for_a_save(process: subprocess.Popen[bytes], folder: Path, count: int) -> None:
    """Until a checkpoint is being written for the so-manieth time."""
    deadline = time.monotonic() + 120
    for wanted in [False, True] * count:
        while partial(folder) != wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.0002)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_kill_9_of_two_processes_leaves_a_loadable_checkpoint(
    tmp_path: Path, parallel: str
) -> None:
    draw, killed, whole, saving = random.Random(3), tmp_path / "killed", tmp_path / "whole", 0
    for _ in range(KILLS):
        process = start(parallel, 400, killed)
        wait_for_a_save(process, killed, draw.randrange(1, 4))
        time.sleep(draw.choice([0, 0.001, 0.003, 0.01]))
        saving += partial(killed)
        kill_both(killed)
        assert process.wait(timeout=120) != 0
    assert saving >= KILLS / 3
    newest = sorted((killed / "checkpoints").glob("step-*"))[-1]
    last = int(newest.name.removeprefix("step-")) + 2
    for folder in (killed, whole):
        assert start(parallel, last, folder).wait(timeout=300) == 0
    assert figures(killed) == figures(whole)
    assert len(figures(whole)) == last
    found = sorted((whole / "checkpoints" / f"step-{last:08d}").rglob("*.safetensors"))
    assert len(found) >= 2  # of the policy and of the critic, of each rank where it has shards
    for path in found:
        ours, theirs = load_file(path), load_file(killed / path.relative_to(whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
