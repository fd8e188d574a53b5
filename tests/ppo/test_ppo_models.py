"""A value head on the policy's trunk, adapters, and bfloat16 weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_llama, tiny_tokenizer
from tiny_policy import make_policy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from rlhf import RewardModel
from rlhf.models import ModelError, scalar_model_from_causal, token_scores
from rlhf.ppo import PPOConfig
from rlhf.ppo.forward import response_logprobs, response_values

# Float32 products of a tiny model in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def hidden_calls(model: Any) -> list[int]:
    """Counts the forwards of a model's trunk from now on."""
    calls: list[int] = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_shared_trunk_is_read_once_for_both(make_trainer: Any) -> None:
    trainer = make_trainer(critic=None, critic_choice="shared", micro_batch_size=8, epochs=1)
    experience = trainer.rollout(next(trainer.prompts))
    assert trainer.critic is None
    assert not experience.values.any()  # the head begins with zeros
    calls = hidden_calls(trainer.policy)
    trainer.update(experience)
    assert len(calls) == 2  # one for each minibatch
    again = trainer.rollout(next(trainer.prompts))
    assert again.values.abs().sum() > 0


def test_a_shared_trunk_gives_the_gradient_of_both_losses(make_trainer: Any) -> None:
    """The value loss reaches the trunk: a policy loss of nothing still moves it."""
    trainer = make_trainer(critic_choice="shared", entropy_coef=0.0, epochs=1)
    with torch.no_grad():
        trainer.policy.value_head.weight.normal_()
    experience = trainer.rollout(next(trainer.prompts))
    experience.advantages = torch.zeros_like(experience.advantages)
    before = trainer.policy.model.layers[0].mlp.up_proj.weight.clone()
    trainer.update(experience)
    assert not torch.equal(before, trainer.policy.model.layers[0].mlp.up_proj.weight)


def test_a_shared_trunk_is_saved_as_two_plain_models(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(critic_choice="shared")
    trainer.train()
    experience = trainer.rollout(trainer.rows)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppo" / "critic")
    assert critic.config.num_labels == 1
    with torch.no_grad():
        logprobs = response_logprobs(policy, experience, 1.0)
        values = response_values(critic, experience)
    torch.testing.assert_close(logprobs, experience.logprobs, **CLOSE)
    torch.testing.assert_close(values, experience.values, **CLOSE)


def test_adapters_alone_are_trained_and_the_reference_is_the_policy_without_them(
    make_trainer: Any,
) -> None:
    trainer = make_trainer(lora_rank=2, learning_rate=1e-2, total_updates=3)
    assert trainer.reference is trainer.policy
    before = {n: p.clone() for n, p in trainer.policy.named_parameters() if "lora" not in n}
    first = trainer.rollout(next(trainer.prompts))
    assert torch.equal(first.logprobs, first.ref_logprobs)  # they begin as nothing
    trainer.update(first)
    second = trainer.rollout(next(trainer.prompts))
    plain = make_policy().eval()
    with torch.no_grad():
        expected = response_logprobs(plain, second, 1.0)
    torch.testing.assert_close(second.ref_logprobs, expected, **CLOSE)
    assert (second.logprobs - second.ref_logprobs).abs().max() > 1e-3
    after = dict(trainer.policy.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert set(trainer.models.policy.named_parameters) == {n for n in after if "lora" in n}


def test_a_policy_with_adapters_is_saved_with_them_merged_in(
    make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(lora_rank=2, critic_lora_rank=3, learning_rate=1e-2)
    trainer.train()
    experience = trainer.rollout(trainer.rows)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppo" / "critic")
    assert not any("lora" in name for name in load_file(tmp_path / "ppo" / "model.safetensors"))
    with torch.no_grad():
        logprobs = response_logprobs(policy, experience, 1.0)
        values = response_values(critic, experience)
    torch.testing.assert_close(logprobs, experience.logprobs, **CLOSE)
    torch.testing.assert_close(values, experience.values, **CLOSE)
    assert policy.generation_config.eos_token_id == trainer.policy.generation_config.eos_token_id


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    "settings",
    [{}, {"critic_lora_rank": 2}, {"critic_choice": "shared"}],
    ids=["policy", "both", "shared"],
)
@pytest.mark.parametrize("make_model", [tiny_gpt2, make_policy], ids=["gpt2", "llama"])
def test_what_is_saved_computes_what_the_adapters_did(
    make_trainer: Any, tmp_path: Path, make_model: Any, settings: dict[str, Any]
) -> None:
    """GPT-2's layers are Conv1D, whose weights lie transposed; its attn.c_proj is square."""
    trainer = make_trainer(policy=make_model(), lora_rank=3, **settings)
    with torch.no_grad():
        for engine in trainer.engines.values():
            for weight in engine.parameters:
                if not weight.any():  # adapters and value heads begin as nothing
                    weight.normal_(std=0.1)
    trainer.save()
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppo" / "critic")
    experience = trainer.rollout(trainer.rows)
    assert (experience.logprobs - experience.ref_logprobs).abs().max() > 1e-2
    assert experience.values.abs().max() > 1e-2
    with torch.no_grad():
        logprobs = response_logprobs(policy, experience, 1.0)
        values = response_values(critic, experience)
    torch.testing.assert_close(logprobs, experience.logprobs, **CLOSE)
    torch.testing.assert_close(values, experience.values, **CLOSE)


def test_a_reference_that_is_given_is_used_with_adapters_too(make_trainer: Any) -> None:
    trainer = make_trainer(lora_rank=2, reference=make_policy(seed=5))
    assert trainer.reference is not trainer.policy
    experience = trainer.rollout(next(trainer.prompts))
    assert (experience.logprobs - experience.ref_logprobs).abs().max() > 0.1


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "add_adapter"])
@pytest.mark.parametrize("which", ["policy", "critic"])
def test_a_model_that_comes_with_adapters_is_refused(
    make_trainer: Any, wrapped: bool, which: str
) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    model = make_policy() if which == "policy" else scalar_model_from_causal(tiny_llama())
    if wrapped:
        model = peft.get_peft_model(model, lora)
    else:
        model.add_adapter(lora, "mine")
    with pytest.raises(ModelError, match=f"the {which} comes with adapters.*merge_and_unload"):
        make_trainer(**{which: model})
    if wrapped:
        make_trainer(**{which: model.merge_and_unload().requires_grad_(True)})


