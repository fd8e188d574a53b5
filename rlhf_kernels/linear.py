"""Log-probabilities and cross-entropy from hidden states, without the whole logits in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.ops.chunks import wide_dtype
from rlhf_kernels.ops.formed_gradients import needs_gradients
from rlhf_kernels.ops.linear_losses import linear_cross_entropy as _linear_cross_entropy
from rlhf_kernels.ops.linear_token_logprobs import linear_token_logprobs as _linear_token_logprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    group: ProcessGroup | None = ...,
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
    group: ProcessGroup | None = ...,
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
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits hidden · weightᵀ + bias, one chunk of rows at a time.

    The backward computes each chunk of logits again; where the loss is cross-entropy or the PPO
    loss, `linear_cross_entropy` and `linear_ppo_loss` need not. Rows with ignore_index take part in
    no matrix product; on a GPU their number is read by the host, once forward and once backward.

    Args:
        hidden: [..., H], float32, bfloat16, float16, or float64 (reference backend).
        weight: [V, H], bias: [V] or None. Under autocast the products run in autocast's dtype,
            else hidden, weight and bias must share theirs. The weight's gradient is summed over the
            chunks in float32 and comes in the weight's dtype. A weight sharded by FSDP2 is gathered
            before (see docs/kernels.md).
        targets, temperature, return_entropy, ignore_index, backend: as in `token_logprobs`.
        chunk_size: rows at a time; None takes as many as fit logits of 64 MiB on a CPU and 256 MiB
            elsewhere, at least 16.
        group: a process group over which the vocabulary is split: each rank passes its own rows of
            weight and bias, in the ranks' order, and the same hidden, targets and temperature,
            where targets count over the whole vocabulary. Every rank gets the whole results, and
            hidden's whole gradient. All ranks must call it, forward and backward.

    Returns:
        logprobs [...], or (logprobs, entropy), float32 (float64 for float64 inputs),
        differentiable by hidden, weight and bias.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or targets that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    dtype = check_linear(hidden, weight, bias, targets, chunk_size, group)
    targets = checks.as_targets(targets)
    number, per_row = checks.split_temperature(temperature, targets, wide_dtype(dtype))
    logprobs, entropy, _ = _linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1).contiguous(),
        number,
        per_row,
        ignore_index,
        return_entropy,
        dtype,
        chunk_size,
        group_name(group),
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
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the targets under the logits hidden · weightᵀ + bias.

    The gradient is formed with the loss, chunk by chunk, and the backward only scales it: three
    matrix products in all. A second backward, through a graph that was retained, forms it again. In
    float16, where a loss scale has to come first, the backward forms it: four products.

    Args:
        hidden, weight, targets, bias, ignore_index, chunk_size, group, backend: as in
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
    dtype = check_linear(hidden, weight, bias, targets, chunk_size, group)
    divisor = checks.as_normalizer(normalizer, hidden.new_empty((), dtype=wide_dtype(dtype)))
    needed = needs_gradients(hidden, weight, bias)
    if waits_for_loss_scale(dtype, needed):
        logprobs = linear_token_logprobs(
            *(hidden, weight, targets),
            bias=bias,
            ignore_index=ignore_index,
            chunk_size=chunk_size,
            group=group,
            backend=backend,
        )
        if divisor is None and reduction == "mean":
            divisor = (targets != ignore_index).sum().clamp(min=1)
        return -logprobs.sum() if divisor is None else -logprobs.sum() / divisor
    loss, *_ = _linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        checks.as_targets(targets).reshape(-1).contiguous(),
        ignore_index,
        divisor,
        reduction == "mean",
        dtype,
        chunk_size,
        group_name(group),
        backend,
        needed,
    )
    return loss


def waits_for_loss_scale(dtype: torch.dtype, needed: list[bool]) -> bool:
    """Whether a gradient must not be formed before the backward brings the upstream one.

    Divided by a number of tokens it falls below float16's normal numbers: that is what losses are
    scaled for. The backward then computes each chunk's logits again, a fourth product.
    """
    return dtype == torch.float16 and any(needed)


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk_size: int | None,
    group: ProcessGroup | None,
) -> torch.dtype:
    """Raise for what does not fit together, else return the dtype of the products."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        checks.gathered(name, tensor)
    checks.floating(hidden=hidden, weight=weight, bias=bias)
    checks.dimensions("weight", weight, 2, "[V, H]")
    vocabulary, width = weight.shape
    # Of a group's ranks one alone must not stop: all of them do, once they know the others' parts.
    if width == 0 or (vocabulary == 0 and group is None):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected [V, H] with V >= 1 and H >= 1"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != width:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; expected [..., {width}], "
            f"the width of weight {tuple(weight.shape)}"
        )
    checks.shape("targets", targets, hidden.shape[:-1], "the shape of hidden without the last")
    if bias is not None:
        checks.shape("bias", bias, (vocabulary,), "one for each row of weight")
    checks.same_device("hidden", hidden, weight=weight, targets=targets, bias=bias)
    whole = isinstance(chunk_size, (int, torch.SymInt)) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (whole and chunk_size >= 1):
        raise ValueError(f"chunk_size is {chunk_size!r}; expected a whole number from 1, or None")
    return _product_dtype(hidden, weight, bias)


def group_name(group: ProcessGroup | None) -> str | None:
    """What stands for a group in an operator's schema."""
    if group is None:
        return None
    # Not hasattr: torch.compile of PyTorch 2.11 knows no such question to a group.
    name = getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(
            f"group is {group!r}; expected a process group, as torch.distributed.new_group gives"
        )
    return name


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
