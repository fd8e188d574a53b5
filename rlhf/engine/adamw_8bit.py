"""AdamW with moments of 8 bits, for weights of float32, or of bfloat16 with 8 bits more.

A trained parameter takes 2 bytes of moments where float32 moments take 8. Moments are quantised in
blocks with a scale each (Dettmers et al. 2022, arXiv 2110.02861). Their code is not that paper's
table but a float of 8 bits, the upper ones of a float16, which plain tensor operations translate
some ten times as fast as a search in a table.

Rounding to nearest would lose what a step changes: at beta2 = 0.999 a second moment that falls by
0.1% a step would stay where it is for ever, and so would a bfloat16 weight at a small learning
rate. So all is rounded up or down by chance, right on average (Gupta et al. 2015, arXiv
1502.02551). The chance is a fixed table read from a place that only the step and the parameter
decide: a resumed training goes on bit for bit, and all ranks of DDP stay alike.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 256
# Numbers in a slice: its temporaries, some 30 bytes each, should fit a cache on a CPU; a GPU should
# have few launches.
CPU_SLICE, GPU_SLICE = 1 << 18, 1 << 22
PLACES = 1 << 20  # in the table of noise that a slice can be read from
CUT = 7  # bits of a float16's mantissa that are cut off; 3 are left
# The largest values of the two codes. Signed: 4 bits of exponent, 1.875 down to 2^-9 (2^-17 below
# normal precision). Unsigned: 5 bits of exponent, 61440 down to 2^-17.
SIGNED_LIMIT, UNSIGNED_LIMIT = 1.875, 61440.0
SECOND_BIT = 0x4000  # of a float16: clear below 2


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with 8-bit moments.

    The state of a parameter of n numbers, all there from the beginning: ``step`` (0-dim);
    ``exp_avg`` (int8) and ``exp_avg_sq`` (uint8), codes of the parameter's shape, with
    ``exp_avg_scale`` and ``exp_avg_sq_scale`` (float32, one for each of ceil(n / 256) blocks); and
    for bfloat16 ``remainder`` (int8, the parameter's shape), see ``split``.

    Args:
        params: Contiguous float32 or bfloat16 parameters, or groups of them; gradients of the same
            type.
        lr: Learning rate.
        betas: Decays of the gradient's mean and of its square.
        eps: Added to the denominator.
        weight_decay: Decoupled from the gradient.

    Raises:
        ValueError: A parameter has another type, or is not contiguous.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for parameter in self._parameters():
            self.state[parameter] = new_state(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, index)
                index += 1
        return loss

    @torch.no_grad()
    def float32(self, parameter: nn.Parameter) -> Tensor:
        """A parameter with all of its bits, as a new float32 tensor."""
        if parameter.dtype == torch.float32:
            return parameter.detach().clone()
        return join(parameter.detach(), self.state[parameter]["remainder"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, which by itself would give the codes the parameters' type."""
        super().load_state_dict(state_dict)
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, parameter in zip(keys, self._parameters()):
            saved = state_dict["state"][key]
            step = saved["step"].clone()
            tensors = {name: value.clone().to(parameter.device) for name, value in saved.items()}
            self.state[parameter] = {**tensors, "step": step}

    def _parameters(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], index: int) -> None:
        state = self.state[parameter]
        state["step"] += 1
        step = int(state["step"])
        chance = random.Random(step << 32 | index)
        assert parameter.grad is not None
        flat = {
            name: value.view(-1) for name, value in state.items() if name in SHAPED
        }
        weights, gradients = parameter.detach().view(-1), parameter.grad.reshape(-1)
        for part, blocks in slices(parameter.numel(), parameter.device):
            gradient = gradients[part].float()
            mean = decode_signed(flat["exp_avg"][part], state["exp_avg_scale"][blocks])
            square = decode_unsigned(flat["exp_avg_sq"][part], state["exp_avg_sq_scale"][blocks])
            beta1, beta2 = group["betas"]
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            noise = noise_at(chance, mean)
            encode_signed(mean, noise, flat["exp_avg"][part], state["exp_avg_scale"][blocks])
            noise = noise_at(chance, mean)
            encode_unsigned(
                square, noise, flat["exp_avg_sq"][part], state["exp_avg_sq_scale"][blocks]
            )
            # From here on as in AdamW, with the moments as they were before they were rounded.
            square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
            change = mean.div_(square)
            exact = weights.dtype == torch.float32
            weight = weights[part] if exact else join(weights[part], flat["remainder"][part])
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(change, alpha=-group["lr"] / (1 - beta1**step))
            if not exact:
                noise = noise_at(chance, weight)
                split(weight, noise, weights[part], flat["remainder"][part])


