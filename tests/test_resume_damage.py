"""Checkpoints that cannot be read, belong to another model, or cannot be written."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import ppo
from test_resume import interrupt_after, interrupted

from rlhf.engine import CheckpointError, OutputError
from rlhf.engine import checkpoint as checkpointing


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def without_files(path: Path) -> None:
    """As earlier versions wrote it, and the weights cut."""
    state = path.with_name("state.json")
    written = json.loads(state.read_text())
    del written["files"]
    state.write_text(json.dumps(written))
    cut(next(path.glob("*.safetensors")))


@pytest.mark.parametrize(
    ("where", "damage", "message"),
    [
        ("state.json", cut, r"state\.json cannot be read"),
        ("state.json", lambda path: path.write_text("{}"), r"state\.json lacks engines, metric"),
        ("policy/*.safetensors", cut, r"policy/.*safetensors has 100 bytes instead of \d+"),
        ("critic/*.safetensors", Path.unlink, r"critic/.*safetensors is missing"),
        ("critic", shutil.rmtree, r"critic/.*safetensors is missing"),
        ("critic", without_files, "step-00000002 cannot be read: Error while deserializing header"),
    ],
)
def test_a_damaged_checkpoint_is_said_so(
    tmp_path: Path, where: str, damage: Any, message: str
) -> None:
    """What is damaged, and which to take instead; no model has changed."""
    ppo(tmp_path, save_every=1).train()
    older, newest = (tmp_path / "checkpoints" / f"step-0000000{number}" for number in (1, 2))
    damage(next(newest.glob(where)))
    trainer = ppo(tmp_path)
    before = [parameter.detach().clone() for parameter in trainer.policy.parameters()]
    with pytest.raises(CheckpointError, match=message) as caught:
        trainer.resume()
    assert f"Name the one before it, {older}, or delete" in str(caught.value)
    assert all(torch.equal(*pair) for pair in zip(before, trainer.policy.parameters(), strict=True))
    resumed = ppo(tmp_path, save_every=1)
    resumed.resume(older)
    resumed.train()  # which writes the damaged one anew


def test_a_save_is_not_disturbed_by_a_damaged_checkpoint(tmp_path: Path) -> None:
    interrupted(tmp_path)
    cut(tmp_path / "checkpoints" / "step-00000001" / "state.json")
    trainer = ppo(tmp_path)
    trainer.updates_done = 2
    trainer.save_checkpoint()
    assert len(trainer.checkpoints.list()) == 2


def test_a_checkpoint_without_one_of_the_models_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, critic="shared")
    with pytest.raises(CheckpointError, match="has no critic: it is of a training without one"):
        ppo(tmp_path).resume(allow=["critic"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_bias": True}, "is only in the model"),
        (
            {"head_dim": 16},
            r"has the shape \(.*\) in the checkpoint and \(.*\) in the model",
        ),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    interrupted(tmp_path)
    other = ppo(tmp_path, policy_options=options)
    with pytest.raises(CheckpointError, match=message):
        other.resume(allow=["policy", "critic", "reference"])


def fail(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = ppo(tmp_path, save_every=1)
    save = checkpointing.save_tensors
    tries = []

    def sometimes(tensors: Any, folder: Path) -> None:
        tries.append(folder)
        if "step-00000002" in str(folder):
            save(tensors, folder)
            fail()
        save(tensors, folder)

    monkeypatch.setattr(checkpointing, "save_tensors", sometimes)
    with caplog.at_level(logging.ERROR):
        trainer.train()
    assert "No space left on device. Earlier checkpoints are untouched" in caplog.text
    assert [path.name for path in trainer.checkpoints.list()] == ["step-00000001"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert (tmp_path / "config.json").exists()


def test_a_full_disk_at_a_signal_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = ppo(tmp_path)
    interrupt_after(trainer, 1)
    monkeypatch.setattr(checkpointing, "save_tensors", fail)
    with pytest.raises(OutputError, match=r"cannot write the checkpoint .*No space left"):
        trainer.train()
