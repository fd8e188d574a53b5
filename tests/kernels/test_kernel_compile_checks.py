"""Inside compiled code, on a CPU, what tensors hold is checked when the code runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from rlhf_kernels import gae, linear_ppo_loss, ppo_loss, rollout_advantages, shaped_rewards

ONES, VALID = torch.ones(64), torch.ones(64, dtype=torch.bool)
TARGETS = torch.ones(64, dtype=torch.long)
HIDDEN, WEIGHT, SCORES = torch.ones(64, 8), torch.ones(11, 8), torch.ones(2)

PACKED: dict[str, Callable[[torch.Tensor], Any]] = {
    "gae": lambda cu: gae(ONES, ONES, VALID, cu_seqlens=cu)[0],
    "rollout_advantages": lambda cu: (
        rollout_advantages(SCORES, ONES, ONES, ONES, VALID, kl_coef=0.1, cu_seqlens=cu).advantages
    ),
    "shaped_rewards": lambda cu: shaped_rewards(SCORES, ONES, VALID, kl_coef=0.1, cu_seqlens=cu),
    "ppo_loss": lambda cu: ppo_loss(ONES, ONES, ONES, VALID, cu_seqlens=cu)[0],
    "linear_ppo_loss": lambda cu: linear_ppo_loss(
        HIDDEN, WEIGHT, TARGETS, ONES, ONES, VALID, cu_seqlens=cu
    )[0],
}


@pytest.mark.parametrize("name", list(PACKED))
def test_sequences_that_do_not_fit_are_refused_in_compiled_code(name: str) -> None:
    """A kernel would read and write beyond its tensors."""
    compiled = torch.compile(PACKED[name], fullgraph=True, backend="aot_eager")
    right = torch.tensor([0, 30, 64])
    torch.testing.assert_close(compiled(right), PACKED[name](right))
    for wrong in ([0, 30, 50], [0, 30, 4_000_000]):
        with pytest.raises(ValueError, match=f"cu_seqlens goes from 0 to {wrong[-1]}; expected 0"):
            compiled(torch.tensor(wrong))
    with pytest.raises(ValueError, match="expected sequences one behind the other"):
        compiled(torch.tensor([0, 65, 64]))


def test_rates_outside_the_unit_interval_are_refused_in_compiled_code() -> None:
    rows = ONES.view(2, 32), ONES.view(2, 32), VALID.view(2, 32)
    compiled = torch.compile(
        lambda gamma: gae(*rows, gamma=gamma)[0], fullgraph=True, backend="aot_eager"
    )
    right = torch.tensor([0.5, 1.0])
    torch.testing.assert_close(compiled(right), gae(*rows, gamma=right)[0])
    with pytest.raises(ValueError, match=r"gamma holds 7\.0 at row 1"):
        compiled(torch.tensor([0.5, 7.0]))


ROWS = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
ROWS_VALID = torch.ones(2, 5, dtype=torch.bool)


def test_tracers_record_the_checks() -> None:
    def packed(values: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return gae(values, values, VALID, cu_seqlens=cu)[0]

    right = torch.tensor([0, 30, 64])
    traced = make_fx(packed)(ONES, right)
    assert torch.equal(traced(ONES, right), packed(ONES, right))
    with pytest.raises(ValueError, match="goes from 0 to 65"):
        traced(ONES, torch.tensor([0, 30, 65]))
    with FakeTensorMode() as mode:
        values, cu = mode.from_tensor(ONES), mode.from_tensor(right)
        assert gae(values, values, mode.from_tensor(VALID), cu_seqlens=cu)[0].shape == ONES.shape


def test_vmap_over_rates_of_each_sequence() -> None:
    def with_rates(gamma: torch.Tensor) -> torch.Tensor:
        return gae(ROWS, ROWS, ROWS_VALID, gamma=gamma)[0]

    rates = torch.tensor([[0.1, 0.9], [1.0, 0.0]])
    expected = torch.stack([with_rates(pair) for pair in rates])
    assert torch.equal(torch.vmap(with_rates)(rates), expected)
