"""What a run shows: figures, samples, evaluation, callbacks."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from small_trainings import TRAININGS

from rlhf.data import DataError
from rlhf.engine import Interrupted, Trackers
from rlhf.engine.progress import ProgressBar, ProgressLines, describe
from rlhf.ppo import Callback, PPOTrainer, RewardError

EVAL = ["w1 w2", "w3", "w4 w5 w6"]
TIMES = ("time", "seconds/", "tokens_per_second")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def training_figures(folder: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock, and without evaluation."""
    return [
        {k: v for k, v in line.items() if not k.startswith((*TIMES, "eval_"))}
        for line in lines(folder / "metrics.jsonl")
    ]


def trainer_with(make_trainer: Any, **more: Any) -> PPOTrainer:
    """A trainer with keyword arguments that the fixture does not know."""
    arguments = {k: more.pop(k) for k in ("eval_prompts", "callbacks") if k in more}
    trainer = make_trainer(**more)
    return PPOTrainer(
        trainer.config,
        trainer.policy,
        trainer.tokenizer,
        trainer.rows,
        trainer.reward,
        **arguments,
    )


def test_evaluation_changes_nothing_of_the_training(make_trainer: Any, tmp_path: Path) -> None:
    settings = {"total_updates": 3, "trackers": ["jsonl"], "epochs": 1}
    make_trainer(**settings, output_dir=str(tmp_path / "plain")).train()
    watched = trainer_with(
        make_trainer,
        **settings,
        output_dir=str(tmp_path / "watched"),
        eval_prompts=EVAL,
        eval_every=2,
    )
    metrics = watched.train()
    assert training_figures(tmp_path / "plain") == training_figures(tmp_path / "watched")
    found = [line for line in lines(tmp_path / "watched" / "metrics.jsonl") if "eval_score" in line]
    assert [line["step"] for line in found] == [2, 3]
    names = {"eval_score", "eval_kl", "eval_response_length", "eval_eos_rate"}
    assert names <= metrics.keys() and names <= found[0].keys()


@pytest.mark.parametrize("total_updates", [3, 2])
def test_an_evaluation_that_failed_is_done_when_the_training_is_resumed(
    make_trainer: Any, tmp_path: Path, total_updates: int
) -> None:
    """The update before it is in the checkpoint and logged; after the last one, models are saved.

    The reward draws from a global generator, where it goes on as if it had not failed.
    """

    def resumable(name: str, fails: bool) -> PPOTrainer:
        def reward(prompts: list[Any], responses: list[str]) -> list[float]:
            noise = torch.rand(()).item()
            if fails and trainer.step == 2 and prompts[0] == EVAL[0]:
                raise KeyError("lexicon")
            return [noise + len(text) for text in responses]

        trainer = trainer_with(  # which the reward asks for its step
            make_trainer,
            **{"total_updates": total_updates, "trackers": ["jsonl"], "reward": reward},
            **{"output_dir": str(tmp_path / name), "eval_prompts": EVAL, "eval_every": 2},
            samples_every=2,
        )
        return trainer

    torch.manual_seed(0)
    whole = resumable("whole", fails=False)
    whole.train()
    torch.manual_seed(0)
    failing = resumable("failing", fails=True)
    with pytest.raises(RewardError, match=r"'lexicon'.*Step 2 is saved to.*--resume"):
        failing.train()
    assert [line["step"] for line in lines(tmp_path / "failing" / "metrics.jsonl")] == [1, 2]
    resumed = resumable("failing", fails=False)
    resumed.resume()
    found = resumed.train()
    assert found["eval_score"] == whole.metric == resumed.metric
    assert (tmp_path / "failing" / "config.json").exists()
    evaluated = [
        [
            line["eval_score"]
            for line in lines(tmp_path / name / "metrics.jsonl")
            if "eval_score" in line
        ]
        for name in ("whole", "failing")
    ]
    assert evaluated[0] == evaluated[1]
    samples = [lines(tmp_path / name / "samples.jsonl") for name in ("whole", "failing")]
    assert samples[0] == samples[1]
    with torch.no_grad():
        pairs = zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_evaluation_draws_the_same_each_time_and_greedy_draws_nothing(make_trainer: Any) -> None:
    sampled = trainer_with(make_trainer, eval_prompts=EVAL)
    assert sampled.evaluate() == sampled.evaluate()
    assert sampled.evaluate()["eval_kl"] == pytest.approx(0.0, abs=1e-5)  # it is the reference
    greedy = [
        trainer_with(make_trainer, eval_prompts=EVAL, eval_greedy=True, seed=seed).evaluate()
        for seed in (0, 1)
    ]
    assert greedy[0] == greedy[1] != sampled.evaluate()


