"""TRL 1.16.0's functions on our kernels: see `rlhf_kernels.integrations.trl`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.integrations import _trl_samples as samples
from rlhf_kernels.integrations._deferred_logits import NEVER
from rlhf_kernels.integrations._patching import Patch, Peer, Replacement
from rlhf_kernels.linear import linear_token_logprobs
from rlhf_kernels.logprobs import token_logprobs

_OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_LEFT_TO_TRL = {"log_sum_sq_probs", "mean_logits", "is_top1"}


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """The log-probabilities of chosen classes under softmax(logits / temperature).

    Args:
        logits: [..., V], floating-point.
        index: [...], or [..., K] for K classes of each row; integers in [0, V), any where masked.
        temperature: a number above 0.
        row_mask: index's shape, bool or numbers; the result is 0 where it is 0, and with one class
            a row the gradient too, whatever the logits.

    Returns:
        index's shape, differentiable: of the logits' dtype on a CPU, and for K classes; float32
        (float64 for float64) elsewhere, where TRL runs on Triton. Sums are taken in float32 or
        wider.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, classes or a temperature that do not fit.
    """
    if index.dim() < logits.dim():
        index = _masked(index, row_mask, NEVER)
        found = token_logprobs(logits, index, temperature=temperature, ignore_index=NEVER)
        return found.to(_result_dtype(logits))
    index = _masked(index, row_mask, 0)
    # All K of a row lie as far from their logits as the likeliest class, which is always finite.
    highest = logits.detach().argmax(dim=-1)
    of_highest = token_logprobs(logits, highest, temperature=temperature)[..., None]
    wide = of_highest.dtype
    below = logits.gather(-1, index).to(wide) - logits.gather(-1, highest[..., None]).to(wide)
    found = (of_highest + below / temperature).to(logits.dtype)
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of each row's softmax, in nats.

    Args:
        logits: [..., V], floating-point. A logit of -inf adds 0, where TRL's result is NaN.
        chunk_size: TRL's rows at a time. The kernels need no chunks: it has no effect.

    Returns:
        [...], of the dtype of `selective_log_softmax`, differentiable.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    first = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return selective_log_softmax_and_entropy(logits, first)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of softmax(logits / temperature), of one pass.

    Args:
        logits, temperature, row_mask: as in `selective_log_softmax`.
        index: [...], integers in [0, V), any where masked.
        entropy_requires_grad: whether a gradient flows through the entropies.

    Returns:
        Both [...], 0 where masked, of the dtype of `selective_log_softmax`.

    Raises:
        ValueError, TypeError: as `selective_log_softmax`.
    """
    logprobs, entropy = token_logprobs(
        *(logits, _masked(index, row_mask, NEVER)),
        temperature=temperature,
        return_entropy=True,
        ignore_index=NEVER,
    )
    dtype = _result_dtype(logits)
    return logprobs.to(dtype), (entropy if entropy_requires_grad else entropy.detach()).to(dtype)


class ChunkedLogProbFunction:
    """What `add_fused_lm_head` calls, by `apply`, for the tokens of a model's hidden states."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities of targets under logits (hidden · weightᵀ + bias) · scale/temperature.

        TRL's own function answers where it is asked for more than entropies beside them, the logits
        are capped or their scale is not above 0, or the weight is partitioned by ZeRO-3.

        Args:
            hidden: [N, H], floating-point. weight: [V, H], bias: [V] or None, copied whole into
                its dtype where theirs differs. Under autocast the products run in autocast's dtype.
            targets: [N], integers in [0, V).
            temperature: a number above 0.
            chunk_size: TRL's columns at a time; without effect, as the chunks here are of rows.
            final_logit_softcapping: the bound of the logits, or None.
            logit_scale: what multiplies the logits.
            outputs: the names of what is computed beside the log-probabilities.

        Returns:
            Log-probabilities and entropies [N], float32, differentiable by hidden, weight and bias;
            log_sum_sq_probs, mean_logits and is_top1. None for what outputs does not name.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices, targets or numbers that do not fit.
        """
        left_to_trl = final_logit_softcapping is not None or _LEFT_TO_TRL & set(outputs)
        if left_to_trl or logit_scale <= 0 or hasattr(weight, "ds_id"):
            rest = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            found: tuple[Tensor | None, ...] = _their_head().apply(
                hidden, weight, bias, targets, *rest
            )
            return found
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        settings: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature / logit_scale,
            "ignore_index": NEVER,
        }
        if "entropy" not in outputs:
            logprobs = linear_token_logprobs(hidden, weight, targets, **settings)
            return logprobs.float(), None, None, None, None
        logprobs, entropy = linear_token_logprobs(
            hidden, weight, targets, return_entropy=True, **settings
        )
        return logprobs.float(), entropy.float(), None, None, None


def _masked(index: Tensor, row_mask: Tensor | None, filler: int) -> Tensor:
    """The index, with a filler where the mask is 0."""
    index = checks.as_targets(index)
    if row_mask is None:
        return index
    checks.like("index", index, row_mask=row_mask)
    return index.masked_fill(row_mask == 0, filler)


def _result_dtype(logits: Tensor) -> torch.dtype:
    on_cpu = logits.device.type == "cpu"
    return logits.dtype if on_cpu else torch.promote_types(logits.dtype, torch.float32)


def _their_head() -> Any:
    """TRL's own class: what it imports under that name is ours while it is patched."""
    if PATCH.active:
        return PATCH.theirs(ChunkedLogProbFunction)
    return importlib.import_module("trl.kernels").ChunkedLogProbFunction


_UTILS = "trl.trainer.utils"

PATCH = Patch(
    Peer("trl", "trl", since="1.16", before="2"),
    [
        Replacement(_UTILS, selective_log_softmax, samples.scaled_logprobs),
        Replacement(_UTILS, entropy_from_logits, samples.entropy),
        Replacement(_UTILS, selective_log_softmax_and_entropy, samples.logprobs_and_entropy),
        Replacement("trl.kernels.chunked_logprob", ChunkedLogProbFunction, samples.fused_head),
    ],
)
