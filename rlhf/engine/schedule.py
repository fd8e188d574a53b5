"""Learning-rate schedules."""

from __future__ import annotations

import math


def learning_rate_factor(schedule: str, step: int, total_steps: int, warmup_ratio: float) -> float:
    """Share of the highest learning rate at a 0-based optimizer step.

    It rises linearly over the first ``ceil(warmup_ratio * total_steps)`` steps, whose last one has
    the full rate, then falls so that it would reach 0 one step after the last: no step is wasted at
    rate 0. Steps beyond ``total_steps`` get 0, except under "constant".
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
