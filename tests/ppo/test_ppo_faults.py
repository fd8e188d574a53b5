"""What can go wrong in the middle of a training: it is said, counted, and costs nothing."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ppo_rewards import Server

from rlhf import HTTPReward
from rlhf import http_reward as http
from rlhf.engine import OutputError, SkippedStepsError, Trackers
from rlhf.ppo import PPOTrainer, RewardError
from rlhf.ppo.seeds import derive_seed
from rlhf.ppo.update import minibatches

MakeTrainer = Callable[..., PPOTrainer]


def weights(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(before: list[torch.Tensor], model: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def adam_steps(engine: Any) -> set[int]:
    return {int(state["step"]) for state in engine.optimizer.state.values()}


def score(prompts: list[Any], responses: list[str]) -> list[float]:
    return [0.1 * len(text.split()) for text in responses]


# Rewards that fail.


def nan(prompts: list[Any], responses: list[str]) -> list[float]:
    return [math.nan, *score(prompts, responses)[1:]]


def broken(prompts: list[Any], responses: list[str]) -> list[float]:
    raise KeyError("lexicon")


def too_slow(prompts: list[Any], responses: list[str]) -> list[float]:
    raise TimeoutError("no answer in 30 s")


async def too_slow_async(prompts: list[Any], responses: list[str]) -> list[float]:
    raise TimeoutError("no answer in 30 s")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (nan, "is nan; it must be a finite number"),
        (broken, "raised KeyError: 'lexicon'"),
        (too_slow, "raised TimeoutError: no answer in 30 s"),
        (too_slow_async, "raised TimeoutError: no answer in 30 s"),
    ],
)
@pytest.mark.parametrize("save_every", [None, 1])
def test_a_reward_that_fails_in_a_training_loses_nothing(
    make_trainer: MakeTrainer, tmp_path: Path, bad: Any, message: str, save_every: int | None
) -> None:
    """Also where no checkpoints were asked for: what was trained until then is written."""
    whole = make_trainer(total_updates=3, output_dir=str(tmp_path / "whole"))
    whole.train()
    failing = make_trainer(total_updates=3, save_every=save_every)

    def away_at_the_third(prompts: list[Any], responses: list[str]) -> Any:
        return (bad if failing.step == 2 else score)(prompts, responses)

    failing.reward = away_at_the_third
    with pytest.raises(RewardError) as caught:
        failing.train()
    said = str(caught.value)
    assert message in said
    assert "Step 2 is saved to" in said and "step-00000002. Run the same command with" in said
    resumed = make_trainer(total_updates=3, save_every=save_every)
    resumed.resume()
    assert resumed.step == 2
    resumed.train()
    assert same(weights(whole.policy), resumed.policy)
    assert same(weights(whole.critic), resumed.critic)


def test_a_reward_that_fails_at_once_has_nothing_to_save(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(reward=broken)
    with pytest.raises(RewardError, match=r"KeyError: 'lexicon'.*'w1.*'\)$"):
        trainer.train()
    assert not trainer.checkpoints.list()


def test_a_failing_reward_on_a_full_disk_says_both(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer()

    def failing(prompts: list[Any], responses: list[str]) -> list[float]:
        if trainer.step == 1:
            (tmp_path / "ppo" / "checkpoints").write_text("in the way")
            raise KeyError("lexicon")
        return score(prompts, responses)

    trainer.reward = failing
    with pytest.raises(RewardError, match=r"'lexicon'.* Besides: cannot write the checkpoint"):
        trainer.train()


def test_a_training_goes_on_when_its_endpoint_is_up_again(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down for longer than it is tried in the second update; then up, and down for a moment."""
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    down = {1, 2, 4}  # numbers of requests

    def answers(number: int, request: dict[str, Any]) -> tuple[int, bytes]:
        if number in down:
            return 503, b""
        scores = score(request["prompts"], request["responses"])
        return 200, http.json.dumps({"scores": scores}).encode()

    server = Server(answers)
    try:
        whole = make_trainer(total_updates=3, output_dir=str(tmp_path / "whole"))
        whole.train()
        settings = {"total_updates": 3, "reward": HTTPReward(server.url, retries=1)}
        with pytest.raises(RewardError, match=r"2 attempts; the last: status 503.*Step 1 is saved"):
            make_trainer(**settings).train()
        resumed = make_trainer(**settings)
        resumed.resume()
        resumed.train()
    finally:
        server.close()
    assert len(server.requests) == 6
    assert same(weights(whole.policy), resumed.policy)


# Losses that are not finite.


def broken_in_one_minibatch(trainer: PPOTrainer, field: str) -> Any:
    """An experience with a NaN in the first minibatch of its update alone."""
    experience = trainer.rollout(next(trainer.prompts))
    seed = derive_seed(trainer.config.seed, "minibatches", trainer.updates_done)
    row = next(minibatches(len(experience), trainer.config, seed))[-1]
    getattr(experience, field)[row] = math.nan
    return experience


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("advantages", "the policy, optimizer step 1: skipped, since the policy loss became NaN"),
        ("returns", "the critic, optimizer step 1: skipped, since the value loss became NaN"),
    ],
)
def test_a_bad_minibatch_costs_its_step_and_is_counted(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, field: str, message: str
) -> None:
    """Neither model takes the step, whichever loss is bad; both take the next."""
    trainer = make_trainer(epochs=1)
    metrics = trainer.update(broken_in_one_minibatch(trainer, field))
    assert message in caplog.text
    assert (metrics["skipped_step"], metrics["critic_skipped_step"]) == (1.0, 1.0)
    assert metrics["optimizer_steps"] == 2
    assert adam_steps(trainer.models.policy) == adam_steps(trainer.models.critic) == {1}
    of_returns = {"return_mean"} if field == "returns" else set()
    assert {name for name, value in metrics.items() if not math.isfinite(value)} == of_returns
    for model in (trainer.policy, trainer.critic):
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    good = trainer.update(trainer.rollout(next(trainer.prompts)))
    assert good["skipped_step"] == 0.0


