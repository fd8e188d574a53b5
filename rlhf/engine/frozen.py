"""A model that is read and never trained, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlhf.engine.config import TrainingConfig
from rlhf.engine.parallel import distribute
from rlhf.engine.precision import resolve_dtype
from rlhf.engine.products import use_fast_products
from rlhf.engine.world import World


class Frozen:
    """The counterpart of ``Engine`` for a reference or a reward model.

    Its weights have the type that the trained models compute with, so that equal models give equal
    results; under FSDP they are split over the ranks as theirs are.

    Args:
        model: Moved to this rank's device, set to evaluation mode, without gradients.
        config: Precision and parallelism.
        exact: Keep the weights in float32 whatever the trained ones have: for scores.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, *, exact: bool = False) -> None:
        device = World.join().device
        in_bfloat16 = config.weights == "bfloat16" and not exact
        self.model: Any = model.to(device).requires_grad_(False).eval()
        use_fast_products(self.model)
        dtype = torch.bfloat16 if in_bfloat16 else resolve_dtype(config.dtype, device)
        self.module = distribute(self.model, config.parallel, torch.float32 if exact else dtype)
        if in_bfloat16 and config.parallel in ("auto", "ddp"):
            self.model.bfloat16()

    @torch.no_grad()
    def run(self, function: Callable[[Any], Any]) -> Any:
        """``function(model)``, with the model's weights at hand."""
        return self.module(function)
