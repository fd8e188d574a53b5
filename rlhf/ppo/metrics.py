"""The figures of one update. ``docs/ppo.md`` defines each and says what is healthy.

All stay on the device until the update is over, then come to the host in one transfer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from rlhf.engine import World
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.experience import Experience
from rlhf_kernels import PPOLossStats, masked_mean

# Means over tokens, under the name that the update reports.
TOKEN_MEANS = {
    "entropy": "entropy",
    "approx_kl": "approx_kl_k3",
    "clip_fraction": "clip_fraction",
    "value_clip_fraction": "value_clip_fraction",
    "dual_clip_fraction": "dual_clip_fraction",
    "ratio_mean": "ratio_mean",
}
LOSSES = ("policy_loss", "value_loss")


class Stopwatch:
    """Seconds spent in each named phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to the phase; waits for the device, once."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class UpdateStats:
    """Adds up the statistics of the micro-batches and optimizer steps of one update.

    Token statistics are weighted by the tokens of their micro-batch, so that the result is the mean
    over all tokens of all epochs, however they were cut. Losses add up within an optimizer step,
    since micro-batches share its normalizer, and are averaged over steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.tokens = torch.zeros((), device=device)
        self.means = torch.zeros(len(TOKEN_MEANS), device=device)
        self.losses = torch.zeros(len(LOSSES), device=device)
        self.ratio_max = torch.zeros((), device=device)
        self.first_step: Tensor | None = None
        self.step_sums: dict[str, float] = {}
        self.steps = 0
        self.early_stopped = False
        self._before_step = (self.means, self.tokens)

    def add(self, stats: PPOLossStats, tokens: Tensor) -> None:
        """Take in one micro-batch with so many valid tokens (0-dim tensor)."""
        means = torch.stack([getattr(stats, name) for name in TOKEN_MEANS.values()])
        self.means = self.means + tokens * means
        self.tokens = self.tokens + tokens
        self.losses += torch.stack([getattr(stats, name) for name in LOSSES])
        self.ratio_max = torch.maximum(self.ratio_max, stats.ratio_max)

    def step_approx_kl(self, world: World) -> float:
        """Mean over the tokens since ``end_step``, of all ranks. Waits for the device."""
        means, tokens = self._before_step
        index = list(TOKEN_MEANS).index("approx_kl")
        sums = torch.stack([self.means[index] - means[index], self.tokens - tokens])
        total, count = world.all_reduce_sum(sums).tolist()
        return total / max(1.0, count)

    def end_step(self, policy: Mapping[str, float], critic: Mapping[str, float]) -> None:
        """Take in what the two engines said of one optimizer step."""
        if self.first_step is None:
            self.first_step = self.means / self.tokens.clamp(min=1)
        self.steps += 1
        self._before_step = (self.means, self.tokens)
        figures = {**policy, **{f"critic_{name}": value for name, value in critic.items()}}
        for name, value in figures.items():
            self.step_sums[name] = self.step_sums.get(name, 0.0) + value

    def on_device(self) -> dict[str, Tensor]:
        """The figures that are still on the device, each a 0-dim tensor."""
        figures = dict(zip(TOKEN_MEANS, self.means / self.tokens.clamp(min=1)))
        figures |= dict(zip(LOSSES, self.losses / max(1, self.steps)))
        figures["ratio_max"] = self.ratio_max
        if self.first_step is not None:
            first = dict(zip(TOKEN_MEANS, self.first_step))
            figures["first_step/ratio_mean"] = first["ratio_mean"]
            figures["first_step/approx_kl"] = first["approx_kl"]
        return figures

    def on_host(self) -> dict[str, float]:
        """What the engines gave: means over the steps, and the number of skipped ones."""
        figures = {
            name: total if name.endswith("skipped_step") else total / max(1, self.steps)
            for name, total in self.step_sums.items()
        }
        return figures | {"optimizer_steps": self.steps, "early_stopped": float(self.early_stopped)}


def unused_figures(config: PPOConfig) -> list[str]:
    """Names of ``on_device`` that would say nothing under these settings."""
    without_dual_clip = [] if config.dual_clip else ["dual_clip_fraction"]
    critic = [] if config.estimator.needs_critic else ["value_loss", "value_clip_fraction"]
    return without_dual_clip + critic


def experience_figures(experience: Experience) -> dict[str, Tensor]:
    """What the rollout shows, each a 0-dim tensor; masked throughout."""
    mask = experience.response_mask
    lengths = mask.sum(1).float()
    scores = experience.scores.float()
    return critic_figures(experience) | {
        "reward": experience.rewards.sum(1).mean(),
        "score": scores.mean(),
        "score_std": scores.std(correction=0),
        "kl": experience.kl.sum(1).mean(),
        "kl_per_token": masked_mean(experience.kl, mask),
        "response_length": lengths.mean(),
        "response_length_min": lengths.min(),
        "response_length_max": lengths.max(),
        "eos_rate": experience.ended.float().mean(),
    }


def critic_figures(experience: Experience) -> dict[str, Tensor]:
    """What the rollout shows of the critic; nothing without one."""
    values, returns, mask = experience.values, experience.returns, experience.response_mask
    if values is None or returns is None:
        return {}
    return {
        "explained_variance": explained_variance(values, returns, mask),
        "value_mean": masked_mean(values, mask),
        "return_mean": masked_mean(returns, mask),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - var(returns - values) / var(returns) over valid tokens; 0 where returns do not vary."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    total = variance(returns)
    explained = 1.0 - variance(returns - values) / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, explained, 0.0)


def to_floats(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """0-dim tensors as numbers, in one transfer."""
    return dict(zip(figures, torch.stack([value.float() for value in figures.values()]).tolist()))
