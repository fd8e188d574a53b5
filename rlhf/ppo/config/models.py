"""Settings of the models that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.engine import check_choice, check_number


@dataclass
class ModelsConfig:
    """The critic, and low-rank adapters.

    Attributes:
        critic: Where the critic comes from when none is given: reward (a copy of the reward model),
            policy (the policy's trunk with a new head), shared (a value head on the policy's own
            trunk: one forward for both, half the memory), or auto (reward where that has the
            policy's tokenizer, else policy).
        critic_learning_rate: The critic's; null takes learning_rate.
        lora_rank: Train low-rank adapters on the policy's linear layers instead of its weights (Hu
            et al. 2021, arXiv 2106.09685); the reference is then the policy without them. Needs
            peft. Null trains all weights.
        critic_lora_rank: The same for a critic of its own; its head is trained whole.
        lora_alpha: Adapters are scaled by lora_alpha / rank.
        frozen_on_disk: Keep the weights of reference and reward model in a file in output_dir and
            in memory only while they are read, once an update each. For a CPU.
    """

    critic: Literal["auto", "reward", "policy", "shared"] = "auto"
    critic_learning_rate: float | None = None
    lora_rank: int | None = None
    critic_lora_rank: int | None = None
    lora_alpha: int = 16
    frozen_on_disk: bool = False

    def check_models(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_choice(self, "critic", ("auto", "reward", "policy", "shared"))
        check_number(self, "critic_learning_rate", above=0, optional=True)
        check_number(self, "lora_rank", at_least=1, integer=True, optional=True)
        check_number(self, "critic_lora_rank", at_least=1, integer=True, optional=True)
        check_number(self, "lora_alpha", at_least=1, integer=True)
        check_choice(self, "frozen_on_disk", (False, True))
        if self.critic == "shared":
            self._check_shared()

    def _check_shared(self) -> None:
        for name in ("critic_learning_rate", "critic_lora_rank"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for a critic of its own, and critic='shared' "
                    "trains one trunk for both; leave it out"
                )
