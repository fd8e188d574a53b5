"""A rollout's forward passes of the trained models, kept for the first step of its update.

Old values and old log-probabilities come from the weights that the first step starts with. Where
all rows are one micro-batch and one optimizer step, that step's forward passes have been done: it
begins with the backward. Until then they take the memory of their activations; with smaller
micro-batches nothing is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rlhf.engine import Engine, rank_micro_batches
from rlhf.engine.weight_bits import sum_of_bits
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.experience import Experience, Sequences


@dataclass
class KeptForward:
    """One pass over all rows.

    Attributes:
        engine: Of the model that was run.
        rows: The rows in the order that they were run in.
        output: What came out, with its graph: the critic's values [B, T], or the policy's hidden
            states [B, T, H]. None once it was used, or when the engine has made a newer one.
        inputs: Copies of what went in. weights: How they were then; see ``_weights``.
    """

    engine: Engine
    rows: list[int]
    output: Tensor | None
    inputs: list[Tensor]
    weights: Tensor

    def holds_for(self, sequences: Sequences) -> bool:
        """Whether the engine would compute the same for them again."""
        if self.output is None or not torch.equal(self.weights, _weights(self.engine)):
            return False
        return all(map(torch.equal, self.inputs, _inputs(sequences)))

    def replay(self, model: Any, batch: Sequences) -> Tensor:
        """In the place of the function that was run, for the same batch."""
        assert self.output is not None
        return self.output


# One graph an engine: whoever collects experiences shall not collect activations.
_newest: weakref.WeakKeyDictionary[Engine, weakref.ref[KeptForward]] = weakref.WeakKeyDictionary()


class KeptForwards(tuple[KeptForward, ...]):
    """Those of an experience. A graph cannot be copied or stored: copies have none."""

    def __reduce__(self) -> Any:
        return KeptForwards, ()


def keep_forward(
    engine: Engine,
    function: Callable[[Any, Sequences], Tensor],
    sequences: Sequences,
    config: PPOConfig,
) -> KeptForward | None:
    """``function(model, batch)`` with its graph, or None where it is not the first step's."""
    lengths = sequences.lengths()
    rows = _only_part(lengths, config)
    if rows is None or engine.world.size > 1 or isinstance(engine.module, FSDPModule):
        return None
    if torch.is_inference_mode_enabled():  # where no graph can be had
        return None
    earlier = _newest.get(engine, lambda: None)()
    if earlier is not None:
        earlier.output = None
    batch = sequences.micro_batch(rows, lengths)
    with torch.enable_grad(), engine.autocast():
        output = engine.run(lambda model: function(model, batch))
    inputs = [each.clone() for each in _inputs(sequences)]
    kept = KeptForward(engine, rows, output, inputs, _weights(engine))
    _newest[engine] = weakref.ref(kept)
    return kept


def take_kept(experience: Experience, engine: Engine) -> tuple[list[int], Tensor] | None:
    """Rows and output of the experience's pass of this engine, if it still holds.

    No one else gets them after that: a graph can be gone backward once.
    """
    kept = next((kept for kept in experience.kept if kept.engine is engine), None)
    if kept is None:
        return None
    holds, output = kept.holds_for(experience), kept.output
    kept.output = None
    experience.kept = KeptForwards(other for other in experience.kept if other is not kept)
    return (kept.rows, output) if holds and output is not None else None


def _only_part(lengths: list[tuple[int, int]], config: PPOConfig) -> list[int] | None:
    """The rows of the only micro-batch of an epoch; None where there are more."""
    if config.minibatch_size < len(lengths):
        return None
    parts = rank_micro_batches(
        range(len(lengths)),
        [sum(both) for both in lengths],
        size=config.micro_batch_size,
        tokens=config.micro_batch_tokens,
    )
    return parts[0] if len(parts) == 1 else None


def _inputs(sequences: Sequences) -> list[Tensor]:
    return [
        sequences.prompt_ids,
        sequences.prompt_mask,
        sequences.responses,
        sequences.response_mask,
    ]


def _weights(engine: Engine) -> Tensor:
    """int64: steps done; of each weight the changes that PyTorch counts, and the sum of its bits.

    It does not count those behind autograd's back, through ``.data`` or NumPy.
    """
    tensors = [*engine.model.parameters(), *engine.model.buffers()]
    counts = torch.tensor([engine.steps_done, *(each._version for each in tensors)])
    return torch.cat([counts, torch.stack([sum_of_bits(each.detach()) for each in tensors]).cpu()])
