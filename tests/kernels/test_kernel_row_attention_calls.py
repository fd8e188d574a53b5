"""What row_attention refuses, its derivatives in float64, and any number of threads."""

from __future__ import annotations

import pytest
import torch
from test_kernel_row_attention import BACKENDS, DTYPES, case, starts_of, with_gradients

from rlhf_kernels.ops.row_attention import row_attention


@pytest.mark.skipif("cpu" not in BACKENDS, reason="cpu is not built")
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_any_number_of_threads(dtype):
    lengths = [63, 130, 8, 300, 64, 1]
    arguments = *case(lengths, 6, 3, 24, dtype), lengths, "cpu"
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_gradients(*arguments)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(one, with_gradients(*arguments)))
    finally:
        torch.set_num_threads(before)


def test_float64_keeps_its_digits():
    inputs, _ = case([5, 3], 2, 1, 4, torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: row_attention(*x, starts_of([5, 3])), leaves)


Q, K = torch.ones(4, 2, 8), torch.ones(4, 1, 8)
WRONG = {
    "query has shape (4, 8); expected 3 dimensions": lambda: row_attention(
        Q[:, 0], K, K, starts_of([4])
    ),
    "key has shape (3, 1, 8); expected (4, 1, 8)": lambda: row_attention(
        Q, K[:3], K, starts_of([4])
    ),
    "value has shape (3, 1, 8); expected (4, 1, 8)": lambda: row_attention(
        Q, K, K[:3], starts_of([4])
    ),
    "query has 1 heads; expected a multiple of key's 2": lambda: row_attention(
        K, Q, Q, starts_of([4])
    ),
    "heads are of size 257; expected 1 to 256": lambda: row_attention(
        *[torch.ones(4, 1, 257)] * 3, starts_of([4])
    ),
    "expected torch.float32": lambda: row_attention(Q, K.bfloat16(), K, starts_of([4])),
    "query has dtype torch.int64": lambda: row_attention(Q.long(), K, K, starts_of([4])),
    "row_starts has dtype torch.float32": lambda: row_attention(Q, K, K, torch.tensor([0.0, 4.0])),
    "expected [rows + 1] on the CPU": lambda: row_attention(Q, K, K, torch.tensor(4)),
    "row_starts goes from 0 to 5; expected 0 to 4": lambda: row_attention(Q, K, K, starts_of([5])),
    "row_starts goes from 1 to 4": lambda: row_attention(Q, K, K, torch.tensor([1, 4])),
    "row_starts turns back": lambda: row_attention(Q, K, K, torch.tensor([0, 4, 2, 4])),
    "scale is inf": lambda: row_attention(Q, K, K, starts_of([4]), float("inf")),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((TypeError, ValueError)) as caught:
        WRONG[message]()
    assert message in str(caught.value)
