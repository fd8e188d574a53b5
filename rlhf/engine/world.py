"""Ranks and devices: the only place that knows how many processes train together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes that train together: one for now.

    Normalisers (token and sequence counts) are summed over it, so that a trainer written against it
    computes the same loss however the batch is spread.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device of this rank: its GPU if there is one, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum of the tensor over all ranks; the tensor itself with one rank."""
        return tensor
