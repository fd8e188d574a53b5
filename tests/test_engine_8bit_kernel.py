"""The step of the 8-bit AdamW: the C++ kernel gives the bits of PyTorch's operations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.engine import adamw_8bit
from rlhf.engine.adamw_8bit import CPU_SLICE, AdamW8bit
from rlhf_kernels.backends import ENVIRONMENT_VARIABLE, cpu

if cpu.availability() is not None:
    pytest.skip("the cpu backend is not built", allow_module_level=True)

from rlhf_kernels import _cpu

DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(params=_cpu.isas())
def instruction_set(request: pytest.FixtureRequest) -> Any:
    usual = _cpu.isa()
    _cpu.use_isa(request.param)
    yield
    _cpu.use_isa(usual)


def after_steps(gradients: list[Tensor], compiled: bool, weight_decay: float = 0.1) -> list[Tensor]:
    """The weights and all of the state after a step with each of the gradients."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(gradients[0].shape, generator=generator)
    parameter = nn.Parameter(start.to(gradients[0].dtype))
    optimizer = AdamW8bit([parameter], lr=0.01, weight_decay=weight_decay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, "cpu" if compiled else "reference")
        assert adamw_8bit.has_kernel(parameter) == compiled
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
            assert parameter.grad.equal(gradient) or gradient.isnan().any()
    return [parameter.detach(), *optimizer.state[parameter].values()]


def gradients_of(shape: tuple[int, ...], dtype: torch.dtype, lowest: float) -> list[Tensor]:
    """For four steps; sizes from 10 to the power of ``lowest`` to 1, and some zeros."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(4):
        sizes = 10 ** (lowest * torch.rand(shape, generator=generator, dtype=torch.float64))
        gradient = sizes * torch.randn(shape, generator=generator, dtype=torch.float64)
        gradient[torch.rand(shape, generator=generator) < 0.05] = 0.0
        result.append(gradient.to(dtype))
    return result


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (255,), (256,), (257,), (30, 50), (2, CPU_SLICE // 2 + 200)]
)
@pytest.mark.usefixtures("instruction_set")
def test_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gradients = gradients_of(shape, dtype, -6.0)
    found = after_steps(gradients, compiled=True)
    assert_same_bits(found, after_steps(gradients, compiled=False))
    if dtype == torch.bfloat16 and len(shape) == 2:  # that rounding is left to chance
        assert len(found[-1].unique()) > 100


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("factor", "lowest"), [(1e18, -36.0), (1e-15, -25.0), (1e-30, -15.0)])
@pytest.mark.usefixtures("instruction_set")
def test_same_bits_from_the_largest_to_the_smallest_gradients(
    factor: float, lowest: float, dtype: torch.dtype, weight_decay: float
) -> None:
    gradients = [factor * g for g in gradients_of((4000,), dtype, lowest)]
    found = after_steps(gradients, True, weight_decay)
    assert_same_bits(found, after_steps(gradients, False, weight_decay))
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.usefixtures("instruction_set")
def test_what_is_not_finite_is_never_hidden(bad: float, dtype: torch.dtype) -> None:
    """In the second of 3 blocks; a NaN's bits are not told, nor codes that one scales."""
    gradients = gradients_of((700,), dtype, -3.0)
    gradients[1][300] = bad
    found, expected = after_steps(gradients, True), after_steps(gradients, False)
    weights, steps, means, mean_scale, squares, square_scale, *_ = found
    for ours, theirs in zip(found, expected, strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    for codes, scales, place in ((means, mean_scale, 2), (squares, square_scale, 4)):
        known = ~scales.isnan().repeat_interleave(256)[:700]
        assert torch.equal(codes[known], expected[place][known])
    assert steps == 4
    outside = torch.ones(700, dtype=torch.bool)
    outside[256:512] = False
    assert weights[outside].isfinite().all()
    assert not square_scale[1].isfinite() and square_scale[[0, 2]].isfinite().all()
    assert weights[300].isnan() or bad == 1e30  # of which the square alone is too large


def test_the_kernel_runs_where_it_can_and_nothing_else_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    assert adamw_8bit.has_kernel(parameter)
    assert not adamw_8bit.has_kernel(nn.Parameter(torch.zeros(3, device="meta")))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert not adamw_8bit.has_kernel(parameter)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    monkeypatch.setattr(cpu, "availability", lambda: "not built")
    assert not adamw_8bit.has_kernel(parameter)


def test_a_state_that_does_not_fit_is_refused() -> None:
    """The kernel is given addresses alone."""
    parameter = nn.Parameter(torch.zeros(300))
    parameter.grad = torch.ones(300)
    for name, wrong in {
        "exp_avg": torch.zeros(299, dtype=torch.int8),
        "exp_avg_sq": torch.zeros(300, dtype=torch.int8),
        "exp_avg_scale": torch.zeros(1),
        "exp_avg_sq_scale": torch.zeros(2, dtype=torch.float64),
        "remainder": torch.zeros(300, dtype=torch.int8),
    }.items():
        optimizer = AdamW8bit([parameter], lr=1.0)
        optimizer.state[parameter][name] = wrong
        with pytest.raises(ValueError, match="are needed, not"):
            optimizer.step()


def test_roots_are_rounded_to_nearest() -> None:
    values = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0))
    exact = values.double().sqrt().float()
    assert torch.equal(adamw_8bit.root_(values), exact)


@pytest.mark.parametrize("size", [1, 256, 1 << 18, (1 << 18) + 1, (1 << 22) + 257])
def test_slices_are_all_of_the_numbers_and_blocks(size: int) -> None:
    place = block = 0
    for first in range(0, size, adamw_8bit.TASK):
        for numbers, blocks in adamw_8bit.slices(first, size, torch.device("cpu")):
            assert (numbers.start, blocks.start) == (place, block)
            place, block = numbers.stop, blocks.stop
            assert place > numbers.start and math.ceil(place / 256) == block
    assert place == size
