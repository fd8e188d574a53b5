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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import chain
from typing import Any

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

# Numbers in a slice. Its temporaries take some 30 bytes each: on a CPU they are to stay in a cache,
# a GPU should have few launches.
CPU_SLICE, GPU_SLICE = 1 << 18, 1 << 22
PLACES = 1 << 18  # in the table of noise that a slice can be read from


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
        tasks = [
            partial(update, parameter, self.state[parameter], group, index)
            for index, (parameter, group) in enumerate(groups)
            if parameter.grad is not None
        ]
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
    """Run updates of parameters: on a CPU in as many threads as PyTorch has.

    These would else meet after each of the many small operations, and where another process has
    one of the cores, that takes ten times as long as the operations.
    """
    threads = torch.get_num_threads()
    if threads > 1 and all(parameter.device.type == "cpu" for parameter in parameters):
        torch.set_num_threads(1)  # in each
        try:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda task: task(), tasks))
        finally:
            torch.set_num_threads(threads)
    else:
        for task in tasks:
            task()


@torch.no_grad()  # also in a thread of its own
def update(parameter: nn.Parameter, state: dict[str, Tensor], group: Any, index: int) -> None:
    """A step of one parameter.

    Args:
        parameter: With its gradient.
        state: See ``AdamW8bit``.
        group: Its settings.
        index: Of the parameter in its optimizer.
    """
    assert parameter.grad is not None
    state["step"] += 1
    step = int(state["step"])
    chance = random.Random(step << 32 | index)
    beta1, beta2 = group["betas"]
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    weights, gradients = parameter.detach().view(-1), parameter.grad.reshape(-1)
    means, squares = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    remainders = state["remainder"].view(-1) if "remainder" in state else None
    for part, blocks in slices(parameter.numel(), parameter.device):
        gradient = gradients[part].float()
        stored_mean = means[part], state["exp_avg_scale"][blocks]
        mean = decode_signed(*stored_mean).lerp_(gradient, 1 - beta1)
        encode_signed(mean, noise_at(chance, mean, CUT), *stored_mean)
        stored_square = squares[part], state["exp_avg_sq_scale"][blocks]
        square = decode_unsigned(*stored_square).mul_(beta2)
        square.addcmul_(gradient, gradient, value=1 - beta2)
        encode_unsigned(square, noise_at(chance, square, CUT), *stored_square)
        # The weight sees the moments as they were before they were rounded.
        change = mean.div_(square.sqrt_().div_(math.sqrt(correction2)).add_(group["eps"]))
        weight = weights[part] if remainders is None else join(weights[part], remainders[part])
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(change, alpha=-group["lr"] / correction1)
        if remainders is not None:
            split(weight, noise_at(chance, weight, 8), weights[part], remainders[part])


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
def noise_table(device: torch.device, bits: int) -> Tensor:
    """Whole numbers of so many bits, the same in every process: int16, or int32 from 8 bits on."""
    longest = CPU_SLICE if device.type == "cpu" else GPU_SLICE
    dtype = torch.int16 if bits < 8 else torch.int32
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(1 << bits, (PLACES + longest,), generator=generator, dtype=dtype)
    return table.to(device)


def noise_at(chance: random.Random, like: Tensor, bits: int) -> Tensor:
    """As many numbers of the table as a slice has, from a place left to chance."""
    place = chance.randrange(PLACES)
    return noise_table(like.device, bits)[place : place + like.numel()]
