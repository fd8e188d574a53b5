"""`gae` against copying what it reads and writes, and against loops over time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import rlhf_kernels as rk
from rlhf_kernels.bench import formulas
from rlhf_kernels.bench.operation import Case, Plan, Work
from rlhf_kernels.bench.operations.sequences import (
    LOOP,
    SequenceOperation,
    normal,
    padded_on_the_right,
)
from rlhf_kernels.bench.peers import PEERS


class GAE(SequenceOperation):
    """Compiling the loop would unroll its steps: there is no such variant."""

    name = "gae"
    primitive = "gae_forward"
    series = 4  # rewards and values in, advantages and returns out

    def work(self, case: Case) -> Work:
        return Work(bytes=self.bytes_of(case))

    def memory(self, case: Case) -> int:
        return 4 * self.bytes_of(case)

    def plan(self, case: Case, rivals: Sequence[str] = PEERS) -> Plan:
        rewards, values = normal(case), normal(case)
        mask = padded_on_the_right(case)
        plan = Plan()
        self.add_ours(plan, case, lambda name: lambda: rk.gae(rewards, values, mask, backend=name))
        self.add_peers(plan, case, rivals, lambda function: lambda: function(rewards, values, mask))
        plan.add(LOOP, lambda _: formulas.gae(rewards, values, mask, 1.0, 0.95))
        outputs = [torch.zeros_like(rewards) for _ in range(2)]
        self.add_copy(plan, [rewards, values, mask, *outputs])
        return plan


OPERATION = GAE()
