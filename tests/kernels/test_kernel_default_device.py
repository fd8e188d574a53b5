"""Results lie on the inputs' device, whatever PyTorch's default device is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_cases import backends_for

import rlhf_kernels as rk

VALUES = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
MASK, TARGETS, SCORES = VALUES > 0.3, torch.ones(2, 9, dtype=torch.long), torch.ones(2)
HIDDEN, WEIGHT = torch.rand(2, 9, 8), torch.rand(11, 8)

CALLS: dict[str, Callable[[str], Any]] = {
    "gae": lambda b: rk.gae(VALUES, VALUES, MASK, backend=b)[0],
    "rollout_advantages": lambda b: (
        rk.rollout_advantages(
            SCORES, VALUES, VALUES, VALUES, MASK, kl_coef=0.1, backend=b
        ).advantages
    ),
    "masked_whiten": lambda b: rk.masked_whiten(VALUES, MASK, backend=b),
    "ppo_loss": lambda b: rk.ppo_loss(VALUES, VALUES, VALUES, MASK, backend=b)[0],
    "token_logprobs": lambda b: rk.token_logprobs(WEIGHT, TARGETS.flatten()[:11], backend=b),
    "linear_token_logprobs": lambda b: rk.linear_token_logprobs(HIDDEN, WEIGHT, TARGETS, backend=b),
    "linear_ppo_loss": lambda b: rk.linear_ppo_loss(
        HIDDEN, WEIGHT, TARGETS, VALUES, VALUES, MASK, backend=b
    )[0],
}


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """New tensors have no memory unless they are told where to be."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device("cpu")


@pytest.mark.parametrize("backend", [b for b in ("reference", "cpu") if b in backends_for()])
@pytest.mark.parametrize("name", list(CALLS))
def test_the_default_device_does_not_matter(elsewhere: None, name: str, backend: str) -> None:
    found = CALLS[name](backend)
    assert found.device.type == "cpu"
    torch.set_default_device("cpu")
    assert torch.equal(found, CALLS[name](backend))
