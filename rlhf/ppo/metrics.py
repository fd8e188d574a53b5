"""The figures of one update. ``docs/ppo.md`` defines each and says what is healthy.

All stay on the device until the update is over, then come to the host in one transfer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Set
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
# Whose loss gives them.
VALUE_FIGURES = frozenset({"value_clip_fraction", "value_loss"})
POLICY_FIGURES = frozenset({*TOKEN_MEANS, *LOSSES}) - VALUE_FIGURES


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
    since micro-batches share its normalizer, and are averaged over steps. What belongs to a step
    that was skipped is left out: it need not be finite.
    """

    def __init__(self, device: torch.device) -> None:
        # Sums over steps, and of the step that is going on: tokens, TOKEN_MEANS, LOSSES.
        self.sums = torch.zeros(1 + len(TOKEN_MEANS) + len(LOSSES), device=device)
        self.pending = torch.zeros_like(self.sums)
        self.ratio_max = torch.zeros((), device=device)
        self.pending_ratio_max = torch.zeros_like(self.ratio_max)
        self.first_step: Tensor | None = None
        self.step_sums: dict[str, float] = {}
        self.steps = 0
        self.steps_taken = 0
        self.early_stopped = False

    def add(self, stats: PPOLossStats, tokens: Tensor, figures: Set[str]) -> None:
        """Take in one micro-batch.

        Args:
            stats: Of its loss.
            tokens: Its valid tokens, a 0-dim tensor; counted with the policy's figures.
            figures: Which of the statistics to take, of POLICY_FIGURES and VALUE_FIGURES.
        """

        def taken(name: str, attribute: str) -> Tensor:
            value = getattr(stats, attribute)
            return value if name in figures else torch.zeros_like(value)

        means = torch.stack([taken(*pair) for pair in TOKEN_MEANS.items()])
        losses = torch.stack([taken(name, name) for name in LOSSES])
        counted = tokens if figures >= POLICY_FIGURES else torch.zeros_like(tokens)
        self.pending += torch.cat([counted.reshape(1), tokens * means, losses])
        if figures >= POLICY_FIGURES:
            self.pending_ratio_max = torch.maximum(self.pending_ratio_max, stats.ratio_max)

    def step_approx_kl(self, world: World) -> float:
        """Mean over the tokens since ``end_step``, of all ranks. Waits for the device."""
        return token_means(world.all_reduce_sum(self.pending))["approx_kl"].item()

    def end_step(self, policy: Mapping[str, float], critic: Mapping[str, float]) -> None:
        """Take in what the two engines said of one optimizer step."""
        self.steps += 1
        figures = {**policy, **{f"critic_{name}": value for name, value in critic.items()}}
        for name, value in figures.items():
            self.step_sums[name] = self.step_sums.get(name, 0.0) + value
        if not (policy or critic).get("skipped_step"):
            self.steps_taken += 1
            self.sums += self.pending
            self.ratio_max = torch.maximum(self.ratio_max, self.pending_ratio_max)
            if self.first_step is None:
                self.first_step = self.pending
        self.pending = torch.zeros_like(self.sums)
        self.pending_ratio_max = torch.zeros_like(self.ratio_max)

    def reduce(self, world: World) -> None:
        """Add up what the ranks have seen of the same steps."""
        self.sums = world.all_reduce_sum(self.sums)
        self.ratio_max = world.all_reduce_max(self.ratio_max)
        if self.first_step is not None:
            self.first_step = world.all_reduce_sum(self.first_step)

    def on_device(self) -> dict[str, Tensor]:
        """The figures that are still on the device, each a 0-dim tensor."""
        figures = token_means(self.sums)
        losses = self.sums[1 + len(TOKEN_MEANS) :] / max(1, self.steps_taken)
        figures |= dict(zip(LOSSES, losses))
        figures["ratio_max"] = self.ratio_max
        if self.first_step is not None:
            first = token_means(self.first_step)
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


def update_figures(
    experience: Experience, stats: UpdateStats, config: PPOConfig, seconds: Mapping[str, float]
) -> dict[str, float]:
    """All figures of one update, as numbers.

    Args:
        experience: Of its rollout.
        stats: Of its optimizer steps, of all ranks.
        config: Settings, some of which leave figures out.
        seconds: That each phase of rollout and update took.
    """
    figures = {**experience_figures(experience), **stats.on_device()}
    for name in unused_figures(config):
        del figures[name]
    metrics = to_floats({**figures, "tokens": experience.response_mask.sum()})
    metrics["kl_coef"] = experience.kl_coef
    metrics.update(stats.on_host())
    metrics["tokens_per_second"] = metrics.pop("tokens") / sum(seconds.values())
    metrics.update({f"seconds/{name}": value for name, value in seconds.items()})
    return metrics


def unused_figures(config: PPOConfig) -> list[str]:
    """Names of ``on_device`` that would say nothing under these settings."""
    without_dual_clip = [] if config.dual_clip else ["dual_clip_fraction"]
    critic = [] if config.estimator.needs_critic else ["value_loss", "value_clip_fraction"]
    return without_dual_clip + critic


def token_means(sums: Tensor) -> dict[str, Tensor]:
    """Means over tokens from the sums of ``UpdateStats``."""
    tokens, means = sums[0], sums[1 : 1 + len(TOKEN_MEANS)]
    return dict(zip(TOKEN_MEANS, means / tokens.clamp(min=1)))


def experience_figures(experience: Experience) -> dict[str, Tensor]:
    """What the rollout shows, each a 0-dim tensor; masked throughout."""
    mask = experience.response_mask
    lengths = mask.sum(1).float()
    scores = experience.scores.float()
    parts = {f"score/{name}": part.mean() for name, part in experience.score_parts.items()}
    return (
        critic_figures(experience)
        | parts
        | {
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
    )


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
