"""Ranks and devices: the only place that knows how many processes train together."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kernels import backends


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


def check_kernels(*primitives: str) -> None:
    """Check, before anything slow, that RLHF_KERNELS_BACKEND can do the work if it is set.

    Raises:
        BackendUnavailableError: It names a backend that does not exist or cannot run here.
        UnsupportedOperationError: It names one that lacks a primitive.
    """
    if os.environ.get(backends.ENVIRONMENT_VARIABLE):
        tensor = torch.empty(0, device=World().device)
        for primitive in primitives:
            backends.choose(primitive, tensor, None)
