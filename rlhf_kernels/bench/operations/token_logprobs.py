"""`token_logprobs`, with and without entropy, against one read of the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.bench import floors, formulas, peers
from rlhf_kernels.bench.operation import (
    BOTH,
    FORWARD,
    Case,
    Grid,
    Operation,
    Plan,
    Work,
    buffer_sets,
    compiled,
    gradients,
    ours,
)
from rlhf_kernels.bench.peers import PEERS
from rlhf_kernels.bench.timing import Run, Variant

ENTROPY = ", entropy"  # ends the name of a variant that computes entropies too
BACKWARD = "backward"  # alone, on a graph that is kept; measured where a target asks for it


class TokenLogprobs(Operation):
    name = "token_logprobs"
    primitive = "token_logprobs_forward"
    # What a program freed seconds ago may have gone back to a virtual machine's host: the first
    # touch of it takes several times as long, and whoever follows a slow variant would pay.
    uncounted_calls = 1

    def sizes(self, grid: Grid) -> Iterator[dict[str, int]]:
        for vocabulary in grid.vocabularies:
            yield {"N": grid.rows, "V": vocabulary}

    def work(self, case: Case) -> Work:
        once = _logits_bytes(case)
        return Work(bytes=once * {FORWARD: 1, BACKWARD: 2, BOTH: 3}[case.direction])

    def memory(self, case: Case) -> int:
        # The sets, a gradient, a floor's buffer; with entropy, eager's six tensors in float32.
        narrow = _logits_bytes(case) * (buffer_sets(_logits_bytes(case), case.device) + 3)
        wide = 6 * 4 * case.sizes["N"] * case.sizes["V"]
        return narrow + (wide if case.device == "cpu" else 0)

    def plan(self, case: Case, rivals: Sequence[str] = PEERS) -> Plan:
        data = _Data(case)
        plan = Plan()
        for backend, reason in self.backends(case).items():
            if reason is not None:
                plan.missing[ours(backend)] = reason
                continue
            data.add(plan, ours(backend), _ours(backend, False))
            data.add(plan, ours(backend) + ENTROPY, _ours(backend, True))
        data.add(plan, "eager", formulas.token_logprobs)
        data.add(plan, "eager" + ENTROPY, formulas.token_logprobs_and_entropy)
        data.add(plan, "torch.compile", compiled(formulas.token_logprobs))
        both = compiled(formulas.token_logprobs_and_entropy)
        data.add(plan, "torch.compile" + ENTROPY, both)
        offers, missing = peers.offers(self.name, case.device, rivals)
        plan.missing.update(missing)
        for offer in offers:
            data.add(plan, offer.label, offer.function, own=offer.destroys)
        data.add_floors(plan)
        return plan


class _Data:
    """Several sets of random logits, in turn: none is in a cache when its turn comes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        shape = (case.sizes["N"], case.sizes["V"])
        sets = buffer_sets(_logits_bytes(case), case.device)
        options: dict[str, Any] = {"device": case.device, "dtype": case.torch_dtype}
        self.logits = [torch.randn(shape, **options).mul_(3) for _ in range(sets)]
        self.targets = torch.randint(shape[1], shape[:1], device=case.device)
        self.upstream = torch.randn(shape[0], device=case.device)

    def add(self, plan: Plan, name: str, function: Callable[..., Any], own: bool = False) -> None:
        """own: on a copy of its own, which it may destroy; the copy's values change no timing."""

        def build() -> Run:
            logits = [self.logits[0].clone()] if own else self.logits
            return _runner(self.case.direction, function, logits, self.targets, self.upstream)

        plan.variants.append(Variant(name, build))

    def add_floors(self, plan: Plan) -> None:
        if self.case.direction == FORWARD:
            floors.reading(plan, self.logits)
        elif self.case.direction == BACKWARD:
            floors.copying(plan, self.logits)
            floors.reading(plan, self.logits)
        else:
            floors.reading_and_copying(plan, self.logits)


def _runner(
    direction: str,
    function: Callable[..., Any],
    logits: list[Tensor],
    targets: Tensor,
    upstream: Tensor,
) -> Run:
    if direction == FORWARD:

        def forward(call: int) -> object:
            with torch.no_grad():
                return function(logits[call % len(logits)], targets)

        return forward
    leaves = [x.detach().requires_grad_() for x in logits]

    def both(call: int) -> object:
        leaf = leaves[call % len(leaves)]
        result = function(leaf, targets)
        return gradients(result, upstream, [leaf])

    if direction == BOTH:
        return both
    results = [_first(function(leaf, targets)) for leaf in leaves]

    def backward(call: int) -> object:
        turn = call % len(leaves)
        result = results[turn]
        return torch.autograd.grad(
            result, leaves[turn], upstream.to(result.dtype), retain_graph=True
        )[0]

    return backward


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _ours(backend: str, entropy: bool) -> Callable[..., Any]:
    def run(logits: Tensor, targets: Tensor) -> Any:
        # Two calls, since the overloads of the public function tell the two apart.
        if entropy:
            return rk.token_logprobs(logits, targets, return_entropy=True, backend=backend)
        return rk.token_logprobs(logits, targets, backend=backend)

    return run


def _logits_bytes(case: Case) -> int:
    return case.sizes["N"] * case.sizes["V"] * case.torch_dtype.itemsize


OPERATION = TokenLogprobs()
