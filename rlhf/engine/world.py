"""Ranks and devices: the only place that knows how many processes train together."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels import backends


class World:
    """The processes that train together: those that ``torchrun`` started, or this one alone.

    An instance has no state of its own; it reads ``torch.distributed``'s default process group.
    """

    @staticmethod
    def join() -> World:
        """The world of this process; under ``torchrun`` its process group is formed first.

        Whoever has formed one (``torch.distributed.init_process_group``) keeps it.
        """
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
                # Objects and normalisers travel between hosts, gradients between GPUs.
                dist.init_process_group("cpu:gloo,cuda:nccl")
            else:
                dist.init_process_group("gloo")
            atexit.register(leave)
        return World()

    @property
    def rank(self) -> int:
        """Number of this process among all."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def size(self) -> int:
        """How many processes train together."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def local_size(self) -> int:
        """How many of them run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

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
        """Sum of the tensor over all ranks, as a new tensor; the tensor itself with one rank."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Largest of each element over all ranks, likewise."""
        if self.size == 1:
            return tensor
        largest = tensor.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Every rank must ask."""
        return flag if self.size == 1 else any(self.gather(flag))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank; any small Python object."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main rank's value on every rank; any small Python object."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def leave() -> None:
    """Dissolve the process group that ``World.join`` formed."""
    if dist.is_initialized():
        dist.destroy_process_group()


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
