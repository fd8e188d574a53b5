"""verl's GAE at 512x1024 with and without our patch, in turns.

    python -m benchmarks.integrations.verl [--output PATH]

Prints the times and met or NOT MET, and writes benchmarks/results/integrations_verl.json, or PATH.
Run it on a quiet machine, where verl is installed (`pip install verl==0.9.1`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.targets import RESULTS, Target, print_targets
from rlhf_kernels.bench.machine import machine, print_machine
from rlhf_kernels.bench.report import write_whole
from rlhf_kernels.bench.timing import Variant, compare, warn_if_busy
from rlhf_kernels.integrations import verl

ROWS, LENGTH = 512, 1024
THEIRS, OURS = "verl", "verl, patched"


def batches(count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rewards, values, and masks of responses of any length, as verl has them."""
    torch.manual_seed(0)
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1))
    mask = (torch.arange(LENGTH) < lengths).long()
    return [(torch.randn(ROWS, LENGTH), torch.randn(ROWS, LENGTH), mask) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "integrations_verl.json")
    options = parser.parse_args()
    about = machine()
    print_machine(about)
    warn_if_busy()
    from verl.trainer.ppo import core_algos

    theirs = core_algos.compute_gae_advantage_return
    with verl.patched():  # refuses where the two differ
        ours = core_algos.compute_gae_advantage_return
    data = batches(8)

    def of(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
        return lambda call: torch.stack(function(*data[call % len(data)], gamma=1.0, lam=0.95))

    def timed(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], object]:
        return lambda: lambda call: function(*data[call % len(data)], gamma=1.0, lam=0.95)

    torch.testing.assert_close(of(ours)(0), of(theirs)(0), rtol=0, atol=1e-4)
    found = compare(
        f"GAE {ROWS}x{LENGTH}",
        [Variant(THEIRS, timed(theirs)), Variant(OURS, timed(ours))],
        turns=15,
        calls_per_turn=5,
        uncounted_calls=2,
    )
    for timing in found.timings:
        print(f"  {timing.name:<16}{timing.median_ms:>9.3f} ms")
    target = Target(f"{found.title}: verl / patched", found.ratio(THEIRS, OURS), 100.0)
    print_targets([target])
    content = {
        "machine": about,
        "targets": [{**asdict(target), "met": target.met}],
        "rows": [asdict(timing) for timing in found.timings],
    }
    write_whole(options.output, json.dumps(content, indent=2) + "\n")
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
