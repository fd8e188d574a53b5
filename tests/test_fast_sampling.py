"""Decoder layers as one function while sampling: the same numbers, and only where they belong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SIZES, tiny_llama
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StaticCache,
)
from transformers.models.llama import modeling_llama

from rlhf_kernels import backends
from rlhf_kernels.fast_layers import use_fast_layers
from rlhf_kernels.fast_sampling import fast_sampling

pytestmark = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None
    or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="the C++ kernels are not built, or this PyTorch has no oneDNN",
)
FUSED = {
    "llama": tiny_llama,
    "llama with biases": lambda: tiny_llama(attention_bias=True),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}
OTHERS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),  # norms of queries and keys
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),  # another RMS norm
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, residual_multiplier=0.5)),
    "biases in the feed-forward layer": lambda: tiny_llama(mlp_bias=True),
}
PROMPT_MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on machines where PyTorch's own products would be taken."""
    monkeypatch.setattr("rlhf_kernels.linear_layers.onednn_is_faster", lambda: True)


def drawn(model: Any) -> Any:
    """With biases and norms that are not those of the start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def fused(model: nn.Module) -> list[bool]:
    layers = model.get_decoder().layers  # type: ignore[operator]
    return ["forward" in vars(layer) for layer in layers]


def logits_of_each_step(model: Any) -> Tensor:
    """[steps, B, V] of a padded prompt and three tokens after it."""
    cache, found = None, []
    ids, mask = torch.arange(1, 13).view(2, 6), PROMPT_MASK
    for step in range(4):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        found.append(output.logits[:, -1])
        ids = torch.full((2, 1), 20 + step)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("prepared", [use_fast_layers, lambda model: None])
@pytest.mark.parametrize("name", FUSED)
def test_the_same_logits(name: str, prepared: Callable[[nn.Module], None]) -> None:
    model = drawn(FUSED[name]())
    plain = logits_of_each_step(model)
    prepared(model)
    with fast_sampling(model, rows=2):
        assert all(fused(model))
        found = logits_of_each_step(model)
    assert not any(fused(model))
    exact = logits_of_each_step(model.double())
    # As far from float64 as PyTorch's, but for sums in other orders.
    eps = torch.finfo(torch.float32).eps
    allowed = 2 * (plain - exact).abs().max() + 8 * eps * exact.abs().max()
    assert float((found - exact).abs().max()) <= float(allowed)


@torch.no_grad()
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products here"
)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_no_farther_from_float64_than_pytorchs(autocast: bool) -> None:
    model = drawn(tiny_llama()).bfloat16()
    within = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with within:
        plain = logits_of_each_step(model).double()
        with fast_sampling(model, rows=2):
            assert all(fused(model))
            found = logits_of_each_step(model).double()
    exact = logits_of_each_step(model.double())
    allowed = (plain - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert float((found - exact).abs().max()) <= float(allowed)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_compute_something_else_are_as_before(name: str) -> None:
    model = drawn(OTHERS[name]())
    plain = logits_of_each_step(model)
    with fast_sampling(model, rows=2):
        assert not any(fused(model))
        torch.testing.assert_close(logits_of_each_step(model), plain)


def test_layers_of_others_are_as_before() -> None:
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).base_model.model
    watched, replaced = tiny_llama(), tiny_llama()
    watched.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    replaced.model.layers[0].self_attn.forward = replaced.model.layers[0].self_attn.forward
    with fast_sampling(adapted, rows=2), fast_sampling(watched, 2), fast_sampling(replaced, 2):
        assert fused(adapted) == [False, False]
        assert fused(watched) == fused(replaced) == [False, True]
    in_float64, compiled = tiny_llama().double(), tiny_llama()
    compiled.model.layers[0].compile()
    with fast_sampling(in_float64, rows=2), fast_sampling(compiled, rows=2):
        assert fused(in_float64) == fused(compiled) == [False, False]


def test_calls_that_are_none_of_sampling_have_the_same_bits() -> None:
    """With gradients, without a cache, with one of another kind, under autocast, in training."""
    model = drawn(tiny_llama())
    ids = torch.arange(1, 13).view(2, 6)

    def results() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ids, use_cache=True).logits.square().sum().backward()
        found = [parameter.grad.clone() for parameter in model.model.layers.parameters()]
        with torch.no_grad():
            found.append(model.model(input_ids=ids, use_cache=False).last_hidden_state)
            static = StaticCache(config=model.config, max_cache_len=8)
            found.append(model.model(input_ids=ids, past_key_values=static).last_hidden_state)
            with torch.autocast("cpu", torch.bfloat16):
                found.append(model.model(input_ids=ids, use_cache=True).last_hidden_state)
            model.train()
            found.append(model.model(input_ids=ids, use_cache=True).last_hidden_state)
            model.eval()
        return found

    plain = results()
    with fast_sampling(model, rows=2):
        assert all(fused(model))
        assert all(map(torch.equal, results(), plain))


@torch.no_grad()
def test_weights_are_those_of_now_and_gone_afterwards() -> None:
    model = drawn(tiny_llama())
    with fast_sampling(model, rows=2):
        before = logits_of_each_step(model)
    for parameter in model.parameters():
        parameter.mul_(1.5)
    with fast_sampling(model, rows=2):
        assert not torch.allclose(logits_of_each_step(model), before)
    with pytest.raises(KeyError), fast_sampling(model, rows=2):
        raise KeyError
    assert not any(fused(model))


@torch.no_grad()
def test_generate_gives_the_same_tokens() -> None:
    model: LlamaForCausalLM = drawn(tiny_llama())
    ids = torch.arange(4, 16).view(2, 6)
    options = {"attention_mask": PROMPT_MASK, "max_new_tokens": 20, "do_sample": False}
    plain = model.generate(ids, **options)
    with fast_sampling(model, rows=2):
        assert torch.equal(model.generate(ids, **options), plain)
        cache = DynamicCache(config=model.config)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), plain)


def test_the_global_generator_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the first look at a kind of layer either."""
    monkeypatch.setattr("rlhf_kernels.fast_sampling._agrees", {})
    model, before = tiny_llama(), torch.random.get_rng_state()
    with fast_sampling(model, rows=2):
        assert all(fused(model))
    assert torch.equal(torch.random.get_rng_state(), before)


