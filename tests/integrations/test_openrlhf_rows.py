"""OpenRLHF's log-probabilities, entropies and KL estimates on our kernels, against its peers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparisons import DTYPES, SEEDS, eps, normal
from hypothesis import assume, given
from hypothesis import strategies as st
from openrlhf_check import Call, check
from openrlhf_definitions import DEFINITIONS

from rlhf_kernels.integrations import openrlhf


@given(
    shape=st.sampled_from([(3,), (2, 3)]),
    vocabulary=st.integers(1, 70),
    temperature=st.sampled_from([1.0, 0.7]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_log_probs_from_logits(
    peer: SimpleNamespace,
    shape: tuple[int, ...],
    vocabulary: int,
    temperature: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    logits = normal(*shape, vocabulary, seed=seed, dtype=dtype, scale=4.0)
    labels = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))

    def call(module: Any) -> Call:  # of a copy, which OpenRLHF's overwrites
        return lambda x: (module.log_probs_from_logits(x.clone(), labels, temperature),)

    size = float(1 + logits.abs().max()) / temperature
    tolerance = (16 + math.sqrt(vocabulary)) * eps(dtype) * size
    check(call, peer, (logits,), (tolerance,), tolerance / temperature)


def test_the_logits_stay_at_any_temperature() -> None:
    logits = normal(2, 3, 5, seed=0, dtype=torch.float32)
    before = logits.clone()
    openrlhf.log_probs_from_logits(logits, torch.zeros(2, 3, dtype=torch.int64), 0.5)
    assert torch.equal(logits, before)


@given(
    shape=st.sampled_from([(3,), (2, 3)]), vocabulary=st.integers(1, 70), dtype=DTYPES, seed=SEEDS
)
def test_entropy(
    peer: SimpleNamespace, shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, seed: int
) -> None:
    logits = normal(*shape, vocabulary, seed=seed, dtype=dtype, scale=4.0)
    size = float(1 + logits.abs().max())
    tolerance = (16 + math.sqrt(vocabulary)) * eps(dtype) * size
    check(
        lambda module: lambda x: (module.compute_entropy(x),),
        *(peer, (logits,), (tolerance,), tolerance * size),
    )


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7)),
    scale=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    weighted=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_approx_kl(
    peer: SimpleNamespace,
    estimator: str,
    unbiased: bool,
    shape: tuple[int, int],
    scale: float,
    weighted: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    new = normal(*shape, seed=seed, dtype=dtype, scale=scale)
    base = normal(*shape, seed=seed + 1, dtype=dtype, scale=scale)
    old = new + normal(*shape, seed=seed + 2, dtype=dtype)

    def call(module: Any) -> Call:
        return lambda new, base: (
            module.compute_approx_kl(
                *(new, base, old.to(new.dtype) if weighted else None),
                kl_estimator=estimator,
                unbiased_gradient=unbiased,
            ),
        )

    # OpenRLHF's is float32 whatever it is given, its way to the unbiased gradient adds the square
    # and takes it away again, and k3's exponential, cut off at 10, goes up to e^2.5 in size.
    size = float((new.double() - base.double()).abs().max())
    straight_through = 10 * size**2 if unbiased and peer is not DEFINITIONS else 0.0
    assume(size**2 < 1e6)
    # It casts float64 first, and a difference is then off by the rounding of its two numbers.
    largest = max(float(each.abs().max()) for each in (new, base, old))
    cast = largest if dtype == torch.float64 and peer is not DEFINITIONS else 0.0
    tolerance = 16 * eps(torch.float32) * (32 + size + straight_through + cast)
    of_gradient = 16 * eps(torch.float32) * (32 + 10 * size + (1 + size) * cast)
    check(call, peer, (new, base), (tolerance,), of_gradient)


def test_an_unknown_estimator_is_an_error_as_in_openrlhf(peer: SimpleNamespace) -> None:
    for function in (openrlhf.compute_approx_kl, peer.compute_approx_kl):
        with pytest.raises((ValueError, KeyError)):
            function(torch.zeros(1, 1), torch.zeros(1, 1), kl_estimator="k4")
