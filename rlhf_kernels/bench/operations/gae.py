"""`gae` against reading its inputs, and against the loop over time."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import rlhf_kernels as rk
from rlhf_kernels.bench import formulas
from rlhf_kernels.bench.operation import FORWARD, Case, Grid, Operation, Plan, Work, ours


class GAE(Operation):
    """Its inputs are small enough for a cache, as in training, where they were just made."""

    name = "gae"
    primitive = "gae_forward"
    passes = (FORWARD,)
    calls_per_turn = 5
    floor_moves_all = False

    def sizes(self, grid: Grid) -> Iterator[dict[str, int]]:
        yield {"B": grid.sequences[0], "T": grid.sequences[1]}

    def dtypes(self, grid: Grid) -> tuple[str, ...]:
        return ("float32",)

    def work(self, case: Case) -> Work:
        # rewards, values and mask in, advantages and returns out
        return Work(bytes=case.sizes["B"] * case.sizes["T"] * (4 + 4 + 1 + 4 + 4))

    def memory(self, case: Case) -> int:
        return case.sizes["B"] * case.sizes["T"] * 4 * 16

    def plan(self, case: Case) -> Plan:
        batch, steps = case.sizes["B"], case.sizes["T"]
        rewards, values = (torch.randn(batch, steps, device=case.device) for _ in range(2))
        lengths = torch.randint(steps // 2, steps + 1, (batch, 1), device=case.device)
        mask = torch.arange(steps, device=case.device) < lengths

        def through(backend: str, _: int) -> object:
            return rk.gae(rewards, values, mask, backend=backend)

        plan = Plan()
        for backend, reason in self.backends(case).items():
            if reason is not None:
                plan.missing[ours(backend)] = reason
                continue
            plan.add(ours(backend), functools.partial(through, backend))
        plan.add("loop over time", lambda _: formulas.gae(rewards, values, mask, 1.0, 0.95))
        plan.add("reading rewards and values", lambda _: (rewards.sum(), values.sum()), floor=True)
        return plan


OPERATION = GAE()
