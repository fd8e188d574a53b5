"""Whether two trainings logged the same numbers: within 1e-4 of them, or float32's rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.ppo_trainer.work import KL_COEF

RELATIVE = 1e-4
EPS = 2.0**-23
CLOCK = {"eps"}  # episodes a second

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Deviation:
    """Of one metric, where it is largest.

    Attributes:
        metric: its name. update: from 1.
        theirs, ours: the numbers. relative: how far apart, relative to theirs.
        rounding: how far float32 alone can bring them apart, where they are small remainders of
            large terms; else 0.
    """

    metric: str
    update: int
    theirs: float
    ours: float
    relative: float
    rounding: float

    @property
    def within(self) -> bool:
        return abs(self.ours - self.theirs) <= RELATIVE * abs(self.theirs) + self.rounding


def deviations(
    theirs: Sequence[Metrics], ours: Sequence[Metrics], logit_size: float
) -> list[Deviation]:
    """The largest deviation of each metric, those outside of the limit first.

    Args:
        theirs, ours: What was logged at each update.
        logit_size: See ``Trained``.

    Raises:
        ValueError: The two logged other metrics, or another number of updates.
    """
    if [set(each) for each in theirs] != [set(each) for each in ours] or not theirs:
        raise ValueError("the trainings did not log the same metrics the same number of times")
    found = []
    for metric in sorted(set(theirs[0]) - CLOCK):
        of_updates = [
            _deviation(metric, update, a, b, logit_size)
            for update, (a, b) in enumerate(zip(theirs, ours), start=1)
        ]
        found.append(max(of_updates, key=lambda each: (not each.within, each.relative)))
    return found


def _deviation(metric: str, update: int, a: Metrics, b: Metrics, logit_size: float) -> Deviation:
    theirs, ours = a[metric], b[metric]
    apart = abs(ours - theirs)
    relative = 0.0 if apart == 0 else apart / abs(theirs) if theirs else math.inf
    return Deviation(metric, update, theirs, ours, relative, _rounding(metric, a, logit_size))


def _rounding(metric: str, logged: Metrics, logit_size: float) -> float:
    """A KL divergence is what remains of two sums of log-probabilities that nearly cancel.

    `objective/entropy` is the size of such a sum over a response. A token's log-probability is its
    logit less the logarithm of a sum over all of them, each rounded at its own size, and a ratio is
    off by as much. The policy's loss is a mean of ratios times whitened advantages.
    """
    of_sum = EPS * abs(logged["objective/entropy"])
    of_token = EPS * logit_size
    if metric == "objective/kl":
        return of_sum
    if metric in ("objective/non_score_reward", "objective/rlhf_reward"):
        return KL_COEF * of_sum
    if metric == "loss/policy_avg":
        return of_token
    if metric == "policy/approxkl_avg":  # of half a square
        return math.sqrt(2 * logged[metric]) * of_token + of_token**2 / 2
    if metric == "val/ratio_var":
        return 2 * math.sqrt(logged[metric]) * of_token + of_token**2
    return 0.0
