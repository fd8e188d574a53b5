"""`rlhf_kernels::linear_token_logprobs`: the output layer and the row kernel, chunk by chunk.

One chunk of logits exists at a time, in one buffer; the backward computes it again and turns it
into its gradient in place. Ignored rows are left out of the matrix products, and since their number
shapes the products, it is read on the host: the one wait for the device in this package, taken only
by the linear operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backends, checks
from rlhf_kernels.ops import define

# Enough rows for the matrix product to run at full speed, small beside model and activations.
CHUNK_BYTES = 64 * 2**20


def default_chunk_size(vocabulary: int, dtype: torch.dtype) -> int:
    """Rows whose logits take about CHUNK_BYTES, in multiples of 16."""
    rows = CHUNK_BYTES // (vocabulary * dtype.itemsize)
    return max(16, rows // 16 * 16)


class _Rows:
    """The rows that take part, in chunks: hidden states, logits and what belongs to them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        ignore_index: int,
        dtype: torch.dtype,
        chunk_size: int,
    ) -> None:
        valid = (targets != ignore_index).nonzero().squeeze(1)
        # Slices, not gathers, where every row takes part.
        self.index = None if valid.numel() == targets.numel() else valid
        self.count = valid.numel()
        self.hidden, self.targets = hidden, targets
        self.temperature, self.temperatures = temperature, temperatures
        self.dtype = dtype
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.chunk_size = chunk_size
        rows = min(chunk_size, self.count)
        self._logits = hidden.new_empty(rows, weight.shape[0], dtype=dtype)

    def pick(self, tensor: Tensor, chunk: slice) -> Tensor:
        return tensor[chunk] if self.index is None else tensor[self.index[chunk]]

    def put(self, tensor: Tensor, chunk: slice, rows: Tensor) -> None:
        if self.index is None:
            tensor[chunk] = rows
        else:
            tensor[self.index[chunk]] = rows

    def tau(self, chunk: slice) -> float | Tensor:
        return (
            self.temperature if self.temperatures is None else self.pick(self.temperatures, chunk)
        )

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(place, hidden states, logits) of each chunk; the logits live until the next one."""
        for start in range(0, self.count, self.chunk_size):
            chunk = slice(start, min(start + self.chunk_size, self.count))
            hidden = self.pick(self.hidden, chunk).to(self.dtype)
            logits = self._logits[: chunk.stop - chunk.start]
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            yield chunk, hidden, logits


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    need_entropy: bool,
    dtype: torch.dtype,
    chunk_size: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Here, since the row kernels know chunks and would name a chunk's row.
    checks.targets_in_range(targets, weight.shape[0], ignore_index)
    checks.temperatures_positive(temperatures, targets, ignore_index)
    with torch.no_grad(), _no_autocast(hidden):
        rows = _Rows(
            hidden,
            weight,
            bias,
            targets,
            temperature,
            temperatures,
            ignore_index,
            dtype,
            chunk_size,
        )
        chosen = backends.choose("token_logprobs_forward", rows.weight, backend)
        logprobs = hidden.new_zeros(hidden.shape[0], dtype=_wide(dtype))
        entropy = torch.zeros_like(logprobs) if need_entropy else logprobs.new_empty(0)
        normalization = logprobs.new_zeros(hidden.shape[0], 2)
        for chunk, _, logits in rows.chunks():
            picked = rows.pick(targets, chunk)
            part = chosen.token_logprobs_forward(
                logits, picked, rows.tau(chunk), ignore_index, need_entropy
            )
            rows.put(logprobs, chunk, part[0])
            if need_entropy:
                rows.put(entropy, chunk, part[1])
            rows.put(normalization, chunk, part[2])
    return logprobs, entropy, normalization


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    need_entropy: bool,
    dtype: torch.dtype,
    chunk_size: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    normalization = hidden.new_empty(rows, 2, dtype=_wide(dtype))
    entropy = normalization.new_empty(rows if need_entropy else 0)
    return normalization.new_empty(rows), entropy, normalization


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    normalization: Tensor,
    entropy: Tensor | None,
    dtype: torch.dtype,
    chunk_size: int,
    backend: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; empty where `needed` says no."""
    with torch.no_grad(), _no_autocast(hidden):
        rows = _Rows(
            hidden,
            weight,
            bias,
            targets,
            temperature,
            temperatures,
            ignore_index,
            dtype,
            chunk_size,
        )
        chosen = backends.choose("token_logprobs_backward", rows.weight, backend)
        wide = _wide(dtype)
        grad_hidden = hidden.new_zeros(hidden.shape) if needed[0] else hidden.new_empty(0)
        grad_weight = weight.new_zeros(weight.shape if needed[1] else 0, dtype=wide)
        grad_bias = weight.new_zeros(weight.shape[0] if needed[2] else 0, dtype=wide)
        for chunk, hidden_rows, logits in rows.chunks():
            grad_logits = chosen.token_logprobs_backward(
                rows.pick(grad_logprobs, chunk),
                None if grad_entropy is None else rows.pick(grad_entropy, chunk),
                logits,
                rows.pick(targets, chunk),
                rows.tau(chunk),
                ignore_index,
                rows.pick(normalization, chunk),
                None if entropy is None else rows.pick(entropy, chunk),
                out=logits,
            )
            if needed[0]:
                rows.put(grad_hidden, chunk, torch.mm(grad_logits, rows.weight).to(hidden.dtype))
            if needed[1]:
                _add_product(grad_weight, grad_logits.t(), hidden_rows)
            if needed[2]:
                grad_bias += grad_logits.sum(dim=0, dtype=wide)
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)


def _backward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    normalization: Tensor,
    entropy: Tensor | None,
    dtype: torch.dtype,
    chunk_size: int,
    backend: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden = hidden.new_empty(hidden.shape) if needed[0] else hidden.new_empty(0)
    grad_weight = weight.new_empty(weight.shape if needed[1] else 0)
    grad_bias = (weight if bias is None else bias).new_empty(weight.shape[0] if needed[2] else 0)
    return grad_hidden, grad_weight, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, temperature, temperatures, ignore_index, need_entropy = inputs[
        :8
    ]
    _, entropy, normalization = output
    constant = (normalization,) if need_entropy else (entropy, normalization)
    ctx.mark_non_differentiable(*constant)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, temperatures, entropy, normalization)
    ctx.options = (temperature, ignore_index, need_entropy, *inputs[8:])


def _autograd_backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, temperatures, entropy, normalization = ctx.saved_tensors
    temperature, ignore_index, need_entropy, dtype, chunk_size, backend = ctx.options
    if grad_logprobs is None:
        if grad_entropy is None:
            return (None,) * 11
        grad_logprobs = normalization.new_zeros(targets.shape)
    if not need_entropy or grad_entropy is None:
        grad_entropy = entropy = None
    needed = [ctx.needs_input_grad[i] for i in range(3)]
    gradients = linear_token_logprobs_backward(
        hidden,
        weight,
        bias,
        targets,
        grad_logprobs,
        grad_entropy,
        temperature,
        temperatures,
        ignore_index,
        normalization,
        entropy,
        dtype,
        chunk_size,
        backend,
        needed,
    )
    kept = [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
    return (*kept, *([None] * 8))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total is float32 or wider whatever the factors are."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """The dtype was decided above; autocast must not decide it again inside."""
    return torch.autocast(tensor.device.type, enabled=False)


linear_token_logprobs_backward = define("linear_token_logprobs_backward", _backward, _backward_fake)
linear_token_logprobs = define(
    "linear_token_logprobs", _forward, _forward_fake, _setup_context, _autograd_backward
)
