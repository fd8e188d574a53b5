"""What an operation gives the benchmark: cases, variants of one case, and what a case must move."""

from __future__ import annotations

import functools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backends
from rlhf_kernels.bench.peers import PEERS
from rlhf_kernels.bench.timing import Run, Variant

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)
SIZE_NAMES = ("N", "V", "H", "B", "T")


@dataclass(frozen=True)
class Case:
    """One operation in one direction at one size: what the variants are compared on.

    sizes: by the names in SIZE_NAMES. dtype: as in torch, without "torch.".
    """

    operation: str
    direction: str
    sizes: dict[str, int]
    dtype: str
    device: str

    @property
    def title(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"{self.operation}, {self.direction}, {sizes}, {self.dtype}, {self.device}"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def backward(self) -> bool:
        return self.direction != FORWARD


@dataclass(frozen=True)
class Grid:
    """Which cases: sizes and types that the operations combine."""

    device: str
    rows: int
    hidden: int
    vocabularies: tuple[int, ...]
    dtypes: tuple[str, ...]
    linear_dtypes: tuple[str, ...]
    sequences: tuple[tuple[int, int], ...] = ((64, 1024), (512, 1024))


@dataclass(frozen=True)
class Work:
    """What a case must move or compute at the least: bytes of memory traffic, or operations."""

    bytes: int = 0
    flops: int = 0


@dataclass
class Plan:
    """The variants of a case, floors among them, and the peers that cannot take part, with why."""

    variants: list[Variant] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, run: Run, **options: bool) -> None:
        self.variants.append(Variant(name, lambda: run, **options))

    def floors(self) -> list[str]:
        return [variant.name for variant in self.variants if variant.floor]


class Operation(ABC):
    """One public function of rlhf_kernels, and how it is measured."""

    name: str
    primitive: str  # that the choice of a backend turns on
    passes: tuple[str, ...] = PASSES
    calls_per_turn = 1
    uncounted_calls = 0  # at the beginning of each turn
    floor_moves_all = True  # the floors move, or compute, all that `work` counts

    @abstractmethod
    def sizes(self, grid: Grid) -> Iterator[dict[str, int]]:
        """The sizes in a grid."""

    @abstractmethod
    def plan(self, case: Case, rivals: Sequence[str] = PEERS) -> Plan:
        """Make the case's data and the variants that work on it; rivals: the peers among them."""

    @abstractmethod
    def work(self, case: Case) -> Work:
        """The least that the case needs."""

    @abstractmethod
    def memory(self, case: Case) -> int:
        """Bytes to expect: of the data and, on a CPU, of the most wasteful variant.

        A GPU that has no more says so, and that variant fails; a CPU's process may be killed.
        """

    def dtypes(self, grid: Grid) -> tuple[str, ...]:
        return grid.dtypes

    def cases(self, grid: Grid) -> Iterator[Case]:
        for dtype in self.dtypes(grid):
            for sizes in self.sizes(grid):
                for direction in self.passes:
                    yield Case(self.name, direction, sizes, dtype, grid.device)

    def backends(self, case: Case) -> dict[str, str | None]:
        """The backends made for such a case, and why one cannot be used here (None: it can)."""
        found: dict[str, str | None] = {}
        for name, spec in backends.BACKENDS.items():
            if spec.devices is not None and case.device not in spec.devices:
                continue
            if spec.dtypes is not None and case.torch_dtype not in spec.dtypes:
                continue
            reason = backends.unavailable_reason(name)
            if reason is None and self.primitive not in backends.load(name).PRIMITIVES:
                continue
            found[name] = reason
        return found


def ours(backend: str) -> str:
    """The name under which rlhf_kernels stands in the tables."""
    return f"rlhf_kernels {backend}"


def default_backend(operation: Operation, case: Case) -> str:
    """What a user gets who names no backend."""
    return str(backends.default(operation.primitive, case.device, case.torch_dtype).NAME)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile`, when it is first called: the compiler's import alone takes seconds."""
    once = functools.cache(lambda: torch.compile(function, dynamic=False, fullgraph=True))
    return lambda *arguments: once()(*arguments)


def forget_compiled() -> None:
    """Each size is compiled for itself, and the compiler stops after a number of them."""
    if "torch._dynamo" in sys.modules:  # whose import takes seconds
        torch.compiler.reset()


def gradients(result: Any, upstream: Tensor | None, leaves: list[Tensor]) -> tuple[Any, ...]:
    """The backward, as training does it; gradients are returned, not left on the leaves.

    With an upstream gradient each of a tuple's tensors gets it; a loss's statistics get none.
    """
    first = result[0] if isinstance(result, tuple) else result
    outputs = [first] if upstream is None else [*result] if isinstance(result, tuple) else [first]
    above = [None if upstream is None else upstream.to(output.dtype) for output in outputs]
    torch.autograd.backward(outputs, above)
    found = tuple(leaf.grad for leaf in leaves)
    for leaf in leaves:
        leaf.grad = None
    return (first.detach(), *found)


def buffer_sets(bytes_each: int, device: str) -> int:
    """How many sets of buffers to rotate, so that no set is in a cache when its turn comes."""
    return max(2, min(16, math.ceil(3 * _cache_bytes(device) / max(1, bytes_each))))


def _cache_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in sizes]
    return max(found, default=32 * 2**20)
