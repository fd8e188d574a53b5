"""Rows that have ended are not computed any more, and nobody notices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from tiny_models import SIZES, tiny_llama
from tiny_sampling import rows, sample

import rlhf.ppo.generation.ended_rows as ended_rows
from rlhf.engine import NonFiniteError
from rlhf.ppo.generation.ended_rows import EndedRows, leaving_out

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]] * 4
STOPS = list(range(20, 45))  # so that a step ends about a row in five
OTHERS = {"vocab_size": 128, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 3}
FAMILIES = {
    "llama": lambda: tiny_llama(context=64),
    "learned positions": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**OTHERS, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "ALiBi": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(**OTHERS, hidden_size=32, n_layer=2, n_head=4)
    ),
    "sliding windows": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=4)
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(**OTHERS, hidden_size=32, num_hidden_layers=2)
    ),
}
SHRINKING = ("llama", "learned positions", "ALiBi")


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The number of rows that each call of the model's embedding has."""
    found: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: found.append(args[0].shape[0])
    )
    yield found
    hook.remove()


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def responses(model: Any, **options: Any) -> list[list[int]]:
    settings = {"stop_token_ids": STOPS, "max_new_tokens": 16, "seed": 3} | options
    return rows(sample(model, PROMPTS, **settings))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3, "top_k": 50},
        {"min_new_tokens": 3},
        {"stop_strings": ["w5", "w70"]},
    ],
    ids=str,
)
def test_responses_are_those_of_whole_batches(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    with counted(model) as batches:
        found = responses(model, **options)
    assert (min(batches) < len(PROMPTS)) == (family in SHRINKING)
    monkeypatch.setattr(ended_rows, "ENOUGH", 0.0)
    with counted(model) as whole:
        assert responses(model, **options) == found
    assert set(whole) == {len(PROMPTS)} and len(whole) == len(batches)
    assert len({len(ids) for ids in found}) > 2


def test_no_step_has_more_than_its_share_of_ended_rows() -> None:
    model = model_of("llama")
    with counted(model) as batches:
        found = responses(model)
    lengths = sorted(map(len, found))
    for step, computed in enumerate(batches[1:], start=1):  # the prompt is the first
        running = sum(length > step for length in lengths)
        assert running <= computed and running > ended_rows.ENOUGH * computed


def test_static_caches_and_none_are_left_alone() -> None:
    model = model_of("llama")
    expected = responses(model)
    for option in (
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ):
        with counted(model) as batches:
            assert responses(model, generation_options=option) == expected
        assert set(batches) == {len(PROMPTS)}


def test_inputs_that_are_not_known_keep_all_rows() -> None:
    model = model_of("llama")
    plain = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: {
        **plain(*args, **kwargs),
        "of_rows_too": torch.zeros(len(PROMPTS)),
    }
    with counted(model) as batches:
        responses(model)
    assert set(batches) == {len(PROMPTS)}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotations_by_the_longest_row_keep_all_rows(rope: dict[str, Any]) -> None:
    original = {"rope_theta": 10000.0, "original_max_position_embeddings": 8}
    model = tiny_llama(context=64, rope_parameters={**rope, **original}).eval()
    with counted(model) as batches:
        responses(model)
    assert set(batches) == {len(PROMPTS)}


def test_positions_of_several_axes_keep_all_rows() -> None:
    """As models of pictures have them, with as many axes as there are rows."""
    rows_ids = torch.tensor([[3], [5], [6], [7]])
    ended = EndedRows([3], rows_ids)
    ended.running[:2] = False
    positions = torch.zeros(4, 4, 1, dtype=torch.int64)
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(4, 1, 1, 2), torch.zeros(4, 1, 1, 2), 0)
    inputs = {"input_ids": rows_ids, "position_ids": positions, "past_key_values": cache}
    assert ended.leave(inputs) is inputs
    assert len(ended.leave({**inputs, "position_ids": positions[0]})["input_ids"]) == 2


def test_adapters_shrink_the_model_inside() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_llama(context=64),
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    with counted(model) as batches:
        responses(model)
    assert min(batches) < len(PROMPTS)


def test_rows_that_run_on_are_still_looked_at() -> None:
    model = model_of("llama")
    head = model.lm_head

    def broken(module: Any, args: Any, output: torch.Tensor) -> None:
        if len(output) < len(PROMPTS):
            output[0] = float("nan")

    head.register_forward_hook(broken)
    with pytest.raises(NonFiniteError, match="1 of 16 responses"):
        responses(model)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_batch_that_has_ended_whole_keeps_its_last_rows() -> None:
    ids = torch.tensor([[5], [6]])
    ended = EndedRows([3], ids)
    assert not ended(ids, None).any()
    assert ended(torch.tensor([[3], [3]]), None).all()
    assert ended.leave({"input_ids": ids})["input_ids"] is ids


def test_compiled_models_compute_all_rows() -> None:
    model = model_of("llama")
    model.compile(backend="eager")
    with leaving_out(EndedRows([3], torch.ones(2, 1)), model):
        assert not model._forward_pre_hooks
