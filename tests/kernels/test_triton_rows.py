"""What only the Triton kernels do: divide rows among programs, and count from 16-byte boundaries.

Runs on a GPU, or interpreted on the CPU (see `make test`).
"""

from __future__ import annotations

import math

import float64_oracle as oracle
import pytest
import torch
from kernel_cases import (
    INTERPRETED,
    ROW_PRIMITIVES,
    backends_for,
    close,
    gradient_tolerance,
    here,
    normal,
    row_tolerance,
    within,
)

from rlhf_kernels import checks, token_logprobs

if "triton" not in backends_for(*ROW_PRIMITIVES):
    pytest.skip("Triton cannot run here", allow_module_level=True)

from rlhf_kernels.backends.triton import launch_token_logprobs as kernels

# For the fixture that places tensors on the backend's device, and for `-k triton`.
pytestmark = pytest.mark.parametrize("backend", ["triton"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check_rows(logits, targets, divided_into=None, monkeypatch=None):
    """Both primitives on rows [N, V] as they lie in memory; the gradient in place of a copy."""
    if divided_into is not None:
        monkeypatch.setattr(kernels, "parts_of_rows", lambda *sizes: divided_into)
    rows = len(logits)
    logprobs, entropy, normalization = kernels.token_logprobs_forward(
        logits, targets, 1.0, -100, True
    )
    g, h = normal(rows, seed=7), normal(rows, seed=8)
    expected = oracle.token_logprobs(
        logits, targets, grad_logprobs=oracle.array(g), grad_entropy=oracle.array(h)
    )
    atol = row_tolerance(logits)
    close(logprobs, expected[0], atol)
    close(entropy, expected[1], atol)
    grad = kernels.token_logprobs_backward(g, h, logits, targets, 1.0, -100, normalization, entropy)
    within(grad, expected[2], gradient_tolerance(logits, targets, 1.0, g, h))
    return logprobs, entropy, normalization, grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [2, 3, 5, 64])
def test_divided_rows(backend, monkeypatch, dtype, parts):
    """As many parts as there are blocks of the row, fewer, and more."""
    logits = normal(3, 5 * 2048 + 77, seed=parts, scale=3.0).to(dtype)
    targets = torch.tensor([len(logits[0]) - 1, -100, 4097])
    a = check_rows(logits, targets, parts, monkeypatch)
    b = check_rows(logits, targets, parts, monkeypatch)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_special_values_in_divided_rows(backend, monkeypatch):
    logits = torch.zeros(5, 3 * 2048)
    logits[0, 2048:] = -math.inf  # whole parts that hold nothing
    logits[1] = -math.inf
    logits[2, 5000] = math.nan
    logits[3, :] = torch.finfo(torch.float32).min
    logits[3, 6143] = torch.finfo(torch.float32).max
    targets = torch.tensor([7, 0, 0, 6143, -100])
    monkeypatch.setattr(kernels, "parts_of_rows", lambda *sizes: 3)
    logprobs, entropy = token_logprobs(logits, targets, return_entropy=True, backend=backend)
    close(logprobs[[0, 3, 4]], [-math.log(2048), 0.0, 0.0], row_tolerance(torch.zeros(1, 2048)))
    close(entropy[[0, 3, 4]], [math.log(2048), 0.0, 0.0], row_tolerance(torch.zeros(1, 2048)))
    assert logprobs[[1, 2]].isnan().all() and entropy[[1, 2]].isnan().all()


def test_how_rows_are_divided(backend):
    """Only where rows are too few to fill the GPU; never into empty parts."""
    assert kernels.parts_of_rows(8192, 38, 132) == 1
    assert kernels.parts_of_rows(1024, 38, 132) == 1
    assert kernels.parts_of_rows(132, 38, 132) == 8
    assert kernels.parts_of_rows(1, 38, 132) == 38
    assert kernels.parts_of_rows(1, 1, 132) == 1
    for rows in range(1, 600, 7):
        for blocks in range(1, 300):
            parts = kernels.parts_of_rows(rows, blocks, 132)
            assert 1 <= parts <= kernels.MOST_PARTS
            assert parts * rows <= max(rows, kernels.PROGRAMS_PER_PROCESSOR * 132)
            each = -(-blocks // parts)
            assert each * (parts - 1) < blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first, stride", [(0, 4112), (1, 4112), (0, 4113), (3, 4119)])
def test_any_alignment(backend, dtype, first, stride):
    """Rows that begin and end on boundaries, beside them, and each elsewhere; results and bits."""
    width = 4104
    memory = normal(4 * stride, seed=1, scale=3.0).to(dtype)
    logits = memory.as_strided((3, width), (stride, 1), first)
    targets = torch.tensor([0, width - 1, 4096])
    before = memory.clone()
    _, entropy, normalization, grad = check_rows(logits, targets)
    assert torch.equal(memory, before)
    # In place, and to memory that lies otherwise: the same bits, and none beside the rows.
    g, h = normal(3, seed=7), normal(3, seed=8)
    rest = (targets, 1.0, -100, normalization, entropy)
    elsewhere = torch.full((4 * stride,), 7.0, dtype=dtype)
    out = elsewhere.as_strided((3, width), (stride + 3, 1), (first + 5) % 8)
    for place in (out, logits):
        kernels.token_logprobs_backward(g, h, logits, *rest, out=place)
        assert torch.equal(place, grad)
    logits.copy_(before.as_strided(logits.shape, logits.stride(), first))
    out.fill_(7.0)
    assert torch.equal(memory, before) and (elsewhere == 7.0).all()


def test_targets_elsewhere(backend):
    """A target in another rank's part of the vocabulary: no term of its own in any column."""
    logits = normal(4, 50, seed=1)
    targets = torch.tensor([3, checks.ELSEWHERE, -100, checks.ELSEWHERE])
    g, h = normal(4, seed=2), normal(4, seed=3)
    out = kernels.token_logprobs_forward(logits, targets, 0.7, -100, True)
    inside = kernels.token_logprobs_forward(logits, targets.clamp(min=-100), 0.7, -100, True)
    assert (out[0][1:] == 0).all() and out[0][0] == inside[0][0]
    there = targets != -100
    rows = logits[there].cpu()
    p = (rows.double() / 0.7).softmax(-1)
    close(out[1][there], -(p * p.log()).sum(-1), row_tolerance(rows, 0.7))
    grad = kernels.token_logprobs_backward(g, h, logits, targets, 0.7, -100, out[2], out[1])
    zeros = torch.zeros(4, dtype=torch.long)
    expected = kernels.token_logprobs_backward(g, h, logits, zeros, 0.7, -100, out[2], out[1])
    elsewhere = targets == checks.ELSEWHERE
    assert torch.equal(grad[elsewhere][:, 1:], expected[elsewhere][:, 1:])
    assert (grad[2] == 0).all() and grad[0].sum().abs() < 1e-5
    only = kernels.token_logprobs_backward(g, None, logits, targets, 0.7, -100, out[2], None)
    within(
        only[elsewhere],
        -p[[1, 2]] * g.cpu().double()[elsewhere.cpu()][:, None] / 0.7,
        gradient_tolerance(logits[elsewhere], zeros[:2], 0.7, g[elsewhere]),
    )


def test_more_than_2_to_the_31_elements_by_strides(backend):
    """Three rows, the last one 2^31 elements behind the first; what is between is not touched."""
    stride = 2**30 + 5  # not a multiple of a vector
    memory = torch.empty(2 * stride + 700, dtype=torch.bfloat16)
    logits = memory.as_strided((3, 600), (stride, 1), 3)
    plain = normal(3, 600, seed=1, scale=3.0).bfloat16()
    logits.copy_(plain)
    targets = torch.tensor([5, -100, 599])
    g, h = normal(3, seed=7), normal(3, seed=8)
    results = []
    for rows in (logits, plain):
        out = kernels.token_logprobs_forward(rows, targets, 1.0, -100, True)
        tail = (rows, targets, 1.0, -100, out[2], out[1])
        grad = kernels.token_logprobs_backward(g, h, *tail, out=rows)
        results.append((*out[:2], grad.clone()))
    atol = row_tolerance(normal(3, 600, seed=1, scale=3.0))
    close(results[0][0], results[1][0], atol)
    close(results[0][1], results[1][1], atol)
    # Two roundings to bfloat16 of nearly the same number.
    close(results[0][2], results[1][2], atol * 30, rtol=torch.finfo(torch.bfloat16).eps)
    assert (results[0][2][1] == 0).all() and (results[0][2][[0, 2]] != 0).any(1).all()


@pytest.mark.skipif(not INTERPRETED, reason="makes its memory on the CPU")
def test_memory_off_the_boundaries_is_refused(backend):
    whole = torch.zeros(64, dtype=torch.uint8)
    odd = torch.frombuffer(whole.numpy().data, dtype=torch.bfloat16, offset=2, count=20)
    with pytest.raises(ValueError, match="16-byte boundary"):
        token_logprobs(odd.view(2, 10), torch.tensor([0, 1]), backend=backend)
    assert odd.data_ptr() % 16 == 2


def test_temperatures_of_rows_are_as_numbers(backend):
    logits, targets = normal(4, 700, seed=1), torch.tensor([0, 5, -100, 699])
    tau = here(torch.full((4,), 0.7))
    one = token_logprobs(logits, targets, temperature=0.7, return_entropy=True, backend=backend)
    per_row = token_logprobs(logits, targets, temperature=tau, return_entropy=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(one, per_row))