@torch.no_grad()
def test_layers_of_one_model_that_differ_are_told_apart() -> None:
    """Every second one does not rotate."""
    config = SmolLM3Config(**SIZES, no_rope_layers=[1, 0])
    model = drawn(SmolLM3ForCausalLM(config))
    plain = logits_of_each_step(model)
    for _ in range(2):
        with fast_sampling(model, rows=2):
            assert fused(model) == [True, False]
            torch.testing.assert_close(logits_of_each_step(model), plain, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["granite", "llama"])
def test_what_surrounds_the_first_look_does_not_matter(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast, other default types and devices."""
    model = drawn({**OTHERS, **FUSED}[name]())
    default = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for within in (torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
                for module in ("fast_sampling", "fast_layers"):
                    monkeypatch.setattr(f"rlhf_kernels.{module}._agrees", {})
                torch.set_default_dtype(dtype)
                with within, fast_sampling(model, rows=2):
                    assert all(fused(model)) == any(fused(model)) == (name == "llama")
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def test_hidden_states_may_have_been_asked_for_before() -> None:
    """transformers leaves its hooks on every layer then."""
    model = drawn(tiny_llama())
    ids = torch.arange(1, 13).view(2, 6)
    plain = model(ids, output_hidden_states=True).hidden_states
    with fast_sampling(model, rows=2):
        assert all(fused(model))
        found = model(ids, output_hidden_states=True, use_cache=True).hidden_states
    torch.testing.assert_close(found, plain)


@torch.no_grad()
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (modeling_llama.LlamaAttention, "forward"),
        (modeling_llama.LlamaMLP, "forward"),
        (modeling_llama.LlamaRMSNorm, "forward"),
        (modeling_llama.LlamaDecoderLayer, "forward"),
        (modeling_llama.LlamaMLP, "__call__"),
        (modeling_llama, "apply_rotary_pos_emb"),
    ],
)
def test_what_someone_else_has_replaced_runs(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a layer was fused before."""
    model = drawn(tiny_llama())
    with fast_sampling(model, rows=2):
        assert all(fused(model))
    theirs = getattr(owner, name)

    def halved(*args: Any, **kwargs: Any) -> Any:
        found = theirs(*args, **kwargs)
        return (
            tuple(each if each is None else each / 2 for each in found)
            if isinstance(found, tuple)
            else found / 2
        )

    monkeypatch.setattr(owner, name, halved, raising=False)
    plain = logits_of_each_step(model)
    with fast_sampling(model, rows=2):
        assert not any(fused(model))
        torch.testing.assert_close(logits_of_each_step(model), plain)


@torch.no_grad()
def test_hooks_on_all_modules_run() -> None:
    model, seen = drawn(tiny_llama()), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module))
    )
    try:
        with fast_sampling(model, rows=2):
            assert not any(fused(model))
            logits_of_each_step(model)
    finally:
        handle.remove()
    assert modeling_llama.LlamaMLP in seen


@torch.no_grad()
def test_an_attention_in_training_drops_what_it_should() -> None:
    model = drawn(tiny_llama(attention_dropout=0.5))
    for layer in model.model.layers:
        layer.self_attn.train()
    torch.manual_seed(1)
    plain = logits_of_each_step(model)
    torch.manual_seed(1)
    with fast_sampling(model, rows=2):
        assert all(fused(model))
        torch.testing.assert_close(logits_of_each_step(model), plain)


def test_an_attention_without_a_config_is_left_alone() -> None:
    model = tiny_llama()
    del model.model.layers[0].self_attn.config
    with fast_sampling(model, rows=2):
        assert fused(model) == [False, True]


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(TypeError, match="model is 'SmolLM2'"), fast_sampling("SmolLM2", rows=2):  # type: ignore[arg-type]
        pass
