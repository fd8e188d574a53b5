"""A training that was stopped and taken up again equals one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_trainings import TRAININGS, ppo, word_count

from rlhf.engine import CheckpointError, Checkpoints, Interrupted
from rlhf.engine.randomness import random_state, set_random_state, set_seed
from rlhf.ppo import RewardError

TIMES = ("time", "seconds/", "tokens_per_second")


def figures(folder: Path) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl`` without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
        for line in lines
    ]


def assert_same_results(folder: Path, other: Path) -> None:
    """Bit for bit: figures and saved models."""
    assert figures(folder) == figures(other)
    for path in folder.rglob("*.safetensors"):
        if "checkpoints" not in path.parts:
            ours, theirs = load_file(path), load_file(other / path.relative_to(folder))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), path


def interrupt_after(trainer: Any, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when a step is done."""
    after_step = trainer._after_step

    def with_signal(**options: Any) -> None:
        if trainer.step == step:
            os.kill(os.getpid(), number)
        after_step(**options)

    trainer._after_step = with_signal


@pytest.mark.parametrize("name", list(TRAININGS))
@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_equals_the_whole_one_bit_for_bit(
    tmp_path: Path, name: str, step: int
) -> None:
    make = TRAININGS[name]
    whole = make(tmp_path / "whole").train()
    stopped = make(tmp_path / "stopped")
    interrupt_after(stopped, step)
    with pytest.raises(Interrupted, match=rf"SIGTERM at step {step}: saved to .*--resume"):
        stopped.train()
    random.seed(99)  # the global generators are somewhere else in a new process
    np.random.seed(99)
    torch.manual_seed(99)
    resumed = make(tmp_path / "stopped")
    assert resumed.resume().name == f"step-{step:08d}"
    last = resumed.train()
    assert_same_results(tmp_path / "whole", tmp_path / "stopped")
    assert last.keys() == whole.keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_rollout_loses_nothing(tmp_path: Path, number: int) -> None:
    """The rollout is given up, and done again, equally, when the training is resumed."""
    ppo(tmp_path / "whole").train()
    stopped = ppo(tmp_path / "stopped")
    calls = []

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        calls.append(len(prompts))
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return word_count(prompts, responses)

    stopped.reward = reward
    earlier = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{signal.Signals(number).name} at step 1"):
        stopped.train()
    assert signal.getsignal(number) is earlier  # handlers are as before
    resumed = ppo(tmp_path / "stopped")
    resumed.resume()
    resumed.train()
    assert_same_results(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_reward_draws_for_a_rollout_that_is_given_up_is_drawn_again(
    tmp_path: Path, fails: bool
) -> None:
    """From the global generators; the rollout ends by a signal or by the reward's failure."""

    def drawing(stop_at: int | None = None) -> Any:
        calls = []

        def reward(prompts: list[Any], responses: list[str]) -> list[float]:
            calls.append(len(prompts))
            noise = random.random() + np.random.rand() + torch.rand(()).item()
            if len(calls) == stop_at:
                if fails:
                    raise KeyError("lexicon")
                os.kill(os.getpid(), signal.SIGTERM)
            return [score + noise for score in word_count(prompts, responses)]

        return reward

    whole = ppo(tmp_path / "whole", scorer=drawing())
    stopped = ppo(tmp_path / "stopped", scorer=drawing(stop_at=2))
    set_seed(0)
    whole.train()
    set_seed(0)
    with pytest.raises((Interrupted, RewardError), match="tep 1"):
        stopped.train()
    resumed = ppo(tmp_path / "stopped", scorer=drawing())
    resumed.resume()
    resumed.train()
    assert_same_results(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_before_anything_is_done_says_so(tmp_path: Path) -> None:
    trainer = ppo(tmp_path)

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return word_count(prompts, responses)

    trainer.reward = reward
    with pytest.raises(Interrupted, match="SIGTERM at step 0: nothing was done yet"):
        trainer.train()
    assert not trainer.checkpoints.list()


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    trainer = ppo(tmp_path)

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    trainer.reward = reward
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert not isinstance(caught.value, Interrupted)


def test_checkpoints_are_written_and_the_newest_and_the_best_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = ppo(tmp_path, total_updates=6, save_every=1, keep_checkpoints=2)
    monkeypatch.setattr(type(trainer), "metric", property(lambda self: -abs(self.step - 2)))
    trainer.train()
    assert [path.name for path in trainer.checkpoints.list()] == [
        "step-00000002",  # the best
        "step-00000004",
        "step-00000005",  # after the last update the models themselves are saved
    ]


def test_any_checkpoint_can_be_resumed(tmp_path: Path) -> None:
    whole = ppo(tmp_path / "whole", save_every=1, keep_checkpoints=9)
    whole.train()
    for folder in whole.checkpoints.list():
        trainer = ppo(tmp_path / folder.name)
        trainer.resume(folder)
        trainer.train()
        expected = load_file(tmp_path / "whole" / "model.safetensors")
        found = load_file(tmp_path / folder.name / "model.safetensors")
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize("keep", [1, 2])
def test_going_on_from_an_older_checkpoint_leaves_the_later_ones_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: int
) -> None:
    """They are set aside, and the one just written is named, kept and the newest."""
    ppo(tmp_path, total_updates=5, save_every=1, keep_checkpoints=9).train()
    folder = tmp_path / "checkpoints"
    trainer = ppo(tmp_path, total_updates=5, keep_checkpoints=keep)
    trainer.resume(folder / "step-00000001")
    interrupt_after(trainer, 2)
    with pytest.raises(Interrupted, match=r"SIGTERM at step 2: saved to .*/step-00000002\."):
        trainer.train()
    assert "step-00000003 is of a later step than 1, where training goes on" in caplog.text
    resumed = ppo(tmp_path, total_updates=5)
    assert resumed.resume() == folder / "step-00000002"
    resumed.resume(folder / "step-00000004.earlier-1")  # who wants it back names it
    assert resumed.step == 4


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for _ in range(2):
        (checkpoints.folder / "step-00000002").mkdir(parents=True)
        (checkpoints.folder / "step-00000002" / "state.json").write_text("{}")
        checkpoints.set_aside_after(1)
    assert {path.name for path in checkpoints.folder.iterdir()} == {
        "step-00000002.earlier-1",
        "step-00000002.earlier-2",
    }


def test_a_loop_of_ones_own_keeps_what_it_writes_after_an_older_checkpoint(tmp_path: Path) -> None:
    ppo(tmp_path, save_every=1).train()
    trainer = ppo(tmp_path, keep_checkpoints=1)
    trainer.resume(tmp_path / "checkpoints" / "step-00000001")
    written = trainer.save_checkpoint()
    assert trainer.checkpoints.list() == [written]


def interrupted(folder: Path, **settings: Any) -> None:
    trainer = ppo(folder, **settings)
    interrupt_after(trainer, 1)
    with pytest.raises(Interrupted):
        trainer.train()


def test_a_new_training_does_not_run_over_checkpoints(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(CheckpointError, match=r"newest step-00000001\. Go on with it \(--resume"):
        ppo(tmp_path).train()


def test_random_states_survive_json() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    np.random.randn()  # leaves a cached number behind
    state = json.loads(json.dumps(random_state()))
    expected = [random.random(), np.random.randn(), torch.rand(1).item()]
    set_random_state(state)
    assert [random.random(), np.random.randn(), torch.rand(1).item()] == expected


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_leaves_a_loadable_checkpoint(tmp_path: Path, kills: int) -> None:
    """However often it is killed, mostly while saving, the training goes on as the whole one."""
    script = Path(__file__).with_name("kill_loop.py")
    paths = [str(script.parent), str(script.parent.parent)]
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(kills), "7"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["saving"] >= kills // 2  # at the dangerous moments: 30 of 40 on two cores
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert figures(whole) == figures(killed)
    assert len(figures(whole)) == found["steps"]
    last = f"checkpoints/step-{found['steps']:08d}"
    for name in ("policy", "critic"):
        for path in (whole / last / name).iterdir():
            ours, theirs = load_file(path), load_file(killed / last / name / path.name)
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
