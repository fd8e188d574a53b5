"""The training engine that SFT, reward modelling and PPO share.

It owns what the three have in common: precision, backward, clipping, the optimizer and its
schedule, ranks, saving and tracking. A trainer only says what its loss is.
"""

from __future__ import annotations

from rlhf.engine.batching import epoch_order, micro_batches, rank_micro_batches
from rlhf.engine.checkpoint import CheckpointError, Checkpoints
from rlhf.engine.config import MAX_SEED, TrainingConfig, check_choice, check_config, check_number
from rlhf.engine.engine import Engine, NonFiniteError, SkippedStepsError, discarding_on_error
from rlhf.engine.frozen import Frozen
from rlhf.engine.interruption import Interrupted
from rlhf.engine.precision import resolve_dtype
from rlhf.engine.randomness import set_seed
from rlhf.engine.resumable import Resumable
from rlhf.engine.saving import (
    OutputError,
    begin_training,
    ensure_writable,
    save_config,
    save_model,
)
from rlhf.engine.schedule import learning_rate_factor
from rlhf.engine.tracking import Trackers
from rlhf.engine.world import World, check_kernels

__all__ = [
    "MAX_SEED",
    "CheckpointError",
    "Checkpoints",
    "Engine",
    "Frozen",
    "Interrupted",
    "NonFiniteError",
    "OutputError",
    "Resumable",
    "SkippedStepsError",
    "Trackers",
    "TrainingConfig",
    "World",
    "begin_training",
    "check_choice",
    "check_config",
    "check_kernels",
    "check_number",
    "discarding_on_error",
    "ensure_writable",
    "epoch_order",
    "learning_rate_factor",
    "micro_batches",
    "rank_micro_batches",
    "resolve_dtype",
    "save_config",
    "save_model",
    "set_seed",
]
