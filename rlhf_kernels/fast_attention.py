"""Attention over batches without padding by this package's kernel, while a model runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.backends import unavailable_reason
from rlhf_kernels.fast_rotary import runs_once_as_written
from rlhf_kernels.ops.row_attention import LARGEST_SIZE, row_attention

NAME = "sdpa"  # what transformers calls PyTorch's attention
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Arguments of an attention that do not change what it computes, given its mask.
WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)


@contextmanager
def fast_attention(model: nn.Module) -> Iterator[None]:
    """Models of transformers that run inside, and whose attention is PyTorch's, attend by the
    kernel.

    That is where they need no mask but the causal one; PyTorch's does the rest, padding included.
    Configs stay as they are: some models ask them which attention it is, and do more for others.
    """
    if unavailable_reason("cpu") is not None or not runs_once_as_written(model):
        yield
        return
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    theirs = ALL_ATTENTION_FUNCTIONS[NAME]
    AttentionInterface.register(NAME, partial(attend, theirs))
    try:
        yield
    finally:
        AttentionInterface.register(NAME, theirs)


def attend(
    theirs: Callable[..., tuple[Tensor, None]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: [B, heads, T, size] to [B, T, heads, size].

    Args:
        theirs: The function that this one stands in for, which does what the kernel does not.
        options: One that is not known might change the result, so its calls are theirs.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rows, heads, steps, size = query.shape
    alike = query.dtype == key.dtype == value.dtype and query.device.type == "cpu"
    plain = alike and query.dtype in DTYPES and size <= LARGEST_SIZE and dropout == 0.0
    square = key.shape == value.shape and key.shape[-1] == size and steps == key.shape[2] > 1
    known = have_no_effect(options)
    if not (plain and square and known and causal) or attention_mask is not None:
        return theirs(
            *(module, query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    starts = torch.arange(0, rows * steps + 1, steps)
    return row_attention(q, k, v, starts, scaling).view(rows, steps, heads, size), None


def have_no_effect(options: Mapping[str, Any]) -> bool:
    """Whether no option is given that might change what an attention computes."""
    return all(name in WITHOUT_EFFECT for name, given in options.items() if given is not None)
