"""What options do to samples, and which are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import tiny_tokenizer
from tiny_policy import EOS_IDS, make_policy
from tiny_sampling import EOS, PROMPTS, rows, sample
from transformers import GenerationConfig

from rlhf.ppo import PPOConfig
from rlhf.ppo.generation import GenerationSettings
from rlhf.ppo.generation.options import PASSED_ON, REFUSED

ONE_TOKEN = {"epsilon_cutoff": 0.999, "typical_p": 1e-6, "top_h": 1e-6}


def sampled(**options: Any) -> list[list[int]]:
    return rows(sample(make_policy(), PROMPTS * 2, seed=3, **options))


def with_options(**options: Any) -> list[list[int]]:
    return sampled(generation_options=options)


@pytest.mark.parametrize("backend", ["generate", "continuous"])
@pytest.mark.parametrize(
    "options",
    [{"top_k": 5, "temperature": 1.7}, {"top_p": 0.6}, {"min_p": 0.2, "temperature": 1.7}],
)
def test_samples_follow_the_distribution_of_the_settings(
    options: dict[str, float], backend: str
) -> None:
    """Frequencies of one-token responses against the distribution worked out by hand."""
    policy, count = make_policy(), 2000
    made = sample(
        policy, [[5, 6, 7]], max_new_tokens=1, num_return=count, batch_size=250,
        generation_backend=backend, **options,
    )  # fmt: skip
    logits = policy(torch.tensor([[5, 6, 7]])).logits[0, -1].detach()
    p = (logits.double() / options.get("temperature", 1.0)).softmax(0)
    ordered, indices = p.sort(descending=True)
    if "top_k" in options:
        kept = torch.arange(len(p)) < 5
    elif "top_p" in options:
        kept = ordered.cumsum(0) - ordered < 0.6
    else:
        kept = ordered >= 0.2 * ordered[0]
    expected = dict(zip(indices[kept].tolist(), (ordered[kept] / ordered[kept].sum()).tolist()))
    assert 1 < len(expected) < 128
    drawn = made.responses[:, 0].tolist()
    assert set(drawn) <= set(expected)
    for token, share in expected.items():
        # Five standard deviations of a frequency.
        assert abs(drawn.count(token) / count - share) < 5 * math.sqrt(share * (1 - share) / count)


def test_a_repetition_penalty_does_not_see_padding() -> None:
    """Nor does EOS become unlikely because it pads."""
    options: dict[str, Any] = {
        "repetition_penalty": 1e6,
        "seed": 3,
        "tokenizer": tiny_tokenizer(pad="<end>"),
    }
    made = rows(sample(make_policy(), **options))
    for prompt, response in zip(PROMPTS, made):
        assert len({*prompt, *response}) == len(prompt) + len(response)
    assert any(len(set(r)) < len(r) for r in sampled(max_new_tokens=30))  # not by chance
    alone = [
        rows(sample(make_policy(), [prompt], row_numbers=[row], **options))[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    assert made == alone


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_cutoffs_that_leave_one_token_leave_nothing_to_chance(name: str) -> None:
    options = {name: ONE_TOKEN[name]}
    assert with_options(**options) != sampled()
    again = rows(sample(make_policy(), PROMPTS * 2, seed=4, generation_options=options))
    assert with_options(**options) == again


def test_eta_sampling_cuts_off_by_entropy() -> None:
    """Tokens below min(e, sqrt(e) exp(-H)) go (Hewitt et al. 2022, arXiv 2210.15191)."""
    policy, options = make_policy(), {"eta_cutoff": 0.1}
    made = sample(
        policy, [[5, 6, 7]], max_new_tokens=1, num_return=2000, batch_size=2000,
        generation_options=options,
    )  # fmt: skip
    p = policy(torch.tensor([[5, 6, 7]])).logits[0, -1].detach().double().softmax(0)
    entropy = -(p * p.log()).sum()
    kept = (p >= min(0.1, math.sqrt(0.1) * entropy.neg().exp())).nonzero()[:, 0].tolist()
    assert 1 < len(kept) < 128
    assert set(made.responses[:, 0].tolist()) == set(kept)


def test_tokens_ruled_out_do_not_come() -> None:
    came = {i for response in sampled() for i in response}
    some = sorted(came - set(EOS_IDS))[:5]
    for options in ({"suppress_tokens": some}, {"bad_words_ids": [[i] for i in some]}):
        assert not {i for response in with_options(**options) for i in response} & set(some)
    first = [response[0] for response in with_options(begin_suppress_tokens=some)]
    assert not set(first) & set(some)
    assert {response[0] for response in sampled()} & set(some)


def test_options_that_force_and_favour_tokens() -> None:
    assert all(set(r) == {7} for r in with_options(sequence_bias=[[[7], 1000.0]]))
    forced = with_options(forced_eos_token_id=EOS)
    assert all(r[-1] in EOS_IDS for r in forced)
    assert any(len(r) == 8 for r in forced)
    soon = with_options(exponential_decay_length_penalty=(2, 1e6))
    assert max(map(len, soon)) <= 4 < max(map(len, sampled()))


def test_no_ngram_comes_twice() -> None:
    assert any(len(set(r)) < len(r) for r in sampled(max_new_tokens=30))
    for response in sampled(max_new_tokens=30, generation_options={"no_repeat_ngram_size": 1}):
        assert len(set(response)) == len(response)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 2},
    ],
)
def test_options_of_speed_leave_samples_as_they_are(options: dict[str, Any]) -> None:
    assert with_options(**options) == sampled()


def test_every_option_that_is_passed_on_exists() -> None:
    assert PASSED_ON["generate"] <= set(GenerationConfig().to_dict())
    assert not PASSED_ON["generate"] & set(REFUSED)
    assert not PASSED_ON["continuous"] & set(REFUSED)


@pytest.mark.parametrize("make", [GenerationSettings, PPOConfig])
@pytest.mark.parametrize(
    "name, message",
    [
        ("do_sample", "greedy"),
        ("temperature", "the setting of that name"),
        ("max_length", "max_new_tokens"),
        ("eos_token_id", "stop_token_ids"),
        ("num_return_sequences", "responses_per_prompt"),
        ("num_beams", "beam search"),
        ("page_size", "generation_backend='continuous'"),
        ("no_repeat_ngram", "did you mean 'no_repeat_ngram_size'"),
        ("nonsense", "these are: bad_words_ids"),
    ],
)
def test_options_that_conflict_are_refused_with_what_to_do(
    make: type, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"generation_options: '{name}'.*{message}"):
        make(generation_options={name: 1})


@pytest.mark.parametrize("make", [GenerationSettings, PPOConfig])
@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"top_k": -1},
        {"min_new_tokens": 65},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"stop_strings": "w1"},
        {"stop_strings": [""]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [True]},
        {"generation_backend": "vllm"},
        {"generation_options": ["use_cache"]},
        {"repetition_penalty": 1.1, "generation_backend": "continuous"},
    ],
)
def test_wrong_settings_are_named(make: type, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(**wrong)


def test_the_config_gives_the_settings_of_its_batches() -> None:
    config = PPOConfig(
        temperature=0.7,
        stop_strings=["x"],
        generation_batch_size=8,
        generation_backend="continuous",
    )
    settings = config.generation_settings(32, dtype="float32", greedy=True)
    assert settings == GenerationSettings(
        temperature=0.7, stop_strings=["x"], batch_size=8, generation_backend="continuous",
        dtype="float32", greedy=True,
    )  # fmt: skip
    assert PPOConfig().generation_settings(32, dtype="auto").batch_size == 32
