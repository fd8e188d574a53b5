"""Continuous batching, and engines of the user's, against transformers' ``generate``."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer
from tiny_policy import make_policy
from tiny_sampling import EOS, PROMPTS, rows, sample
from transformers import ContinuousBatchingConfig

from rlhf.ppo.generation import Generated

MANY = PROMPTS * 3
PAGE = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"


def continuously(policy: Any, prompts: list[list[int]] = MANY, **options: Any) -> Generated:
    return sample(policy, prompts, generation_backend="continuous", **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"greedy": True},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "min_new_tokens": 3},
        {"batch_size": 2, "max_new_tokens": 20},
        {"num_return": 2, "row_numbers": list(range(40, 64))},
    ],
)
def test_both_backends_sample_the_same(options: dict[str, Any]) -> None:
    made = continuously(make_policy(), seed=3, **options)
    expected = sample(make_policy(), MANY, seed=3, **options)
    assert rows(made) == rows(expected)
    assert made.ended.tolist() == expected.ended.tolist()
    assert made.texts == expected.texts
    assert len({len(response) for response in rows(made)}) > 1


def test_requests_that_must_give_up_their_memory_keep_their_random_numbers() -> None:
    """Room for 20 pages of 4 tokens, and 12 responses of up to 40 tokens side by side."""
    options = {PAGE: 4, "num_blocks": 20, "max_batch_tokens": 64}
    policy = tiny_llama()  # ends seldom
    made = continuously(policy, seed=3, max_new_tokens=40, generation_options=options)
    assert rows(made) == rows(sample(policy, MANY, seed=3, max_new_tokens=40))


def test_the_policy_and_the_global_generators_are_left_as_they_were() -> None:
    policy = make_policy()
    policy.train()
    policy.set_attn_implementation("eager")
    torch.manual_seed(7)
    before, config = torch.random.get_rng_state(), policy.generation_config
    made = continuously(policy, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert policy.training
    assert policy.config._attn_implementation == "eager"
    assert policy.generation_config is config
    assert rows(made) == rows(sample(policy, MANY, seed=3))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_adapters_act_and_the_model_inside_keeps_its_config(backend: str, task: str | None) -> None:
    peft = pytest.importorskip("peft")
    base = make_policy()
    own, plain = base.generation_config, rows(sample(base, seed=3))
    lora = peft.LoraConfig(task_type=task, target_modules=["q_proj", "v_proj"])
    policy = peft.get_peft_model(base, lora)
    assert rows(sample(policy, seed=3, generation_backend=backend)) == plain  # adapters are 0
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    assert rows(sample(policy, seed=3, generation_backend=backend)) != plain
    assert base.generation_config is own
    assert policy.generation_config is own


def test_weights_in_bfloat16_run_in_bfloat16_and_others_do_not() -> None:
    made = continuously(make_policy().to(torch.bfloat16), dtype="bfloat16")
    assert len(rows(made)) == len(MANY)
    with pytest.raises(ValueError, match=r"type of the weights, torch\.float32, .*'bfloat16'"):
        continuously(make_policy(), dtype="bfloat16")


def test_an_engine_that_cannot_start_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    impossible = {"num_blocks": 10**9}
    with pytest.raises(ValueError, match=r"continuous batching.*generation_backend='generate'"):
        continuously(policy, generation_options=impossible)
    assert rows(sample(policy))  # and the policy still samples otherwise
    with pytest.raises(ValueError, match="no continuous batching for Namespace"):
        continuously(Namespace(policy))
    monkeypatch.setitem(sys.modules, "rlhf.ppo.generation.continuous", None)
    with pytest.raises(ValueError, match="has no continuous batching"):
        continuously(policy)


def test_an_error_in_the_engines_thread_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of order")

    monkeypatch.setattr(policy.model, "forward", broken)
    with pytest.raises(RuntimeError, match=r"continuous batching .*out of order"):
        continuously(policy)


class Namespace:
    """A model without transformers' mixins."""

    def __init__(self, model: Any) -> None:
        self.parameters = model.parameters
        self.generation_config = model.generation_config
        self.get_input_embeddings = model.get_input_embeddings


def test_any_engine_can_sample_and_its_ids_are_kept_as_they_are() -> None:
    """0 is <unk>, so the text of a response would give other ids if it were encoded again."""
    calls: list[dict[str, Any]] = []

    def engine(policy: Any, tokenizer: Any, prompts: Any, settings: Any, **rest: Any) -> Any:
        calls.append({"prompts": prompts, "settings": settings, **rest})
        return [[127, 0, 5], [6, EOS, 9, 9], [7, 40, 41], [8] * 8]

    made = sample(
        make_policy(), sampler=engine, seed=5, stop_token_ids=[40], row_numbers=[2, 4, 6, 8]
    )
    assert rows(made) == [[127, 0, 5], [6, EOS], [7, 40], [8] * 8]
    assert made.ended.tolist() == [False, True, True, False]
    assert made.texts[1] == tiny_tokenizer().decode([6])
    (call,) = calls
    assert call["prompts"] == PROMPTS
    assert (call["seed"], call["row_numbers"]) == (5, [2, 4, 6, 8])
    assert {EOS, 40} <= set(call["ending"].ids)


@pytest.mark.parametrize(
    "returned, message",
    [
        ([[5]] * 3, "a list of 4 responses.*list of 3"),
        (None, "NoneType"),
        ([[5], [6], [], [7]], "response 2 has 0"),
        ([[5], [6], [7], [8] * 9], "max_new_tokens=8; response 3 has 9"),
        ([[5], ["6"], [7], [8]], "response 1 is"),
        (["5", "6", "7", "8"], "response 0 is 5"),
        ([[5], [6], [7, 128], [8]], "0 to 127; response 2 has 128"),
        ([[5, -1], [6], [7], [8]], "0 to 127; response 0 has -1"),
    ],
)
def test_what_an_engine_must_return_is_checked(returned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(make_policy(), sampler=lambda *args, **options: returned)
