"""Log-probabilities of chosen tokens from logits."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.ops.token_logprobs import token_logprobs as _token_logprobs


@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    return_entropy: Literal[False] = ...,
    ignore_index: int = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    return_entropy: Literal[True],
    ignore_index: int = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(logits / temperature), and its entropy.

    Args:
        logits: [..., V], float32, bfloat16, float16, or float64 (reference backend). Slices and
            expanded tensors are read where they lie, as long as the last dimension has no gaps.
        targets: [...], integers in [0, V) or ignore_index. On a CPU anything else raises; on a
            GPU the row's result is undefined.
        temperature: a positive number, or a tensor of the targets' shape or 0-dim (no gradient): on
            a CPU what is not positive raises, except in ignored rows.
        return_entropy: also return the entropy of each row's distribution.
        ignore_index: rows with this target give 0, and a gradient of 0, whatever their logits.
        backend: see `rlhf_kernels.backends`.

    Returns:
        logprobs [...], or (logprobs, entropy), float32 (float64 for float64 logits). Both are
        differentiable by the logits.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or targets that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    checks.floating(logits=logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected [..., V] with V >= 1")
    checks.shape("targets", targets, logits.shape[:-1], "the shape of logits without the last")
    checks.same_device("logits", logits, targets=targets)
    targets = checks.as_targets(targets)
    number, per_row = checks.split_temperature(temperature, targets, checks.compute_dtype(logits))
    logprobs, entropy, _ = _token_logprobs(
        _groups_of_rows(logits),
        targets.reshape(-1).contiguous(),
        number,
        per_row,
        ignore_index,
        return_entropy,
        backend,
    )
    if return_entropy:
        return logprobs.view(targets.shape), entropy.view(targets.shape)
    return logprobs.view(targets.shape)


def _groups_of_rows(logits: Tensor) -> Tensor:
    """The rows as [G, N, V], G = 1 where one stride leads from row to row.

    A slice such as `logits[:, :-1]` needs two. A copy is made only where the columns are apart, or
    more than two strides would be needed.
    """
    vocabulary = logits.shape[-1]
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() == 3 and logits.numel() > 0 and not _one_stride(logits):
        return logits
    return logits.reshape(1, -1, vocabulary)


def _one_stride(logits: Tensor) -> bool:
    """Whether the rows of [B, T, V] are the same distance apart throughout."""
    batch, length, _ = logits.shape
    return batch == 1 or length == 1 or logits.stride(0) == length * logits.stride(1)
