"""`ppo_loss` with its statistics, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import rlhf_kernels as rk
from rlhf_kernels.bench import formulas
from rlhf_kernels.bench.operation import BOTH, Case, Plan, Work, compiled, gradients
from rlhf_kernels.bench.operations.sequences import SequenceOperation, normal
from rlhf_kernels.bench.peers import PEERS


class PPOLoss(SequenceOperation):
    """The peers' functions give fewer statistics."""

    name = "ppo_loss"
    primitive = "ppo_loss_forward"
    passes = (BOTH,)
    series = 10  # seven in, three gradients out

    def work(self, case: Case) -> Work:
        return Work(bytes=self.bytes_of(case))

    def memory(self, case: Case) -> int:
        return 6 * self.bytes_of(case)

    def plan(self, case: Case, rivals: Sequence[str] = PEERS) -> Plan:
        old_logprobs, old_values = -normal(case).abs(), normal(case)
        advantages, returns = normal(case), normal(case)
        mask = torch.rand(old_values.shape, device=case.device) > 0.1
        logprobs = (old_logprobs + 0.1 * normal(case)).requires_grad_()
        values = (old_values + 0.1 * normal(case)).requires_grad_()
        entropy = normal(case).abs().requires_grad_()
        leaves = [logprobs, values, entropy]
        config = rk.PPOLossConfig()
        rest = (old_logprobs, advantages, mask, values, old_values, returns, entropy, config)
        first = (logprobs, old_logprobs, advantages, mask)
        given = {"values": values, "old_values": old_values, "returns": returns}

        def both(loss: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: gradients(loss(), None, leaves)

        def through(backend: str) -> Callable[[], Any]:
            return both(
                lambda: rk.ppo_loss(
                    *first, **given, entropy=entropy, config=config, backend=backend
                )
            )

        def plain(function: Callable[..., Any]) -> Callable[[], Any]:
            return both(lambda: function(logprobs, *rest))

        plan = Plan()

        def add(name: str, function: Callable[..., Any]) -> None:
            run = plain(function)
            plan.add(name, lambda _: run())

        self.add_ours(plan, case, through)
        self.add_peers(plan, case, rivals, plain)
        add("eager", formulas.ppo_loss)
        add("eager, no statistics", formulas.ppo_loss_only)
        add("torch.compile", compiled(formulas.ppo_loss))
        inputs = [logprobs, old_logprobs, advantages, values, old_values, returns, entropy]
        self.add_copy(plan, [*inputs, mask, *(torch.zeros_like(x) for x in leaves)])
        return plan


OPERATION = PPOLoss()
