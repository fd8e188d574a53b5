"""The norm of all gradients, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.engine.gradient_norm import gradient_norm
from rlhf_kernels.backends import ENVIRONMENT_VARIABLE, cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_cpu_kernels = pytest.mark.skipif(cpu.availability() is not None, reason="no C++ kernels")


@pytest.fixture(params=["kernel", "pytorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pytorch":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    elif cpu.availability() is not None:
        pytest.skip("no C++ kernels")
    return str(request.param)


@pytest.fixture
def every_isa() -> Iterator[list[str]]:
    """The names of all instruction sets; the one in use comes back."""
    extension = cpu._cpu
    before = extension.isa()
    yield list(extension.isas())
    extension.use_isa(before)


def drawn(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def in_float64(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_that_of_float64(way: str, dtype: torch.dtype) -> None:
    gradients = drawn([(300, 70), (), (1,), (0, 3), (17,), (2, 3, 65)], dtype)
    norm = gradient_norm(gradients)
    assert norm.shape == ()
    # PyTorch adds up float32 squares in float32, in lanes: 21,000 of them, a rounding each.
    eps = torch.finfo(torch.float32).eps
    assert norm.item() == pytest.approx(in_float64(gradients), rel=64 * eps)


@needs_cpu_kernels
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2]),
)
def test_any_sizes(sizes: list[int], dtype: torch.dtype, threads: int) -> None:
    gradients = drawn([(size,) for size in sizes], dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        norm = gradient_norm(gradients)
    finally:
        torch.set_num_threads(before)
    # Sums of at most 32 float32 squares, each rounded, and the norm itself.
    assert norm.item() == pytest.approx(in_float64(gradients), rel=2**-23 * 17, abs=0)


@needs_cpu_kernels
def test_the_sum_of_many_is_exact_on_every_instruction_set(every_isa: list[str]) -> None:
    """Several pieces of several blocks, ends that fill no vector, whatever the threads."""
    before = torch.get_num_threads()
    for dtype in DTYPES:
        x = drawn([(3 * 65536 + 2048 + 21,)], dtype)[0]
        exact = float(x.double().square().sum())
        for isa in every_isa:
            cpu._cpu.use_isa(isa)
            sums = set()
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                sums.add(cpu.square_sum(x))
            torch.set_num_threads(before)
            assert len(sums) == 1
            # Blocks of 2048 in at least 16 sums: 130 roundings at most, at worst all of one sign.
            assert sums.pop() == pytest.approx(exact, rel=130 * 2**-24)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_shows(way: str, bad: float, dtype: torch.dtype) -> None:
    for place in (0, 2047, 70_000):
        gradients = drawn([(70_001,), (3,)], dtype)
        gradients[0][place] = bad
        assert not math.isfinite(gradient_norm(gradients).item())


def test_gaps_and_none_at_all() -> None:
    with_gaps = drawn([(40, 30)], torch.bfloat16)[0][::2, ::3]
    expected = in_float64([with_gaps])
    assert gradient_norm([with_gaps]).item() == pytest.approx(expected, rel=1e-6)
    assert gradient_norm([]).item() == 0.0


def test_many_squares_keep_their_digits() -> None:
    """16 million of the same: float32 alone would stop counting at 2^24 of a lane's sum."""
    if cpu.availability() is not None:
        pytest.skip("no C++ kernels")
    gradient = torch.full((16_000_000,), 0.1)
    assert gradient_norm([gradient]).item() == pytest.approx(400.0, rel=2**-23)
