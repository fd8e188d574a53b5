"""verl's log-probabilities, entropies and KL penalties on our kernels."""

from __future__ import annotations

import math

import pytest
import torch
from comparisons import DTYPES, SEEDS, close, eps, normal
from hypothesis import assume, given
from hypothesis import strategies as st
from verl_check import Call, check
from verl_peer import algorithms, functional

from rlhf_kernels.integrations import verl

ESTIMATORS = ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 4),
    vocabulary=st.integers(1, 70),
    flat=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
@pytest.mark.parametrize("name", ["logprobs", "entropy", "entropy in chunks"])
def test_rows(
    name: str,
    rows: int,
    length: int,
    vocabulary: int,
    flat: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    shape = (rows * length,) if flat or name == "entropy in chunks" else (rows, length)
    logits = normal(*shape, vocabulary, seed=seed, dtype=dtype, scale=4.0)
    labels = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    arithmetic = torch.float32 if name == "entropy in chunks" else dtype  # verl's is, always
    tolerance = (16 + math.sqrt(vocabulary)) * eps(arithmetic) * float(1 + logits.abs().max())
    calls: dict[str, tuple[Call, Call]] = {
        "logprobs": (
            lambda x: verl.logprobs_from_logits(x, labels),
            lambda x: functional.logprobs_from_logits(x, labels),
        ),
        "entropy": (verl.entropy_from_logits, functional.entropy_from_logits),
        "entropy in chunks": (
            verl.entropy_from_logits_with_chunking,
            lambda x: functional.entropy_from_logits_with_chunking(x, chunk_size=2),
        ),
    }
    check(*calls[name], [logits], tolerance, tolerance, seed)


def test_what_cannot_be_sampled_adds_nothing_to_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    close(verl.entropy_from_logits(logits), torch.tensor([math.log(2)]), 1e-6)
    assert functional.entropy_from_logits(logits).isnan().all()


def test_logprobs_are_float32_where_flash_attention_gives_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, labels = torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 2])
    monkeypatch.setattr(functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    assert verl.logprobs_from_logits(logits, labels).dtype == torch.float32
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    assert verl.logprobs_from_logits(logits, labels).dtype == torch.bfloat16


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 9)),
    scale=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    dtype=DTYPES,
    seed=SEEDS,
)
@pytest.mark.parametrize("estimator", [*ESTIMATORS, *(f"{name}+" for name in ESTIMATORS)])
def test_kl_penalty(
    estimator: str, shape: tuple[int, int], scale: float, dtype: torch.dtype, seed: int
) -> None:
    new = normal(*shape, seed=seed, dtype=dtype, scale=scale)
    reference = normal(*shape, seed=seed + 1, dtype=dtype, scale=scale)
    assume(not (dtype == torch.float16 and scale > 100))  # a square overflows
    size = float((new.double() - reference.double()).abs().max()) if new.numel() else 0.0
    # k3 is cut off at 10, so no exponential above 31 takes part.
    tolerance = 8 * eps(dtype) * (32 + size + size**2)
    if new.numel() == 0:
        assert verl.kl_penalty(new, reference, estimator).shape == shape
        return
    check(
        lambda new, reference: verl.kl_penalty(new, reference, estimator),
        lambda new, reference: algorithms.kl_penalty(new, reference, estimator),
        [new, reference],
        tolerance,
        tolerance,
        seed,
    )


@pytest.mark.parametrize("estimator", ["full", "k4", ""])
def test_an_unknown_estimator_is_an_error_as_in_verl(estimator: str) -> None:
    for function in (verl.kl_penalty, algorithms.kl_penalty):
        with pytest.raises(NotImplementedError):
            function(torch.zeros(1, 1), torch.zeros(1, 1), estimator)
