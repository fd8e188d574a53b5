"""A step of the 8-bit AdamW on the shapes of SmolLM2-135M in bfloat16, on a CPU.

    python -m benchmarks.optimizer [--turns N]

Prints milliseconds a step: the kernel's, the tensor operations', and those of moving as many bytes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

import torch
from torch import nn

from rlhf.engine.adamw_8bit import AdamW8bit
from rlhf_kernels.backends import ENVIRONMENT_VARIABLE
from rlhf_kernels.bench.machine import machine, print_machine
from rlhf_kernels.bench.timing import Run, Variant, compare, warn_if_busy

WIDTH, LAYERS, VOCABULARY = 576, 30, 49152
# Read and written: 2 bytes of weight, one each of remainder and moments; read: 2 of the gradient.
BYTES = 2 * (2 + 1 + 2) + 2


def shapes() -> Iterator[tuple[int, ...]]:
    yield VOCABULARY, WIDTH
    for _ in range(LAYERS):
        yield from [(WIDTH, WIDTH)] * 2 + [(WIDTH // 3, WIDTH)] * 2  # attention
        yield from [(1536, WIDTH)] * 2 + [(WIDTH, 1536)]
        yield from [(WIDTH,)] * 2
    yield (WIDTH,)


def make_parameters() -> list[nn.Parameter]:
    parameters = []
    for shape in shapes():
        parameter = nn.Parameter(0.02 * torch.randn(shape, dtype=torch.bfloat16))
        parameter.grad = 1e-3 * torch.randn(shape, dtype=torch.bfloat16)
        parameters.append(parameter)
    return parameters


def stepping(parameters: list[nn.Parameter], backend: str) -> Run:
    optimizer = AdamW8bit(parameters, lr=1e-5)

    def run(_: int) -> None:
        os.environ[ENVIRONMENT_VARIABLE] = backend
        optimizer.step()

    return run


def moving(numbers: int) -> Run:
    half = numbers * BYTES // 2 // 8
    source, target = (torch.ones(half, dtype=torch.int64) for _ in range(2))
    return lambda _: target.copy_(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    turns = parser.parse_args().turns
    print_machine(machine())
    warn_if_busy()
    parameters = make_parameters()
    numbers = sum(parameter.numel() for parameter in parameters)
    variants = [
        Variant("kernel", lambda: stepping(parameters, "cpu")),
        Variant("operations", lambda: stepping(parameters, "reference")),
        Variant("moving the bytes", lambda: moving(numbers), floor=True),
    ]
    comparison = compare("AdamW8bit", variants, turns=turns)
    print(f"\n{numbers / 1e6:.1f}M parameters, {torch.get_num_threads()} threads")
    for timing in comparison.timings:
        low, high = timing.lower_ms, timing.upper_ms
        print(f"  {timing.name:<18}{timing.median_ms:8.1f} ms   ({low:.1f} to {high:.1f})")
    for name, why in comparison.failures.items():
        print(f"  {name}: {why}")


if __name__ == "__main__":
    main()
