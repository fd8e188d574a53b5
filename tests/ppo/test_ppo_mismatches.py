"""Models and tokenizers that do not fit each other are refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_llama, tiny_tokenizer

from rlhf import RewardModel, RewardTrainer, SFTTrainer
from rlhf.best_of import best_of_n
from rlhf.engine.saving import save_model
from rlhf.models import ModelError, scalar_model_from_causal
from rlhf.ppo import GenerationSettings, PPOTrainer

MakeTrainer = Callable[..., PPOTrainer]
SETTINGS = GenerationSettings(max_new_tokens=4)


def score(prompts: list[Any], responses: list[str]) -> list[float]:
    return [0.1 * len(text.split()) for text in responses]


def other_tokenizer() -> Any:
    """As many words as ``tiny_tokenizer`` has, two of them the other way round."""
    tokenizer = tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    words = backend["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    return type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)),
        eos_token="<end>",
        pad_token="<pad>",
    )


@pytest.mark.parametrize("role", ["reference", "critic"])
def test_a_model_with_another_tokenizer_is_refused(
    make_trainer: MakeTrainer, tmp_path: Path, role: str
) -> None:
    """Of the same size, so that only the words show it."""
    model = tiny_llama() if role == "reference" else scalar_model_from_causal(tiny_llama())
    save_model(model, other_tokenizer(), tmp_path / "other")
    save_model(model, tiny_tokenizer(), tmp_path / "same")
    message = (
        rf"the {role} has another tokenizer than the policy: token id 8 is 'w2' there and 'w1'"
    )
    with pytest.raises(ModelError, match=message):
        make_trainer(**{role: str(tmp_path / "other")})
    make_trainer(**{role: str(tmp_path / "same")})


def test_a_reward_model_with_another_tokenizer_is_no_critic(make_trainer: MakeTrainer) -> None:
    judge = RewardModel(scalar_model_from_causal(tiny_llama()), other_tokenizer())
    with pytest.raises(ModelError, match="the critic has another tokenizer than the policy"):
        make_trainer(critic=judge)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    small = tiny_llama()
    small.resize_token_embeddings(64)  # w56 is the last word that it knows
    message = r"gives the token id 66, and .* knows 64, 0 to 63\. Give the tokenizer that lies"
    with pytest.raises(ModelError, match=message):
        make_trainer(policy=small, prompts=["w1", "w2 w59"])
    trainer = make_trainer(policy=small, prompts=["w1"], critic_choice="policy")
    with pytest.raises(ModelError, match=message):
        trainer.rollout(["w59"])
    with pytest.raises(ModelError, match=message):
        best_of_n(
            small, ["w59"], score, 2, tokenizer=tiny_tokenizer(), settings=SETTINGS, template="none"
        )


@pytest.mark.parametrize("trainer", [SFTTrainer, RewardTrainer])
def test_the_other_trainers_refuse_it_too(tmp_path: Path, trainer: Any) -> None:
    small = tiny_llama()
    small.resize_token_embeddings(64)
    row = {"prompt": "w1", "completion": "w59", "chosen": "w59", "rejected": "w2"}
    keys = ("prompt", "completion") if trainer is SFTTrainer else ("prompt", "chosen", "rejected")
    config = trainer.config_class(output_dir=str(tmp_path), eval_fraction=0.0, template="none")
    with pytest.raises(ModelError, match="the token id 66, and the model knows 64"):
        trainer(config, small, tiny_tokenizer(), [{key: row[key] for key in keys}])
