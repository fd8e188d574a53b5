"""A model that is read and never trained, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rlhf.engine.config import TrainingConfig
from rlhf.engine.parallel import distribute
from rlhf.engine.parked import ParkedWeights
from rlhf.engine.precision import resolve_dtype
from rlhf.engine.world import World
from rlhf_kernels.fast_layers import use_fast_layers


class Frozen:
    """The counterpart of ``Engine`` for a reference or a reward model.

    Its weights have the type that the trained models compute with, so that equal models give equal
    results; under FSDP they are split over the ranks as theirs are.

    Args:
        model: Moved to this rank's device, set to evaluation mode, without gradients.
        config: Precision and parallelism.
        exact: Keep the weights in float32 whatever the trained ones have: for scores.
        parked_in: Keep them in a file in this folder, and in memory during ``run`` alone.

    Raises:
        ValueError: Weights on a GPU or spread by FSDP are to be parked.
        OutputError: They cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        *,
        exact: bool = False,
        parked_in: str | Path | None = None,
    ) -> None:
        device = World.join().device
        in_bfloat16 = config.weights == "bfloat16" and not exact
        self.model: Any = model.to(device).requires_grad_(False).eval()
        use_fast_layers(self.model)
        dtype = torch.bfloat16 if in_bfloat16 else resolve_dtype(config.dtype, device)
        self.module = distribute(self.model, config.parallel, torch.float32 if exact else dtype)
        if in_bfloat16 and config.parallel in ("auto", "ddp"):
            self.model.bfloat16()
        self._parked = None if parked_in is None else self._park(device, parked_in)

    @property
    def is_sharded(self) -> bool:
        """Whether each forward pass waits for the other ranks."""
        return isinstance(self.module, FSDPModule)

    def _park(self, device: torch.device, folder: str | Path) -> ParkedWeights:
        if device.type != "cpu" or self.is_sharded:
            raise ValueError(
                "frozen_on_disk keeps weights on disk where they are read by a CPU, whole; leave "
                f"it out on {device.type}" + (" and under fsdp" if self.is_sharded else "")
            )
        return ParkedWeights(self.model, folder)

    @torch.no_grad()
    def run(self, function: Callable[[Any], Any]) -> Any:
        """``function(model)``, with the model's weights at hand."""
        try:
            return self.module(function)
        finally:
            if self._parked is not None:
                self._parked.release()
