"""The optimizer, and the float32 weights that it updates where the model's own are bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.engine.adamw_8bit import AdamW8bit
from rlhf.engine.config import TrainingConfig
from rlhf.engine.eight_bit_codes import split


def trainable_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name.

    Raises:
        ValueError: There are none, or one is not float32.
    """
    named = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"{name} has no trainable parameter")
    for key, parameter in named.items():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"{name}: parameter {key} is {parameter.dtype}; load the model in float32 "
                "(dtype decides the precision of matrix products, weights that of the weights)"
            )
    return named


def make_optimizer(
    parameters: list[nn.Parameter], config: TrainingConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), or with 8-bit moments, with weight decay on
    matrices only.
    """
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
    }
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw_8bit":
        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)


@torch.no_grad()
def to_bfloat16(model: nn.Module, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Make a float32 model bfloat16, one weight after the other.

    Args:
        model: Its weights, also those that are not trained, become bfloat16.
        named: The trained ones, by name.

    Returns:
        By the same names what ``AdamW8bit`` keeps beside the weights, so that nothing of 24 bits
        is lost.
    """
    remainders = {}
    for name, parameter in named.items():
        weights = torch.empty_like(parameter, dtype=torch.bfloat16)
        remainders[name] = torch.empty_like(parameter, dtype=torch.int8)
        split(parameter.detach(), 128, weights, remainders[name])
        parameter.data = weights
    model.bfloat16()  # the others
    return remainders


class MasterWeights:
    """Float32 copies of weights, for the optimizer; the model's own become bfloat16.

    An update is often smaller than a bfloat16 weight's last digit and would be lost (Micikevicius
    et al. 2018, arXiv 1710.03740). Gradients are added up in float32 too: each is taken from the
    model as soon as it is there, so that the model holds none.

    Args:
        model: Its weights, also those that are not trained, become bfloat16.
        named: The trained ones, by name.

    Attributes:
        named: The copies, by the names of the model's parameters.
    """

    def __init__(self, model: nn.Module, named: dict[str, nn.Parameter]) -> None:
        self.named = {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}
        self._pairs = [(self.named[name], p) for name, p in named.items()]
        model.bfloat16()
        for master, parameter in self._pairs:
            parameter.register_post_accumulate_grad_hook(self._taker(master))

    def write_back(self) -> None:
        """Round the copies into the model."""
        with torch.no_grad():
            for master, parameter in self._pairs:
                parameter.copy_(master)

    @staticmethod
    def _taker(master: nn.Parameter) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)  # in float32
            parameter.grad = None

        return take
