"""Attention over batches without padding by this package's kernel, while a model runs on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.backends import unavailable_reason
from rlhf_kernels.fast_rotary import runs_once_as_written
from rlhf_kernels.ops.row_attention import LARGEST_SIZE, row_attention

NAME = "rlhf_kernels_row_attention"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def fast_attention(model: nn.Module) -> Iterator[None]:
    """Models of transformers inside whose attention is PyTorch's attend by the kernel.

    That is where they need no mask but the causal one; PyTorch's does the rest, padding included.
    """
    configs = _configs_of_pytorch_s(model) if unavailable_reason("cpu") is None else []
    if not configs or not runs_once_as_written(model):
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def _configs_of_pytorch_s(model: nn.Module) -> list[Any]:
    """Of all models inside; several layers share one."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    found = {id(each): each for each in configs if _implementation(each) == "sdpa"}
    return list(found.values())


def _implementation(config: Any) -> Any:
    return getattr(config, "_attn_implementation", None)


def attend(
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
    """Attention in the form that transformers calls: [B, heads, T, size] to [B, T, heads, size]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rows, heads, steps, size = query.shape
    alike = query.dtype == key.dtype == value.dtype and query.device.type == "cpu"
    plain = alike and query.dtype in DTYPES and size <= LARGEST_SIZE and dropout == 0.0
    whole = attention_mask is None and causal and steps == key.shape[2] and steps > 1
    if not (plain and whole) or any(options.get(name) is not None for name in ("cache", "softcap")):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            *(module, query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    starts = torch.arange(0, rows * steps + 1, steps)
    return row_attention(q, k, v, starts, scaling).view(rows, steps, heads, size), None
