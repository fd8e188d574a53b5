"""Rotary position embeddings of models on a CPU, by this package's kernel.

transformers' attention layers look up a function of their module, `apply_rotary_pos_emb`; so that
is what ours takes the place of, while a model runs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.backends import unavailable_reason
from rlhf_kernels.ops.rotary import rotary

NAME = "apply_rotary_pos_emb"
Function = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def fast_rotary(model: nn.Module) -> Iterator[None]:
    """Queries and keys of models like this one are rotated by the kernel inside, on CPUs.

    Nothing changes for models whose function is not there, or computes something else.
    """
    module = _module_of(model)
    theirs = None if module is None else getattr(module, NAME)
    possible = unavailable_reason("cpu") is None and runs_once_as_written(model)
    if theirs is None or not possible or not _is_plain_rotary(theirs):
        yield
        return
    setattr(module, NAME, _by_kernel(theirs))
    try:
        yield
    finally:
        setattr(module, NAME, theirs)


def runs_once_as_written(model: nn.Module) -> bool:
    """Whether what holds during a forward can be told to a model's layers.

    Compiled ones would be compiled anew whenever it changes, and checkpointed ones run again in the
    backward, when it holds no longer.
    """
    return not any(module._compiled_call_impl or _runs_again(module) for module in model.modules())


def is_checkpointed(model: nn.Module) -> bool:
    """Whether layers run again in the backward, by transformers' checkpointing or PyTorch's."""
    return any(map(_runs_again, model.modules()))


def _runs_again(module: nn.Module) -> bool:
    # Asked of every module in every forward: a module's own `getattr` takes 3 us to find nothing.
    by_class = getattr(type(module), "gradient_checkpointing", False)
    checkpointed = vars(module).get("gradient_checkpointing", by_class)
    # The other is of torch.distributed, and not imported for this.
    return bool(checkpointed) or type(module).__name__ == "CheckpointWrapper"


def _module_of(model: nn.Module) -> ModuleType | None:
    """Where the first class in a model that has the function, or is made from one, finds it."""
    kinds = dict.fromkeys(type(module) for module in model.modules())
    bases = dict.fromkeys(base.__module__ for kind in kinds for base in kind.__mro__)
    modules = (sys.modules.get(name) for name in bases)
    return next((module for module in modules if module and hasattr(module, NAME)), None)


@cache
def _by_kernel(theirs: Function) -> Function:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        alike = q.dtype == k.dtype == cos.dtype == sin.dtype and q.device.type == "cpu"
        if not alike or unsqueeze_dim != 1 or cos.shape[-1] != q.shape[-1]:
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return apply_rotary_pos_emb


@cache
def _is_plain_rotary(function: Any) -> bool:
    """Whether it rotates halves, on numbers drawn for the question."""
    if list(inspect.signature(function).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    try:
        found = function(q, k, cos, sin)
    except Exception:  # of another family
        return False
    expected = (rotary(q, cos, sin), rotary(k, cos, sin))
    bound = 16 * torch.finfo(torch.float32).eps
    return all(torch.allclose(a, b, rtol=bound, atol=bound) for a, b in zip(found, expected))
