"""The draw of a token from one uniform number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.ppo.generation.processors import BLOCK, draw

LARGEST = 1 - 2.0**-53  # that torch.rand gives in float64


def exact(scores: Tensor) -> Tensor:
    """The cumulative distribution [B, V] in float64."""
    return scores.double().softmax(-1).cumsum(-1)


@pytest.mark.parametrize("vocabulary", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 20_000])
def test_it_is_the_inverse_of_the_cumulative_distribution(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    scores = 3 * torch.randn(64, vocabulary, generator=generator)
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    tokens = draw(scores, uniforms)
    cumulative = torch.nn.functional.pad(exact(scores), (1, 0))
    below, above = (cumulative.gather(1, tokens[:, None] + i)[:, 0] for i in (0, 1))
    # A share is an exponential and a division in float32, of scores up to 15: 32 roundings at most;
    # a block's share and the total are sums of such.
    error = 64 * torch.finfo(torch.float32).eps
    assert ((below - error <= uniforms) & (uniforms <= above + error)).all()


def test_each_token_has_its_share() -> None:
    """Numbers at even distances fall on each token as often as it is likely, up to one."""
    shares = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3]).repeat_interleave(100)
    scores = shares.log()[None]
    count = 5000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(scores.expand(count, -1), uniforms)
    found = torch.bincount(tokens, minlength=len(shares)).double()
    assert ((found - count * shares.double() / shares.sum()).abs() <= 1.01).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, LARGEST])
@pytest.mark.parametrize("possible", [[0], [5], [BLOCK - 1], [BLOCK], [3 * BLOCK - 1], [2, 700]])
def test_what_is_impossible_is_never_drawn(possible: list[int], uniform: float) -> None:
    scores = torch.full((1, 3 * BLOCK), -math.inf)
    scores[0, possible] = torch.tensor([0.3, 0.1])[: len(possible)]
    (token,) = draw(scores, torch.tensor([uniform], dtype=torch.float64)).tolist()
    assert token in possible
    assert uniform == 0.5 or token == possible[0 if uniform == 0.0 else -1]


def test_rare_tokens_behind_likely_ones_are_drawn() -> None:
    """A share of 1e-12, which a sum near 1 in float32 would lose."""
    scores = torch.full((1, 2 * BLOCK), -math.inf)
    scores[0, 0], scores[0, -1] = 0.0, math.log(1e-12)
    uniforms = torch.tensor([1 - 5e-13, 1 - 2e-12], dtype=torch.float64)
    assert draw(scores.expand(2, -1), uniforms).tolist() == [2 * BLOCK - 1, 0]


def test_rows_do_not_depend_on_each_other() -> None:
    scores, uniforms = torch.randn(9, 1000), torch.rand(9, dtype=torch.float64)
    alone = [int(draw(scores[i : i + 1], uniforms[i : i + 1])) for i in range(9)]
    assert draw(scores, uniforms).tolist() == alone
