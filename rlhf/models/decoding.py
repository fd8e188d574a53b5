"""The attention of sampling on a CPU, in float32 under a model of 16 bits.

One query a row against its cache takes PyTorch's kernel five times as long in bfloat16 (16 rows, 9
heads, 64 tokens: 0.73 ms a layer and token, 0.15 ms in float32, the cache's copies included). The
kernel of this package reads the cache as it is: 0.05 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from rlhf.models.packed import HALVES, attends_by_kernel
from rlhf_kernels.fast_attention import have_no_effect
from rlhf_kernels.ops.cached_attention import cached_attention

IN_FLOAT32 = "rlhf_in_float32"


@contextmanager
def attending_in_float32(model: Any) -> Iterator[None]:
    """The model's attention widens 16-bit numbers inside, where it is PyTorch's on a CPU."""
    config = model.config.get_text_config()
    before = getattr(config, "_attn_implementation", None)
    compiled = any(module._compiled_call_impl for module in model.modules())
    if before != "sdpa" or compiled or next(model.parameters()).device.type != "cpu":
        yield
        return
    AttentionInterface.register(IN_FLOAT32, attend_in_float32)
    AttentionMaskInterface.register(IN_FLOAT32, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config._attn_implementation = IN_FLOAT32
    try:
        yield
    finally:
        config._attn_implementation = before


def attend_in_float32(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention, of float32; the result in the query's type."""
    if query.dtype not in HALVES:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if _is_step(query, key, value, attention_mask, **options):
        mask = None if attention_mask is None else attention_mask[:, 0, 0, : key.shape[2]]
        found = cached_attention(query[:, :, 0], key, value, mask, options.get("scaling"))
        return found[:, None], None
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):  # which would round it all to bfloat16
        q, k, v = query.float(), key.float(), value.float()
        found, _ = sdpa_attention_forward(module, q, k, v, attention_mask, **options)
    return found.to(query.dtype), None


def _is_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> bool:
    """Whether it is one query a row, and no more than the kernel computes."""
    rows, heads, steps, size = query.shape
    alike = query.dtype == key.dtype == value.dtype and key.shape == value.shape
    fits = alike and key.shape[3] == size and heads % key.shape[1] == 0
    plain = mask is None or (mask.dtype == torch.bool and mask.shape[:3] == (rows, 1, 1))
    return (
        steps == 1
        and dropout == 0.0
        and fits
        and plain
        and have_no_effect(options)
        and attends_by_kernel(query)
    )
