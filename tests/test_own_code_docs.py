"""docs/own-code.md: every pair of snippets runs and gives the same numbers and gradients.

"Before" runs in float64 on the same numbers as "after", which runs in float32 and in float64.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import rlhf_kernels

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own-code.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.M)
}
HUGGING_FACE = "A Hugging Face causal model"
DTYPES = [torch.float32, torch.float64]

# Section: the names to compare, and what they are differentiated by.
PAIRS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "Log-probabilities from logits": (["logprobs", "entropy"], ["logits"]),
    "Log-probabilities from hidden states": (["logprobs", "entropy"], ["hidden", "weight"]),
    "Linear cross-entropy": (["loss"], ["hidden", "weight"]),
    "KL penalty": (["kl"], ["logprobs", "ref_logprobs"]),
    "Shaped rewards": (["rewards"], ["logprobs", "ref_logprobs", "scores"]),
    "GAE": (["advantages", "returns"], []),
    "Masked mean and whitening": (["mean", "whitened"], []),
    "From a rollout to advantages": (["kl", "rewards", "advantages", "returns"], []),
    "PPO loss": (
        ["loss", "clip_fraction", "approx_kl"],
        ["logprobs", "values", "entropy"],
    ),
    "PPO loss from hidden states": (["loss"], ["hidden", "weight"]),
}

B, T, V, H = 3, 7, 41, 8


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32)


def given() -> dict[str, Any]:
    """The page's names, float32, log-probabilities apart enough for ratios on either side."""
    torch.manual_seed(0)
    mask = torch.arange(T) < torch.tensor([[7], [3], [5]])
    tokens = torch.randint(V, (B, T))
    logprobs = -normal(B, T).exp()
    names = {
        "hidden": normal(B, T, H),
        "weight": normal(V, H) / H**0.5,
        "logits": 2 * normal(B, T, V),
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.3 * normal(B, T),
        "ref_logprobs": logprobs + 0.5 * normal(B, T),
        "entropy": normal(B, T).exp(),
        "scores": normal(B),
    }
    for name in ("values", "old_values", "rewards", "advantages", "returns"):
        names[name] = normal(B, T)
    constants = {"temperature": 0.7, "kl_coef": 0.1, "gamma": 0.97, "lam": 0.9}
    labels = tokens.masked_fill(~mask, -100)
    modules = {"torch": torch, "F": F}
    return {**names, **constants, **modules, "tokens": tokens, "mask": mask, "labels": labels}


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "docs/own-code.md", "exec"), names)
    return names


