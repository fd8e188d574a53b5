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
        if 0 in sizes:  # which every rank knows, so that all of them stop
            raise ValueError(
                f"weight has no rows on rank {sizes.index(0)} of the group; expected [V, H] with "
                "V >= 1 on every rank"
            )
        self._first = sum(sizes[: self._group.rank()])
        self._end = self._first + weight.shape[0]
        self.vocabulary = sum(sizes)
        self.largest = max(sizes)

    def own(self, targets: Tensor) -> Tensor:
        """Targets as this rank's columns; those of other ranks as ELSEWHERE."""
        here = (targets >= self._first) & (targets < self._end)
        return torch.where(here, targets - self._first, ELSEWHERE)

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
            # A part of no weight has no mean either: 0·(-inf) counts as 0.
            mean = torch.where(part == 0, 0.0, log_sum - entropy + shift)
            terms.append(part * mean)
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
    sizes = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(sizes, mine, group=group)
    return torch.cat(sizes).tolist()
