"""The trunk over rows packed one behind the other, and attention from row to row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import SIZES, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from rlhf.models import hidden_states, packed, position_ids_from_mask
from rlhf.models.packed import (
    attend_by_rows,
    attending_by_rows,
    attends_by_kernel,
    attends_packed,
    can_attend_by_rows,
    packs,
)


def padded_rows(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 100, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([[7], [1], [0], [4]])
    return ids, mask.flip(1) if side == "left" else mask


FAMILIES: dict[str, Any] = {
    "llama": tiny_llama,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ),
}


def gradients_of(hidden: torch.Tensor, trunk: torch.nn.Module) -> list[torch.Tensor]:
    """Those of all parameters from the hidden states' squares, in float64."""
    gradients = torch.autograd.grad(hidden.square().sum(), list(trunk.parameters()))
    return [gradient.double() for gradient in gradients]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_packed_one_behind_the_other_give_the_same(family: str, side: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    ids, mask = padded_rows(side)
    assert can_attend_by_rows(model) and packs(model, mask)
    positions, trunk = position_ids_from_mask(mask), model.get_decoder()
    wide = copy.deepcopy(trunk).double()
    results = [
        decoder(ids, attention_mask=mask.long(), position_ids=positions).last_hidden_state
        for decoder in (trunk, wide)
    ]
    padded, exact = [gradients_of(x[mask], y) for x, y in zip(results, (trunk, wide))]
    packed = hidden_states(model, ids, mask)
    torch.testing.assert_close(packed[mask], results[0][mask], rtol=1e-5, atol=1e-5)
    assert not packed[~mask].any()
    # Norms of small numbers magnify what float32 rounds: how far, the padded batch tells.
    for a, b, c in zip(gradients_of(packed, trunk), padded, exact, strict=True):
        assert (a - c).norm() <= 4 * (b - c).norm()
    assert model.config._attn_implementation == "sdpa"


def test_packed_rows_of_float64_keep_its_digits() -> None:
    model = tiny_llama().double().eval()
    ids, mask = padded_rows("left")
    assert packs(model, mask) and not packs(model, torch.ones_like(mask))
    positions = position_ids_from_mask(mask)
    padded = model.model(ids, attention_mask=mask.long(), position_ids=positions)
    found = hidden_states(model, ids, mask)[mask]
    assert found.dtype == torch.float64
    # Norms and rotary positions are float32's in transformers, attention is not.
    mixed = model.model.layers[0].self_attn
    query = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    output, _ = attend_by_rows(mixed, query, query, query, None, row_lengths=[2, 3])
    exact = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :2], query[:, :, :2], query[:, :, :2], is_causal=True
    )
    torch.testing.assert_close(output[:, :2], exact.transpose(1, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, padded.last_hidden_state[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not attends_by_kernel(torch.ones(1)), reason="the C++ kernels are not built")
def test_autocast_s_mixed_types_go_to_the_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 queries and keys, since they are rotated in it, and values of 16 bits."""
    model, ids, mask = tiny_llama().eval(), *padded_rows("left")
    types = []
    kernel = packed.row_attention

    def seen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
        types.append({query.dtype, key.dtype, value.dtype})
        return kernel(query, key, value, *rest)

    monkeypatch.setattr(packed, "row_attention", seen)
    with torch.autocast("cpu", torch.bfloat16):
        found = hidden_states(model, ids, mask)[mask]
        found.sum().backward()
    assert types == [{torch.float32}] * 2
    exact = hidden_states(model, ids, mask)[mask]
    # Products of bfloat16 in two layers, at sizes of 1.
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.1)
    assert all(layer.self_attn.v_proj.weight.grad.any() for layer in model.model.layers)


def test_rows_for_flash_attention_are_told_apart_by_their_positions() -> None:
    """What flash attention is given; PyTorch's understands it too, only slower."""
    model = tiny_llama().eval()
    ids, mask = padded_rows("left")
    positions = position_ids_from_mask(mask)
    output = model.model(ids[mask][None], position_ids=positions[mask][None], use_cache=False)
    packed = output.last_hidden_state[0]
    torch.testing.assert_close(packed, hidden_states(model, ids, mask)[mask], rtol=1e-5, atol=1e-5)


def test_flash_attention_is_given_packed_rows() -> None:
    model = tiny_llama()
    assert not attends_packed(model)
    for name in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
        model.config._attn_implementation_internal = name
        assert attends_packed(model) and packs(model, torch.ones(2, 3))


def test_rows_are_not_packed_where_that_would_be_wrong_or_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask = padded_rows("left")[1]
    assert packs(tiny_llama(), torch.ones_like(mask)) == attends_by_kernel(torch.ones(1))
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "reference")
    assert not packs(tiny_llama(), torch.ones_like(mask))
    eager, checkpointed, compiled = tiny_llama(), tiny_llama(), tiny_llama()
    eager.config._attn_implementation = "eager"
    checkpointed.gradient_checkpointing_enable()
    compiled.model.layers[1].compile()
    sliding = Qwen3ForCausalLM(
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    )
    for model in (eager, checkpointed, compiled, sliding):
        assert not packs(model, mask)


@pytest.mark.parametrize("backend", ["", "reference"])  # by the kernel, by PyTorch
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_of_16_bits_is_in_float32(
    autocast: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of equal and of unequal lengths alike: no further off than by storing in bfloat16."""
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    model, lengths = tiny_llama().bfloat16(), [[6, 6, 6], [6, 1, 3]]
    assert packs(model, torch.ones(2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert packs(tiny_llama(), torch.ones(2, 3))
    for row_lengths in lengths:
        tokens = sum(row_lengths)
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, heads, tokens, 8, generator=generator).bfloat16().requires_grad_()
            for heads in (4, 2, 2)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, _ = attend_by_rows(model, query, key, value, None, row_lengths=row_lengths)
        upstream = torch.randn(output.shape, generator=generator).bfloat16()
        found = output, *torch.autograd.grad(output, (query, key, value), upstream)
        wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
        starts = torch.tensor(row_lengths).cumsum(0)
        row = torch.bucketize(torch.arange(tokens), starts, right=True)
        seen = (row[:, None] == row) & torch.ones(tokens, tokens).tril().bool()
        exact = torch.nn.functional.scaled_dot_product_attention(
            *wide, attn_mask=seen, enable_gqa=True
        ).transpose(1, 2)
        expected = exact, *torch.autograd.grad(exact, wide, upstream.double())
        for a, b in zip(found, expected):
            assert a.dtype == torch.bfloat16 and a.shape == b.shape
            # Rounded once; float32's own rounding is at the size of the largest.
            half = torch.finfo(torch.bfloat16).eps / 2
            bound = b.abs() * half + b.abs().max() * 2.0**-20
            assert ((a.double() - b).abs() <= bound).all()


def test_attention_is_as_before_after_an_error() -> None:
    model = tiny_llama()
    with pytest.raises(KeyError), attending_by_rows(model.model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
