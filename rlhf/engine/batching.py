"""The order in which examples are seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")


def epoch_steps(
    lengths: Sequence[int], batch_size: int, micro_batch_size: int, *, seed: int, epoch: int
) -> list[list[list[int]]]:
    """One epoch as optimizer steps, each a list of micro-batches of indices into ``lengths``.

    Steps are a seeded random partition of the examples, a new one each epoch; the last may be
    smaller. Inside a step examples are sorted by length before they are cut into micro-batches,
    which saves padding and cannot bias a step: its examples stay a uniform sample.
    """
    # Modulo what a generator takes: the product of a large seed is beyond it.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    steps = []
    for start in range(0, len(order), batch_size):
        step = sorted(order[start : start + batch_size], key=lambda index: lengths[index])
        steps.append(chunks(step, micro_batch_size))
    return steps


def chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    """The items in order, in lists of ``size``; the last may be shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
