"""The functions that `rlhf_kernels.integrations.openrlhf` describes and offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rlhf_kernels
from rlhf_kernels import PPOLossConfig, checks
from rlhf_kernels.integrations._common import entropy, or_nan, promoted

_LOG_RATIO_BOUND = 20.0
_KL_BOUND = 10.0
_KL_WEIGHT_BOUND = 10.0
_DIVERGENCE_EPS = 1e-6  # how far from 0 and 1 the probabilities of a binary divergence are kept
_ESTIMATORS = ("k1", "k2", "k3")


# --- openrlhf.models.utils ---


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [...] of labels [...] under softmax(logits [..., V] / temperature).

    They have the logits' dtype and are differentiable. The logits are never overwritten.
    """
    logprobs = rlhf_kernels.token_logprobs(logits, labels, temperature=temperature)
    return logprobs.to(logits.dtype)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropies [...] of softmax(logits [..., V]), of the logits' dtype, differentiable."""
    return entropy(logits).to(logits.dtype)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """An estimate of the KL divergence per token, bounded to ±10; float32, differentiable.

    Args:
        log_probs, log_probs_base: the same shape.
        log_probs_old: their shape; weights the unbiased gradient by min(ratio, 10); None: by 1.
        kl_estimator: "k1", "k2" or "k3", the value's.
        unbiased_gradient: the gradient is that of weight · k2, which has no bound.

    Raises:
        ValueError: another estimator; shapes or dtypes that do not fit.
    """
    if kl_estimator not in _ESTIMATORS:
        raise ValueError(
            f"kl_estimator is {kl_estimator!r}; choose one of {', '.join(_ESTIMATORS)}"
        )
    if not unbiased_gradient:
        return _bounded_kl(log_probs, log_probs_base, kl_estimator).float()
    with torch.no_grad():
        value = _bounded_kl(log_probs, log_probs_base, kl_estimator)
    through = rlhf_kernels.kl_penalty(log_probs, log_probs_base, estimator="k2")
    if log_probs_old is not None:
        log_ratio = _difference(log_probs, log_probs_old).detach()
        through = through * log_ratio.exp().clamp(max=_KL_WEIGHT_BOUND)
    return (value + (through - through.detach())).float()


# --- openrlhf.models.loss ---


class PolicyLoss(nn.Module):
    """The clipped loss, or GSPO's, with OpenRLHF's corrections of the rollout's probabilities.

    Args:
        clip_eps_low, clip_eps_high: how far below and above 1 the ratio counts; above 0.
        dual_clip: c > 1 bounds the loss of negative advantages at -c·A; None: no.
        token_level_loss: the mean over tokens; False: over sequences of their mean over tokens,
            as always with "gspo".
        policy_loss_type: "ppo", or "gspo": one ratio a sequence, the geometric mean of its tokens'.
        is_correction_level: "off", "token" or "seq": what is weighted by π_old/π_rollout, or left
            out.
        is_correction_mode: "mask" leaves out what is outside of the threshold, "clip" bounds the
            weight to it.
        is_correction_gating: what is compared with the threshold: the weight's "ratio", or the
            divergence "binary_kl" or "tv" between the two policies' choices of this token or not.
        is_correction_threshold: (low, high).

    Raises:
        AssertionError: dual_clip is not above 1.
        ValueError: another name than these, or a combination that has no meaning: "clip" of
            anything but each token's ratio, a divergence bounded from below.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        assert dual_clip is None or dual_clip > 1.0, f"dual_clip is {dual_clip}; it must exceed 1"
        checks.one_of("is_correction_level", is_correction_level, ("off", "token", "seq"))
        checks.one_of("is_correction_mode", is_correction_mode, ("mask", "clip"))
        checks.one_of("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv"))
        of_ratio = is_correction_gating == "ratio"
        if is_correction_mode == "clip" and not (of_ratio and is_correction_level != "seq"):
            raise ValueError(
                "only each token's ratio can be clipped; use is_correction_mode='mask'"
            )
        if is_correction_level != "off" and not of_ratio and is_correction_threshold[0] > 0:
            raise ValueError(
                f"is_correction_threshold is {is_correction_threshold}; a divergence "
                f"({is_correction_gating}) has no bound from below: make the first number 0"
            )
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.dual_clip = dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The loss and what it saw; NaN where a mean is of nothing.

        Args:
            log_probs, old_log_probs, advantages, action_mask: [B, T]; no mask: all are valid.
            rollout_log_probs: [B, T], needed with a correction.
            dp_size: by how many ranks' mean the loss is divided afterwards.
            batch_num_tokens, global_batch_size: the whole batch's tokens and sequences, in place of
                this call's; above 0. dp_size counts with them alone.

        Returns:
            Five 0-dim tensors: the loss, differentiable by log_probs; the fraction of tokens whose
            ratio is clipped; the mean of old - new log-probabilities; and with a correction of
            "ppo", else None, the mean of rollout's - old ones and the fraction filtered out.

        Raises:
            ValueError: another policy_loss_type.
        """
        mask = _as_mask(action_mask, log_probs)
        correction = None
        if self.policy_loss_type == "ppo":
            # Bounded before the kernel, which bounds nothing.
            log_ratio = _difference(log_probs, old_log_probs)
            log_ratio = log_ratio.clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
            if self.is_correction_level != "off":
                correction = _correct(self, old_log_probs, rollout_log_probs, mask)
        elif self.policy_loss_type == "gspo":
            corrected = self.is_correction_level != "off"
            behind = rollout_log_probs if corrected else old_log_probs
            log_ratio = _mean_of_rows(_difference(log_probs, behind), mask, at_least=1)
            log_ratio = log_ratio.expand_as(mask)
        else:
            raise ValueError(f"policy_loss_type is {self.policy_loss_type!r}; use 'ppo' or 'gspo'")
        counts = (dp_size, batch_num_tokens, global_batch_size)
        divisor = _divisor(mask, self.token_level_loss, *counts)
        loss, stats = rlhf_kernels.ppo_loss(
            log_ratio,
            _zeros_like(log_ratio),
            advantages,
            mask,
            importance_weights=correction.weights if correction else None,
            config=PPOLossConfig(
                clip_range=self.clip_eps_low,
                clip_range_high=self.clip_eps_high,
                dual_clip=self.dual_clip,
                aggregation=_aggregation(self.token_level_loss),
            ),
            normalizer=divisor,
        )
        series = (log_probs, old_log_probs, advantages, action_mask)
        dtype = _loss_dtype(
            *(self.token_level_loss, batch_num_tokens, global_batch_size, *series),
            rollout_log_probs if self.is_correction_level != "off" else None,
        )
        clipped = or_nan(stats.clip_fraction, mask.sum()).to(_fraction_dtype(action_mask))
        with torch.no_grad():
            ppo_kl = _mean(_difference(old_log_probs, log_probs), mask)
        ppo_kl = ppo_kl.to(promoted(log_probs, old_log_probs, action_mask))
        loss = or_nan(loss, divisor).to(dtype)
        if correction is None or rollout_log_probs is None:
            return loss, clipped, ppo_kl, None, None
        kl = correction.kl.to(promoted(rollout_log_probs, old_log_probs, action_mask))
        filtered = correction.filtered
        if self.is_correction_level != "seq":
            filtered = filtered.to(_fraction_dtype(action_mask))
        return loss, clipped, ppo_kl, kl, filtered


