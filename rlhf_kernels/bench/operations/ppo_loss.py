"""`ppo_loss` with its statistics, against reading its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import rlhf_kernels as rk
from rlhf_kernels.bench import formulas
from rlhf_kernels.bench.operation import (
    BOTH,
    Case,
    Grid,
    Operation,
    Plan,
    Work,
    compiled,
    gradients,
    ours,
)


class PPOLoss(Operation):
    """Its inputs are small enough for a cache, as in training, where they were just made."""

    name = "ppo_loss"
    primitive = "ppo_loss_forward"
    passes = (BOTH,)
    calls_per_turn = 5
    floor_moves_all = False

    def sizes(self, grid: Grid) -> Iterator[dict[str, int]]:
        yield {"B": grid.sequences[0], "T": grid.sequences[1]}

    def dtypes(self, grid: Grid) -> tuple[str, ...]:
        return ("float32",)

    def work(self, case: Case) -> Work:
        # seven inputs and the mask in, three gradients out
        return Work(bytes=case.sizes["B"] * case.sizes["T"] * (7 * 4 + 1 + 3 * 4))

    def memory(self, case: Case) -> int:
        return case.sizes["B"] * case.sizes["T"] * 4 * 64

    def plan(self, case: Case) -> Plan:
        shape = (case.sizes["B"], case.sizes["T"])

        def normal() -> torch.Tensor:
            return torch.randn(shape, device=case.device)

        old_logprobs, old_values = -normal().abs(), normal()
        advantages, returns = normal(), normal()
        mask = torch.rand(shape, device=case.device) > 0.1
        logprobs = (old_logprobs + 0.1 * normal()).requires_grad_()
        values = (old_values + 0.1 * normal()).requires_grad_()
        entropy = normal().abs().requires_grad_()
        config = rk.PPOLossConfig()
        rest = (old_logprobs, advantages, mask, values, old_values, returns, entropy, config)
        plan = Plan()

        def add(name: str, loss: Callable[[], Any]) -> None:
            plan.add(name, lambda _: gradients(loss(), None, [logprobs, values, entropy]))

        def through(backend: str) -> Callable[[], Any]:
            return lambda: rk.ppo_loss(
                logprobs,
                old_logprobs,
                advantages,
                mask,
                values=values,
                old_values=old_values,
                returns=returns,
                entropy=entropy,
                config=config,
                backend=backend,
            )

        for backend, reason in self.backends(case).items():
            if reason is not None:
                plan.missing[ours(backend)] = reason
            else:
                add(ours(backend), through(backend))
        add("eager", lambda: formulas.ppo_loss(logprobs, *rest))
        add("eager, no statistics", lambda: formulas.ppo_loss_only(logprobs, *rest))
        fused = compiled(formulas.ppo_loss)
        add("torch.compile", lambda: fused(logprobs, *rest))
        inputs = (logprobs, old_logprobs, advantages, values, old_values, returns, entropy)
        plan.add(
            "reading the seven inputs", lambda _: [x.detach().sum() for x in inputs], floor=True
        )
        return plan


OPERATION = PPOLoss()
