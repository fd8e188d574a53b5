"""What the samples of several peers are made of: a few float32 numbers on the CPU.

Each tensor names its device, since a program that patches may have set another default.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHAPE = (4, 6)  # rows of tokens
VOCABULARY = 11


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def mask() -> Tensor:
    """With holes, an empty row and a full one."""
    rows = [[1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1], [0] * 6, [1] * 6]
    return torch.tensor(rows, dtype=torch.bool, device="cpu")


def with_gradients(output: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Under an upstream gradient that differs from place to place."""
    upstream = torch.linspace(0.5, 1.5, output.numel(), device="cpu").view(output.shape)
    return [output, *torch.autograd.grad(output, leaves, upstream)]
