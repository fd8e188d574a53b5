"""A vocabulary split over the ranks of a process group, in the ranks' order.

Every rank holds all rows and some columns of the logits. Maxima, then sums and the target's term,
are reduced over the ranks: two small collectives a chunk, nothing of the vocabulary's size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from rlhf_kernels.checks import ELSEWHERE


class Shard:
    """This rank's columns among those of all ranks."""

    def __init__(self, group: str, weight: Tensor) -> None:
        self._group = _resolve_process_group(group)  # type: ignore[arg-type]
        sizes = _sizes(self._group, weight)
        self._first = sum(sizes[: self._group.rank()])
        self._end = self._first + weight.shape[0]
        self.vocabulary = sum(sizes)
        self.largest = max(sizes)

    def own(self, targets: Tensor, ignore_index: int) -> Tensor:
        """Targets as this rank's columns; those of other ranks as ELSEWHERE."""
        here = (targets >= self._first) & (targets < self._end)
        mine = torch.where(here, targets - self._first, ELSEWHERE)
        return torch.where(targets == ignore_index, ignore_index, mine)

    def combine(
        self,
        logprobs: Tensor,
        entropy: Tensor | None,
        normalization: Tensor,
        targets: Tensor,
        temperature: float | Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Results over all columns, from results over this rank's.

        With d = (z - max)/τ and this rank's part S_r of Σ e^d, the mean of d over this rank's own
        softmax is log S_r - entropy.
        """
        local_max, log_sum = normalization.unbind(dim=1)
        maximum = local_max.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self._group)
        shift = (local_max - maximum) / temperature
        # A part of nothing but -inf is NaN by itself, but adds nothing to others.
        empty = local_max == -torch.inf
        part = torch.where(empty, 0.0, (shift + log_sum).exp())
        of_target = torch.where(empty, -torch.inf, logprobs + log_sum + shift)
        terms = [part, torch.where(targets == ELSEWHERE, 0.0, of_target)]
        if entropy is not None:
            terms.append(torch.where(empty, 0.0, part * (log_sum - entropy + shift)))
        sums = torch.stack(terms)
        dist.all_reduce(sums, group=self._group)
        log_total = sums[0].log()
        whole_entropy = None if entropy is None else log_total - sums[2] / sums[0]
        whole = torch.stack([maximum, log_total], dim=1)
        return sums[1] - log_total, whole_entropy, whole

    def add_up(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self._group)


def _sizes(group: dist.ProcessGroup, weight: Tensor) -> list[int]:
    """The ranks' numbers of columns; the host reads them."""
    mine = torch.tensor([weight.shape[0]], device=weight.device)
    sizes = mine.new_empty(group.size())
    dist.all_gather_into_tensor(sizes, mine, group=group)
    return sizes.tolist()
