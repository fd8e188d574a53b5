"""The last feed-forward network is run where hidden states are read, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf.models import hidden_states
from rlhf.models.last_layer import last_feed_forward_from
from rlhf_kernels.fast_layers import use_fast_layers

FIRST = 4
IDS = torch.arange(3 * 9).reshape(3, 9) % 50 + 3


def mask(padded: bool) -> Tensor:
    """Prompts of 4, 2 and 1 tokens padded left, then responses of 5, 3 and none padded right."""
    found = torch.ones(3, 9, dtype=torch.bool)
    if padded:
        found[1, :2] = found[1, 7:] = found[2, :3] = found[2, 4:] = False
    return found


def agree(found: Tensor, expected: Tensor) -> None:
    """Products of fewer rows: their sums may be of another order, and so round otherwise."""
    largest = float(expected.detach().abs().max())
    bound = 32 * torch.finfo(expected.dtype).eps * largest
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def calls_of_last_feed_forward(model: Any) -> list[int]:
    """How many tokens each call of it is given from now on."""
    seen: list[int] = []
    network = model.get_decoder().layers[-1].mlp
    whole = network.forward

    def forward(x: Tensor) -> Tensor:
        seen.append(x.shape[:-1].numel())
        return whole(x)

    network.forward = forward
    return seen


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prepare", [use_fast_layers, lambda model: None])
def test_states_and_gradients_are_those_of_all_tokens(
    padded: bool, dtype: torch.dtype, prepare: Callable[[Any], None]
) -> None:
    model = tiny_llama().to(dtype)
    prepare(model)
    read = mask(padded)[:, FIRST:, None]
    weight = torch.randn(3, 9 - FIRST, 1, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = []
    for first in (FIRST, 0):
        states = hidden_states(model, IDS, mask(padded), first=first)[:, FIRST - first :] * read
        loss = (states * weight).square().sum()
        found.append([states, *torch.autograd.grad(loss, list(model.model.parameters()))])
    for ours, expected in zip(*found, strict=True):
        agree(ours, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_not_read_is_left_out(padded: bool) -> None:
    model = tiny_llama()
    use_fast_layers(model)
    seen = calls_of_last_feed_forward(model)
    hidden_states(model, IDS, mask(padded), first=FIRST)
    hidden_states(model, IDS, mask(padded))
    assert seen == [mask(padded)[:, FIRST:].sum(), mask(padded).sum()]


def test_rows_without_anything_to_read_are_possible() -> None:
    model = tiny_llama()
    nothing = mask(False)
    nothing[:, FIRST:] = False
    states = hidden_states(model, IDS, nothing, first=FIRST)
    states.sum().backward()
    assert states.isfinite().all()


def checkpointed() -> Any:
    model = tiny_llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [checkpointed, gpt2])
def test_others_run_as_ever(make: Callable[[], Any]) -> None:
    model = make()
    found = hidden_states(model, IDS, mask(False), first=FIRST)
    expected = hidden_states(model, IDS, mask(False))[:, FIRST:]
    assert torch.equal(found, expected)


def test_it_is_put_back_after_an_error() -> None:
    model = tiny_llama()
    network = model.get_decoder().layers[-1].mlp
    with (
        pytest.raises(ZeroDivisionError),
        last_feed_forward_from(model.get_decoder(), mask(False), FIRST),
    ):
        assert "forward" in vars(network)
        1 / 0  # noqa: B018
    assert "forward" not in vars(network)
