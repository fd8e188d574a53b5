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

On a CPU a compiled kernel takes the place of the operations, with the same bits
(csrc/cpu/adamw_8bit.cpp). For that, every product and sum here is an operation of its own: how
PyTorch rounds one that does both depends on the machine.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlhf.engine.eight_bit_codes import (
    BLOCK,
    CUT,
    decode_signed,
    decode_unsigned,
    encode_signed,
    encode_unsigned,
    join,
    split,
)
from rlhf_kernels.backends import ENVIRONMENT_VARIABLE, cpu

# Numbers that a task updates, and on a CPU those of each slice in it. Temporaries of a slice take
# some 30 bytes a number: on a CPU they are to stay in a cache, a GPU should have few launches.
TASK, CPU_SLICE = 1 << 22, 1 << 18
PLACES = 1 << 18  # in the noise that a slice can be read from
WEIGHT_BITS = 8  # that a weight is rounded by


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
        groups = [(p, group) for group in self.param_groups for p in group["params"]]
        tasks = []
        for index, (parameter, group) in enumerate(groups):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            state["step"] += 1
            for first in range(0, parameter.numel(), TASK):
                tasks.append(partial(update, parameter, state, group, index, first))
        run_all(tasks, [parameter for parameter, _ in groups])
        return loss

    @torch.no_grad()
    def float32(self, parameter: nn.Parameter) -> Tensor:
        """A parameter with all of its bits; of a float32 one, itself."""
        if parameter.dtype == torch.float32:
            return parameter.detach()
        return join(parameter.detach(), self.state[parameter]["remainder"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, which by itself would give the codes the parameters' type."""
        super().load_state_dict(state_dict)
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, parameter in zip(keys, self._parameters()):
            for name, value in state_dict["state"][key].items():
                device = "cpu" if name == "step" else parameter.device
                self.state[parameter][name] = value.detach().to(device, copy=True)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(group["params"] for group in self.param_groups)


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


def run_all(tasks: Sequence[Callable[[], None]], parameters: list[nn.Parameter]) -> None:
    """Run updates: on a CPU in as many threads as PyTorch has, each of which takes the next one.

    They would else meet after each of the many small operations, and where another process has
    one of the cores, that takes ten times as long as the operations.
    """
    threads = torch.get_num_threads()
    if threads > 1 and all(parameter.device.type == "cpu" for parameter in parameters):
        torch.set_num_threads(1)  # in each
        try:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(run_in_turn, [iter(tasks)] * threads))
        finally:
            torch.set_num_threads(threads)
    else:
        run_in_turn(tasks)


def run_in_turn(tasks: Iterable[Callable[[], None]]) -> None:
    for task in tasks:
        task()


class Settings(NamedTuple):
    """What a step does with each number of a parameter."""

    beta1: float
    rest1: float  # 1 - beta1
    beta2: float
    rest2: float
    square_factor: float  # of the squares' root
    eps: float
    decay: float  # what the weight is multiplied with
    rate: float  # and the change, which is then added

    @classmethod
    def at(cls, step: int, group: Any) -> Settings:
        beta1, beta2 = group["betas"]
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        return cls(
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            1 / math.sqrt(correction2),
            group["eps"],
            1 - group["lr"] * group["weight_decay"],
            -group["lr"] / correction1,
        )


class Part(NamedTuple):
    """A slice of a parameter and of its state; all but the gradient is updated."""

    weights: Tensor
    remainder: Tensor | None
    gradient: Tensor
    mean: Tensor
    mean_scale: Tensor
    square: Tensor
    square_scale: Tensor


def update(
    parameter: nn.Parameter, state: dict[str, Tensor], group: Any, index: int, first: int
) -> None:
    """A step of the numbers of one parameter from ``first`` on, up to ``TASK`` of them.

    Args:
        parameter: With its gradient.
        state: See ``AdamW8bit``; its ``step`` counts this one already.
        group: Its settings.
        index: Of the parameter in its optimizer.
        first: A multiple of ``TASK``.
    """
    assert parameter.grad is not None
    step = int(state["step"])
    chance = random.Random(step << 64 | index << 32 | first // TASK)
    settings = Settings.at(step, group)
    weights, gradients = parameter.detach().view(-1), parameter.grad.reshape(-1)
    means, squares = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    remainders = state["remainder"].view(-1) if "remainder" in state else None
    update_part = update_compiled if has_kernel(parameter) else update_by_operations
    for numbers, blocks in slices(first, parameter.numel(), parameter.device):
        part = Part(
            weights[numbers],
            None if remainders is None else remainders[numbers],
            gradients[numbers],
            means[numbers],
            state["exp_avg_scale"][blocks],
            squares[numbers],
            state["exp_avg_sq_scale"][blocks],
        )
        update_part(part, chance.randrange(PLACES), settings)


def has_kernel(tensor: Tensor) -> bool:
    """Whether the C++ is there for a parameter or its gradient, and is not to be left out."""
    wanted = os.environ.get(ENVIRONMENT_VARIABLE) or cpu.NAME
    return tensor.device.type == "cpu" and wanted == cpu.NAME and cpu.availability() is None


def update_compiled(part: Part, place: int, settings: Settings) -> None:
    cpu.adamw_8bit(*part, noise_words(CPU_SLICE)[place:], settings)


@torch.no_grad()  # also in a thread of its own
def update_by_operations(part: Part, place: int, settings: Settings) -> None:
    """A step of a slice.

    Args:
        part: The slice.
        place: In the noise.
        settings: Of the step.
    """
    noise = partial(noise_at, part.weights, place)
    beta1, rest1, beta2, rest2, square_factor, eps, decay, rate = settings
    gradient = part.gradient.float()
    mean = decode_signed(part.mean, part.mean_scale).mul_(beta1).add_(gradient * rest1)
    encode_signed(mean, noise(0, CUT), part.mean, part.mean_scale)
    square = decode_unsigned(part.square, part.square_scale).mul_(beta2)
    square.add_((gradient * rest2).mul_(gradient))
    encode_unsigned(square, noise(CUT, CUT), part.square, part.square_scale)
    # The weight sees the moments as they were before they were rounded.
    change = mean.div_(root_(square).mul_(square_factor).add_(eps))
    weight = part.weights if part.remainder is None else join(part.weights, part.remainder)
    weight.mul_(decay).add_(change.mul_(rate))
    if part.remainder is not None:
        split(weight, noise(2 * CUT, WEIGHT_BITS), part.weights, part.remainder)


def root_(values: Tensor) -> Tensor:
    """The roots in their place, rounded to nearest.

    On a CPU PyTorch can have MKL's, which are off by a digit for one number in six.
    """
    if values.device.type != "cpu":
        return values.sqrt_()
    numbers = values.numpy()
    np.sqrt(numbers, out=numbers)
    return values


def slices(first: int, size: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cuts a task's numbers into parts of whole blocks, and the rest, a shorter block, by itself.

    Args:
        first: The task's first number.
        size: The number of all.
        device: Where they are.

    Yields:
        The slice of numbers, and that of their blocks.
    """
    end, whole = min(first + TASK, size), size - size % BLOCK
    starts = range(first, min(end, whole), longest_slice(device))
    for start, stop in zip(starts, [*starts[1:], min(end, whole)]):
        yield slice(start, stop), slice(start // BLOCK, stop // BLOCK)
    if whole < end:
        yield slice(whole, size), slice(whole // BLOCK, whole // BLOCK + 1)


def longest_slice(device: torch.device) -> int:
    return CPU_SLICE if device.type == "cpu" else TASK


@cache
def noise_words(longest: int) -> Tensor:
    """Noise for a slice from any place on, the same in every process: int32 on the CPU.

    The lowest 7 bits are for the mean, 7 for the square, 8 for the weight.
    """
    bits, generator = 2 * CUT + WEIGHT_BITS, torch.Generator().manual_seed(0)
    shape = (PLACES + longest,)
    return torch.randint(1 << bits, shape, generator=generator, dtype=torch.int32, device="cpu")


@cache
def noise_table(device: torch.device, first: int, bits: int) -> Tensor:
    """So many bits of each word: int16, or int32 from 8 bits on."""
    words = noise_words(longest_slice(device))
    numbers = (words >> first) & ((1 << bits) - 1)
    return numbers.to(device, torch.int16 if bits < 8 else torch.int32)


def noise_at(like: Tensor, place: int, first: int, bits: int) -> Tensor:
    """As many numbers of the table as a slice has, from a place on."""
    return noise_table(like.device, first, bits)[place : place + like.numel()]
