"""What cached_attention refuses, float64, and any number of threads."""

from __future__ import annotations

import math

import pytest
import torch
from test_cached_attention import BACKENDS, DTYPES, case, hiding

from rlhf_kernels.ops.cached_attention import cached_attention


@pytest.mark.skipif("cpu" not in BACKENDS, reason="cpu is not built")
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_any_number_of_threads(dtype):
    arguments = *case(5, 3, 3, 200, 64, dtype), hiding(5, 200), None, "cpu"
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cached_attention(*arguments)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(cached_attention(*arguments), one)
    finally:
        torch.set_num_threads(before)


def test_float64_keeps_its_digits():
    query, key, value = (x.double() for x in case(2, 2, 2, 9, 8))
    weights = torch.softmax(8**-0.5 * query.unflatten(1, (2, 2)) @ key.mT, -1)
    exact = (weights @ value).flatten(1, 2)
    torch.testing.assert_close(cached_attention(query, key, value), exact, rtol=0, atol=1e-14)


Q, K, M = torch.ones(2, 4, 8), torch.ones(2, 2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
WRONG = {
    "query has shape (2, 8); expected 3 dimensions": (Q[:, 0], K, K),
    "key has shape (2, 5, 8); expected 4 dimensions": (Q, K[:, 0], K),
    "key has shape (1, 2, 5, 8); expected (2, 2, 5, 8)": (Q, K[:1], K),
    "value has shape (2, 2, 4, 8); expected (2, 2, 5, 8)": (Q, K, K[:, :, :4]),
    "query has 3 heads; expected a multiple of key's 2": (Q[:, :3], K, K),
    "expected torch.float32": (Q, K.bfloat16(), K),
    "query has dtype torch.int64": (Q.long(), K, K),
    "mask has shape (2, 4); expected (2, 5)": (Q, K, K, M[:, :4]),
    "mask has dtype torch.int64; expected torch.bool": (Q, K, K, M.long()),
    "heads are of size 0": (Q[..., :0], K[..., :0], K[..., :0]),
    "scale is inf": (Q, K, K, None, math.inf),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((TypeError, ValueError)) as caught:
        cached_attention(*WRONG[message])
    assert message in str(caught.value)
