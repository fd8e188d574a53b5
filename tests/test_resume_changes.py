"""What is named and refused on a resume, since it would change the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import TRAININGS, ppo, word_count
from test_resume import interrupt_after, interrupted
from tiny_models import tiny_llama
from tiny_policy import make_policy

from rlhf import PPOTrainer, RewardModel
from rlhf.engine import CheckpointError, Interrupted
from rlhf.models import scalar_model_from_causal


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_coef": 0.3}, "kl_coef: 0.1 before, 0.3 now"),
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"total_updates": 5}, "total_updates: 3 before, 5 now"),
    ],
)
def test_a_changed_setting_is_named_and_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    interrupted(tmp_path)
    changed = ppo(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=message):
        changed.resume()
    assert changed.step == 0
    changed.resume(allow=list(settings))
    assert changed.step == 1


def test_changed_data_and_models_are_named_and_refused(tmp_path: Path) -> None:
    for name in ("sft", "reward"):
        trainer = TRAININGS[name](tmp_path / name)
        interrupt_after(trainer, 1)
        with pytest.raises(Interrupted):
            trainer.train()
        with pytest.raises(CheckpointError, match="train_data: '"):
            TRAININGS[name](tmp_path / name, rows=15 - 1).resume()
    interrupted(tmp_path)
    other = ppo(tmp_path, prompts=["w1", "w2"])
    with pytest.raises(CheckpointError, match="prompts: '"):
        other.resume()
    other = ppo(tmp_path, policy_seed=3)
    with pytest.raises(CheckpointError, match=r"policy\.ends: '"):
        other.resume()


def with_policy(folder: Path, change: Callable[[Any], Any]) -> PPOTrainer:
    """``ppo`` with a policy that something was done to."""
    policy = make_policy()
    with torch.no_grad():
        change(policy)
    trainer = ppo(folder)
    return PPOTrainer(trainer.config, policy, trainer.tokenizer, trainer.rows, word_count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda policy: policy.model.norm.weight[9:-9].mul_(2), r"policy\.bits: '"),
        (lambda policy: setattr(policy.config, "rms_norm_eps", 0.5), r"rms_norm_eps: 1e-06 before"),
        (
            lambda policy: setattr(policy.generation_config, "eos_token_id", [3, 9]),
            r"eos_token_ids: \[3, 108.* before, \[3, 9\] now",
        ),
    ],
)
def test_a_small_change_of_a_model_is_named_and_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    interrupted(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        with_policy(tmp_path, change).resume()


def test_another_template_of_the_reward_and_other_eval_prompts_are_named_and_refused(
    tmp_path: Path,
) -> None:
    model = scalar_model_from_causal(tiny_llama(3), seed=2)

    def make(template: str, eval_prompts: list[str]) -> PPOTrainer:
        made = ppo(tmp_path)
        reward = RewardModel(model, made.tokenizer, template)
        return PPOTrainer(
            made.config,
            make_policy(),
            made.tokenizer,
            made.rows,
            reward,
            eval_prompts=eval_prompts,
        )

    first = make("none", ["w1"])
    first.save_checkpoint()
    make("none", ["w1"]).resume()
    with pytest.raises(CheckpointError, match="eval_prompts: '"):
        make("none", ["w2"]).resume()
    with pytest.raises(CheckpointError, match=r"1\.template: 'none' before, 'instruction' now"):
        make("instruction", ["w1"]).resume()
    with pytest.raises(CheckpointError, match=r"reward model 1: '\(set\)' before, '\(not set\)'"):
        ppo(tmp_path).resume()


def test_a_checkpoint_of_an_earlier_version_is_compared_by_what_it_has(tmp_path: Path) -> None:
    interrupted(tmp_path)
    state = tmp_path / "checkpoints" / "step-00000001" / "state.json"
    written = json.loads(state.read_text())
    saved = written["state"]["identity"]
    for name in ("policy", "critic", "reference"):
        saved[name] = saved[name]["ends"]
    del saved["eval_prompts"], saved["eos_token_ids"], written["state"]["eval_score"]
    state.write_text(json.dumps(written))
    ppo(tmp_path).resume()
    with pytest.raises(CheckpointError, match="policy: '"):
        ppo(tmp_path, policy_seed=3).resume()


def test_what_only_changes_memory_and_speed_may_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path)
    trainer = ppo(tmp_path, micro_batch_size=4, save_every=1)
    trainer.resume()
    assert "micro_batch_size: 2 before, 4 now" in caplog.text
    trainer.train()


def test_unknown_names_and_missing_checkpoints_are_said_so(tmp_path: Path) -> None:
    trainer = ppo(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*empty"):
        trainer.resume()
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no state\.json"):
        trainer.resume(tmp_path)
    interrupted(tmp_path / "run")
    with pytest.raises(CheckpointError, match="kl_coeff cannot be allowed"):
        ppo(tmp_path / "run").resume(allow=["kl_coeff"])
