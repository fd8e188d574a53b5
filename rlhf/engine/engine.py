"""Backward, clipping, optimizer and schedule of one model."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from rlhf.engine.config import TrainingConfig
from rlhf.engine.precision import resolve_dtype
from rlhf.engine.schedule import learning_rate_factor
from rlhf.engine.world import World

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 3


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a metric became NaN or infinite."""


class Engine:
    """Trains one model: ``backward`` as often as there are micro-batches, then ``step``.

    Weights stay float32; matrix products under ``autocast()`` run in ``compute_dtype``. The loss
    given to ``backward`` must already be divided by the whole step's normaliser (summed over
    ``world``), so that gradients simply add up.

    Args:
        model: Moved to this rank's device and set to training mode. Its trainable weights must be
            float32.
        config: Optimizer, schedule and precision settings.
        total_steps: Optimizer steps of the whole training, for the schedule.
        learning_rate: Instead of ``config.learning_rate``.
        name: What to call the model in errors.

    Raises:
        ValueError: A trainable weight is not float32, or there are none.
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
        self.world = World()
        self.device = self.world.device
        self.name = name
        self.config = config
        self.total_steps = total_steps
        self.steps_done = 0
        self.compute_dtype = resolve_dtype(config.dtype, self.device)
        self.model = model.to(self.device).train()
        if config.gradient_checkpointing:
            enable = getattr(model, "gradient_checkpointing_enable")  # noqa: B009 (not on nn.Module)
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.parameters = trainable_parameters(model, name)
        self.base_learning_rate = config.learning_rate if learning_rate is None else learning_rate
        self.optimizer = make_optimizer(self.parameters, config, self.base_learning_rate)
        self._skipped_in_a_row = 0
        self._loss_is_bad = torch.zeros((), dtype=torch.bool, device=self.device)

    def autocast(self) -> AbstractContextManager[None]:
        """Context for forward passes: matrix products in ``compute_dtype``."""
        enabled = self.compute_dtype != torch.float32
        dtype = self.compute_dtype if enabled else None
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a 0-dim loss to those of the micro-batches before it.

        Raises:
            NonFiniteError: The loss is NaN or infinite. On the CPU before any gradient is touched;
                on a GPU the check waits for ``step``, before any weight is touched, so that no
                micro-batch waits for the host.
        """
        if self.device.type == "cpu":
            self._check_loss(bool(torch.isfinite(loss)))
        else:
            self._loss_is_bad |= ~torch.isfinite(loss.detach())
        loss.backward()

    def step(self) -> dict[str, float]:
        """Clip, update the weights, clear the gradients, advance the schedule.

        Returns:
            ``grad_norm`` before clipping, the ``learning_rate`` used, and ``skipped_step``: 1 if a
            gradient was NaN or infinite, so that the weights were left alone (``grad_norm`` is then
            0, what was applied).

        Raises:
            NonFiniteError: A loss was NaN or infinite, or a third step in a row had to be skipped.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        # One transfer to the host for both figures.
        grad_norm, bad = torch.stack([norm.float(), self._loss_is_bad.float()]).tolist()
        if bad:
            self.discard()
            self._check_loss(False)
        rate = self.learning_rate
        skipped = not math.isfinite(grad_norm)
        if skipped:
            self._note_skipped(grad_norm)
            grad_norm = 0.0
        else:
            self._skipped_in_a_row = 0
            if self.config.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    self.parameters, self.config.max_grad_norm, norm
                )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        return {"grad_norm": grad_norm, "learning_rate": rate, "skipped_step": float(skipped)}

    def discard(self) -> None:
        """Drop what ``backward`` has gathered since the last step, so that none of it is left for
        the next one.
        """
        self.optimizer.zero_grad()
        self._loss_is_bad.zero_()

    @property
    def learning_rate(self) -> float:
        """The rate that the next ``step`` uses."""
        config = self.config
        return self.base_learning_rate * learning_rate_factor(
            config.lr_schedule, self.steps_done, self.total_steps, config.warmup_ratio
        )

    def _check_loss(self, finite: bool) -> None:
        if not finite:
            raise NonFiniteError(
                f"the loss of {self.name} at optimizer step {self.steps_done + 1} is NaN or "
                "infinite; its weights were left as they are. Look at the data of this step, or "
                "lower the learning rate."
            )

    def _note_skipped(self, grad_norm: float) -> None:
        self._skipped_in_a_row += 1
        message = (
            f"the gradient norm of {self.name} at optimizer step {self.steps_done + 1} is "
            f"{grad_norm}; the step is skipped ({self._skipped_in_a_row} in a row)"
        )
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            self.discard()
            raise NonFiniteError(f"{message}. Lower the learning rate or max_grad_norm.")
        logger.warning(message)


@contextmanager
def discarding_on_error(*engines: Engine) -> Iterator[None]:
    """Whatever ends the block early takes the gradients of its unfinished step with it."""
    try:
        yield
    except BaseException:
        for engine in engines:
            engine.discard()
        raise


def trainable_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters that require gradients; ValueError if there are none or one is not float32."""
    named = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"{name} has no trainable parameter")
    for key, parameter in named:
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"{name}: parameter {key} is {parameter.dtype}; load the model in float32 "
                "(dtype decides the precision of matrix products, weights stay float32)"
            )
    return [parameter for _, parameter in named]


def make_optimizer(
    parameters: list[nn.Parameter], config: TrainingConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), with weight decay on matrices only."""
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
