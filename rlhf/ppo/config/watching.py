"""Settings of what a run shows while it goes on."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.engine import check_number


@dataclass
class WatchingConfig:
    """What a run shows while it goes on.

    Attributes:
        samples_every: Show some responses every so many updates; null for never.
        samples_count: How many.
        eval_every: Answer the held-out prompts every so many updates, and after the last; null for
            never. Does nothing without eval_prompts.
        eval_greedy: Answer them with the likeliest tokens instead of sampled ones.
    """

    samples_every: int | None = 10
    samples_count: int = 3
    eval_every: int | None = 10
    eval_greedy: bool = False

    def check_watching(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_number(self, "samples_every", at_least=1, integer=True, optional=True)
        check_number(self, "samples_count", at_least=1, integer=True)
        check_number(self, "eval_every", at_least=1, integer=True, optional=True)
