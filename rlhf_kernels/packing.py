"""Packed sequences [N] without padding, and the same padded to [B, T]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Where sequences stand one behind the other: sequence b from cu_seqlens[b] to the next."""

    places: Tensor  # [B, T], of each padded place in [N]; 0 in the padding
    inside: Tensor  # [B, T], False in the padding

    @classmethod
    def of(cls, cu_seqlens: Tensor | None, like: Tensor) -> Packed | None:
        """None for padded sequences. Reads the longest length, for which a GPU's host waits."""
        if cu_seqlens is None:
            return None
        starts, lengths = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]
        longest = int(lengths.max()) if lengths.numel() else 0
        steps = torch.arange(longest, device=like.device)
        inside = steps < lengths
        return cls(torch.where(inside, starts + steps, 0), inside)

    def pad(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_zeros(self.places.shape)
        return torch.where(self.inside, x[self.places], x.new_zeros(()))

    def unpad(self, x: Tensor) -> Tensor:
        return x[self.inside]  # row by row, which is the order of the packed places


def valid_tokens(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """How many valid tokens each sequence has [B]."""
    if cu_seqlens is None:
        return mask.sum(dim=1)
    return torch.cat([cu_seqlens.new_zeros(1), mask.cumsum(0)])[cu_seqlens].diff()


def at_tokens(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """One number a sequence [B] at each place of its sequence, in a form that fits `mask`."""
    if cu_seqlens is None:
        return x[:, None]
    places = torch.arange(mask.numel(), device=mask.device)
    return x[torch.searchsorted(cu_seqlens, places, right=True) - 1]