def test_adapters_need_peft(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"lora_rank needs the package peft: pip install"):
        make_trainer(lora_rank=2)


def test_bfloat16_weights_follow_float32_copies(make_trainer: Any, tmp_path: Path) -> None:
    """Updates far below a bfloat16 weight's last digit add up in the copies."""
    settings = {"learning_rate": 1e-6, "total_updates": 2}
    trainer = make_trainer(weights="bfloat16", **settings)
    before = {n: p.clone() for n, p in trainer.models.policy.named_parameters.items()}
    experience = trainer.rollout(next(trainer.prompts))
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.reference.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(experience.logprobs, experience.ref_logprobs, rtol=0, atol=0)
    metrics = trainer.update(experience)
    assert metrics["first_step/ratio_mean"] == pytest.approx(1.0, abs=1e-2)
    masters = trainer.models.policy.named_parameters
    moved = [(masters[n] - value).abs().max().item() for n, value in before.items()]
    assert 1e-7 < max(moved) < 1e-5
    for name, parameter in trainer.policy.named_parameters():
        assert torch.equal(parameter, masters[name].bfloat16())
    trainer.save()
    saved = load_file(tmp_path / "ppo" / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], masters["lm_head.weight"].detach())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic_learning_rate": 1e-3}, "critic_learning_rate=0.001 is for a critic of its own"),
        ({"critic_lora_rank": 2}, "critic_lora_rank=2 is for a critic of its own"),
        ({"critic_warmup_updates": 2}, "critic='shared' has no trunk of its own"),
    ],
)
def test_settings_that_a_shared_trunk_has_no_use_for(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(critic="shared", **settings)


def test_a_critic_beside_a_shared_trunk_is_refused(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match="a critic was given, and critic='shared'"):
        make_trainer(critic_choice="shared", critic=scalar_model_from_causal(tiny_llama()))


def test_the_critic_is_the_one_that_was_asked_for(make_trainer: Any) -> None:
    reward = RewardModel(scalar_model_from_causal(tiny_llama(9), seed=4), tiny_tokenizer())
    with pytest.raises(ModelError, match="critic='reward' needs a RewardModel"):
        make_trainer(critic_choice="reward")
    ids = torch.arange(4, 12).unsqueeze(0)
    found = {}
    for choice in ("auto", "reward", "policy"):
        trainer = make_trainer(reward=reward, critic_choice=choice)
        found[choice] = token_scores(trainer.critic, ids, torch.ones_like(ids)).detach()
    assert torch.equal(found["auto"], found["reward"])
    assert found["reward"].any() and not found["policy"].any()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor on CPU needs a C++ compiler")
def test_compiled_layers_give_the_same_figures(make_trainer: Any) -> None:
    plain, compiled = (make_trainer(torch_compile=choice).train() for choice in (False, True))
    for name in ("score", "kl", "grad_norm", "critic_grad_norm", "value_loss"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5), name
