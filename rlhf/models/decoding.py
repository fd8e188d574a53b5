"""The attention of sampling on a CPU: PyTorch's, in float32 under a model of 16 bits.

One query a row against its cache takes PyTorch's kernel five times as long in bfloat16 (16 rows, 9
heads, 64 tokens: 0.73 ms a layer and token, 0.15 ms in float32).
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

from rlhf.models.packed import HALVES

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
    """transformers' attention by PyTorch, of float32; the result in the query's type."""
    if query.dtype not in HALVES:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):  # which would round it all to bfloat16
        q, k, v = query.float(), key.float(), value.float()
        found, _ = sdpa_attention_forward(module, q, k, v, attention_mask, **options)
    return found.to(query.dtype), None
