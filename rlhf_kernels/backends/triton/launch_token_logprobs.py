"""What is allocated and launched around the row kernels of `token_logprobs`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends.triton import token_logprobs as kernels
from rlhf_kernels.backends.triton.tensors import MOST_COLUMNS, processors, unit_columns, vector

VECTOR_BYTES = 16
# Four vectors in flight for each of a program's 128 threads.
BLOCK_VECTORS = 512
NUM_WARPS = 4
# A program holds little of a multiprocessor; fewer than this many leave its memory pipes idle.
PROGRAMS_PER_PROCESSOR = 8
MOST_PARTS = 64


def parts_of_rows(rows: int, blocks: int, multiprocessors: int) -> int:
    """Into how many programs to divide each row of `blocks` blocks: few rows fill a GPU too."""
    wanted = PROGRAMS_PER_PROCESSOR * multiprocessors // rows
    wanted = max(1, min(wanted, blocks, MOST_PARTS))
    return triton.cdiv(blocks, triton.cdiv(blocks, wanted))  # none of them empty


def token_logprobs_forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    need_entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probabilities [N], entropies [N] (or None), normalization [N, 2] of the rows of [N, V].

    The normalization of an ignored row is 0. A target out of range raises on a CPU; on a GPU its
    row's log-probability is undefined, but nothing outside of the row is read.
    """
    logits = unit_columns(logits)
    rows, columns = logits.shape
    _check(logits, targets, ignore_index)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    normalization = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs) if need_entropy else None
    if rows == 0:
        return logprobs, entropy, normalization
    view = _rows(logits)
    aligned = view.begins_and_ends(columns)
    per_row, number = _temperature(temperature)
    row = (*view.arguments, columns, targets.contiguous(), per_row, number, ignore_index)
    outputs = (normalization, logprobs, entropy)
    shape = {"BLOCK": view.block, "VECTOR": view.vector, "ALIGNED": aligned, "num_warps": NUM_WARPS}
    blocks = view.blocks(columns, aligned)
    parts = parts_of_rows(rows, blocks, processors(logits.device))
    with torch.cuda.device_of(logits):
        if parts == 1:
            kernels.forward_kernel[(rows,)](*row, *outputs, **shape)
        else:
            sums = torch.empty(rows, parts, 3, dtype=torch.float32, device=logits.device)
            part = triton.cdiv(blocks, parts)
            kernels.partial_kernel[(rows, parts)](*row, part, sums, ENTROPY=need_entropy, **shape)
            kernels.combine_kernel[(rows,)](
                *row, *outputs, sums, parts, MOST_PARTS=MOST_PARTS, num_warps=1
            )
    return logprobs, entropy, normalization


def token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    normalization: Tensor,
    entropy: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient [N, V] of the logits, in their dtype; `out` may be `logits` itself."""
    if out is not None and out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out has strides {out.stride()}; expected columns side by side")
    logits = unit_columns(logits)
    rows, columns = logits.shape
    _check(logits, targets, ignore_index)
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if rows == 0:
        return out
    view, out_view = _rows(logits), _rows(out)
    aligned = view.begins_and_ends(columns) and out_view.begins_and_ends(columns)
    blocks = view.blocks(columns, aligned)
    per_row, number = _temperature(temperature)
    with torch.cuda.device_of(logits):
        kernels.backward_kernel[(rows * blocks,)](
            *view.arguments,
            *out_view.arguments,
            columns,
            blocks,
            targets.contiguous(),
            per_row,
            number,
            ignore_index,
            vector(normalization),
            None if entropy is None else vector(entropy),
            vector(grad_logprobs),
            None if grad_entropy is None else vector(grad_entropy),
            BLOCK=view.block,
            VECTOR=view.vector,
            ALIGNED=aligned,
            SAME_HEAD=view.same_head(out_view),
            num_warps=NUM_WARPS,
        )
    return out


class _Rows(NamedTuple):
    """Rows as the kernels address them: from a 16-byte boundary at or below the first of them."""

    base: Tensor
    first: int  # elements between the boundary and the first row
    stride: int
    vector: int  # elements of 16 bytes

    @property
    def arguments(self) -> tuple[Tensor, int, int]:
        return self.base, self.first, self.stride

    @property
    def block(self) -> int:
        return BLOCK_VECTORS * self.vector

    def begins_and_ends(self, columns: int) -> bool:
        """Whether every row begins and ends on a boundary."""
        return self.first == 0 and self.stride % self.vector == 0 and columns % self.vector == 0

    def blocks(self, columns: int, aligned: bool) -> int:
        """Blocks that hold any row, from the boundary at or below its beginning on."""
        return triton.cdiv(columns + (0 if aligned else self.vector - 1), self.block)

    def same_head(self, other: _Rows) -> bool:
        """Whether each row begins as far behind a boundary as the other's does."""
        return (self.first - other.first) % self.vector == 0 and (
            self.stride - other.stride
        ) % self.vector == 0


def _rows(x: Tensor) -> _Rows:
    elements = VECTOR_BYTES // x.element_size()
    first = x.data_ptr() % VECTOR_BYTES // x.element_size()
    if first > x.storage_offset():
        raise ValueError("memory that does not begin on a 16-byte boundary; clone the tensor")
    base = x.as_strided((1,), (1,), x.storage_offset() - first)
    return _Rows(base, first, x.stride(0), elements)


def _check(logits: Tensor, targets: Tensor, ignore_index: int) -> None:
    checks.targets_in_range(targets, logits.shape[1], ignore_index)
    if logits.shape[1] > MOST_COLUMNS:
        raise ValueError(f"logits has {logits.shape[1]} columns; the most are {MOST_COLUMNS}")


def _temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        return vector(temperature), 1.0
    return None, float(temperature)
