"""What a training takes: counted, and compared with models as they are."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from rlhf.cli import main
from rlhf.engine import Engine, TrainingConfig
from rlhf.engine.gradient_norm import gradient_norm
from rlhf.engine.lora import add_lora
from rlhf.models import scalar_model_from_causal
from rlhf.plan import (
    GIB,
    SHAPES,
    Shape,
    Training,
    memory_plan,
    table,
    trained_bytes,
    what_to_change,
)

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
# What the tables of the page show.
SHOWN = [("1b", 8), ("7b", 8), ("70b", 8), ("70b", 64)]


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", list(SHAPES))
def test_counts_are_those_of_the_model(name: str) -> None:
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert shape.total == parameters(model)
    assert shape.layer == parameters(model.model.layers[0])
    assert Shape.of(config) == dataclasses.replace(shape, head_size=shape.hidden // shape.heads)


def bytes_after_a_step(engine: Engine) -> int:
    """Weights, gradients and optimizer state as the engine holds them."""
    ids = torch.arange(4, 12).unsqueeze(0)
    engine.backward(engine.run(lambda model: model(input_ids=ids).logits.float().sum()))
    norm = gradient_norm([p.grad for p in engine.parameters if p.grad is not None])
    engine._update_weights(norm, 0.1)
    state = [v for s in engine.optimizer.state.values() for v in s.values() if v.dim()]
    held = {id(t): t for p in engine.model.parameters() for t in (p, p.grad) if t is not None}
    held |= {id(t): t for p in engine.parameters for t in (p, p.grad) if t is not None}
    return sum(t.numel() * t.element_size() for t in [*held.values(), *state])


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_bytes_are_those_that_the_engine_holds(
    weights: str, rank: int | None, optimizer: str
) -> None:
    model = tiny_llama()
    shape = Shape.of(model.config)
    assert shape.total == parameters(model)
    assert shape.scalar == parameters(scalar_model_from_causal(model))
    if rank is not None:
        add_lora(model, rank, 4, seed=0)
        assert shape.adapters(rank) == parameters(model) - shape.total
    config = TrainingConfig(dtype="float32", weights=weights, optimizer=optimizer)
    engine = Engine(model, config, 1)
    training = Training(
        gpus=1, parallel="one", weights=weights, lora_rank=rank, optimizer=optimizer
    )
    # Blocks that are not full have whole scales too: less than two more for each tensor.
    more = 2 * 4 * len(engine.parameters) if optimizer == "adamw_8bit" else 0
    expected = trained_bytes(shape, shape.total, training)
    assert expected <= bytes_after_a_step(engine) <= expected + more


def test_the_cache_is_that_of_the_model() -> None:
    model = tiny_llama().bfloat16()
    ids = torch.ones(3, 16, dtype=torch.long)
    cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    held = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    training = Training(parallel="fsdp", length=16, generation_batch=3)
    assert memory_plan(Shape.of(model.config), training).generation["KV cache"] == held


@pytest.mark.parametrize("name", list(SHAPES))
def test_more_gpus_and_savings_never_take_more(name: str) -> None:
    shape = SHAPES[name]
    peaks = [memory_plan(shape, Training(gpus=n, parallel="fsdp")).peak for n in (2, 8, 64)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1]
    base = Training()
    for change in (
        {"critic": "shared"},
        {"critic": "none"},
        {"lora_rank": 8},
        {"reward_model": False},
        {"micro_batch_tokens": 1024},
        {"generation_batch": 1},
    ):
        changed = dataclasses.replace(base, **change)
        assert memory_plan(shape, changed).peak <= memory_plan(shape, base).peak, change
    assert (
        memory_plan(shape, base).peak
        < memory_plan(shape, dataclasses.replace(base, parallel="ddp")).peak
    )


def test_advice_is_given_until_it_fits() -> None:
    training = Training(parallel="ddp", gradient_checkpointing=False)
    assert what_to_change(SHAPES["1b"], training, 1000 * GIB) == []
    advice = what_to_change(SHAPES["7b"], training, 80 * GIB)
    assert advice[0] == "gradient_checkpointing=true" and "parallel=fsdp" in advice
    assert what_to_change(SHAPES["7b"], training, 14 * GIB)[-1] == "more GPUs"
    assert "fits a GPU to sample" in what_to_change(SHAPES["70b"], training, 80 * GIB)[-1]


def test_the_tables_of_the_page_are_what_the_function_gives() -> None:
    text = PAGE.read_text()
    for name, gpus in SHOWN:
        expected = table(SHAPES[name], Training(gpus=gpus))
        assert expected in text, f"{name} on {gpus} GPUs:\n{expected}"
    assert len(re.findall(r"^### ", text, re.MULTILINE)) == len(SHOWN)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "--params", "7b", "--gpus", "8"]) == 0
    assert "6.74 billion parameters" in capsys.readouterr().out
    tiny_llama().save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--gpus", "1", "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["kept"]["policy"] > 0
    assert main(["plan", "--params", "8x22b"]) == 2
    assert "must be one of 0.135b, 1b" in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "give --params or --model" in capsys.readouterr().err
    assert main(["plan", "--params", "7b", "--parallel", "zero3"]) == 2
    assert "parallel='zero3' must be one of" in capsys.readouterr().err
