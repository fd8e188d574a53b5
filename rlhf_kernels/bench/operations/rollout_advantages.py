"""`rollout_advantages` against the operations that trainers chain from scores to advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import rlhf_kernels as rk
from rlhf_kernels.bench import formulas
from rlhf_kernels.bench.operation import Case, Plan, Work
from rlhf_kernels.bench.operations.sequences import SequenceOperation, normal, padded_on_the_right
from rlhf_kernels.bench.peers import PEERS

TRL = "TRL 1.12's operations"
_KL_COEF = 0.05


class RolloutAdvantages(SequenceOperation):
    """With whitened advantages, the default of all."""

    name = "rollout_advantages"
    primitive = "rollout_forward"
    series = 7  # log-probabilities, those of the reference, values in; four out

    def work(self, case: Case) -> Work:
        return Work(bytes=self.bytes_of(case))

    def memory(self, case: Case) -> int:
        return 4 * self.bytes_of(case)

    def plan(self, case: Case, rivals: Sequence[str] = PEERS) -> Plan:
        logprobs = -normal(case).abs()
        ref_logprobs = logprobs + 0.1 * normal(case)
        values, mask = normal(case), padded_on_the_right(case)
        scores = torch.randn(case.sizes["B"], device=case.device)
        data = (scores, logprobs, ref_logprobs, values, mask)
        plan = Plan()
        self.add_ours(
            plan,
            case,
            lambda name: lambda: rk.rollout_advantages(*data, kl_coef=_KL_COEF, backend=name),
        )
        self.add_peers(plan, case, rivals, lambda function: lambda: function(*data, _KL_COEF))
        plan.add(TRL, lambda _: formulas.rollout_advantages(*data, _KL_COEF))
        outputs = [torch.zeros_like(values) for _ in range(4)]
        self.add_copy(plan, [logprobs, ref_logprobs, values, mask, *outputs])
        return plan


OPERATION = RolloutAdvantages()
