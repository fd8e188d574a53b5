"""Sampling responses."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer
from tiny_policy import EOS_IDS, make_policy
from tiny_sampling import PROMPTS, rows, sample

from rlhf.engine import NonFiniteError
from rlhf.ppo.generation import GenerationSettings, generate
from rlhf.ppo.generation.processors import RequireFinite


@pytest.mark.parametrize("pad", ["<pad>", "<end>", None])
def test_generated_masks_do_not_depend_on_the_padding_token(pad: str | None) -> None:
    policy = make_policy()
    settings = GenerationSettings(max_new_tokens=8, dtype="float32")
    made = generate(policy, tiny_tokenizer(pad=pad), PROMPTS * 4, settings, seed=1)
    for ids, ended in zip(rows(made), made.ended.tolist()):
        assert [i in EOS_IDS for i in ids[:-1]] == [False] * (len(ids) - 1)
        assert (ids[-1] in EOS_IDS) == ended
        assert ended or len(ids) == 8
    assert 0 < made.ended.sum() < len(made.ended)  # the test saw both


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_order_and_padding_do_not_change_greedy_responses(batch_size: int) -> None:
    policy = make_policy()
    together = rows(sample(policy, greedy=True, batch_size=batch_size, num_return=2))
    alone = [rows(sample(policy, [prompt], greedy=True))[0] for prompt in PROMPTS]
    assert together == [ids for ids in alone for _ in range(2)]


def test_prompts_are_left_padded_in_the_given_order() -> None:
    made = sample(make_policy())
    assert made.prompt_ids.shape == (4, 5)
    assert [ids[m].tolist() for ids, m in zip(made.prompt_ids, made.prompt_mask)] == PROMPTS
    assert made.prompt_mask[:, -1].all()


def test_seed_decides_and_global_generator_is_left_alone() -> None:
    policy = make_policy()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = rows(sample(policy, seed=5))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    assert rows(sample(policy, seed=5)) == first
    assert rows(sample(policy, seed=6)) != first


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_chunks_do_not_change_samples(batch_size: int) -> None:
    policy = make_policy()
    together = rows(sample(policy, num_return=2, seed=4))
    assert rows(sample(policy, num_return=2, seed=4, batch_size=batch_size)) == together
    assert together[::2] != together[1::2]  # the two responses to a prompt differ


@pytest.mark.parametrize("numbers", [[1, 3, 5, 7], [6, 0, 5], [2]])
def test_a_rank_samples_its_rows_as_one_process_would(numbers: list[int]) -> None:
    policy, prompts = make_policy(), PROMPTS * 2
    whole = rows(sample(policy, prompts, seed=4))
    assert whole[:4] != whole[4:]  # the same prompts under other row numbers
    part = sample(policy, [prompts[n] for n in numbers], seed=4, row_numbers=numbers)
    assert rows(part) == [whole[n] for n in numbers]


@pytest.mark.parametrize("backend", ["generate", "continuous"])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(greedy: bool, bad: float, backend: str) -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.lm_head.weight[9, 0] = bad
    options = {"greedy": greedy, "top_k": 5, "top_p": 0.9, "temperature": 0.7}
    where = "for .* of 4 responses" if backend == "generate" else r"for \d+ of the tokens"
    with pytest.raises(NonFiniteError, match=rf"logits are NaN or infinite {where}"):
        sample(policy, generation_backend=backend, **options)


def test_an_empty_prompt_is_named() -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(make_policy(), [[5], []])


def test_a_token_ruled_out_is_no_error() -> None:
    scores = torch.tensor([[0.0, -math.inf, 1.0]])
    assert RequireFinite()(torch.zeros(1, 2), scores) is scores
    with pytest.raises(NonFiniteError):
        RequireFinite()(torch.zeros(1, 2), torch.full((1, 3), -math.inf))


def test_the_models_own_generation_config_does_not_shape_samples() -> None:
    plain, shaped = make_policy(), make_policy()
    shaped.generation_config.repetition_penalty = 5.0
    shaped.generation_config.no_repeat_ngram_size = 1
    shaped.generation_config.temperature = 0.1
    own = shaped.generation_config
    assert rows(sample(shaped, seed=3)) == rows(sample(plain, seed=3))
    assert shaped.generation_config is own


def test_training_mode_comes_back_also_after_an_error() -> None:
    policy = tiny_llama()
    policy.train()
    sample(policy)
    assert policy.training
    with pytest.raises(IndexError):
        sample(policy, [[10_000]])
    assert policy.training
