"""Settings that every trainer has, and the checks that make a wrong one a clear error."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

TRACKERS = ("jsonl", "tensorboard", "progress")  # unless others are named
ALL_TRACKERS = (*TRACKERS, "wandb")
WANDB_MISSING = "the tracker wandb needs the package of that name: pip install wandb"
MAX_SEED = 2**63 - 1  # what PyTorch's generators take


def check_number(
    config: Any,
    name: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """Raise ValueError naming the field and its value unless it is a finite number in bounds.

    Args:
        config: The object that has the field.
        name: The field's name.
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        below: Exclusive upper bound.
        at_most: Inclusive upper bound.
        integer: Whether it must be a whole number.
        optional: Whether None is allowed.
    """
    value = getattr(config, name)
    if optional and value is None:
        return
    kind = int if integer else (int, float)
    bounds = (
        (above, "above", lambda bound: value > bound),
        (at_least, "at least", lambda bound: value >= bound),
        (below, "below", lambda bound: value < bound),
        (at_most, "at most", lambda bound: value <= bound),
    )
    is_number = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and all(bound is None or holds(bound) for bound, _, holds in bounds):
        return
    rules = " and ".join(f"{word} {bound}" for bound, word, _ in bounds if bound is not None)
    what = ("a whole number" if integer else "a number") + (f" {rules}" if rules else "")
    raise ValueError(f"{name}={value!r} must be {what}" + (" (or None)" if optional else ""))


def check_choice(config: Any, name: str, choices: Iterable[Any]) -> None:
    """Raise ValueError naming the field and the choices unless its value is one of them."""
    value, choices = getattr(config, name), list(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def check_config(config: Any, config_class: type, user: str) -> None:
    """Check that ``user`` can train with a config, before it touches anything.

    Raises:
        TypeError: It is another trainer's.
        ImportError: A tracker's package is not installed.
    """
    if not isinstance(config, config_class):
        raise TypeError(
            f"{user} takes a {config_class.__name__} as its config, and was given a "
            f"{type(config).__name__}"
        )
    if "wandb" in getattr(config, "trackers", ()) and find_spec("wandb") is None:
        raise ImportError(WANDB_MISSING)


@dataclass
class TrainingConfig:
    """Settings that all trainers share.

    Attributes:
        output_dir: Folder for the trained model, its tokenizer and the logs; those of an earlier
            training are replaced.
        learning_rate: Highest learning rate of AdamW.
        weight_decay: AdamW's weight decay, applied to matrices but not to biases and norms.
        adam_beta1: AdamW's decay of the gradient's mean.
        adam_beta2: AdamW's decay of the gradient's square.
        adam_eps: AdamW's epsilon.
        max_grad_norm: Gradients are scaled down to this norm; null for no clipping.
        optimizer: adamw has float32 moments. adamw_8bit rounds them to 8 bits: 2 bytes a trained
            parameter in place of 8, noise of some 10% in each one's step size, and a slower step.
            With bfloat16 weights it has no float32 copies but keeps 8 bits more of each weight,
            and sums gradients in bfloat16: 7 bytes a trained parameter in all, in place of 18.
            Not with fsdp or hybrid.
        lr_schedule: The learning rate after the warmup: linear or cosine to 0, or constant.
        warmup_ratio: Share of all optimizer steps over which the learning rate rises from 0.
        seed: Seed of everything random.
        dtype: Precision of matrix products: auto is bfloat16 where the hardware is fast at it and
            float32 elsewhere.
        weights: Type of the weights. With bfloat16 the optimizer keeps float32 copies: as exact an
            update, half the memory to read in each forward pass. See also optimizer.
        micro_batch_size: Sequences in one forward pass. Changes memory and speed, not the result.
        micro_batch_tokens: Tokens in one forward pass, padding included, as a second limit; null
            for none. A sequence that is longer goes by itself.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, slower.
        torch_compile: Compile the decoder layers with torch.compile.
        parallel: How the ranks of torchrun share the models: ddp (also auto) copies them, fsdp
            splits weights, gradients and optimizer state over all ranks, hybrid splits them inside
            each machine.
        max_skipped_steps: End the training after so many optimizer steps in a row were skipped
            because a loss or a gradient was NaN or infinite.
        save_every: Write a checkpoint every so many steps (PPO: updates); null for none but on
            SIGTERM and SIGINT.
        keep_checkpoints: Newest checkpoints to keep. PPO keeps the best evaluated one besides.
        log_every: Log every so many optimizer steps.
        trackers: Where metrics go: jsonl (metrics.jsonl), tensorboard (tb/), progress (terminal),
            wandb (where it is installed).
    """

    output_dir: str = "runs/output"
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.0
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: Literal["float32", "bfloat16"] = "float32"
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    parallel: Literal["auto", "ddp", "fsdp", "hybrid"] = "auto"
    max_skipped_steps: int = 3
    save_every: int | None = None
    keep_checkpoints: int = 2
    log_every: int = 1
    trackers: list[str] = field(default_factory=lambda: list(TRACKERS))

    def __post_init__(self) -> None:
        if not str(self.output_dir).strip():
            raise ValueError("output_dir is empty; name a folder for the results")
        self.output_dir = os.path.expanduser(self.output_dir)  # once, for all that use it
        check_number(self, "learning_rate", above=0)
        check_number(self, "weight_decay", at_least=0)
        check_number(self, "adam_beta1", at_least=0, below=1)
        check_number(self, "adam_beta2", at_least=0, below=1)
        check_number(self, "adam_eps", above=0)
        check_number(self, "max_grad_norm", above=0, optional=True)
        check_choice(self, "optimizer", ("adamw", "adamw_8bit"))
        check_choice(self, "lr_schedule", ("linear", "cosine", "constant"))
        check_number(self, "warmup_ratio", at_least=0, below=1)
        check_number(self, "seed", at_least=0, at_most=MAX_SEED, integer=True)
        check_choice(self, "dtype", ("auto", "float32", "bfloat16"))
        check_choice(self, "weights", ("float32", "bfloat16"))
        check_number(self, "micro_batch_size", at_least=1, integer=True)
        check_number(self, "micro_batch_tokens", at_least=1, integer=True, optional=True)
        check_choice(self, "parallel", ("auto", "ddp", "fsdp", "hybrid"))
        if self.optimizer == "adamw_8bit" and self.parallel in ("fsdp", "hybrid"):
            raise ValueError(
                f"optimizer='adamw_8bit' cannot split its state over ranks: parallel="
                f"{self.parallel!r} needs optimizer='adamw'; or set parallel='ddp'"
            )
        check_number(self, "max_skipped_steps", at_least=1, integer=True)
        check_number(self, "save_every", at_least=1, integer=True, optional=True)
        check_number(self, "keep_checkpoints", at_least=1, integer=True)
        check_number(self, "log_every", at_least=1, integer=True)
        if not isinstance(self.trackers, list) or set(self.trackers) - set(ALL_TRACKERS):
            raise ValueError(
                f"trackers={self.trackers!r} must be a list of {', '.join(map(repr, ALL_TRACKERS))}"
            )
