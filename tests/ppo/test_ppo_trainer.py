"""The trainer as a whole: the loop, its figures, its errors, what it saves."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from tiny_policy import make_policy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.engine import NonFiniteError, OutputError, World, micro_batches
from rlhf.models import ModelError
from rlhf.ppo import PPOConfig, PPOTrainer, RewardError
from rlhf.ppo.seeds import derive_seed
from rlhf.ppo.update import minibatches
from rlhf_kernels.fast_layers import use_fast_layers

DOCS = Path(__file__).parents[2] / "docs" / "ppo.md"
# Depend on the clock.
TIMINGS = re.compile(r"seconds/|tokens_per_second")


def weights(trainer: Any) -> list[torch.Tensor]:
    models = trainer.policy, trainer.critic, trainer.reference
    return [p.detach().clone() for model in models for p in model.parameters()]


def figures(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not TIMINGS.match(name)}


def run_openly(trainer: Any) -> list[dict[str, float]]:
    return [figures(trainer.update(trainer.rollout(prompts))) for prompts in trainer.prompts]


def test_two_runs_are_equal_bit_for_bit(make_trainer: Any) -> None:
    first, second = make_trainer(), make_trainer()
    torch.manual_seed(1)
    one = run_openly(first)
    torch.manual_seed(2)  # nothing depends on the global generator
    assert run_openly(second) == one
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second)))
    assert run_openly(make_trainer(seed=1)) != one


def test_the_open_loop_is_what_train_does(make_trainer: Any, tmp_path: Path) -> None:
    closed = make_trainer(trackers=["jsonl"], output_dir=str(tmp_path / "closed"), total_updates=3)
    returned = figures(closed.train())
    lines = (tmp_path / "closed" / "metrics.jsonl").read_text().splitlines()
    logged = [figures(json.loads(line)) for line in lines]
    opened = make_trainer(total_updates=3)
    by_hand = run_openly(opened)
    assert [{k: line[k] for k in by_hand[0]} for line in logged] == by_hand
    assert returned == by_hand[-1]
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(weights(closed), weights(opened)))
    assert closed.finished
    assert not list(closed.prompts)


def test_only_policy_and_critic_move(make_trainer: Any) -> None:
    policy = make_policy()
    before = copy.deepcopy(policy.state_dict())
    trainer = make_trainer(policy=policy)
    values = copy.deepcopy(trainer.critic.state_dict())
    trainer.update(trainer.rollout(next(trainer.prompts)))
    assert all(torch.equal(v, before[k]) for k, v in trainer.reference.state_dict().items())
    assert not any(torch.equal(v, before[k]) for k, v in trainer.policy.state_dict().items())
    assert any(not torch.equal(v, values[k]) for k, v in trainer.critic.state_dict().items())


def test_figures_are_those_of_the_experience(make_trainer: Any) -> None:
    trainer = make_trainer(kl_coef=0.3)
    trainer.update(trainer.rollout(next(trainer.prompts)))  # so that KL and values are not 0
    made = trainer.rollout(next(trainer.prompts))
    metrics = trainer.update(made)
    rows = range(len(made))
    valid = [made.response_mask[row] for row in rows]
    kls = [(made.logprobs[r][valid[r]] - made.ref_logprobs[r][valid[r]]).double() for r in rows]
    lengths = [int(mask.sum()) for mask in valid]
    scores = made.scores.tolist()
    mean = sum(scores) / len(scores)
    total_kl = sum(kl.sum().item() for kl in kls)
    expected = {
        "score": mean,
        "score_std": math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores)),
        "reward": mean - 0.3 * total_kl / len(scores),
        "kl": total_kl / len(scores),
        "kl_per_token": total_kl / sum(lengths),
        "response_length": sum(lengths) / len(lengths),
        "response_length_min": min(lengths),
        "response_length_max": max(lengths),
        "eos_rate": made.ended.float().mean().item(),
    }
    errors = made.returns[made.response_mask] - made.values[made.response_mask]
    spread = made.returns[made.response_mask].var(correction=0)
    expected["explained_variance"] = (1 - errors.var(correction=0) / spread).item()
    assert abs(total_kl) > 1e-3
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    total = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
    assert metrics["tokens_per_second"] == pytest.approx(sum(lengths) / total)


def test_every_figure_is_finite_and_documented(make_trainer: Any) -> None:
    metrics = run_openly(make_trainer(dual_clip=3.0))[-1] | {"tokens_per_second": 1.0}
    documented = set(re.findall(r"^\| `([^`]+)`", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(metrics) <= documented
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("template", ["auto", "none"])
def test_saved_models_load_with_transformers(
    make_trainer: Any, tmp_path: Path, template: str
) -> None:
    trainer = make_trainer(total_updates=1, template=template, max_new_tokens=6)
    trainer.train()
    folder = tmp_path / "ppo"
    policy = AutoModelForCausalLM.from_pretrained(folder)
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer("w1 w2 w3")["input_ids"]])
    for loaded, trained in ((policy, trainer.policy), (critic, trainer.critic)):
        trained.eval()
        use_fast_layers(loaded)  # as the trained one has them, to the bit
        assert torch.equal(loaded.eval()(ids).logits, trained(ids).logits)
    assert json.loads((folder / "training_config.json").read_text())["total_updates"] == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda prompts, responses: [float("nan")] * len(prompts), "'w1.*'.*Nothing was updated"),
        (lambda prompts, responses: [1.0], "1 scores for 8 responses"),
        (lambda prompts, responses: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_bad_reward_changes_nothing(make_trainer: Any, bad: Any, message: str) -> None:
    trainer = make_trainer()
    good, before, prompts = trainer.reward, weights(trainer), next(trainer.prompts)
    trainer.reward = bad
    with pytest.raises(RewardError, match=message):
        trainer.rollout(prompts)
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), before))
    trainer.reward = good
    assert run_openly(trainer) == run_openly(make_trainer())  # as if nothing had happened


def test_an_experience_turned_nan_stops_before_the_weights_change(make_trainer: Any) -> None:
    trainer = make_trainer()
    experience = trainer.rollout(next(trainer.prompts))
    experience.advantages = experience.advantages * float("nan")
    before = weights(trainer)
    with pytest.raises(NonFiniteError, match="the policy loss became NaN"):
        trainer.update(experience)
    assert all(torch.equal(a, b) for a, b in zip(weights(trainer), before))


def test_scores_too_large_for_the_value_loss_are_said_so(make_trainer: Any) -> None:
    def huge(prompts: list[Any], responses: list[str]) -> list[float]:
        return [1e20 * len(text) for text in responses]

    trainer = make_trainer(reward=huge, whiten_advantages=False)
    with pytest.raises(NonFiniteError, match=r"the value loss became .* reach \d.*e\+2.*scale"):
        trainer.train()


def test_a_failed_update_leaves_no_gradient_for_the_next(make_trainer: Any) -> None:
    failed, fresh = make_trainer(max_skipped_steps=1), make_trainer()
    experience, same = (t.rollout(next(t.prompts)) for t in (failed, fresh))
    broken = copy.deepcopy(experience)
    # Only the last response of the first minibatch: micro-batches before it have their gradients.
    seed = derive_seed(failed.config.seed, "minibatches", 0)
    rows = next(minibatches(len(broken), failed.config, seed))
    lengths = broken.lengths()
    batches = micro_batches(rows, [sum(both) for both in lengths], size=3)
    assert len(batches) == 2
    broken.advantages[batches[-1][-1]] = float("nan")
    with pytest.raises(NonFiniteError):
        failed.update(broken)
    engines = failed.models.policy, failed.models.critic
    assert all(p.grad is None for engine in engines for p in engine.parameters)
    assert figures(failed.update(experience)) == figures(fresh.update(same))
    assert all(torch.equal(a, b) for a, b in zip(weights(failed), weights(fresh)))


def test_only_the_main_rank_writes(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(total_updates=1, trackers=["jsonl"])
    monkeypatch.setattr(World, "is_main", False)
    trainer.train()
    assert not list((tmp_path / "ppo").iterdir())


def test_results_in_a_home_folder(
    make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_trainer(total_updates=1, trackers=["jsonl"], output_dir="~/out").train()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "metrics.jsonl", "critic", "training_config.json"} <= names


def test_changed_scores_count_once_advantages_are_estimated_anew(make_trainer: Any) -> None:
    trainer = make_trainer(whiten_advantages=False, kl_coef=0.0)
    experience = trainer.rollout(next(trainer.prompts))
    before = experience.rewards.sum(1)
    experience.scores = experience.scores + 2.0
    trainer.estimate_advantages(experience)
    torch.testing.assert_close(experience.rewards.sum(1), before + 2.0)


@pytest.mark.parametrize("score", [float("nan"), float("-inf")])
def test_a_changed_score_that_is_no_number_is_named(make_trainer: Any, score: float) -> None:
    trainer = make_trainer()
    experience = trainer.rollout(next(trainer.prompts))
    before = experience.advantages.clone()
    experience.scores[2] = score
    with pytest.raises(ValueError, match=rf"scores\[2\] of the experience is {score}"):
        trainer.estimate_advantages(experience)
    assert torch.equal(experience.advantages, before)


def test_dropout_is_off_in_all_three_models(make_trainer: Any) -> None:
    trainer = make_trainer(policy=make_policy(attention_dropout=0.5))
    metrics = trainer.update(trainer.rollout(next(trainer.prompts)))
    assert metrics["first_step/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    for model in (trainer.policy, trainer.critic, trainer.reference):
        dropouts = [m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")]
        assert dropouts
        assert set(dropouts) == {0.0}


def test_gradient_checkpointing_gives_the_same_figures(make_trainer: Any) -> None:
    plain, saving = (
        run_openly(make_trainer()),
        run_openly(make_trainer(gradient_checkpointing=True)),
    )
    assert plain[-1] == pytest.approx(saving[-1], rel=1e-3, abs=1e-5)


def test_a_tokenizer_must_be_given_beside_a_policy_object(tmp_path: Path) -> None:
    config = PPOConfig(output_dir=str(tmp_path))
    with pytest.raises(ModelError, match="no tokenizer is given"):
        PPOTrainer(config, make_policy(), None, ["w1"], lambda prompts, responses: [0.0])


def test_a_reward_or_config_of_another_kind_is_said_at_once(make_trainer: Any) -> None:
    with pytest.raises(TypeError, match="the reward is float"):
        make_trainer(reward=3.0)
    with pytest.raises(TypeError, match=r"PPOTrainer takes a PPOConfig as its config, .* a dict"):
        PPOTrainer({}, make_policy(), None, ["w1"], print)  # type: ignore[arg-type]


def test_a_finished_training_is_not_begun_again(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(total_updates=1)
    trainer.train()
    with pytest.raises(RuntimeError, match="ended after 1 of 1 updates"):
        trainer.train()
    assert (tmp_path / "ppo" / "config.json").exists()


def test_a_training_that_breaks_off_leaves_no_earlier_models(
    make_trainer: Any, tmp_path: Path
) -> None:
    make_trainer(total_updates=1).train()
    trainer = make_trainer(total_updates=1, reward=lambda prompts, responses: 1 / 0)
    with pytest.raises(RewardError):
        trainer.train()
    for folder in (tmp_path / "ppo", tmp_path / "ppo" / "critic"):
        assert not (folder / "config.json").exists()


def test_an_unwritable_output_folder_is_named(make_trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="file"):
        make_trainer(output_dir=str(tmp_path / "file" / "ppo"))


def test_the_policy_itself_is_no_reference(make_trainer: Any) -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match="the policy object itself"):
        make_trainer(policy=policy, reference=policy)


def test_a_reference_of_another_vocabulary_is_refused(make_trainer: Any) -> None:
    other = tiny_llama()
    other.resize_token_embeddings(64)
    with pytest.raises(ModelError, match="64 token ids and the policy 128"):
        make_trainer(reference=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10, "minibatch_size": 4}, "minibatch_size=4 does not divide batch_size=10"),
        ({"temperature": 0}, "temperature=0"),
        ({"lam": 1.5}, "lam=1.5"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0"),
        ({"clip_range": -0.1}, "clip_range"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"total_updates": 0}, "total_updates=0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PPOConfig(**settings)


def test_defaults_are_the_published_ones() -> None:
    config = PPOConfig()
    assert (config.learning_rate, config.batch_size, config.epochs) == (1e-5, 64, 4)
    assert (config.clip_range, config.value_clip_range, config.value_coef) == (0.2, 0.2, 0.5)
    assert (config.entropy_coef, config.kl_coef) == (0.01, 0.1)
    assert (config.gamma, config.lam, config.adam_eps) == (1.0, 0.95, 1e-5)


def test_bfloat16_products_train_float32_weights(make_trainer: Any) -> None:
    trainer = make_trainer(dtype="bfloat16")
    metrics = trainer.update(trainer.rollout(next(trainer.prompts)))
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32}
    # Logits of size 10 with 8 significant bits, computed in two different batches.
    assert metrics["first_step/ratio_mean"] == pytest.approx(1.0, abs=0.05)
    assert metrics["grad_norm"] > 0