def test_an_eval_prompt_that_does_not_fit_is_named(make_trainer: Any, tmp_path: Path) -> None:
    file = tmp_path / "held out.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("w1", "w2 " * 60)))
    for prompts, name in (["w1", "w2 " * 60], "eval_prompts"), (str(file), r"held out\.jsonl"):
        with pytest.raises(DataError, match=f"{name}, row 2: the prompt has 60 tokens"):
            trainer_with(make_trainer, eval_prompts=prompts)
    with pytest.raises(DataError, match="eval_prompts, row 2: prompt is empty"):
        trainer_with(make_trainer, eval_prompts=["w1", ""])


def test_the_checkpoint_with_the_best_evaluation_is_kept(make_trainer: Any) -> None:
    class Fake(Callback):
        def on_evaluate(self, trainer: PPOTrainer, metrics: dict[str, float]) -> None:
            trainer._eval_score = {1: 0.0, 2: 5.0}.get(trainer.updates_done, 1.0)

    trainer = trainer_with(
        make_trainer,
        eval_prompts=EVAL,
        eval_every=1,
        total_updates=5,
        save_every=1,
        keep_checkpoints=1,
        callbacks=[Fake()],
    )
    trainer.train()
    assert [path.name for path in trainer.checkpoints.list()] == ["step-00000002", "step-00000004"]


def test_a_checkpoint_carries_the_score_of_its_own_evaluation(make_trainer: Any) -> None:
    """None where its update was not evaluated: the next best is then an evaluated one."""
    trainer = trainer_with(
        make_trainer,
        eval_prompts=EVAL,
        eval_every=2,
        total_updates=6,
        save_every=1,
        keep_checkpoints=9,
    )
    trainer.train()
    checkpoints = trainer.checkpoints
    rated = [checkpoints.read(folder)["metric"] is not None for folder in checkpoints.list()]
    assert rated == [False, True, False, True, False]


@pytest.mark.parametrize(("save_every", "warned"), [(3, True), (2, False), (None, False)])
def test_checkpoints_that_are_never_evaluated_are_said_so(
    make_trainer: Any, caplog: pytest.LogCaptureFixture, save_every: int | None, warned: bool
) -> None:
    settings = {"eval_every": 4, "total_updates": 12, "save_every": save_every}
    trainer_with(make_trainer, **settings, eval_prompts=EVAL)
    assert ("save_every=3 and eval_every=4 fall on no update together" in caplog.text) is warned
    trainer_with(make_trainer, **settings)  # nothing is evaluated
    assert caplog.text.count("fall on no update") == warned


