"""The same input gives the same bits: run to run, and for any number of threads."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    INTERPRETED,
    ROW_PRIMITIVES,
    backends_for,
    normal,
    ppo_inputs,
    random_mask,
)

import rlhf_kernels as kernels


def results(backend: str) -> list[torch.Tensor]:
    """Every output and gradient of cases long enough to be divided among threads."""
    tensors = results_of_rows(backend)
    if backend in backends_for("gae_forward", "ppo_loss_forward"):
        tensors += results_of_sequences(backend)
    return [tensor.detach() for tensor in (*tensors, *results_of_linear(backend))]


def results_of_rows(backend: str) -> list[torch.Tensor]:
    # 300 rows: several for each thread; interpreted ones take milliseconds each.
    rows = 30 if backend == "triton" and INTERPRETED else 300
    logits = normal(rows, 333, seed=1).requires_grad_()
    targets = torch.arange(rows) % 333
    logprobs, entropy = kernels.token_logprobs(
        logits, targets, return_entropy=True, backend=backend
    )
    (grad,) = torch.autograd.grad((logprobs * entropy).sum(), logits)
    return [logprobs, entropy, grad]


def results_of_sequences(backend: str) -> list[torch.Tensor]:
    # 131 × 1000 tokens: 32 of the blocks (4096 tokens) in which sums are taken, and beyond the
    # 100,000 from which on gae divides its rows.
    rows = 13 if backend == "triton" and INTERPRETED else 131
    inputs, mask = ppo_inputs(rows, 1000), random_mask(rows, 1000)
    advantages, returns = kernels.gae(inputs["returns"], inputs["values"], mask, backend=backend)
    leaves = [inputs[n].requires_grad_() for n in ("logprobs", "values", "entropy")]
    loss, stats = kernels.ppo_loss(mask=mask, **inputs, backend=backend)
    return [advantages, returns, loss, *stats, *torch.autograd.grad(loss, leaves)]


def results_of_linear(backend: str) -> list[torch.Tensor]:
    hidden, weight = normal(60, 8, seed=3).requires_grad_(), normal(50, 8, seed=4).requires_grad_()
    loss = kernels.linear_cross_entropy(
        hidden, weight, torch.arange(60) % 50, chunk_size=16, backend=backend
    )
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("backend", backends_for(*ROW_PRIMITIVES))
def test_run_to_run(backend):
    assert same_bits(results(backend), results(backend))


@pytest.mark.skipif("cpu" not in backends_for(*ROW_PRIMITIVES), reason="cpu is not built")
def test_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results("cpu")
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            several = results("cpu")
            # The matrix products around the kernels are torch's, not the backend's to promise.
            assert same_bits(one[:-3], several[:-3]), f"{threads} threads"
    finally:
        torch.set_num_threads(before)