def cast(names: dict[str, Any], dtype: torch.dtype, leaves: Sequence[str] = ()) -> dict[str, Any]:
    floating = {
        k: v.to(dtype) for k, v in names.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    floating |= {name: floating[name].clone().requires_grad_() for name in leaves}
    return {**names, **floating}


def tolerance(before: dict[str, Any], dtype: torch.dtype) -> float:
    """A sum of n numbers rounds n times, each time at most at the size of the largest in sight.

    The longest sums are those over the vocabulary, and over all tokens; 16 more roundings are
    allowed for exponentials, logarithms and quotients.
    """
    numbers = [v.detach() for v in before.values() if isinstance(v, Tensor) and v.numel()]
    largest = max(float(v.double().abs().nan_to_num(posinf=0).max()) for v in numbers)
    return torch.finfo(dtype).eps * (max(V, B * T) + 16) * (1 + largest)


def weighted_sum(outputs: Sequence[Tensor]) -> Tensor:
    """With weights of its own for each number, so that no two gradients cancel."""
    parts = [
        (each * torch.linspace(0.5, 1.5, each.numel(), dtype=each.dtype).view(each.shape)).sum()
        for each in outputs
    ]
    return torch.stack(parts).sum()


def test_every_section_is_run() -> None:
    assert set(SECTIONS) == {*PAIRS, HUGGING_FACE}
    assert all(len(SECTIONS[title]) == 2 for title in PAIRS)


def test_every_function_has_its_pair() -> None:
    imported = " ".join(re.findall(r"from rlhf_kernels import (.*)", PAGE))
    functions = {name for name in rlhf_kernels.__all__ if name[0].islower()}
    assert functions == {name for name in re.findall(r"\w+", imported) if name[0].islower()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("title", PAIRS)
def test_before_and_after(title: str, dtype: torch.dtype) -> None:
    outputs, leaves = PAIRS[title]
    before, after = SECTIONS[title]
    inputs = given()
    torch.set_default_dtype(torch.float64)  # what quotients of counts have
    try:
        exact = run(before, cast(inputs, torch.float64, leaves))
    finally:
        torch.set_default_dtype(torch.float32)
    found = run(after, cast(inputs, dtype, leaves))
    atol = tolerance(exact, dtype)
    for name in outputs:
        assert found[name].dtype == dtype, name
        torch.testing.assert_close(found[name].double(), exact[name].double(), rtol=0, atol=atol)
    if leaves:
        differentiable = [name for name in outputs if found[name].requires_grad]
        of_found, of_exact = (
            torch.autograd.grad(
                weighted_sum([names[name] for name in differentiable]),
                [names[name] for name in leaves],
            )
            for names in (found, exact)
        )
        for ours, plain in zip(of_found, of_exact):
            torch.testing.assert_close(ours.double(), plain, rtol=0, atol=atol)


def tiny_model(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).float().to(dtype)


def sequences(dtype: torch.dtype) -> dict[str, Any]:
    """Padded on the left; prompts of 2 tokens, responses that end at different places."""
    torch.manual_seed(2)
    input_ids = torch.randint(V, (5, T + 1))
    attention_mask = torch.arange(T + 1) >= torch.tensor([[0], [1], [2], [0], [1]])
    mask = (torch.arange(T) >= 3) & (torch.arange(T) < torch.tensor([[7], [5], [6], [4], [7]]))
    advantages, old_logprobs = normal(5, T), -3 + normal(5, T)
    return {
        **{"torch": torch, "F": F, "temperature": 0.7, "mask": mask, "input_ids": input_ids},
        "attention_mask": attention_mask.long(),
        "advantages": advantages.to(dtype),
        "old_logprobs": old_logprobs.to(dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_hugging_face_recipe(dtype: torch.dtype) -> None:
    before, after, rollout = SECTIONS[HUGGING_FACE]
    plain = run(before, {"model": tiny_model(torch.float64), **sequences(torch.float64)})
    ours = run(after, {"model": tiny_model(dtype), **sequences(dtype)})
    # Twice through a layer of products: its roundings too, at the size of its largest number.
    atol = 4 * tolerance(plain, dtype)
    torch.testing.assert_close(ours["loss"].double(), plain["loss"].detach(), rtol=0, atol=atol)
    gradients = dict(plain["model"].named_parameters())
    for name, parameter in ours["model"].named_parameters():
        expected = gradients[name].grad
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=0, atol=atol, msg=name)
    ours = run(rollout, ours)
    expected = plain["logprobs"].detach() * plain["mask"]
    torch.testing.assert_close(ours["rollout_logprobs"].double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("family", "option"), [("Granite", "logits_scaling"), ("Cohere", "logit_scale")]
)
def test_a_factor_on_the_logits_belongs_to_the_temperature(family: str, option: str) -> None:
    """By the page's expression for a model of that family."""
    (expression,) = re.findall(rf"`([^`]*config\.{option})`", PAGE)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=V, **sizes, **heads, **special, **{option: 0.4}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).double()
    tokens = torch.randint(V, (B, T))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        expected = (logits / 0.7).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        found = rlhf_kernels.linear_token_logprobs(
            model.base_model(input_ids=tokens).last_hidden_state,
            model.lm_head.weight,
            tokens,
            temperature=eval(expression, {"temperature": 0.7, "config": config}),
        )
    atol = 4 * tolerance({"logits": logits}, torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
