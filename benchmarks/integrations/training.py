"""A training of a peer's trainer, patched or not, and what came out of it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.ppo_trainer.work import Work

SEED = 0


@dataclass(frozen=True)
class Training:
    """What a process is asked to do.

    Attributes:
        work: Models and sizes; one update more than `work.updates`, the first not timed.
        learning_rate: High enough that three updates move every metric.
        patched: Whether the peer's functions are replaced by ours.
    """

    work: Work
    learning_rate: float
    patched: bool


@dataclass(frozen=True)
class Trained:
    """What it reports.

    Attributes:
        metrics: What the trainer logged, for each update.
        seconds: Of each update after the first.
        peak_mib: The process's largest resident memory.
        replaced: Where the peer's functions were replaced.
        logit_size: Mean over tokens of the largest logit's magnitude, divided by the temperature:
            what a log-probability is a difference of.
    """

    metrics: list[dict[str, float]]
    seconds: list[float]
    peak_mib: float
    replaced: list[str]
    logit_size: float
