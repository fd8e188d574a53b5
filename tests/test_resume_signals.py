"""A signal at any place of a training: it goes on afterwards as if there had been none."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_trainings import TRAININGS, ppo
from test_resume import assert_same_results

from rlhf import PPOTrainer
from rlhf.engine import Interrupted
from rlhf.engine.checkpoint import Checkpoints
from rlhf.engine.engine import Engine
from rlhf.engine.supervised import SupervisedTrainer
from rlhf.ppo.models import PPOModels

Patch = pytest.MonkeyPatch
SETTINGS: dict[str, Any] = {"save_every": 1, "total_updates": 3}


def signal_inside(patch: Patch, place: Any, name: str, call: int) -> list[int]:
    """SIGTERM when a function begins for the so-manieth time; returns what counts its calls."""
    function, calls = getattr(place, name), []

    def signalled(*args: Any, **options: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **options)

    patch.setattr(place, name, signalled)
    return calls


def evaluated(folder: Path) -> PPOTrainer:
    """With an evaluation after every update."""
    trainer = ppo(folder, **SETTINGS, eval_every=1)
    trainer.eval_rows, trainer.eval_ids = trainer._encode(trainer.rows[:2], "eval_prompts")
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    evaluated(folder).train()
    return folder


# Where the signal comes, in which call, and the step whose checkpoint is then there.
PLACES = {
    "sampling": ("rlhf.ppo.trainer", "shared_generation", 2, 1),
    "scoring": ("rlhf.ppo.trainer", "shared_scores", 2, 1),
    "log-probabilities": ("rlhf.ppo.trainer", "make_experience", 2, 2),
    "before an optimizer step": (Engine, "step", 6, 1),  # of 8 in an update, 4 for each model
    "after the last optimizer step": ("rlhf.ppo.metrics", "to_floats", 2, 2),
    "evaluation": ("rlhf.ppo.trainer", "evaluate", 2, 2),
    "writing a checkpoint": (Checkpoints, "save", 2, 2),
    "renaming a checkpoint": ("rlhf.engine.checkpoint", "put_in_place", 2, 2),
}


@pytest.mark.parametrize("where", PLACES)
def test_a_signal_at_any_place_of_an_update(
    whole: Path, tmp_path: Path, monkeypatch: Patch, where: str
) -> None:
    place, name, call, step = PLACES[where]
    module = __import__(place, fromlist=["_"]) if isinstance(place, str) else place
    with monkeypatch.context() as patch:
        calls = signal_inside(patch, module, name, call)
        with pytest.raises(Interrupted, match=f"SIGTERM at step {step}: saved to"):
            evaluated(tmp_path).train()
    assert len(calls) >= call
    resumed = evaluated(tmp_path)
    assert resumed.resume().name == f"step-{step:08d}"
    resumed.train()
    assert_same_results(whole, tmp_path)


@pytest.mark.parametrize(
    ("place", "name", "call"),
    [
        ("rlhf.ppo.trainer", "run_epochs", 3),
        ("rlhf.ppo.trainer", "evaluate", 3),
        (PPOModels, "save", 1),
        ("rlhf.ppo.models", "save_model", 2),  # the critic is there, the policy not yet
    ],
)
def test_a_signal_when_all_is_trained_lets_it_be_saved(
    whole: Path, tmp_path: Path, monkeypatch: Patch, place: Any, name: str, call: int
) -> None:
    module = __import__(place, fromlist=["_"]) if isinstance(place, str) else place
    calls = signal_inside(monkeypatch, module, name, call)
    evaluated(tmp_path).train()
    assert len(calls) >= call
    assert_same_results(whole, tmp_path)


@pytest.mark.parametrize("name", ["sft", "reward"])
@pytest.mark.parametrize(
    ("place", "method", "call", "step"),
    [
        (SupervisedTrainer, "_train_step", 3, 3),
        (Engine, "backward", 2, 1),  # between micro-batches
        (SupervisedTrainer, "_end_of_epoch", 1, 4),
        (Checkpoints, "save", 4, 4),
        (SupervisedTrainer, "_train_step", 7, 7),
    ],
)
def test_a_signal_at_any_place_of_a_supervised_training(
    tmp_path: Path, monkeypatch: Patch, name: str, place: Any, method: str, call: int, step: int
) -> None:
    make: Callable[..., Any] = TRAININGS[name]
    make(tmp_path / "whole", save_every=1).train()
    with monkeypatch.context() as patch:
        signal_inside(patch, place, method, call)
        with pytest.raises(Interrupted, match=f"SIGTERM at step {step}: saved to"):
            make(tmp_path / "stopped", save_every=1).train()
    resumed = make(tmp_path / "stopped", save_every=1)
    assert resumed.resume().name == f"step-{step:08d}"
    resumed.train()
    assert_same_results(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_signal_while_a_supervised_model_is_saved(
    tmp_path: Path, monkeypatch: Patch, name: str
) -> None:
    make: Callable[..., Any] = TRAININGS[name]
    make(tmp_path / "whole").train()
    calls = signal_inside(monkeypatch, Engine, "whole_weights", 1)
    make(tmp_path / "signalled").train()
    assert calls == [1]
    assert_same_results(tmp_path / "whole", tmp_path / "signalled")


def test_a_signal_at_once_after_resuming_elsewhere_writes_a_checkpoint_there(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    first = ppo(tmp_path / "first", **SETTINGS)
    first.train()
    other = ppo(tmp_path / "other", **SETTINGS)
    other.resume(tmp_path / "first" / "checkpoints" / "step-00000001")
    with monkeypatch.context() as patch:
        signal_inside(patch, __import__("rlhf.ppo.trainer", fromlist=["_"]), "shared_scores", 1)
        with pytest.raises(Interrupted, match=r"at step 1: saved to .*other.*step-00000001"):
            other.train()
    resumed = ppo(tmp_path / "other", **SETTINGS)
    resumed.resume()
    resumed.train()
