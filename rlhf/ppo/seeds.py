"""Seeds that depend on nothing but where they are used."""

from __future__ import annotations

import random


def derive_seed(seed: int, *place: int | str) -> int:
    """A seed for one use: the same ``seed`` and place give the same, any other an unrelated one.

    So what a step draws does not depend on what was drawn before it, and a run can be taken up in
    the middle.
    """
    return random.Random("/".join(map(str, (seed, *place)))).getrandbits(63)
