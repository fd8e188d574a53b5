"""The operations that are measured: one file each, found by its name."""

from __future__ import annotations

import importlib

from rlhf_kernels.bench.operation import Operation

OPERATIONS = (
    "token_logprobs",
    "linear_token_logprobs",
    "linear_cross_entropy",
    "linear_ppo_loss",
    "gae",
    "rollout_advantages",
    "ppo_loss",
)


def load(name: str) -> Operation:
    """The operation of that name: the one instance that its module holds as OPERATION."""
    operation = importlib.import_module(f"{__name__}.{name}").OPERATION
    assert isinstance(operation, Operation)
    return operation