@pytest.mark.parametrize("save_every", [1, None])
def test_a_training_stops_after_so_many_bad_steps_and_its_checkpoint_is_good(
    make_trainer: MakeTrainer, tmp_path: Path, save_every: int | None
) -> None:
    """One is written if there is none: the bad steps changed nothing, and are done again."""
    whole = make_trainer(total_updates=4, output_dir=str(tmp_path / "whole"))
    whole.train()
    settings = {"total_updates": 4, "save_every": save_every, "max_skipped_steps": 3}
    trainer = make_trainer(**settings)
    at_two: list[torch.Tensor] = []
    update = trainer.update

    def breaking(experience: Any) -> dict[str, float]:
        if trainer.step == 2:
            at_two.extend(weights(trainer.policy))
            experience.advantages = experience.advantages * math.nan
        return update(experience)

    trainer.update = breaking  # type: ignore[method-assign]
    with pytest.raises(SkippedStepsError, match=r"\(3 in a row\).*Step 2 is saved to") as caught:
        trainer.train()
    assert "the critic, optimizer step 11: skipped, since the policy loss" in str(caught.value)
    assert "should be around 1" not in str(caught.value)  # the scores are
    assert same(at_two, trainer.policy)
    resumed = make_trainer(**settings)
    assert resumed.resume().name == "step-00000002"
    resumed.train()
    assert same(weights(whole.policy), resumed.policy)


def test_an_update_that_ends_early_counts_from_its_beginning(make_trainer: MakeTrainer) -> None:
    """Else the learning rate's schedule would be ahead of the update that is done again."""
    trainer = make_trainer(epochs=1, max_skipped_steps=1)
    experience = trainer.rollout(next(trainer.prompts))
    seed = derive_seed(trainer.config.seed, "minibatches", 0)
    _, second = minibatches(len(experience), trainer.config, seed)
    experience.advantages[second[0]] = math.nan
    with pytest.raises(SkippedStepsError):
        trainer.update(experience)
    for engine in trainer.engines.values():
        assert adam_steps(engine) == {1}
        assert (engine.steps_done, engine.skipped_in_a_row) == (0, 0)


def test_an_absurd_score_costs_its_update_and_not_the_training(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its square overflows: figures of the returns are no numbers in the update that it spoils."""
    calls: list[int] = []

    def absurd(prompts: list[Any], responses: list[str]) -> list[float]:
        calls.append(1)
        scores = score(prompts, responses)
        return [1e30, *scores[1:]] if len(calls) == 2 else scores

    trainer = make_trainer(reward=absurd, total_updates=3, max_skipped_steps=5, trackers=["jsonl"])
    assert trainer.train()["skipped_step"] == 0
    lines = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").open()]
    assert [line["skipped_step"] > 0 for line in lines] == [False, True, False]
    assert ["explained_variance" in line for line in lines] == [True, False, True]
    assert "step 2: explained_variance (nan) cannot be logged" in caplog.text


def test_a_divergence_that_is_no_number_leaves_its_control_alone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(kl_target=0.1, epochs=1)
    experience = trainer.rollout(next(trainer.prompts))
    experience.ref_logprobs[0, 0] = math.nan
    trainer.estimate_advantages(experience)
    before = trainer.kl_control.coef
    metrics = trainer.update(experience)
    assert math.isnan(metrics["kl"]) and metrics["skipped_step"] > 0
    assert trainer.kl_control.coef == before


# Disks that are full.


def test_a_model_that_cannot_be_saved_is_saved_later(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same trainer, or by one that goes on from the last checkpoint."""
    trainer = make_trainer(total_updates=3, save_every=1)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("transformers.modeling_utils.safe_save_file", fail)
        with pytest.raises(OutputError, match=r"cannot save the model to .*No space left"):
            trainer.train()
    folder = tmp_path / "ppo"
    assert not (folder / "config.json").exists()
    assert [path.name for path in trainer.checkpoints.list()] == ["step-00000001", "step-00000002"]
    resumed = make_trainer(total_updates=3, save_every=1)
    resumed.resume()
    resumed.train()
    assert (folder / "config.json").exists()
    assert same(weights(trainer.policy), resumed.policy)
    trainer.save()
    assert (folder / "config.json").exists()


def test_a_checkpoint_folder_that_cannot_be_written_costs_checkpoints_alone(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(total_updates=2, save_every=1)
    (tmp_path / "ppo" / "checkpoints").write_text("in the way")
    with caplog.at_level(logging.ERROR):
        trainer.train()
    assert "The training goes on without this checkpoint." in caplog.text
    assert (tmp_path / "ppo" / "config.json").exists()


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_figures_that_cannot_be_written_cost_no_training(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file on which every write ends as on a full disk."""
    start = Trackers.__enter__

    def on_a_full_disk(trackers: Trackers) -> Trackers:
        jsonl: Any = trackers._trackers[0]
        jsonl._file = FULL.open("a")
        jsonl._samples = FULL
        return start(trackers)

    monkeypatch.setattr(Trackers, "__enter__", on_a_full_disk)
    trainer = make_trainer(trackers=["jsonl"], samples_every=1)
    trainer.train()
    assert trainer.finished
    assert "JsonlTracker cannot write: [Errno 28] No space left on device" in caplog.text
