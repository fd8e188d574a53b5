"""The 8-bit floats of moments, and the 24-bit floats of weights, that ``AdamW8bit`` keeps.

A slice of numbers is coded at once, in blocks with a scale each.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
CUT = 7  # bits of a float16's mantissa that are cut off; 3 are left
# The largest values of the two codes, of 4 and 5 bits of exponent; the smallest is 2^-17, and from
# 2^-14 on a step is at most an eighth of the value.
SIGNED_LIMIT, UNSIGNED_LIMIT = 1.875, 61440.0
SECOND_BIT = 0x4000  # of a float16: clear below 2


def scaled_half(values: Tensor, limit: float, scale: Tensor) -> Tensor:
    """Bits (int16) of the float16 next to values / scale, where each block's largest is ``limit``.

    Args:
        values: A slice, float32.
        limit: What the largest magnitude of each block becomes.
        scale: Of its blocks, float32; written.
    """
    by_block = values.view(scale.numel(), -1)
    largest = by_block.abs().amax(dim=1)
    # No smaller than what has a finite inverse.
    torch.clamp(largest / limit, min=torch.finfo(torch.float32).tiny, out=scale)
    factor = scale.reciprocal()
    scale.mul_(largest != 0)
    return (by_block * factor.unsqueeze(1)).half().view(torch.int16).view(-1)


def encode_unsigned(values: Tensor, noise: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Round values that are not negative to 8-bit floats, right on average.

    None becomes 0, unless its block is: Adam divides by them.

    Args:
        values: A slice, float32.
        noise: From 0 to 127, int16.
        codes: uint8, written. 5 bits of exponent and 3 of mantissa.
        scale: Of the slice's blocks, float32, written.
    """
    bits = scaled_half(values, UNSIGNED_LIMIT, scale)
    codes.copy_(bits.add_(noise).bitwise_right_shift_(CUT).clamp_(min=1))


def decode_unsigned(codes: Tensor, scale: Tensor) -> Tensor:
    """The values of ``encode_unsigned``'s codes, float32."""
    bits = codes.to(torch.int16).bitwise_left_shift_(CUT)
    return unscaled(bits, scale)


def encode_signed(values: Tensor, noise: Tensor, codes: Tensor, scale: Tensor) -> None:
    """As ``encode_unsigned``, of values of either sign; codes are int8.

    Sign, 4 bits of exponent, 3 of mantissa: below 2, the first of a float16's 5 bits of exponent
    is clear, and left out.
    """
    bits = scaled_half(values, SIGNED_LIMIT, scale).add_(noise)
    sign = (bits >> (CUT + 1)).bitwise_and_(-128)
    codes.copy_(bits.bitwise_right_shift_(CUT).bitwise_and_(127).bitwise_or_(sign))


def decode_signed(codes: Tensor, scale: Tensor) -> Tensor:
    """The values of ``encode_signed``'s codes, float32."""
    bits = codes.to(torch.int16).bitwise_left_shift_(CUT)  # the sign is in both upper bits
    return unscaled(bits.bitwise_and_(~SECOND_BIT), scale)


def unscaled(bits: Tensor, scale: Tensor) -> Tensor:
    values = bits.view(torch.float16).float()
    values.view(scale.numel(), -1).mul_(scale.unsqueeze(1))
    return values


def split(values: Tensor, noise: Tensor | int, weights: Tensor, remainder: Tensor) -> None:
    """Write float32 values as bfloat16 weights and 8 bits more: floats of 24 bits.

    The weights are the values to nearest; their last digit is 256 of the remainder's.

    Args:
        values: float32.
        noise: From 0 to 255, int32, to round to 24 bits by chance; 128 to round to nearest.
        weights: bfloat16, written.
        remainder: int8, written.
    """
    bits = values.view(torch.int32).add(noise).bitwise_right_shift_(8)
    upper = bits.add(128).bitwise_right_shift_(8)
    weights.view(torch.int16).copy_(upper)
    remainder.copy_(bits.sub_(upper.bitwise_left_shift_(8)))


def join(weights: Tensor, remainder: Tensor) -> Tensor:
    """The float32 values that ``split`` was given, to 24 bits."""
    bits = weights.view(torch.int16).to(torch.int32).bitwise_left_shift_(8)
    return bits.add_(remainder).bitwise_left_shift_(8).view(torch.float32)
