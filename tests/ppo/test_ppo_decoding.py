"""The attention of sampling, widened under 16-bit models on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_llama

from rlhf.models import decoding
from rlhf.models.decoding import attending_in_float32
from rlhf.models.packed import attends_by_kernel

IDS = torch.arange(1, 13).view(2, 6)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def logits_of_each_step(model: Any, dtype: torch.dtype) -> torch.Tensor:
    """[steps, B, V], of the same tokens whatever the model says: its cache, then one at a time."""
    cache, found = None, []
    ids, mask = IDS, MASK
    for step in range(4):
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[:, -1])
        ids = torch.full((2, 1), 20 + step)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    assert all(logits.dtype == dtype for logits in found)
    return torch.stack(found)


@torch.no_grad()
def test_logits_are_no_farther_from_float64_than_pytorch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().bfloat16().eval()
    plain = logits_of_each_step(model, torch.bfloat16).double()
    types, steps = [], []
    theirs, ours = decoding.sdpa_attention_forward, decoding.cached_attention

    def seen(module: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        types.append(query.dtype)
        return theirs(module, query, *rest, **options)

    def step(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        steps.append(query.dtype)
        return ours(query, *rest)

    monkeypatch.setattr(decoding, "sdpa_attention_forward", seen)
    monkeypatch.setattr(decoding, "cached_attention", step)
    with attending_in_float32(model):
        found = logits_of_each_step(model, torch.bfloat16).double()
    layers = model.config.num_hidden_layers
    if attends_by_kernel(torch.empty(0, dtype=torch.bfloat16)):
        assert types == [torch.float32] * layers and steps == [torch.bfloat16] * 3 * layers
    else:
        assert types == [torch.float32] * 4 * layers and not steps
    assert model.config._attn_implementation == "sdpa"
    exact = logits_of_each_step(model.double(), torch.float64)
    allowed = (plain - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert float((found - exact).abs().max()) <= float(allowed)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_have_the_same_bits(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype).eval()
    plain = logits_of_each_step(model, dtype)
    with attending_in_float32(model):
        assert torch.equal(logits_of_each_step(model, dtype), plain)


@torch.no_grad()
def test_under_autocast_it_is_float32_too() -> None:
    model = tiny_llama().eval()
    exact = logits_of_each_step(model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits_of_each_step(model, torch.bfloat16).float()
        with attending_in_float32(model):
            found = logits_of_each_step(model, torch.bfloat16).float()
    allowed = (plain - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert float((found - exact).abs().max()) <= float(allowed)


def test_another_attention_is_left_alone() -> None:
    model = tiny_llama()
    model.config._attn_implementation = "eager"
    with attending_in_float32(model):
        assert model.config._attn_implementation == "eager"
