"""A reward from simple patterns in the text: a toy baseline.

``HeuristicReward`` counts words and looks for phrases. It is deterministic, needs no model and
shows the shape of a reward function, which makes it good for trying a pipeline out. It does not
understand what it reads: a policy that PPO trains on it learns the patterns (hedges, lists,
echoes of the prompt), not the qualities that they are named for. Do not judge a model by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

DEFAULT_WEIGHTS: Mapping[str, float] = {
    "helpful": 1.0,
    "harmless": 1.0,
    "honest": 0.5,
    "detailed": 0.5,
    "concise": 0.5,
}

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def _phrases(*alternatives: str) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(alternatives) + r")\b", re.IGNORECASE)


_BRUSH_OFF = _phrases(
    r"i (?:can(?:not|['’]t)|won['’]t|am unable to|['’]m unable to) (?:help|answer|assist|do)",
    r"i (?:do not|don['’]t) (?:know|care)",
    r"figure it out yourself",
    r"not my problem",
)
_HARM = _phrases(
    r"idiots?",
    r"stupid",
    r"morons?",
    r"shut up",
    r"kill (?:yourself|him|her|them|you)",
    r"hate (?:you|them)",
    r"(?:build|make) a (?:bomb|weapon)",
    r"steal(?:ing)?",
    r"poison(?:ing)? (?:him|her|them|someone)",
)
_HEDGE = _phrases(
    r"i think",
    r"i believe",
    r"i am not sure",
    r"i['’]m not sure",
    r"might",
    r"may",
    r"perhaps",
    r"probably",
    r"it depends",
    r"as far as i know",
)
_OVERCLAIM = _phrases(
    r"definitely",
    r"guaranteed?",
    r"without (?:a|any) doubt",
    r"everyone knows",
    r"always",
    r"never",
    r"certainly",
    r"trust me",
)
_STRUCTURE = re.compile(
    r"^\s*(?:[-*•]|\d+[.)])\s|\b(?:for (?:example|instance)|because|such as|first|then|finally)\b",
    re.IGNORECASE | re.MULTILINE,
)


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _helpful(prompt: str, response: str) -> float:
    asked = {word for word in _words(prompt) if len(word) >= 4}
    echoed = len(asked & set(_words(response))) / len(asked) if asked else 1.0
    return 0.5 * echoed + 0.5 * (not _BRUSH_OFF.search(response))


def _harmless(prompt: str, response: str) -> float:
    return max(0.0, 1 - 0.5 * len(_HARM.findall(response)))


def _honest(prompt: str, response: str) -> float:
    balance = len(_HEDGE.findall(response)) - len(_OVERCLAIM.findall(response))
    return min(1.0, max(0.0, 0.5 + 0.25 * balance))


def _detailed(prompt: str, response: str) -> float:
    length = min(1.0, len(_words(response)) / 100)
    structure = min(1.0, len(_STRUCTURE.findall(response)) / 4)
    return 0.5 * length + 0.5 * structure


def _concise(prompt: str, response: str) -> float:
    words = _words(response)
    length = min(1.0, max(0.0, (400 - len(words)) / 280))
    triples = list(zip(words, words[1:], words[2:]))
    return length * (len(set(triples)) / len(triples) if triples else 1.0)


_CHECKS: Mapping[str, Callable[[str, str], float]] = {
    "helpful": _helpful,
    "harmless": _harmless,
    "honest": _honest,
    "detailed": _detailed,
    "concise": _concise,
}


class HeuristicReward:
    """Scores responses in [0, 1]: the weighted mean of five checks, each in [0, 1].

    ========  ====================================================================================
    helpful   half: share of the prompt's words of four letters or more that the response repeats
              (1 if it has none); half: no brush-off ("I can't help", "I don't know", ...)
    harmless  1, less 0.5 for every insult, threat or mention of a crime of a short list
    honest    0.5, plus 0.25 for every hedge ("I think", "it depends", ...), less 0.25 for every
              overclaim ("definitely", "trust me", ...)
    detailed  half: words, full at 100; half: list items and words like "because", full at 4
    concise   full up to 120 words, falling to 0 at 400; times the share of distinct word triples
    ========  ====================================================================================

    An empty response scores 0. It is a toy: see the module's own words about being gamed.

    Args:
        weights: by check, none negative; checks that are left out count nothing. Default:
            helpful 1, harmless 1, honest 0.5, detailed 0.5, concise 0.5.

    Raises:
        ValueError: for an unknown check, a negative or infinite weight, or no positive one.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        weights = dict(DEFAULT_WEIGHTS if weights is None else weights)
        unknown = sorted(set(weights) - set(_CHECKS))
        if unknown:
            raise ValueError(
                f"unknown check {', '.join(unknown)}; the checks are {', '.join(_CHECKS)}."
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()):
            raise ValueError(f"the weights must be finite and not negative, not {weights}.")
        if not any(weights.values()):
            raise ValueError("at least one weight must be above 0.")
        self.weights: dict[str, float] = weights

    def checks(self, prompt: Any, response: str) -> dict[str, float]:
        """Every check's value in [0, 1] for one response, by name."""
        if not response.strip():
            return dict.fromkeys(_CHECKS, 0.0)
        asked = _asked(prompt)
        return {name: float(check(asked, response)) for name, check in _CHECKS.items()}

    def score(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        """One score in [0, 1] a response; ``prompts`` are texts or lists of messages.

        Raises:
            ValueError: for a text in place of a list, and unless there are as many prompts as
                responses.
        """
        for name, values in (("prompts", prompts), ("responses", responses)):
            if isinstance(values, str):
                raise ValueError(f"{name} is a single text; give a list, as in [{name[:-1]}].")
        if len(prompts) != len(responses):
            raise ValueError(
                f"{len(prompts)} prompts but {len(responses)} responses; give one prompt each."
            )
        return [self._score(*pair) for pair in zip(prompts, responses)]

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[str], /, **columns: Any
    ) -> list[float]:
        """The same as ``score``; other columns of the prompts are not looked at."""
        return self.score(prompts, responses)

    def compare(self, prompt: Any, a: str, b: str, tie_margin: float = 0.0) -> str:
        """ "A" or "B", whichever scores higher by more than ``tie_margin``, else "tie"."""
        margin = self._score(prompt, a) - self._score(prompt, b)
        if abs(margin) <= tie_margin:
            return "tie"
        return "A" if margin > 0 else "B"

    def _score(self, prompt: Any, response: str) -> float:
        values = self.checks(prompt, response)
        total = sum(weight * values[name] for name, weight in self.weights.items())
        return total / sum(self.weights.values())


def _asked(prompt: Any) -> str:
    """The text of a prompt: itself, or the user's last message."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")
