"""The figures that the kernels of the foundation must reach on a CPU.

    python -m benchmarks.foundation [--quick] [--output PATH]

Prints a table and writes benchmarks/results/foundation.json, or PATH. Run it on a quiet machine:
the floor, one read of the logits by `logits.sum(-1)`, is measured in the same turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.targets import RESULTS, Target, at_least, at_most, print_targets, write_results
from rlhf_kernels.bench import operations
from rlhf_kernels.bench.machine import machine, print_machine
from rlhf_kernels.bench.operation import BOTH, FORWARD, Case, ours
from rlhf_kernels.bench.runner import Result, measure
from rlhf_kernels.bench.timing import warn_if_busy

LOGITS = {"N": 2048, "V": 49152}  # SmolLM2's vocabulary; 403 MB, past any cache
SEQUENCES = {"B": 64, "T": 1024}
CPU = ours("cpu")
VARIANTS = (
    CPU,
    f"{CPU}, entropy",
    "torch.compile",
    "eager",
    "eager, no statistics",
    "loop over time",
)
FLOOR = "one read: sum(-1)"


def _measure(operation: str, direction: str, sizes: dict[str, int], turns: int) -> Result:
    case = Case(operation, direction, sizes, "float32", "cpu")
    return measure(operations.load(operation), case, turns=turns, only=VARIANTS)


def _targets(forward: Result, both: Result, advantages: Result, loss: Result) -> list[Target]:
    what = "token_logprobs forward"
    return [
        at_most(f"{what} / reading once", forward, CPU, FLOOR, 1.6),
        at_least(f"{what}, over torch.compile", forward, "torch.compile", CPU, 2.5),
        at_least(f"{what} and backward, over torch.compile", both, "torch.compile", CPU, 2.0),
        at_least("gae, over the Python loop", advantages, "loop over time", CPU, 50.0),
        at_least("ppo_loss forward and backward, over eager", loss, "eager", CPU, 5.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns; JSON only with --output")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    quick = arguments.quick
    output = arguments.output or (None if quick else RESULTS / "foundation.json")
    torch.manual_seed(0)
    about = machine()
    print_machine(about)
    warn_if_busy()
    results = [
        _measure("token_logprobs", FORWARD, LOGITS, 5 if quick else 15),
        _measure("token_logprobs", BOTH, LOGITS, 3 if quick else 9),
        _measure("gae", FORWARD, SEQUENCES, 10 if quick else 40),
        _measure("ppo_loss", BOTH, SEQUENCES, 20 if quick else 80),
    ]
    targets = _targets(*results)
    print_targets(targets)
    if output is not None:
        write_results(output, about, results, targets)
        print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
