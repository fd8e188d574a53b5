"""What the operations on sequences share: their sizes, and the copy that floors them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.bench import peers
from rlhf_kernels.bench.operation import FORWARD, Case, Grid, Operation, Plan, ours

COPY = "copying inputs and outputs"
LAUNCH = "an empty kernel"
LOOP = "loop over time"


class SequenceOperation(Operation):
    """Its inputs are small enough for a cache, as in training, where they were just made."""

    passes: tuple[str, ...] = (FORWARD,)
    calls_per_turn = 20  # a slow variant makes fewer
    floor_moves_all = False
    series: int  # float32 tensors [B, T] among inputs and outputs

    def sizes(self, grid: Grid) -> Iterator[dict[str, int]]:
        for batch, steps in grid.sequences:
            yield {"B": batch, "T": steps}

    def dtypes(self, grid: Grid) -> tuple[str, ...]:
        return ("float32",)

    def bytes_of(self, case: Case) -> int:
        """Inputs, outputs and the mask, each once."""
        return case.sizes["B"] * case.sizes["T"] * (4 * self.series + 1)

    def add_ours(self, plan: Plan, case: Case, call: Callable[[str], Callable[[], Any]]) -> None:
        """A variant for each backend of the machine; `call` makes it from the backend's name."""
        for backend, reason in self.backends(case).items():
            if reason is None:
                _add(plan, ours(backend), call(backend))
            else:
                plan.missing[ours(backend)] = reason

    def add_peers(
        self,
        plan: Plan,
        case: Case,
        rivals: Sequence[str],
        adapt: Callable[[Any], Callable[[], Any]],
    ) -> None:
        """A variant for each peer's function; `adapt` calls it with the case's data."""
        offers, missing = peers.offers(self.name, case.device, rivals)
        plan.missing |= missing
        for offer in offers:
            _add(plan, offer.label, adapt(offer.function), offer.comparable)

    def add_copy(self, plan: Plan, tensors: list[Tensor]) -> None:
        """Each into a buffer of its own that is kept."""
        pairs = [(torch.empty_like(x), x.detach()) for x in tensors]
        plan.add(COPY, lambda _: [to.copy_(x) for to, x in pairs], floor=True)
        if tensors[0].device.type == "cuda":
            one = torch.zeros(1, device=tensors[0].device)
            plan.add(LAUNCH, lambda _: one.zero_(), floor=True)


def _add(plan: Plan, name: str, run: Callable[[], Any], comparable: bool = True) -> None:
    plan.add(name, lambda _: run(), comparable=comparable)


def normal(case: Case) -> Tensor:
    return torch.randn(case.sizes["B"], case.sizes["T"], device=case.device)


def padded_on_the_right(case: Case) -> Tensor:
    """A mask of lengths between half and all of the steps."""
    batch, steps = case.sizes["B"], case.sizes["T"]
    lengths = torch.randint(max(1, steps // 2), steps + 1, (batch, 1), device=case.device)
    return torch.arange(steps, device=case.device) < lengths
