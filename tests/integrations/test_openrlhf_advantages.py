"""OpenRLHF's GAE on our kernels, against its peers, and as its trainer calls it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from comparisons import DTYPES, SEEDS, close, eps, masks, normal
from hypothesis import given
from hypothesis import strategies as st
from openrlhf_definitions import DEFINITIONS
from torch import Tensor

from rlhf_kernels.integrations import openrlhf


@given(
    mask=masks(longest=7),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    lambd=st.sampled_from([1.0, 0.95, 0.0]),
    masked=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_gae(
    peer: SimpleNamespace,
    mask: Tensor,
    gamma: float,
    lambd: float,
    masked: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    values = normal(*mask.shape, seed=seed, dtype=dtype)
    rewards = normal(*mask.shape, seed=seed + 1, dtype=dtype)
    rates = (mask if masked else None, gamma, lambd)
    found = openrlhf.get_advantages_and_returns(None, values, rewards, *rates)
    call = peer.get_advantages_and_returns
    expected = call(None, values.double(), rewards.double(), *rates)
    if peer is not DEFINITIONS:
        same_type = call(None, values, rewards, *rates)
        assert [each.dtype for each in found] == [each.dtype for each in same_type]
    # Each step rounds four times, at the size of what has been summed at most.
    summed = float((rewards.double().abs() + 2 * values.double().abs()).sum(1).max())
    for one, other in zip(found, expected):
        assert not one.requires_grad
        close(one, other, 4 * mask.shape[1] * eps(dtype) * summed)


def test_gae_ignores_what_stands_at_masked_places() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    values, rewards = (normal(3, 4, seed=seed, dtype=torch.float32) for seed in range(2))
    expected = openrlhf.get_advantages_and_returns(None, values, rewards, mask, 0.9, 0.8)
    values[mask == 0] = rewards[mask == 0] = math.nan
    found = openrlhf.get_advantages_and_returns(None, values, rewards, mask, 0.9, 0.8)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


def test_its_experience_maker_gives_the_same_advantages(real_openrlhf: SimpleNamespace) -> None:
    maker = object.__new__(real_openrlhf.experience_maker.RemoteExperienceMaker)
    maker.advantage_estimator = "gae"
    maker.kl_ctl = SimpleNamespace(value=0.1)
    maker.strategy = SimpleNamespace(args=arguments())
    maker.args = maker.strategy.args

    def advantages() -> list[Tensor]:
        found = maker.compute_advantages_and_returns(experiences())
        return [each for one in found for each in (one.advantages, one.returns)]

    expected = advantages()
    with openrlhf.patched():
        found = advantages()
    for one, other in zip(found, expected, strict=True):
        close(one, other, 64 * eps(torch.float32) * float(1 + other.abs().max()))


def arguments() -> Any:
    advantage = SimpleNamespace(estimator="gae", gamma=0.99, lambd=0.95, no_std_norm=False)
    return SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(
            clip_range=(-10, 10),
            overlong_buffer_len=None,
            overlong_penalty_factor=1.0,
            stop_properly_penalty_coef=None,
        ),
        rollout=SimpleNamespace(n_samples_per_prompt=1),
    )


def experiences() -> list[Any]:
    """Two batches of other widths, one with holes."""
    masks = [[[1, 1, 1, 0], [1, 0, 1, 1]], [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]]
    found = []
    for number, rows in enumerate(masks):
        mask = torch.tensor(rows, dtype=torch.bool)
        values, kl = (
            normal(*mask.shape, seed=2 * number + i, dtype=torch.float32) for i in range(2)
        )
        found.append(
            SimpleNamespace(
                index=[2 * number, 2 * number + 1],
                rewards=torch.tensor([0.5, -1.0]),
                values=values,
                kl=kl,
                action_mask=mask,
                info={},
            )
        )
    return found
