"""Forward, backward, clipping, optimizer and schedule of one model, on any number of ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from rlhf.engine.adamw_8bit import AdamW8bit
from rlhf.engine.config import TrainingConfig
from rlhf.engine.gradient_norm import gradient_norm
from rlhf.engine.lora import has_lora, merged_weights
from rlhf.engine.optimizer import (
    MasterWeights,
    make_optimizer,
    to_bfloat16,
    trainable_parameters,
)
from rlhf.engine.parallel import call_gathered, decoder_layers, distribute, summing_gradients
from rlhf.engine.precision import autocast, resolve_dtype
from rlhf.engine.schedule import learning_rate_factor
from rlhf.engine.world import World
from rlhf_kernels.cpu_memory import keep_freed_memory
from rlhf_kernels.fast_layers import use_fast_layers

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a metric became NaN or infinite."""


class SkippedStepsError(NonFiniteError):
    """Too many optimizer steps in a row had to be skipped. None of them has changed a weight."""


class Engine:
    """Trains one model: ``backward`` as often as there are micro-batches, then ``step``.

    Whatever reads the model's weights does so inside ``run`` or ``run_gathered``, where they are
    whole also when FSDP has split them. Weights are float32 (with ``config.weights`` "bfloat16"
    what the optimizer updates is; with "adamw_8bit" that has 24 bits); matrix products under
    ``autocast()`` run in ``compute_dtype``. The loss given to ``backward`` must already be divided
    by the whole step's normaliser, over all ranks, so that gradients simply add up.

    Args:
        model: Moved to this rank's device and set to training mode. Its trainable weights must be
            float32.
        config: Optimizer, schedule, precision and parallelism.
        total_steps: Optimizer steps of the whole training, for the schedule.
        learning_rate: Instead of ``config.learning_rate``.
        name: What to call the model in errors.

    Raises:
        ValueError: A trainable weight is not float32, or there are none; or ``config.parallel``
            cannot be had here.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        total_steps: int,
        *,
        learning_rate: float | None = None,
        name: str = "model",
    ) -> None:
        self.world = World.join()
        self.device = self.world.device
        self.name = name
        self.config = config
        self.total_steps = total_steps
        self.steps_done = 0
        self.compute_dtype = resolve_dtype(config.dtype, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        named = trainable_parameters(model, name)  # before anything is changed
        self.model = model.to(self.device).train()
        if config.gradient_checkpointing:
            enable = getattr(model, "gradient_checkpointing_enable")  # noqa: B009 (not on nn.Module)
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        use_fast_layers(self.model)
        if config.torch_compile:
            for layer in decoder_layers(model):
                layer.compile(dynamic=True)
        in_bfloat16 = config.weights == "bfloat16"
        gathered = torch.bfloat16 if in_bfloat16 else self.compute_dtype
        # The 8-bit optimizer updates bfloat16 weights by itself, with what they lack of float32.
        by_itself = in_bfloat16 and config.optimizer == "adamw_8bit"
        remainders = to_bfloat16(self.model, named) if by_itself else {}
        self.module = distribute(self.model, config.parallel, gathered)
        if isinstance(self.module, FSDPModule):
            named = trainable_parameters(self.model, name)  # anew: FSDP has replaced them
        # FSDP keeps float32 shards by itself, and gathers them in bfloat16.
        with_masters = in_bfloat16 and not by_itself and not isinstance(self.module, FSDPModule)
        self.masters = MasterWeights(self.model, named) if with_masters else None
        self.named_parameters = self.masters.named if self.masters else named
        self.parameters = list(self.named_parameters.values())
        self.base_learning_rate = config.learning_rate if learning_rate is None else learning_rate
        self.optimizer = make_optimizer(self.parameters, config, self.base_learning_rate)
        for key, remainder in remainders.items():
            self.optimizer.state[named[key]]["remainder"] = remainder
        self.skipped_in_a_row = 0
        self._bad_terms: dict[str, Tensor] = {}

    def run(self, function: Callable[[Any], Any], *, last: bool = True) -> Any:
        """``function(model)``, with the model's weights at hand.

        Tensors that need gradients reach the function as part of itself (a closure), never as an
        argument: FSDP takes an argument's gradient for the end of its own backward.

        Args:
            function: Of the model; what it returns is returned.
            last: Whether the step's last micro-batch; gradients are summed over ranks with it.
        """
        with summing_gradients(self.module, last):
            return self.module(function)

    @torch.no_grad()
    def run_gathered(self, function: Callable[[Any], Any]) -> Any:
        """As ``run``, without gradients and with all weights gathered once: for generation."""
        return call_gathered(self.module, function)

    def autocast(self) -> AbstractContextManager[None]:
        """Context for forward passes: matrix products in ``compute_dtype``."""
        return autocast(self.compute_dtype, self.device)

    def backward(
        self,
        loss: Tensor,
        *,
        terms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the gradients of a 0-dim loss to those of the micro-batches before it.

        Whether the loss is finite is looked at in ``step``, before any weight is touched, so that
        no micro-batch waits for the host.

        Args:
            loss: Divided by the normaliser of the whole step.
            terms: What it was added up from, by name, for the message if it is NaN or infinite;
                and what else must be finite, such as the loss of a model trained beside this one.
        """
        for name, term in {**(terms or {}), "loss": loss}.items():
            bad = ~torch.isfinite(term.detach())
            earlier = self._bad_terms.get(name)
            self._bad_terms[name] = bad if earlier is None else earlier | bad
        # DDP and FSDP take the mean over ranks of what has to be summed.
        (loss * self.world.size if self.world.size > 1 else loss).backward()

    def step(self) -> dict[str, float]:
        """Clip, update the weights, clear the gradients, advance the schedule.

        Returns:
            ``grad_norm`` before clipping, the ``learning_rate`` used, and ``skipped_step``: 1 if a
            loss or a gradient was NaN or infinite, so that the weights were left alone
            (``grad_norm`` is then 0, what was applied).

        Raises:
            SkippedStepsError: ``config.max_skipped_steps`` steps in a row had to be skipped.
        """
        norm = gradient_norm([p.grad for p in self.parameters if p.grad is not None])
        grad_norm, bad_terms = self._on_host(norm)
        rate = self.learning_rate
        skipped = bool(bad_terms) or not math.isfinite(grad_norm)
        if skipped:
            self._note_skipped(grad_norm, bad_terms)
            grad_norm = 0.0
        else:
            self.skipped_in_a_row = 0
            self._update_weights(norm, rate)
        self.discard()
        self.steps_done += 1
        return {"grad_norm": grad_norm, "learning_rate": rate, "skipped_step": float(skipped)}

    def require_progress(self) -> None:
        """Raise NonFiniteError if not one of the steps so far could be taken."""
        if self.steps_done and self.skipped_in_a_row == self.steps_done:
            raise NonFiniteError(
                f"{self.name}: all {self.steps_done} optimizer steps were skipped, since their "
                "loss or gradient was NaN or infinite. Look at the model's weights and the data."
            )

    def whole_weights(self) -> dict[str, Tensor]:
        """All weights as they are to be saved, for ``save_model``: on the main rank gathered from
        all shards, float32 values rather than their roundings, adapters merged in, and of tied
        weights only the first. Every rank must ask.
        """
        if isinstance(self.module, FSDPModule):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights: dict[str, Any] = dict(get_model_state_dict(self.model, options=options))
        else:
            weights = self.model.state_dict()
        if self.masters is not None:
            weights = {**weights, **self.masters.named}
        elif isinstance(self.optimizer, AdamW8bit):
            exact = {name: self.optimizer.float32(p) for name, p in self.named_parameters.items()}
            weights = {**weights, **exact}
        first_names = {name for name, _ in self.model.named_parameters()}
        all_names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tied = all_names - first_names
        weights = {name: w.detach() for name, w in weights.items() if name not in tied}
        return merged_weights(self.model, weights) if has_lora(self.model) else weights

    def discard(self) -> None:
        """Drop what ``backward`` has gathered since the last step, so that none of it is left for
        the next one.
        """
        self.optimizer.zero_grad()
        self.model.zero_grad()
        self._bad_terms = {}

    @property
    def learning_rate(self) -> float:
        """The rate that the next ``step`` uses."""
        config = self.config
        return self.base_learning_rate * learning_rate_factor(
            config.lr_schedule, self.steps_done, self.total_steps, config.warmup_ratio
        )

    def _on_host(self, norm: Tensor) -> tuple[float, list[str]]:
        """The gradient norm and the loss terms that are not finite, in one transfer."""
        names = list(self._bad_terms)
        flags = [self._bad_terms[name].float() for name in names]
        # The largest over ranks: one rank's bad loss must make all of them skip.
        values = self.world.all_reduce_max(torch.stack([*flags, ~norm.isfinite()]).float())
        *bad, _, grad_norm = torch.cat([values, norm.float().reshape(1)]).tolist()
        return grad_norm, [name for name, is_bad in zip(names, bad) if is_bad]

    def _update_weights(self, norm: Tensor, rate: float) -> None:
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.masters is not None:
            self.masters.write_back()

    def _note_skipped(self, grad_norm: float, bad_terms: list[str]) -> None:
        self.skipped_in_a_row += 1
        what = f"gradient norm is {grad_norm}"
        if bad_terms:
            parts = [name for name in bad_terms if name != "loss"] or ["loss"]
            what = f"{' and the '.join(parts)} became NaN or infinite"
        message = (
            f"{self.name}, optimizer step {self.steps_done + 1}: skipped, since the {what}; the "
            f"weights are left as they are ({self.skipped_in_a_row} in a row)"
        )
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            self.discard()
            raise SkippedStepsError(
                f"{message}. Look at the data of this step, or lower the learning rate; "
                "max_skipped_steps says how many end the training."
            )
        logger.warning(message)


@contextmanager
def discarding_on_error(*engines: Engine) -> Iterator[None]:
    """Whatever ends the block early takes the gradients of its unfinished step with it.

    The engines' steps count from where the block began, since it is to be done again.
    """
    counts = [(engine.steps_done, engine.skipped_in_a_row) for engine in engines]
    try:
        yield
    except BaseException:
        for engine, (done, skipped) in zip(engines, counts):
            engine.discard()
            engine.steps_done, engine.skipped_in_a_row = done, skipped
        raise
