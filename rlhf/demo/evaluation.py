"""Before against after on prompts that no training saw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.demo.annotators import gold_scores
from rlhf.demo.sampling import kl_per_response, sample
from rlhf.demo.settings import DemoSettings
from rlhf.ppo import Generated
from rlhf.reward_model import RewardModel

SHOWN = 3


def evaluate(
    before: Path, after: Path, reward: Path, prompts: Sequence[str], settings: DemoSettings
) -> dict[str, Any]:
    """Gold and reward-model scores of the policies before and after PPO, and of best-of-n.

    The gold score never takes part in training. Each prompt gets ``best_of`` responses before and
    ``after_samples`` after; a policy's score at a prompt is their mean, so that before and after
    can be compared prompt by prompt.
    """
    reward_model = RewardModel.from_pretrained(reward)
    n, m = settings.best_of, settings.after_samples
    old = sample(before, prompts, n, settings.generation(), settings.seed + 1)
    new = sample(after, prompts, m, settings.generation(), settings.seed + 1)
    old_gold, new_gold = grouped(gold_scores(old.texts), n), grouped(gold_scores(new.texts), m)
    old_reward = grouped(score(reward_model, prompts, old.texts, n), n)
    new_reward = grouped(score(reward_model, prompts, new.texts, m), m)
    best = [max(range(n), key=scores.__getitem__) for scores in old_reward]
    kl = kl_per_response(new, after, before, settings.temperature)
    return {
        "prompts": len(prompts),
        "before": {**means(old_gold, old_reward), "kl": 0.0, **shape(old)},
        "after": {**means(new_gold, new_reward), "kl": statistics.fmean(kl), **shape(new)},
        "best_of_n": {
            "n": n,
            "gold": statistics.fmean(golds[i] for golds, i in zip(old_gold, best)),
            "reward": statistics.fmean(map(max, old_reward)),
            # An upper bound (Stiennon et al. 2020), and exact when no two scores are equal.
            "kl": math.log(n) - (n - 1) / n,
        },
        "gold_gain": paired_gain(old_gold, new_gold),
        "examples": [
            {
                "prompt": prompts[i],
                "before": old.texts[i * n].strip(),
                "after": new.texts[i * m].strip(),
                "gold_before": old_gold[i][0],
                "gold_after": new_gold[i][0],
            }
            for i in range(min(SHOWN, len(prompts)))
        ],
    }


def score(
    reward_model: RewardModel, prompts: Sequence[str], texts: Sequence[str], count: int
) -> list[float]:
    """Reward-model scores of ``count`` texts to each prompt."""
    return reward_model.score([prompt for prompt in prompts for _ in range(count)], texts)


def grouped(values: Sequence[float], size: int) -> list[list[float]]:
    """The values of each prompt."""
    return [list(values[i : i + size]) for i in range(0, len(values), size)]


def means(gold: list[list[float]], reward: list[list[float]]) -> dict[str, float]:
    """Mean scores of a policy."""
    return {
        "gold": statistics.fmean(map(statistics.fmean, gold)),
        "reward": statistics.fmean(map(statistics.fmean, reward)),
    }


def shape(generated: Generated) -> dict[str, float]:
    """How long responses are and how many end by themselves."""
    return {
        "length": generated.response_mask.sum(1).float().mean().item(),
        "eos_rate": generated.ended.float().mean().item(),
    }


def paired_gain(before: list[list[float]], after: list[list[float]]) -> dict[str, float]:
    """Mean gain per prompt and its standard error, prompts being the independent draws."""
    gains = [statistics.fmean(b) - statistics.fmean(a) for a, b in zip(before, after)]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.nan
    return {"mean": statistics.fmean(gains), "standard_error": error}
