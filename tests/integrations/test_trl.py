"""TRL 1.12's functions on our kernels, values and gradients.

What is expected is TRL's own where TRL 1.12 is installed, else its definition, each in float64.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_kernels.integrations import trl

ROOT = Path(__file__).resolve().parents[2]
SEEDS = st.integers(0, 50)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator)).to(dtype)


def close(found: Tensor, expected: Tensor, roundings: float) -> None:
    """Arithmetic is float32's or wider, and rounded once to the result's dtype."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected.double(), rtol=eps, atol=roundings * eps)


@st.composite
def masks(draw: st.DrawFn, valid: int) -> Tensor:
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor(draw(st.lists(flags, min_size=rows, max_size=rows)))
    assume(int(mask.sum()) >= valid)
    return mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))


@given(SEEDS, DTYPES, st.sampled_from([(), (1,), (3,)]))
def test_selected_log_probabilities(seed: int, dtype: torch.dtype, chosen: tuple[int, ...]) -> None:
    logits = normal(2, 5, 7, seed=seed, dtype=dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    index = torch.randint(7, (2, 5, *chosen), generator=torch.Generator().manual_seed(seed))
    found = trl.selective_log_softmax(logits, index)
    several = index if chosen else index[..., None]
    expected = exact.log_softmax(-1).gather(-1, several).view(index.shape)
    assert found.dtype == dtype and found.shape == index.shape
    close(found, expected, 16)
    upstream = normal(*index.shape, seed=seed + 1, dtype=dtype)
    (gradient,) = torch.autograd.grad(found, logits, upstream)
    (of_exact,) = torch.autograd.grad(expected, exact, upstream.double())
    close(gradient, of_exact, 32)


@given(SEEDS, DTYPES)
def test_entropies(seed: int, dtype: torch.dtype) -> None:
    logits = normal(2, 5, 7, seed=seed, dtype=dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    found = trl.entropy_from_logits(logits, chunk_size=3)
    expected = -(exact.softmax(-1) * exact.log_softmax(-1)).sum(-1)
    assert found.dtype == dtype
    close(found, expected, 16)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    (of_exact,) = torch.autograd.grad(expected.sum(), exact)
    close(gradient, of_exact, 32)


@given(masks(valid=1), SEEDS, st.sampled_from([None, 0, 1]))
def test_means(mask: Tensor, seed: int, axis: int | None) -> None:
    values = normal(*mask.shape, seed=seed)
    weights = mask.double()
    sums = (values * weights).sum() if axis is None else (values * weights).sum(axis)
    expected = sums / (weights.sum() if axis is None else weights.sum(axis))
    found = trl.masked_mean(values, mask, axis)
    assert torch.equal(found.isnan(), expected.isnan())
    close(found.nan_to_num(), expected.nan_to_num(), 16)


@given(masks(valid=2), SEEDS, st.booleans(), st.booleans())
def test_variances_and_whitening(mask: Tensor, seed: int, flag: bool, grad: bool) -> None:
    values = normal(*mask.shape, seed=seed).requires_grad_(grad)
    exact = values.detach().double().requires_grad_(grad)
    picked = exact[mask.bool()]
    assume(float(picked.detach().std()) > 0.1)
    close(trl.masked_var(values, mask, flag), picked.var(correction=int(flag)), 64)
    found = trl.masked_whiten(values, mask, flag)
    expected = (exact - picked.mean()) / (picked.var() + 1e-8).sqrt()
    expected = expected if flag else expected + picked.mean()
    close(found, expected, 2000)  # the deviation may be a 60th of the numbers
    if grad:
        upstream = normal(*mask.shape, seed=seed + 1)
        (gradient,) = torch.autograd.grad(found, values, upstream)
        (of_exact,) = torch.autograd.grad(expected, exact, upstream.double())
        assert (gradient - of_exact).abs().max() <= 1e-3 * (1 + of_exact.abs().max())


def test_one_valid_place_has_no_variance_and_none_raises() -> None:
    values = normal(2, 3, seed=0)
    one = torch.zeros(2, 3, dtype=torch.bool)
    one[1, 1] = True
    assert trl.masked_var(values, one).isnan() and trl.masked_whiten(values, one).isnan().all()
    with pytest.raises(ValueError, match="no place of the mask is valid"):
        trl.masked_whiten(values, torch.zeros_like(one))


def test_labels_outside_of_the_vocabulary_raise_as_in_trl() -> None:
    logits = normal(2, 3, 5, seed=0)
    for label in (-100, -1, 5):
        with pytest.raises((ValueError, IndexError)):
            trl.selective_log_softmax(logits, torch.full((2, 3), label))


@pytest.mark.parametrize("name", ["selective_log_softmax", "entropy_from_logits"])
def test_trl_s_own(name: str) -> None:
    """These two are in later versions as well."""
    theirs: Any = getattr(pytest.importorskip("trl.trainer.utils"), name)
    logits = normal(2, 5, 7, seed=0)
    index = [torch.arange(10).view(2, 5) % 7] if name.startswith("selective") else []
    close(getattr(trl, name)(logits, *index), theirs(logits, *index), 16)


PATCH_AND_BACK = """
import sys
from rlhf_kernels.integrations import trl
assert "trl" not in sys.modules and "transformers" not in sys.modules
with trl.patched() as places:
    from trl.experimental.ppo import ppo_trainer
    assert ppo_trainer.forward is trl.forward
    assert ppo_trainer.selective_log_softmax is trl.selective_log_softmax
    assert ppo_trainer.PPOTrainer.train.__globals__["batch_generation"] is trl.batch_generation
assert len(places) == 10, places
for name in ("forward", "batch_generation", "masked_whiten", "selective_log_softmax"):
    assert getattr(ppo_trainer, name).__module__.startswith("trl."), name
"""


def test_patching_trl_1_12_and_back() -> None:
    """The patch itself compares every function with TRL's, PPOTrainer's forward too."""
    python = ROOT / ".benchmarks" / "ppo_trainer" / "trl-1.12.0" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with TRL 1.12.0; benchmarks.integrations.trl makes one")
    ended = subprocess.run(
        [str(python), "-c", PATCH_AND_BACK], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_nothing_of_trl_is_imported() -> None:
    program = "import sys; from rlhf_kernels.integrations import trl; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"trl", "transformers", "accelerate"} & set(ended.stdout.split())
