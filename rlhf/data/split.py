"""Setting some items aside."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from rlhf.data.errors import DataError

Item = TypeVar("Item")


def split_holdout(
    items: Sequence[Item], fraction_or_count: float | int, seed: int
) -> tuple[list[Item], list[Item]]:
    """Set aside a random part of ``items``, the same one for the same seed.

    Args:
        items: anything with a length and an index.
        fraction_or_count: a float in (0, 1) is a fraction (at least one item), an int a count.
        seed: of the choice.

    Returns:
        ``(train, held_out)``, both in the order of ``items``.

    Raises:
        DataError: if either part would be empty.
    """
    total, size = len(items), fraction_or_count
    if isinstance(size, float):
        if not 0 < size < 1:
            raise DataError(f"the held-out fraction is {size}; give one between 0 and 1.")
        size = max(1, round(size * total))
    if not 0 < size < total:
        raise DataError(f"cannot hold out {size} of {total} items; both parts need at least one.")
    chosen = set(random.Random(seed).sample(range(total), size))
    train = [items[i] for i in range(total) if i not in chosen]
    return train, [items[i] for i in sorted(chosen)]
