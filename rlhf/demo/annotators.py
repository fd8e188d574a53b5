"""Simulated annotators: a program that stands in for people, so that the demo can run by itself.

Nobody should take their labels for human judgement. They prefer warm, positive answers: the gold
score of a response is VADER's compound sentiment (Hutto and Gilbert 2014), which training never
sees. Each simulated annotator sees it through Bradley-Terry noise (Bradley and Terry 1952): the
probability of preferring A is sigmoid(scale * (gold(A) - gold(B))).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

TIE = "tie"


@dataclass(frozen=True)
class SimulatedAnnotator:
    """One simulated annotator.

    Attributes:
        name: What prints call it.
        scale: How reliably it prefers the better response; a difference of 0.5 in gold score makes
            it right with probability sigmoid(scale / 2).
        tie_band: It calls responses equal when their gold scores differ by less than this.
    """

    name: str
    scale: float
    tie_band: float

    def label(self, gold_a: float, gold_b: float, generator: random.Random) -> str:
        """ "A", "B" or "tie"."""
        difference = gold_a - gold_b
        if abs(difference) < self.tie_band:
            return TIE
        prefers_a = 1 / (1 + math.exp(-self.scale * difference))
        return "A" if generator.random() < prefers_a else "B"


SIMULATED_ANNOTATORS = (
    SimulatedAnnotator("simulated annotator 1 (careful)", scale=12.0, tie_band=0.05),
    SimulatedAnnotator("simulated annotator 2 (average)", scale=8.0, tie_band=0.10),
    SimulatedAnnotator("simulated annotator 3 (hasty)", scale=6.0, tie_band=0.15),
)


def gold_scores(texts: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each text, from -1 (hostile) to 1 (warm)."""
    analyzer = _analyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]


def annotate(
    gold_a: Sequence[float], gold_b: Sequence[float], seed: int
) -> tuple[list[list[str]], list[str]]:
    """Labels of all simulated annotators, one row per pair, and the majority label per pair."""
    generator = random.Random(seed)
    rows = [
        [annotator.label(a, b, generator) for annotator in SIMULATED_ANNOTATORS]
        for a, b in zip(gold_a, gold_b, strict=True)
    ]
    return rows, [majority(row) for row in rows]


def majority(labels: Sequence[str]) -> str:
    """The label given more often than any other; "tie" if there is none."""
    (first, count), *rest = Counter(labels).most_common()
    return TIE if rest and rest[0][1] == count else first


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        from rlhf.demo.model import MissingPackageError

        raise MissingPackageError(
            "the demo's gold score needs the package vaderSentiment. "
            'Install it with: pip install "rlhf-kernels[demo]"'
        ) from error
    return SentimentIntensityAnalyzer()
