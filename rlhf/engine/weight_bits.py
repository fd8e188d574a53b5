"""A checksum of weights that does not depend on how they lie in memory, nor on threads."""

from __future__ import annotations

import torch
from torch import Tensor

_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sum_of_bits(tensor: Tensor) -> Tensor:
    """int64 [], modulo 2^64: the numbers' bits, in words of eight bytes read as whole numbers.

    Sums of whole numbers are exact, so their order does not matter. Words make it as fast as the
    memory; PyTorch would copy smaller numbers to int64 first.
    """
    size = tensor.element_size()
    flat = tensor.contiguous().flatten()
    if flat.storage_offset() * size % 8:
        flat = flat.clone()
    in_words = flat.numel() - flat.numel() % (8 // size)
    rest = flat[in_words:].view(_WHOLE_NUMBERS[size])
    return flat[:in_words].view(torch.int64).sum() + rest.sum()
