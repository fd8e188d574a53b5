"""Floors: the part of the work that no implementation can do without, done by PyTorch.

The floor of a case is the fastest of the candidates here, measured in the same turns as the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_kernels.bench.operation import Plan
from rlhf_kernels.bench.timing import Run

Reader = Callable[[Tensor], Tensor]


def reading(plan: Plan, sets: Sequence[Tensor]) -> None:
    """Each way that PyTorch has to read the logits once and keep a number a row."""
    for name, read in _readers(sets[0]).items():
        plan.add(f"one read: {name}", _rotating(read, sets), floor=True)


def reading_and_copying(plan: Plan, sets: Sequence[Tensor]) -> None:
    """One read, then one copy that reads and writes: into a kept buffer, or into fresh memory."""
    kept = torch.empty_like(sets[0])
    for name, read in _readers(sets[0]).items():
        plan.add(f"one read + copy: {name}", _rotating(_then(read, kept.copy_), sets), floor=True)
        if name == "sum(-1)":
            both = _rotating(_then(read, torch.clone), sets)
            plan.add(f"one read + copy to new memory: {name}", both, floor=True)


def copying(plan: Plan, sets: Sequence[Tensor]) -> None:
    """One copy that reads and writes, into a kept buffer."""
    kept = torch.empty_like(sets[0])
    plan.add("copy", _rotating(kept.copy_, sets), floor=True)


def products(
    plan: Plan, sets: Sequence[Tensor], weight: Tensor, chunk: int, gradients: bool
) -> None:
    """`torch.mm` alone over chunks of rows: logits; with gradients, those of hidden and weight."""
    name = "three bare products" if gradients else "one bare product"
    vocabulary, width = weight.shape
    chunk = min(chunk, sets[0].shape[0])
    logits = weight.new_empty(chunk, vocabulary)
    grad_hidden = weight.new_empty(chunk, width)
    grad_weight = torch.empty_like(weight) if gradients else None

    def run(hidden: Tensor) -> None:
        for rows in hidden.split(chunk):
            part = logits[: rows.shape[0]]
            torch.mm(rows, weight.t(), out=part)
            if grad_weight is not None:
                torch.mm(part, weight, out=grad_hidden[: rows.shape[0]])
                torch.mm(part.t(), rows, out=grad_weight)

    plan.add(f"{name}, {chunk} rows at a time", _rotating(run, sets), floor=True)


def _readers(logits: Tensor) -> dict[str, Reader]:
    """Numbers a row, so that threads share the rows; views where a type's own code is slow."""
    readers: dict[str, Reader] = {
        "sum(-1)": lambda x: x.sum(-1),
        "amax(-1)": lambda x: x.amax(-1),
    }
    if logits.shape[-1] * logits.dtype.itemsize % 4 == 0:
        readers["amax(-1) as int32"] = lambda x: x.view(torch.int32).amax(-1)
        if logits.dtype != torch.float32:
            readers["sum(-1) as float32"] = lambda x: x.view(torch.float32).sum(-1)
    return readers


def _then(first: Reader, second: Reader) -> Reader:
    def both(x: Tensor) -> Tensor:
        first(x)
        return second(x)

    return both


def _rotating(function: Callable[[Tensor], object], sets: Sequence[Tensor]) -> Run:
    return lambda call: function(sets[call % len(sets)])
