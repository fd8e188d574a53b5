"""The order of prompts, and prompts that do not fit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer
from tiny_policy import make_policy

from rlhf.best_of import best_of_n
from rlhf.data import ChatFormat, DataError
from rlhf.models import scalar_model_from_causal
from rlhf.ppo import GenerationSettings
from rlhf.ppo.prompts import PromptOrder, encode_prompts, read_prompts
from rlhf.ppo.samples import samples_of
from rlhf.ppo.seeds import derive_seed
from rlhf.reward_model import RewardModel


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (3, 8), (5, 5), (1, 2)])
def test_every_pass_uses_every_prompt_once(count: int, batch_size: int) -> None:
    order = PromptOrder(count, batch_size, seed=1)
    batches = [order.batch(number) for number in range(count)]
    assert {len(batch) for batch in batches} == {batch_size}
    stream = [index for batch in batches for index in batch]
    passes = [stream[start : start + count] for start in range(0, len(stream), count)]
    assert all(Counter(p) == Counter(range(count)) for p in passes)


def test_passes_are_shuffled_anew_and_by_seed() -> None:
    order = PromptOrder(20, 20, seed=1)
    assert order.batch(0) != order.batch(1)
    assert order.batch(0) == PromptOrder(20, 20, seed=1).batch(0)
    assert order.batch(0) != PromptOrder(20, 20, seed=2).batch(0)


def test_derived_seeds_depend_on_seed_and_place() -> None:
    seeds = {derive_seed(s, place, n) for s in (0, 1) for place in ("a", "b") for n in (0, 1, 10)}
    assert len(seeds) == 12
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)


def test_a_prompt_too_long_for_the_context_names_its_row() -> None:
    rows = read_prompts(["w1 w2", "w1 w2 w3 w4 w5 w6"])
    chat_format = ChatFormat(tiny_tokenizer(), "none")
    with pytest.raises(DataError, match=r"row 2: the prompt has 6 tokens.*context of 10 leaves 5"):
        encode_prompts(rows, chat_format, max_new_tokens=5, context=10)
    fitting = encode_prompts(rows, chat_format, max_new_tokens=4, context=10)
    assert fitting[1] == [8, 9, 10, 11, 12, 13]


def make_judge(context: int) -> RewardModel:
    return RewardModel(scalar_model_from_causal(tiny_llama(context=context)), tiny_tokenizer())


def test_the_reward_models_context_is_checked_before_anything_runs(make_trainer: Any) -> None:
    """The longest response, and an EOS where it has none, fit its context; a token less, not."""
    prompts = ["w1", "w1 w2 w3 w4 w5 w6"]
    needed = len(make_judge(64).chat_format.encode(prompts[1], " ".join(["w1"] * 10))[0])
    judge, policy, tokenizer = make_judge(needed), make_policy(), tiny_tokenizer()
    policy.generation_config.eos_token_id = None  # so that most responses are of full length
    options = {"policy": policy, "prompts": prompts, "tokenizer": tokenizer, "max_new_tokens": 10}
    trainer = make_trainer(reward=judge, **options)
    assert max(len(text.split()) for text in trainer.rollout(prompts[1:] * 8).texts) == 10
    small = make_judge(needed - 1)
    options["critic"] = scalar_model_from_causal(tiny_llama())
    with pytest.raises(DataError, match=rf"row 2: for the reward model .* of {needed - 1} leaves"):
        make_trainer(reward=small, **options)
    with pytest.raises(DataError, match="row 2: for the reward model"):
        best_of_n(
            policy,
            prompts,
            small,
            2,
            tokenizer=tokenizer,
            settings=GenerationSettings(max_new_tokens=10),
        )


def write_prompts(path: Path, prompts: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


TEXTS = ["w1", "w1 w2 w3 w4 w5 w6", "w7"]
IDS = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("judged", [False, True], ids=["function", "reward model"])
def test_prompts_as_ids_are_those_of_their_texts(
    make_trainer: Any, tmp_path: Path, judged: bool
) -> None:
    """The same rollout and evaluation, and everyone reads the text."""
    seen = []

    def length(prompts: list[Any], responses: list[str]) -> list[float]:
        seen.append(prompts)
        return [float(len(prompt + text)) for prompt, text in zip(prompts, responses)]

    reward = make_judge(64) if judged else length
    file = write_prompts(tmp_path / "ids.jsonl", IDS)
    forms = TEXTS, IDS, [{"prompt": ids} for ids in IDS], file
    trainers = [make_trainer(prompts=form, eval_prompts=form, reward=reward) for form in forms]
    expected, *made = [trainer.rollout(next(trainer.prompts)) for trainer in trainers]
    for experience in made:
        for name in ("prompt_ids", "responses", "scores", "advantages"):
            assert torch.equal(getattr(experience, name), getattr(expected, name)), name
        assert experience.prompts == expected.prompts
        assert samples_of(experience, 3) == samples_of(expected, 3)
    figures, *others = [trainer.evaluate() for trainer in trainers]
    assert others == [figures] * 3
    assert seen[4:] == ([] if judged else [TEXTS] * 4)


def test_best_of_n_takes_ids() -> None:
    def texts_of(prompts: list[Any], responses: list[str]) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]

    settings = GenerationSettings(max_new_tokens=10)
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "settings": settings}
    options["template"] = "none"
    by_text, by_ids = (best_of_n(make_policy(), p, texts_of, 2, **options) for p in (TEXTS, IDS))
    assert [result.candidates for result in by_ids] == [result.candidates for result in by_text]
    assert [result.prompt for result in by_ids] == IDS


def test_ids_are_taken_as_they_are_under_any_template(make_trainer: Any) -> None:
    prompts = [[3, 8, 2], [3]]  # <end> w1 <start>, <end>; of these <end> is special
    trainer = make_trainer(prompts=prompts, template="auto")
    made = trainer.rollout([*prompts, "w1"])
    assert made.prompt_ids[0][made.prompt_mask[0]].tolist() == [3, 8, 2]
    assert [row["prompt"] for row in made.prompts] == ["w1 <start>", "", "w1"]


def test_an_id_that_the_tokenizer_does_not_have_names_file_and_row(
    make_trainer: Any, tmp_path: Path
) -> None:
    largest = len(tiny_tokenizer()) - 1
    make_trainer(prompts=[[largest]])
    file = write_prompts(tmp_path / "ids.jsonl", [[1], [2, 2**40, 3]])
    with pytest.raises(DataError, match=rf"ids\.jsonl, row 2: .* id {2**40}, .* above {largest}"):
        make_trainer(prompts=file)
    with pytest.raises(DataError, match="row 2: the prompt has 60 tokens"):
        make_trainer(prompts=[[1], [8] * 60])


def test_a_prompt_with_an_unknown_role_names_its_row(make_trainer: Any) -> None:
    prompts: list[Any] = [
        {"prompt": [{"role": "user", "content": "w1"}]},
        {"prompt": [{"role": "robot", "content": "w2"}]},
    ]
    with pytest.raises(DataError, match=r"row 2.*'robot'"):
        make_trainer(prompts=prompts)


def test_a_long_prompt_stops_the_trainer_before_anything_runs(make_trainer: Any) -> None:
    with pytest.raises(DataError, match=r"row 2.*lower max_new_tokens"):
        make_trainer(prompts=["w1", " ".join(["w2"] * 60)])
