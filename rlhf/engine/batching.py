"""The order in which examples are seen, and who forwards which of them together.

Every rank works out the shares of all ranks from the lengths of all sequences, which all of them
know; so nothing is exchanged to agree on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")


def epoch_order(count: int, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """One epoch as optimizer steps, each a list of indices below ``count``.

    Steps are a seeded random partition of the examples, a new one each epoch; the last may be
    smaller.
    """
    # Modulo what a generator takes: the product of a large seed is beyond it.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return chunks(torch.randperm(count, generator=generator).tolist(), batch_size)


def rank_micro_batches(
    rows: Sequence[int],
    lengths: Sequence[int],
    *,
    size: int,
    tokens: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> list[list[int]]:
    """This rank's share of some rows, in micro-batches.

    All ranks get equally many micro-batches, since each forward pass may wait for the other ranks;
    those of a rank with fewer are empty at the end. How rows are spread cannot bias a step: every
    one is in exactly one micro-batch, and the loss is divided by the count of all of them.

    Args:
        rows: Which rows.
        lengths: Length of every row there is, indexed by row.
        size: Most rows in a micro-batch.
        tokens: Most tokens, padding included; None for no limit. A longer row goes by itself.
        rank: The rank that asks.
        ranks: How many there are.
    """
    shares = [
        micro_batches(share, lengths, size=size, tokens=tokens)
        for share in share_out(rows, lengths, ranks)
    ]
    missing = max(map(len, shares)) - len(shares[rank])
    return shares[rank] + [[] for _ in range(missing)]


def share_out(rows: Sequence[int], lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The rows in one list for each rank: equally many (to one), of about equal length.

    Longest first, to and fro: 0 1 2 2 1 0 0 1 2 ...
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for turn, part in enumerate(chunks(sorted(rows, key=lambda row: -lengths[row]), ranks)):
        order = range(ranks) if turn % 2 == 0 else reversed(range(ranks))
        for rank, row in zip(order, part):
            shares[rank].append(row)
    return shares


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], *, size: int, tokens: int | None = None
) -> list[list[int]]:
    """The rows sorted by length, so that little padding is left, and cut at both limits."""
    found: list[list[int]] = []
    for row in sorted(rows, key=lambda row: lengths[row]):
        # Sorted: this row is the longest of its micro-batch, and sets its width.
        fits = found and len(found[-1]) < size
        if fits and (tokens is None or (len(found[-1]) + 1) * lengths[row] <= tokens):
            found[-1].append(row)
        else:
            found.append([row])
    return found


def chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    """The items in order, in lists of ``size``; the last may be shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
