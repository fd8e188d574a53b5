"""Log-probabilities and cross-entropy from hidden states, without the whole logits in memory."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.ops.linear_token_logprobs import default_chunk_size
from rlhf_kernels.ops.linear_token_logprobs import linear_token_logprobs as _linear_token_logprobs


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    return_entropy: Literal[False] = ...,
    ignore_index: int = ...,
    chunk_size: int | None = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    return_entropy: Literal[True],
    ignore_index: int = ...,
    chunk_size: int | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits hidden · weightᵀ + bias, one chunk of rows at a time.

    The backward computes each chunk of logits again. Rows with ignore_index take part in no matrix
    product; on a GPU their number is read by the host, once forward and once backward.

    Args:
        hidden: [..., H], float32, bfloat16, float16, or float64 (reference backend).
        weight: [V, H], bias: [V] or None. Under autocast the products run in autocast's dtype,
            else hidden, weight and bias must share theirs. The weight's gradient is summed over the
            chunks in float32 and comes in the weight's dtype.
        targets, temperature, return_entropy, ignore_index, backend: as in `token_logprobs`.
        chunk_size: rows at a time; None takes as many as fit logits of 64 MiB, at least 16.

    Returns:
        logprobs [...], or (logprobs, entropy), float32 (float64 for float64 inputs),
        differentiable by hidden, weight and bias.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or targets that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    checks.floating(hidden=hidden, weight=weight, bias=bias)
    checks.dimensions("weight", weight, 2, "[V, H]")
    vocabulary, width = weight.shape
    if vocabulary == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [V, H] with V >= 1")
    if hidden.dim() == 0 or hidden.shape[-1] != width:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; expected [..., {width}], "
            f"the width of weight {tuple(weight.shape)}"
        )
    checks.shape("targets", targets, hidden.shape[:-1], "the shape of hidden without the last")
    if bias is not None:
        checks.shape("bias", bias, (vocabulary,), "one for each row of weight")
    checks.same_device("hidden", hidden, weight=weight, targets=targets, bias=bias)
    targets = checks.as_targets(targets)
    dtype = _product_dtype(hidden, weight, bias)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    number, per_row = checks.split_temperature(temperature, targets, wide)
    if chunk_size is None:
        chunk_size = default_chunk_size(vocabulary, dtype)
    elif chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}; expected at least 1, or None")
    logprobs, entropy, _ = _linear_token_logprobs(
        hidden.reshape(-1, width),
        weight,
        bias,
        targets.reshape(-1).contiguous(),
        number,
        per_row,
        ignore_index,
        return_entropy,
        dtype,
        chunk_size,
        backend,
    )
    if return_entropy:
        return logprobs.view(targets.shape), entropy.view(targets.shape)
    return logprobs.view(targets.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the targets under the logits hidden · weightᵀ + bias.

    Args:
        hidden, weight, targets, bias, ignore_index, chunk_size, backend: as in
            `linear_token_logprobs`.
        reduction: "mean" over the targets that are not ignored (0 if all are), or "sum".
        normalizer: divides the sum in place of the count, whatever the reduction, so that
            micro-batches and ranks can add up to the mean of the whole batch.

    Returns:
        The loss, 0-dim, float32 (float64 for float64 inputs).

    Raises:
        As `linear_token_logprobs`; ValueError for an unknown reduction or a normalizer <= 0.
    """
    checks.one_of("reduction", reduction, ("mean", "sum"))
    logprobs = linear_token_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        backend=backend,
    )
    total = -logprobs.sum()
    divisor = checks.as_normalizer(normalizer, total)
    if divisor is not None:
        return total / divisor
    if reduction == "sum":
        return total
    return total / (targets != ignore_index).sum().clamp(min=1)


def _product_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} and hidden {hidden.dtype}; "
                f"expected one dtype for both, or autocast"
            )
    return hidden.dtype
