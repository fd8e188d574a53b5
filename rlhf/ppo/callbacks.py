"""Code of the user's that runs at certain points of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.ppo.experience import Experience
    from rlhf.ppo.trainer import PPOTrainer


class Callback:
    """Override what is needed. Under several ranks each calls it; ``trainer.world`` says which.

    An exception ends the training with its own traceback. ``trainer.stop()`` ends it cleanly after
    the present update, as if it were the last: the models are saved, and no checkpoint is written.
    """

    def on_train_begin(self, trainer: PPOTrainer) -> None:
        """Before the first rollout, also of a resumed training."""

    def on_rollout(self, trainer: PPOTrainer, experience: Experience) -> None:
        """After a rollout; the experience may be changed (see ``docs/ppo.md``)."""

    def on_update(self, trainer: PPOTrainer, metrics: dict[str, float]) -> None:
        """After an update, with its metrics."""

    def on_evaluate(self, trainer: PPOTrainer, metrics: dict[str, float]) -> None:
        """After an evaluation, with its metrics."""

    def on_train_end(self, trainer: PPOTrainer) -> None:
        """After the last update, before the models are saved."""
