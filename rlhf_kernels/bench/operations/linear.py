"""What the operations over the output layer share: data, floors, and the way a variant runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.bench import floors, peers
from rlhf_kernels.bench.operation import (
    Case,
    Grid,
    Operation,
    Plan,
    Work,
    compiled,
    gradients,
    ours,
)
from rlhf_kernels.bench.peers import PEERS
from rlhf_kernels.bench.timing import Run, Variant
from rlhf_kernels.ops.chunks import default_chunk_size


class LinearOperation(Operation):
    """An operation on hidden states [N, H], a weight [V, H] and targets [N]."""

    primitive = "token_logprobs_forward"

    @abstractmethod
    def ours(self, backend: str) -> Callable[..., Any]:
        """The public function on one backend, called with `arguments`."""

    @abstractmethod
    def eager(self) -> Callable[..., Any]:
        """The formula in PyTorch."""

    def arguments(
        self, case: Case, hidden: Tensor, weight: Tensor, targets: Tensor
    ) -> tuple[Any, ...]:
        """What every variant is called with."""
        return hidden, weight, targets

    def upstream(self, case: Case) -> Tensor | None:
        """The gradient that comes from above; None for a loss."""
        return None

    def sizes(self, grid: Grid) -> Iterator[dict[str, int]]:
        for vocabulary in grid.vocabularies:
            yield {"N": grid.rows, "V": vocabulary, "H": grid.hidden}

    def dtypes(self, grid: Grid) -> tuple[str, ...]:
        return grid.linear_dtypes

    def work(self, case: Case) -> Work:
        product = 2 * case.sizes["N"] * case.sizes["V"] * case.sizes["H"]
        return Work(flops=3 * product if case.backward else product)

    def memory(self, case: Case) -> int:
        # Weight, its gradients and sums; eager's logits, gradient, and six tensors in float32.
        rows, vocabulary, hidden = (case.sizes[name] for name in "NVH")
        logits = rows * vocabulary * (2 * case.torch_dtype.itemsize + 6 * 4)
        layer = (2 * rows + 4 * vocabulary) * hidden * 4
        return layer + (logits if case.device == "cpu" else 0)

    def plan(self, case: Case, rivals: Sequence[str] = PEERS) -> Plan:
        rows, vocabulary, width = (case.sizes[name] for name in "NVH")
        options: dict[str, Any] = {"device": case.device, "dtype": case.torch_dtype}
        weight = torch.randn(vocabulary, width, **options).mul_(3 * width**-0.5)
        hidden = [torch.randn(rows, width, **options) for _ in range(2)]
        targets = torch.randint(vocabulary, (rows,), device=case.device)
        upstream = self.upstream(case) if case.backward else None
        if case.backward:
            for leaf in (weight, *hidden):
                leaf.requires_grad_()
        arguments = [self.arguments(case, x, weight, targets) for x in hidden]
        plan = Plan()

        def add(name: str, function: Callable[..., Any], comparable: bool = True) -> None:
            run = _runner(case.backward, function, arguments, hidden, weight, upstream)
            plan.variants.append(Variant(name, lambda: run, comparable=comparable))

        for backend, reason in self.backends(case).items():
            if reason is not None:
                plan.missing[ours(backend)] = reason
            else:
                add(ours(backend), self.ours(backend))
        add("eager", self.eager())
        add("torch.compile", compiled(self.eager()))
        offers, missing = peers.offers(self.name, case.device, rivals)
        plan.missing.update(missing)
        for offer in offers:
            add(offer.label, self.adapt(offer.function), offer.comparable)
        floors.products(
            plan,
            [x.detach() for x in hidden],
            weight.detach(),
            default_chunk_size(vocabulary, case.torch_dtype, case.device),
            case.backward,
        )
        return plan

    def adapt(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A peer's function as it is called here."""
        return function


def _runner(
    backward: bool,
    function: Callable[..., Any],
    arguments: list[tuple[Any, ...]],
    hidden: list[Tensor],
    weight: Tensor,
    upstream: Tensor | None,
) -> Run:
    def forward(call: int) -> object:
        with torch.no_grad():
            return function(*arguments[call % len(arguments)])

    def both(call: int) -> object:
        turn = call % len(arguments)
        return gradients(function(*arguments[turn]), upstream, [hidden[turn], weight])

    return both if backward else forward
