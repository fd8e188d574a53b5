"""Checks of what users pass in: each message names the argument, what it is and what is expected.

Nothing here reads a tensor's content on a GPU, which would make the host wait for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What a row kernel is given for a target that stands in another rank's part of the vocabulary: the
# row counts, but none of its columns here is the target's. No vocabulary reaches, and no user
# means, a number like this.
ELSEWHERE = -(2**62)


def floating(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected a floating-point tensor")


def like(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """Every tensor has the shape and the device of the reference."""
    shape, device = reference.shape, reference.device
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}, "
                f"the shape of {reference_name}"
            )
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device}; expected {device}, the device of {reference_name}"
            )


def shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {tuple(expected)}, {meaning}"
        )


def dimensions(name: str, tensor: Tensor, number: int, meaning: str) -> None:
    if tensor.dim() != number:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; expected {number} dimensions, {meaning}"
        )


def gathered(name: str, tensor: Tensor | None) -> None:
    """Kernels take whole tensors; a DTensor is one rank's part of one."""
    # By name, since importing the type would import torch.distributed.tensor.
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor, a part of a sharded parameter; gather it before "
            f"(`{name}.full_tensor()`, or inside the forward of the module that FSDP2 wraps)"
        )


def sequences(name: str, tensor: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, int]:
    """cu_seqlens as int64, and the number of sequences in a tensor [B, T], or [N] with it."""
    if cu_seqlens is None:
        dimensions(name, tensor, 2, "[B, T] (or [N] with cu_seqlens)")
        return None, tensor.shape[0]
    dimensions(name, tensor, 1, "[N], as cu_seqlens is given")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; expected int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; expected [B + 1]: where each "
            "sequence begins, and the end"
        )
    same_device(name, tensor, cu_seqlens=cu_seqlens)
    if cu_seqlens.device.type == "cpu":  # a GPU's host does not look
        from rlhf_kernels.ops.checked import checked_cu_seqlens

        cu_seqlens = checked_cu_seqlens(cu_seqlens, tensor.shape[0], name)
    return cu_seqlens.to(torch.int64).contiguous(), cu_seqlens.numel() - 1


def in_order(name: str, length: int, cu_seqlens: Tensor) -> None:
    """Raise unless cu_seqlens [B + 1], on the CPU, goes from 0 to ``length`` and never back."""
    ends = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if ends != (0, length):
        raise ValueError(
            f"cu_seqlens goes from {ends[0]} to {ends[1]}; expected 0 to {length}, "
            f"the length of {name}"
        )
    back = cu_seqlens.diff() < 0
    if back.any():
        place = int(back.nonzero()[0])
        raise ValueError(
            f"cu_seqlens holds {int(cu_seqlens[place + 1])} after {int(cu_seqlens[place])} at "
            f"index {place + 1}; expected sequences one behind the other"
        )


def rate(name: str, value: Tensor, like_tensor: Tensor, sequences: int) -> Tensor:
    """Numbers [B] in [0, 1]; the same tensor."""
    floating(**{name: value})
    shape(name, value, (sequences,), "one a sequence")
    same_device("rewards", like_tensor, **{name: value})
    if value.device.type != "cpu":
        return value
    from rlhf_kernels.ops.checked import checked_rate

    return checked_rate(value.detach(), name)


def in_unit_interval(name: str, value: Tensor) -> None:
    """Raise for the first number of value [B], on the CPU, outside [0, 1]."""
    outside = ~((value >= 0) & (value <= 1))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"{name} holds {float(value[row])} at row {row}; expected numbers in [0, 1]"
        )


def same_device(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device}; expected {reference.device}, "
                f"the device of {reference_name}"
            )


def same_dtype(reference_name: str, reference: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected {reference.dtype}, "
                f"the dtype of {reference_name}"
            )


def as_mask(mask: Tensor) -> Tensor:
    """The mask as bool. Integer masks (as tokenizers make them) count as valid where not 0."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"mask has dtype {mask.dtype}; expected bool, or integers where 0 is masked"
        )
    return mask != 0


def as_targets(targets: Tensor) -> Tensor:
    if targets.dtype == torch.int64:
        return targets
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets has dtype {targets.dtype}; expected integers (torch.int64)")
    return targets.long()


def targets_in_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise for the first target [N] outside [0, vocabulary). CPU tensors only."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    outside = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    outside &= targets != ELSEWHERE
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"targets holds {int(targets[row])} at flat row {row}; expected values in "
            f"[0, {vocabulary}), or {ignore_index} for rows to leave out"
        )


def temperatures_positive(temperatures: Tensor | None, targets: Tensor, ignore_index: int) -> None:
    """Raise for the first temperature [N] of a row that counts and is not positive and finite.

    CPU tensors only.
    """
    if temperatures is None or temperatures.device.type != "cpu":
        return
    unusable = ~((temperatures > 0) & (temperatures < math.inf)) & (targets != ignore_index)
    if unusable.any():
        row = int(unusable.nonzero()[0])
        raise ValueError(
            f"temperature holds {float(temperatures[row])} at flat row {row}; "
            "expected positive finite numbers"
        )


def positive(name: str, number: float) -> float:
    # A comparison, which unlike math.isfinite a compiler can trace for numbers that change.
    if not 0.0 < number < math.inf:
        raise ValueError(f"{name} is {number!r}; expected a positive finite number")
    return float(number)


def temperature_number(number: float) -> float:
    """A temperature whose inverse is a normal float32 number too."""
    if not 1e-37 < number < 1e37:
        raise ValueError(f"temperature is {number!r}; expected a number between 1e-37 and 1e37")
    return float(number)


def finite(name: str, number: float) -> float:
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} is {number!r}; expected a finite number")
    return float(number)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def split_temperature(
    temperature: float | Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """A number, and per-row temperatures [N] in `dtype` where they were given as a tensor."""
    if not isinstance(temperature, Tensor):
        return temperature_number(temperature), None
    if temperature.dim() == 0:
        temperature = temperature.expand(targets.shape)
    like("targets", targets, temperature=temperature)
    floating(temperature=temperature)
    return 1.0, temperature.detach().reshape(-1).to(dtype).contiguous()


def as_normalizer(normalizer: float | Tensor | None, like_tensor: Tensor) -> Tensor | None:
    """The divisor as a 0-dim float tensor on the device, without a copy that would wait."""
    if normalizer is None:
        return None
    if not isinstance(normalizer, Tensor):
        value = positive("normalizer", normalizer)
        return torch.full((), value, dtype=like_tensor.dtype, device=like_tensor.device)
    if normalizer.numel() != 1:
        raise ValueError(
            f"normalizer has shape {tuple(normalizer.shape)}; expected a number or a 0-dim tensor"
        )
    same_device("the other tensors", like_tensor, normalizer=normalizer)
    return normalizer.detach().reshape(()).to(like_tensor.dtype)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any tensor is, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def unit_interval(name: str, number: float) -> None:
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} is {number!r}; expected a number in [0, 1]")
