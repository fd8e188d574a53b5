"""Settings of the models that are trained."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.engine import check_number


@dataclass
class ModelsConfig:
    """The critic and how the models are trained.

    Attributes:
        critic_learning_rate: The critic's; null takes learning_rate.
    """

    critic_learning_rate: float | None = None

    def check_models(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_number(self, "critic_learning_rate", above=0, optional=True)