SHAPED = ("exp_avg", "exp_avg_sq", "remainder")  # what has the parameter's shape


def new_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """Moments of 0, and of a bfloat16 weight nothing but itself."""
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"parameters must be float32 or bfloat16, not {parameter.dtype}")
    if not parameter.is_contiguous():
        raise ValueError(f"parameters must be contiguous; one of shape {parameter.shape} is not")
    blocks, device = math.ceil(parameter.numel() / BLOCK), parameter.device
    state = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(parameter.shape, dtype=torch.int8, device=device),
        "exp_avg_scale": torch.zeros(blocks, device=device),
        "exp_avg_sq": torch.zeros(parameter.shape, dtype=torch.uint8, device=device),
        "exp_avg_sq_scale": torch.zeros(blocks, device=device),
    }
    if parameter.dtype == torch.bfloat16:
        state["remainder"] = torch.zeros(parameter.shape, dtype=torch.int8, device=device)
    return state


def slices(size: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cuts numbers 0 to size into parts of whole blocks, and the rest, a shorter block, by itself.

    Yields:
        The slice of numbers, and that of their blocks.
    """
    longest = CPU_SLICE if device.type == "cpu" else GPU_SLICE
    whole = size - size % BLOCK
    for start in range(0, whole, longest):
        stop = min(start + longest, whole)
        yield slice(start, stop), slice(start // BLOCK, stop // BLOCK)
    if whole < size:
        yield slice(whole, size), slice(whole // BLOCK, whole // BLOCK + 1)


@cache
def noise_table(device: torch.device) -> Tensor:
    """Whole numbers from 0 to 127, the same in every process; int16."""
    longest = CPU_SLICE if device.type == "cpu" else GPU_SLICE
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(1 << CUT, (PLACES + longest,), generator=generator, dtype=torch.int16)
    return table.to(device)


def noise_at(chance: random.Random, like: Tensor) -> Tensor:
    """As many numbers of the table as a slice has, from a place left to chance."""
    place = chance.randrange(PLACES)
    return noise_table(like.device)[place : place + like.numel()]


def scaled_half(values: Tensor, limit: float, scale: Tensor) -> Tensor:
    """Bits (int16) of the float16 next to values / scale, where each block's largest is ``limit``.

    Args:
        values: A slice, float32.
        limit: What the largest magnitude of each block becomes.
        scale: Of its blocks, float32; written.
    """
    by_block = values.view(scale.numel(), -1)
    largest = by_block.abs().amax(dim=1)
    torch.div(largest, limit, out=scale)
    # A block of zeros: anything that is finite.
    factor = limit / largest.clamp_(min=torch.finfo(torch.float32).tiny)
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


def split(values: Tensor, noise: Tensor | None, weights: Tensor, remainder: Tensor) -> None:
    """Write float32 values as bfloat16 weights and 8 bits more: floats of 24 bits.

    The weights are the values to nearest; of these, 1 step is 256 of the remainder.

    Args:
        values: float32.
        noise: From 0 to 127, int16, to round to 24 bits by chance; None: to nearest.
        weights: bfloat16, written.
        remainder: int8, written.
    """
    bits = values.view(torch.int32)
    # Noise of 7 bits for 8 that are cut off, in steps of 2 around their middle: right on average.
    up = 128 if noise is None else noise.to(torch.int32).mul_(2)
    bits = (bits + up).bitwise_right_shift_(8)
    upper = (bits + 128).bitwise_right_shift_(8)
    weights.view(torch.int16).copy_(upper)
    remainder.copy_(bits.sub_(upper.bitwise_left_shift_(8)))


def join(weights: Tensor, remainder: Tensor) -> Tensor:
    """The float32 values that ``split`` was given, to 24 bits."""
    bits = weights.view(torch.int16).to(torch.int32).bitwise_left_shift_(8)
    return bits.add_(remainder).bitwise_left_shift_(8).view(torch.float32)
