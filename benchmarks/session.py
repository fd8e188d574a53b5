"""What the target commands share: their options, what they measured, how they end."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.targets import RESULTS, Target, print_targets, write_results
from rlhf_kernels import backends
from rlhf_kernels.bench import operations
from rlhf_kernels.bench.machine import machine, print_machine
from rlhf_kernels.bench.operation import Case, default_backend, ours
from rlhf_kernels.bench.operations.token_logprobs import ENTROPY
from rlhf_kernels.bench.runner import Result, measure, memory_of
from rlhf_kernels.bench.timing import warn_if_busy

COMPILED, EAGER = "torch.compile", "eager"
QUICK_SIZE = 512


class Session:
    """What has been measured so far, and the targets judged by it."""

    def __init__(self, device: str, quick: bool, output: Path | None = None) -> None:
        self.device, self.quick, self.output = device, quick, output
        self.about = machine()
        self.results: list[Result] = []
        self.targets: list[Target] = []

    @classmethod
    def from_command_line(cls, doc: str, name: str) -> Session:
        """name: of the file in benchmarks/results, without its ending."""
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        devices = ("cpu", "cuda")
        default = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=devices, default=default)
        parser.add_argument(
            "--quick", action="store_true", help="sizes to 512; JSON only with --output"
        )
        parser.add_argument("--output", type=Path, help="where the JSON goes")
        options = parser.parse_args()
        file = RESULTS / (f"{name}.json" if options.device == "cpu" else f"{name}-cuda.json")
        torch.manual_seed(0)
        output = options.output or (None if options.quick else file)
        session = cls(options.device, options.quick, output)
        print_machine(session.about)
        warn_if_busy()
        return session

    def measure(
        self,
        operation: str,
        direction: str,
        sizes: dict[str, int],
        dtype: str = "float32",
        *,
        turns: int,
        others: Sequence[str],
        with_memory: bool = False,
    ) -> tuple[Result, str, str | None]:
        """The result, the name of ours in it and of the fastest floor.

        Ours is the default on a CPU; on a GPU, where kernels are to be confirmed, the fastest.
        """
        if self.quick:
            sizes = {name: min(size, QUICK_SIZE) for name, size in sizes.items()}
        case = Case(operation, direction, sizes, dtype, self.device)
        loaded = operations.load(operation)
        own = [ours(default_backend(loaded, case))]
        if self.device == "cuda":
            own = [ours(name) for name in backends.BACKENDS if name != "reference"]
        only = (*own, *(name + ENTROPY for name in own), *others)
        used = memory_of([case], only) if with_memory else {}
        result = measure(
            loaded,
            case,
            turns=min(turns, 2) if self.quick else turns,
            warmup=1 if "H" in sizes else 2,
            only=only,
            used=used.get(case.title),
        )
        self.results.append(result)
        if result.comparison is None:
            return result, own[0], None
        fastest = result.comparison.fastest
        return result, fastest(own) or own[0], fastest(result.floors)

    def finish(self) -> None:
        """Print the targets and write everything."""
        print_targets(self.targets)
        if self.output is not None:
            write_results(self.output, self.about, self.results, self.targets)
            print(f"\nwritten to {self.output}")
