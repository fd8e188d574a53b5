"""Responses that have ended leave a batch, so that a step of sampling computes the others alone.

transformers' ``generate`` goes on with all rows until the last one ends. Here the model is called
with fewer of them, which the loop around it does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from rlhf_kernels.fast_rotary import runs_once_as_written

OF_ROWS = {"input_ids", "attention_mask", "position_ids"}  # tensors that a model is called with
WITHOUT_ROWS = {"cache_position"}
BY_LONGEST_ROW = {"dynamic", "longrope"}  # rotations that change when the longest row leaves
ENOUGH = 0.75  # of the rows: so few must be left before the others' cache is copied


class EndedRows(StoppingCriteria):
    """Ends rows of a batch, and knows which ones the model still has to compute.

    Args:
        ending_ids: The ids that end a response.
        batch: int64 [B, L], the prompts.
        at_strings: What else ends rows, in generate's form, if there is something.

    Attributes:
        running: bool [B], rows that have not ended.
        rows: int64 [A], those of them, or some more, that the cache has.
    """

    def __init__(
        self,
        ending_ids: Sequence[int],
        batch: Tensor,
        at_strings: Callable[..., Tensor] | None = None,
    ) -> None:
        self.ending_ids = torch.tensor(list(ending_ids), dtype=torch.int64, device=batch.device)
        self.at_strings = at_strings
        self.running = torch.ones(len(batch), dtype=torch.bool, device=batch.device)
        self.rows = torch.arange(len(batch), device=batch.device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = torch.isin(input_ids[:, -1], self.ending_ids)
        if self.at_strings is not None:
            ended |= self.at_strings(input_ids, scores)
        self.running &= ~ended
        return ended

    @property
    def some_left_out(self) -> bool:
        return len(self.rows) < len(self.running)

    def leave(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What to call the model with: rows that have ended are taken out, once they are enough.

        Args:
            inputs: Keyword arguments of all rows, and the cache, which is changed.
        """
        still = self.running[self.rows]
        if 0 < int(still.sum()) <= ENOUGH * len(still) and _can_leave(inputs, len(self.running)):
            inputs["past_key_values"].batch_select_indices(still.nonzero().flatten())
            self.rows = self.rows[still]
        if not self.some_left_out:
            return inputs
        of_rows = {name: x for name, x in inputs.items() if name in OF_ROWS and x is not None}
        return inputs | {name: x[self.rows] for name, x in of_rows.items()}


@contextmanager
def leaving_out(ended: EndedRows, model: Any) -> Iterator[None]:
    """Inside, ``model.generate`` with ``ended`` among its criteria does not compute its rows.

    Nothing changes on a GPU, where a step takes as long for few rows and to ask which ones have
    ended would be to wait for it, for compiled models, which would be compiled again, and where
    a row's numbers depend on the others' lengths.

    Args:
        ended: Of a batch that has not begun.
        model: The model that generate calls, without a wrapper.
    """
    if model.device.type != "cpu" or not runs_once_as_written(model) or _looks_at_all_rows(model):
        yield
        return

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, ended.leave(kwargs)

    def after(module: Any, args: Any, output: Any) -> None:
        if ended.some_left_out:  # its token will be padding, whatever the logits are
            logits = output.logits.new_zeros(len(ended.running), *output.logits.shape[1:])
            output.logits = logits.index_copy_(0, ended.rows, output.logits)

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _can_leave(inputs: dict[str, Any], rows: int) -> bool:
    """Whether all that has rows is known: matrices of a row each, and keys and values."""
    cache = inputs.get("past_key_values")
    plain = type(cache) is DynamicCache and all(type(x) is DynamicLayer for x in cache.layers)
    tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    known = tensors.keys() <= OF_ROWS | WITHOUT_ROWS
    of_rows = [tensors[name] for name in tensors.keys() & OF_ROWS]
    return plain and known and all(x.dim() == 2 and len(x) == rows for x in of_rows)


def _looks_at_all_rows(model: Any) -> bool:
    """Whether its rotary embeddings choose their frequencies by the longest row of a batch."""
    kinds = (vars(module).get("rope_type") for module in model.modules())
    # Where layers differ it is a kind for each sort of them.
    return any(
        BY_LONGEST_ROW.intersection(kind.values() if isinstance(kind, dict) else [kind])
        for kind in kinds
    )