class ValueLoss(nn.Module):
    """Half the squared error of values.

    Args:
        clip_eps: how far values may be from the old ones; above 0. None: any distance.
        token_level_loss: as in `PolicyLoss`.
    """

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.token_level_loss = token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-dim, differentiable by values; NaN where a mean is of nothing.

        Args:
            values, old_values, returns, action_mask: [B, T]; no mask: all are valid.
            the others: as in `PolicyLoss`.
        """
        mask, zeros = _as_mask(action_mask, values), _zeros_like(values)
        counts = (dp_size, batch_num_tokens, global_batch_size)
        divisor = _divisor(mask, self.token_level_loss, *counts)
        loss, _ = rlhf_kernels.ppo_loss(
            *(zeros, zeros, zeros, mask),  # nothing for the policy's part of the kernel's loss
            values=values,
            old_values=old_values if self.clip_eps is not None else None,
            returns=returns,
            config=PPOLossConfig(
                value_clip_range=self.clip_eps,
                value_coef=1.0,
                aggregation=_aggregation(self.token_level_loss),
            ),
            normalizer=divisor,
        )
        series = (values, returns, action_mask, old_values if self.clip_eps is not None else None)
        dtype = _loss_dtype(self.token_level_loss, batch_num_tokens, global_batch_size, *series)
        return or_nan(loss, divisor).to(dtype)


# --- openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker ---


@torch.no_grad()
def get_advantages_and_returns(
    self: Any,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor | None,
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    """Advantages, not whitened, and returns [B, T].

    Args:
        self: the experience maker, of which nothing is read; anything outside of one.
        values, rewards, action_mask: [B, T]; no mask: all are valid.
        gamma, lambd: the discount and the decay, in [0, 1].

    Every place is a step; at masked ones reward and value are 0, and advantages and returns those
    of such a step.
    """
    dtype = promoted(values, rewards, action_mask)
    wide = checks.compute_dtype(values, rewards)
    mask = _as_mask(action_mask, values)
    advantages, returns = rlhf_kernels.gae(
        torch.where(mask, rewards, 0.0).to(wide),
        torch.where(mask, values, 0.0).to(wide),
        _everywhere(values),
        gamma=gamma,
        lam=lambd,
    )
    return advantages.to(dtype), returns.to(dtype)


# --- what they share ---


class _Correction(NamedTuple):
    """What PolicyLoss does about another engine's sampling.

    weights: [B, T], which multiply each token's loss. kl: the mean of rollout's - old
    log-probabilities. filtered: the fraction of tokens, or sequences, outside of the threshold.
    """

    weights: Tensor
    kl: Tensor
    filtered: Tensor


def _correct(loss: Any, old: Tensor, rollout: Tensor | None, mask: Tensor) -> _Correction:
    """By the settings of `loss`, a PolicyLoss, ours or OpenRLHF's."""
    if rollout is None:
        raise TypeError("rollout_log_probs is None; the correction needs them")
    low, high = loss.is_correction_threshold
    log_weights = _difference(old, rollout).detach()
    of_ratio, per_row = loss.is_correction_gating == "ratio", loss.is_correction_level == "seq"
    gate = log_weights if of_ratio else _divergence(loss.is_correction_gating, old, rollout)
    if per_row:
        gate = _mean_of_rows(gate, mask)  # NaN, which no threshold keeps, for an empty row
    if of_ratio:
        gate = gate.exp()
    kept = (gate >= low) & (gate <= high)
    if loss.is_correction_mode == "clip":
        weights = gate.clamp(low, high)
    else:
        weights = torch.where(kept, log_weights.exp(), 0.0)
    filtered = (~kept).float()
    return _Correction(
        weights,
        _mean(_difference(rollout, old), mask),
        filtered.mean() if per_row else _mean(filtered, mask),
    )


