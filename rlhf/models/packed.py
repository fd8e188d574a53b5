"""The trunk on real tokens alone: rows of a batch one behind the other, without padding.

With flash attention transformers finds the rows by their positions. On a CPU a kernel of our own
attends from row to row; all other layers see one long row either way. It computes in float32
whatever the model's type, and is faster than PyTorch's attention for batches without padding too:
`python -m benchmarks.row_attention`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from rlhf.models.last_layer import last_feed_forward_from
from rlhf_kernels import backends
from rlhf_kernels.fast_rotary import runs_once_as_written
from rlhf_kernels.ops.row_attention import LARGEST_SIZE, row_attention

BY_ROWS = "rlhf_by_rows"
HALVES = (torch.bfloat16, torch.float16)


def packs(model: Any, attention_mask: Tensor) -> bool:
    """Whether ``packed_hidden_states`` is right for the model and worth it for this batch."""
    if attends_packed(model):
        return True
    if attention_mask.device.type != "cpu" or not can_attend_by_rows(model):
        return False
    in_16_bits = torch.is_autocast_enabled("cpu") or model.dtype in HALVES
    if in_16_bits or attends_by_kernel(torch.empty(0, dtype=model.dtype)):
        return True
    return not bool(attention_mask.all())


def attends_by_kernel(like: Tensor) -> bool:
    """Whether the C++ kernel is there for such tensors, and no other backend is asked for."""
    try:
        return backends.choose("row_attention_forward", like, None).NAME == "cpu"
    except (backends.BackendUnavailableError, backends.UnsupportedOperationError):
        return False


def attends_packed(model: Any) -> bool:
    """Whether the model's attention takes sequences one behind the other, without padding."""
    return "flash" in (getattr(model.config.get_text_config(), "_attn_implementation", "") or "")


def can_attend_by_rows(model: Any) -> bool:
    """Whether the attention is PyTorch's, over all earlier tokens in every layer."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        getattr(config, "_attn_implementation", None) == "sdpa"
        and getattr(model, "_supports_attention_backend", False)
        and getattr(config, "sliding_window", None) is None
        and set(layers) == {"full_attention"}
        and runs_once_as_written(model)
    )


def packed_hidden_states(
    trunk: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    first: int = 0,
) -> Tensor:
    """The last hidden states [B, L, H] from the tokens where the mask is True; padding has 0.

    Those before the column ``first`` are not read, and may be anything.
    """
    packed = {
        "input_ids": input_ids[attention_mask][None],
        "position_ids": position_ids[attention_mask][None],
        "attention_mask": None,
        "use_cache": False,
    }
    if attends_packed(trunk):
        output = trunk(**packed)
    else:
        lengths = attention_mask.sum(1).tolist()
        with attending_by_rows(trunk), last_feed_forward_from(trunk, attention_mask, first):
            output = trunk(**packed, row_lengths=[length for length in lengths if length])
    tokens = output.last_hidden_state[0]
    hidden = tokens.new_zeros(*input_ids.shape, tokens.shape[-1])
    return hidden.masked_scatter(attention_mask[..., None], tokens)


@contextmanager
def attending_by_rows(trunk: Any) -> Iterator[None]:
    """The trunk's attention goes from row to row, over ``row_lengths``."""
    AttentionInterface.register(BY_ROWS, attend_by_rows)
    AttentionMaskInterface.register(BY_ROWS, no_mask)
    config = trunk.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = BY_ROWS
    try:
        yield
    finally:
        config._attn_implementation = before


def attend_by_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    row_lengths: Sequence[int],
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row, in the form that transformers calls.

    Args:
        query, key, value: [1, heads, tokens, size], with fewer heads of key and value where groups
            of heads share them.
        row_lengths: Tokens of each row.

    Returns:
        [1, tokens, heads, size], and no attention weights.
    """
    # Autocast gives values of 16 bits to queries and keys that were rotated in float32.
    widest = torch.promote_types(query.dtype, torch.promote_types(key.dtype, value.dtype))
    q, k, v = (x.squeeze(0).transpose(0, 1).to(widest) for x in (query, key, value))
    if dropout == 0.0 and query.shape[-1] <= LARGEST_SIZE and attends_by_kernel(q):
        starts = torch.tensor([0, *itertools.accumulate(row_lengths)])
        return row_attention(q, k, v, starts, scaling)[None].to(query.dtype), None
    return by_pytorch(query, key, value, row_lengths, dropout, scaling), None


def by_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_lengths: Sequence[int],
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """The same where there is no kernel for it: with dropout, in float64, without a compiler.

    In float32 where it is in 16 bits: PyTorch's backward of bfloat16 takes three times as long, and
    rounds more.
    """
    all_rows = [x.float() if x.dtype in HALVES else x for x in (query, key, value)]
    if len(set(row_lengths)) == 1:  # a batch
        parts = [tuple(x.unflatten(2, (len(row_lengths), -1))[0].transpose(0, 1) for x in all_rows)]
    else:
        parts = list(zip(*(x.split(list(row_lengths), dim=2) for x in all_rows)))
    with torch.autocast("cpu", enabled=False):  # which would round it all to bfloat16
        rows = [
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
            )
            for q, k, v in parts
        ]
    # From [rows, heads, tokens, size], one part or one for each row.
    tokens = [part.transpose(1, 2).flatten(0, 1) for part in rows]
    return torch.cat(tokens)[None].to(query.dtype)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Each row is attended to by itself."""
