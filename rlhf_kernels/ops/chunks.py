"""The output layer in chunks: what all linear operations share.

One chunk of logits exists at a time, in one buffer, and its gradient takes its place there. Ignored
rows are left out of the matrix products, and since their number shapes the products, it is read on
the host: the one wait for the device in this package, taken only by the linear operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import backends, checks
from rlhf_kernels.backends.cpu_extension import in_huge_pages
from rlhf_kernels.ops.products import mm, onednn_is_faster, takes_onednn

if TYPE_CHECKING:
    from rlhf_kernels.ops.shards import Shard

# Enough rows for the matrix products to run at full speed, small beside model and activations.
CPU_CHUNK_BYTES = 64 * 2**20
GPU_CHUNK_BYTES = 256 * 2**20
# Of a part of the weight's gradient in 16 bits, before it is added up in float32.
CPU_PRODUCT_BYTES = 8 * 2**20
GPU_PRODUCT_BYTES = 64 * 2**20
# The row kernels' ignore_index: rows to ignore are in no chunk, and the user's number may be a
# column of a part of the vocabulary.
_NONE_IGNORED = -(2**61)


def default_chunk_size(vocabulary: int, dtype: torch.dtype, device: str) -> int:
    """Rows whose logits take about 64 MiB on a CPU, 256 MiB elsewhere, in multiples of 16.

    Half of it where products come from oneDNN, in memory of their own: there are two chunks then.
    """
    budget = CPU_CHUNK_BYTES if device == "cpu" else GPU_CHUNK_BYTES
    if device == "cpu" and dtype == torch.float32 and onednn_is_faster():
        budget //= 2
    rows = budget // (vocabulary * dtype.itemsize)
    return max(16, rows // 16 * 16)


class Head(NamedTuple):
    """The output layer and how it is computed."""

    weight: Tensor  # [V, H], of this rank
    bias: Tensor | None
    dtype: torch.dtype  # of the products
    chunk_size: int | None
    group: str | None  # the process group over which the vocabulary is split
    backend: str | None


class Chunk(NamedTuple):
    """Some rows: where they stand among those that take part, and what belongs to them."""

    place: slice
    hidden: Tensor  # [n, H], in the products' dtype
    logits: Tensor  # [n, V], valid until the next chunk
    targets: Tensor  # [n]
    temperature: float | Tensor


class Rows:
    """The rows [N] that take part: their chunks of logits, log-probabilities and gradients."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        ignore_index: int,
    ) -> None:
        self._shard = _shard(head)
        # Here, since the row kernels know chunks and would name a chunk's row.
        columns = head.weight.shape[0]
        vocabulary = columns if self._shard is None else self._shard.vocabulary
        checks.targets_in_range(targets, vocabulary, ignore_index)
        checks.temperatures_positive(temperatures, targets, ignore_index)
        valid = (targets != ignore_index).nonzero().squeeze(1)
        # Slices, not gathers, where every row takes part.
        self._index = None if valid.numel() == targets.numel() else valid
        self.count = valid.numel()
        self.head = head
        self._hidden = hidden
        self._targets = targets if self._shard is None else self._shard.own(targets)
        self._temperature, self._temperatures = temperature, temperatures
        self.weight = head.weight.to(head.dtype)
        self._bias = None if head.bias is None else head.bias.to(head.dtype)
        # Ranks take the same chunks, however the vocabulary is split.
        largest = columns if self._shard is None else self._shard.largest
        self._chunk_size = head.chunk_size or default_chunk_size(
            largest, head.dtype, hidden.device.type
        )
        self._buffer: Tensor | None = None
        self._kernels = backends.choose("token_logprobs_forward", self.weight, head.backend)
        self._gradients = backends.choose("token_logprobs_backward", self.weight, head.backend)

    @property
    def in_one_chunk(self) -> bool:
        return self.count <= self._chunk_size

    def pick(self, tensor: Tensor, place: slice) -> Tensor:
        """The rows of a tensor [N, ...] that stand at `place` among those that take part."""
        return tensor[place] if self._index is None else tensor[self._index[place]]

    def put(self, tensor: Tensor, place: slice, rows: Tensor) -> None:
        if self._index is None:
            tensor[place] = rows
        else:
            tensor[self._index[place]] = rows

    def chunks(self) -> Iterator[Chunk]:
        for start in range(0, self.count, self._chunk_size):
            place = slice(start, min(start + self._chunk_size, self.count))
            hidden = self.pick(self._hidden, place).to(self.head.dtype)
            logits = self._products(hidden)
            tau: float | Tensor = self._temperature
            if self._temperatures is not None:
                tau = self.pick(self._temperatures, place)
            yield Chunk(place, hidden, logits, self.pick(self._targets, place), tau)

    def _products(self, hidden: Tensor) -> Tensor:
        """The logits of some rows, in the buffer of all chunks unless oneDNN makes them."""
        columns = self.weight.t()
        if self._bias is None and takes_onednn(hidden, columns):
            return mm(hidden, columns)
        if self._buffer is None:
            rows = min(self._chunk_size, self.count)
            self._buffer = in_huge_pages(hidden.new_empty(rows, columns.shape[1]))
        logits = self._buffer[: hidden.shape[0]]
        if self._bias is None:
            return torch.mm(hidden, columns, out=logits)
        return torch.addmm(self._bias, hidden, columns, out=logits)

    def logprobs(self, chunk: Chunk, need_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-probabilities, entropies and normalization, over the ranks' whole vocabulary."""
        logprobs, entropy, normalization = self._kernels.token_logprobs_forward(
            chunk.logits, chunk.targets, chunk.temperature, _NONE_IGNORED, need_entropy
        )
        if self._shard is None:
            return logprobs, entropy, normalization
        return self._shard.combine(
            logprobs, entropy, normalization, chunk.targets, chunk.temperature
        )

    def logit_gradients(
        self,
        chunk: Chunk,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
        normalization: Tensor,
        entropy: Tensor | None,
    ) -> Tensor:
        """The gradient [n, V], which takes the place of the chunk's logits."""
        return self._gradients.token_logprobs_backward(
            grad_logprobs,
            grad_entropy,
            chunk.logits,
            chunk.targets,
            chunk.temperature,
            _NONE_IGNORED,
            normalization,
            None if grad_entropy is None else entropy,
            out=chunk.logits,
        )

    def add_up_over_ranks(self, tensor: Tensor) -> None:
        if self._shard is not None:
            self._shard.add_up(tensor)


class Gradients:
    """The gradients of hidden, weight and bias, added up over the chunks; empty if not needed."""

    def __init__(self, rows: Rows, hidden: Tensor, needed: list[bool]) -> None:
        self._rows, self._needed, self._dtype = rows, needed, hidden.dtype
        weight, wide = rows.head.weight, wide_dtype(rows.head.dtype)
        # Ranks of a split vocabulary add up their parts: those are not rounded before.
        dtype = hidden.dtype if rows.head.group is None else wide
        self.hidden = hidden.new_zeros(hidden.shape if needed[0] else 0, dtype=dtype)
        self.weight: Tensor | None = None  # until there is a chunk
        self.bias = weight.new_zeros(weight.shape[0] if needed[2] else 0, dtype=wide)

    def add(self, chunk: Chunk, grad_logits: Tensor) -> None:
        if self._needed[0]:
            grad_hidden = mm(grad_logits, self._rows.weight).to(self.hidden.dtype)
            self._rows.put(self.hidden, chunk.place, grad_hidden)
        if self._needed[1]:
            self._add_of_weight(grad_logits.t(), chunk.hidden)
        if self._needed[2]:
            self.bias += grad_logits.sum(dim=0, dtype=self.bias.dtype)

    def _add_of_weight(self, left: Tensor, right: Tensor) -> None:
        weight = self._rows.head.weight
        if self.weight is None:
            # The product of an only chunk is the gradient; nothing is added up, so nothing is lost.
            dtype = left.dtype if self._rows.in_one_chunk else wide_dtype(left.dtype)
            self.weight = in_huge_pages(weight.new_empty(weight.shape, dtype=dtype))
            if dtype == left.dtype:
                torch.mm(left, right, out=self.weight)
                return
            self.weight.zero_()
        _add_product(self.weight, left, right)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of what they are the gradients of."""
        if self._needed[0]:
            self._rows.add_up_over_ranks(self.hidden)
        head = self._rows.head
        bias_dtype = head.weight.dtype if head.bias is None else head.bias.dtype
        return (
            self.hidden.to(self._dtype),
            self._of_weight(),
            self.bias.to(bias_dtype),
        )

    def _of_weight(self) -> Tensor:
        weight = self._rows.head.weight
        if self.weight is None:
            return weight.new_zeros(weight.shape if self._needed[1] else 0)
        if weight.dtype == self.weight.dtype:
            return self.weight
        return in_huge_pages(torch.empty_like(self.weight, dtype=weight.dtype)).copy_(self.weight)


def _shard(head: Head) -> Shard | None:
    if head.group is None:
        return None
    from rlhf_kernels.ops.shards import Shard  # which needs torch.distributed

    return Shard(head.group, head.weight)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total is float32 or wider whatever the factors are."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    # In parts, as the narrow product of a whole weight would take half as much memory as `total`.
    budget = CPU_PRODUCT_BYTES if total.device.type == "cpu" else GPU_PRODUCT_BYTES
    rows = max(256, budget // (total.shape[1] * left.dtype.itemsize))
    for part, factor in zip(total.split(rows), left.split(rows)):
        part += torch.mm(factor, right)


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The shapes of `Gradients.finish`."""
    grad_hidden = hidden.new_empty(hidden.shape if needed[0] else 0)
    grad_weight = weight.new_empty(weight.shape if needed[1] else 0)
    grad_bias = (weight if bias is None else bias).new_empty(weight.shape[0] if needed[2] else 0)
    return grad_hidden, grad_weight, grad_bias


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(tensor: Tensor) -> torch.autocast:
    """The products' dtype was decided above; autocast must not decide it again inside."""
    return torch.autocast(tensor.device.type, enabled=False)