def _divergence(kind: str, old: Tensor, rollout: Tensor) -> Tensor:
    """Between two choices each, this token or not, per token."""
    wide = checks.compute_dtype(old, rollout)
    p, q = (
        each.detach().to(wide).exp().clamp(_DIVERGENCE_EPS, 1 - _DIVERGENCE_EPS)
        for each in (rollout, old)
    )
    if kind == "tv":
        return (p - q).abs()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def _difference(new: Tensor, old: Tensor | None) -> Tensor:
    if old is None:
        raise TypeError("rollout_log_probs is None; the correction needs them")
    wide = checks.compute_dtype(new, old)
    return new.to(wide) - old.to(wide)


def _bounded_kl(log_probs: Tensor, base: Tensor, estimator: str) -> Tensor:
    if estimator == "k3":
        # Bounded first: what overflows has the gradient 0, not 0 · ∞.
        log_ratio = _difference(log_probs, base).clamp(min=-_KL_BOUND)
        value = rlhf_kernels.kl_penalty(log_ratio, _zeros_like(log_ratio), estimator="k3")
    else:
        value = rlhf_kernels.kl_penalty(log_probs, base, estimator=estimator)
    return value.clamp(-_KL_BOUND, _KL_BOUND)


def _everywhere(x: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=x.device).expand(x.shape)


def _as_mask(mask: Tensor | None, like: Tensor) -> Tensor:
    return _everywhere(like) if mask is None else mask.bool()


def _zeros_like(x: Tensor) -> Tensor:
    """In the memory of one number."""
    return x.new_zeros(()).expand_as(x)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return or_nan(rlhf_kernels.masked_mean(x, mask), mask.sum())


def _mean_of_rows(x: Tensor, mask: Tensor, at_least: int = 0) -> Tensor:
    """[B, 1]; at_least: what the divisor is, at least."""
    count = mask.sum(dim=-1, keepdim=True).clamp(min=at_least)
    return torch.where(mask, x, 0.0).sum(dim=-1, keepdim=True) / count


def _aggregation(token_level: bool) -> str:
    return "token-mean" if token_level else "seq-mean-token-mean"


def _divisor(
    mask: Tensor,
    token_level: bool,
    dp_size: int,
    batch_num_tokens: float | Tensor | None,
    global_batch_size: float | Tensor | None,
) -> float | Tensor:
    """By what the sum is divided: this call's count, or the whole batch's for each rank."""
    whole = batch_num_tokens if token_level else global_batch_size
    if isinstance(whole, Tensor):
        return whole.to(mask.device) / dp_size
    if whole is not None:
        return whole / dp_size
    return mask.sum() if token_level else mask.any(dim=-1).sum()


def _loss_dtype(
    token_level: bool,
    batch_num_tokens: float | Tensor | None,
    global_batch_size: float | Tensor | None,
    *tensors: Tensor | None,
) -> torch.dtype:
    """A 0-dim count takes part in OpenRLHF's division, and a float32 mask in that of sequences."""
    whole = batch_num_tokens if token_level else global_batch_size
    dtype = promoted(*tensors, whole if isinstance(whole, Tensor) else None)
    return dtype if token_level else torch.promote_types(dtype, torch.float32)


def _fraction_dtype(mask: Tensor | None) -> torch.dtype:
    """A fraction is the mean of float32 flags times the mask."""
    if mask is None or not mask.is_floating_point():
        return torch.float32
    return torch.promote_types(mask.dtype, torch.float32)