def test_samples_are_written_and_cut_on_a_resume(make_trainer: Any, tmp_path: Path) -> None:
    settings = {"total_updates": 4, "trackers": ["jsonl"], "samples_every": 1, "samples_count": 2}
    make_trainer(**settings, output_dir=str(tmp_path / "whole")).train()
    expected = lines(tmp_path / "whole" / "samples.jsonl")
    assert [line["step"] for line in expected] == [1, 1, 2, 2, 3, 3, 4, 4]
    first = expected[0]
    assert set(first) == {"step", "prompt", "response", "score", "kl", "tokens", "ended"}
    assert first["prompt"].startswith("w1") and first["tokens"] > 0

    stopped = make_trainer(**settings, output_dir=str(tmp_path / "stopped"))
    save = stopped._after_step

    def interrupt(**options: Any) -> None:
        if stopped.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        save(**options)

    stopped._after_step = interrupt
    with pytest.raises(Interrupted):
        stopped.train()
    with (tmp_path / "stopped" / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "left": "over"}\n{"step": 4, "half')
    resumed = make_trainer(**settings, output_dir=str(tmp_path / "stopped"))
    resumed.resume()
    resumed.train()
    assert lines(tmp_path / "stopped" / "samples.jsonl") == expected


SAMPLES = [{"prompt": "[bold]Hi[/bold]", "response": "[/oops] yes", "score": 0.25, "kl": 1.5}]


@pytest.mark.parametrize("kind", [ProgressBar, ProgressLines])
def test_text_of_samples_is_shown_as_it_is(kind: Any) -> None:
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    tracker = kind(console, "ppo", 3, ["score"])
    tracker.log({"score": 0.5, "seconds/generate": 1.25, "seconds/update": 2.0}, 1)
    tracker.log_samples(SAMPLES, 1)
    tracker.close()
    shown = console.export_text()
    assert "[bold]Hi[/bold]" in shown and "[/oops] yes" in shown


def test_lines_say_what_is_left_and_what_took_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rlhf.engine.progress.time.monotonic", lambda: now[0])
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    tracker = ProgressLines(console, "ppo", 11, ["score"])
    for step in (1, 2, 3):
        tracker.log({"score": 0.5, "seconds/generate": 1.25, "seconds/update": 2.0}, step)
        now[0] += 60.0
    tracker.close()
    assert (
        "ppo 2/11  0:09:00 left  score 0.5  (generate 1.2s, update 2.0s)" in console.export_text()
    )
    assert describe({"score": 1.0}, ["score"]) == "score 1"


class Recorder(Callback):
    """Notes what was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_train_begin(self, trainer: PPOTrainer) -> None:
        self.calls.append("begin")

    def on_rollout(self, trainer: PPOTrainer, experience: Any) -> None:
        self.calls.append(f"rollout of {len(experience)}")

    def on_update(self, trainer: PPOTrainer, metrics: dict[str, float]) -> None:
        self.calls.append(f"update {trainer.updates_done}: {'score' in metrics}")
        if trainer.updates_done == 2:
            trainer.stop()

    def on_evaluate(self, trainer: PPOTrainer, metrics: dict[str, float]) -> None:
        self.calls.append(f"evaluate {'eval_score' in metrics}")

    def on_train_end(self, trainer: PPOTrainer) -> None:
        self.calls.append("end")


def test_callbacks_see_the_run_and_can_end_it(make_trainer: Any, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = trainer_with(
        make_trainer, total_updates=9, eval_prompts=EVAL, eval_every=9, callbacks=[recorder]
    )
    trainer.train()
    assert recorder.calls == [
        "begin",
        "rollout of 8",
        "update 1: True",
        "rollout of 8",
        "update 2: True",
        "evaluate True",  # the last update, as it turned out
        "end",
    ]
    assert (tmp_path / "ppo" / "config.json").exists()
    with pytest.raises(RuntimeError, match="ended after 2 of 9 updates"):
        trainer.train()


def test_an_error_of_a_callback_is_not_swallowed(make_trainer: Any) -> None:
    class Broken(Callback):
        def on_update(self, trainer: PPOTrainer, metrics: dict[str, float]) -> None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trainer_with(make_trainer, callbacks=[Broken()]).train()


def test_wandb_gets_figures_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("done")
    )
    fake = SimpleNamespace(
        init=lambda **options: calls.append(options) or run,
        Table=lambda columns, data: (columns, data),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Trackers(["wandb"], tmp_path / "a", title="ppo") as trackers:
        trackers.log({"score": 1.0}, 3)
        trackers.log_samples(SAMPLES, 3)
    assert calls[0]["name"] == "ppo a"
    assert calls[1] == ({"score": 1.0}, 3)
    assert calls[2][0]["samples"] == (list(SAMPLES[0]), [list(SAMPLES[0].values())])
    assert calls[3] == "done"


def test_wandb_that_is_not_installed_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        Trackers(["wandb"], tmp_path)


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_tracker_that_is_missing_costs_nothing_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    TRAININGS[name](tmp_path).train()

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(ImportError, match="pip install wandb"):
        TRAININGS[name](tmp_path, trackers=["jsonl", "wandb"]).train()
    assert files() == before


def test_a_tracker_that_cannot_begin_leaves_the_figures_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: Any) -> None:
        raise ConnectionError("no API key")

    with Trackers(["jsonl"], tmp_path) as trackers:
        trackers.log({"score": 1.0}, 3)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail))
    with pytest.raises(ConnectionError):
        Trackers(["jsonl", "wandb"], tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text()
