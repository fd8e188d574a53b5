"""The main cases at small sizes, for pytest-benchmark to keep and compare over commits.

pytest benchmarks --benchmark-only --benchmark-autosave
pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:20%
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from rlhf_kernels.bench import operations
from rlhf_kernels.bench.operation import BOTH, FORWARD, Case, default_backend, ours
from rlhf_kernels.bench.timing import synchronize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = {"N": 256, "V": 32_000}
HIDDEN = {"N": 128, "V": 32_000, "H": 256}
SEQUENCES = {"B": 64, "T": 1024}
CASES = [
    Case(operation, direction, sizes, dtype, DEVICE)
    for operation, directions, sizes, dtypes in [
        ("token_logprobs", (FORWARD, BOTH), ROWS, ("float32", "bfloat16")),
        ("linear_token_logprobs", (FORWARD, BOTH), HIDDEN, ("float32",)),
        ("linear_cross_entropy", (BOTH,), HIDDEN, ("float32",)),
        ("linear_ppo_loss", (BOTH,), HIDDEN, ("float32",)),
        ("gae", (FORWARD,), SEQUENCES, ("float32",)),
        ("rollout_advantages", (FORWARD,), SEQUENCES, ("float32",)),
        ("ppo_loss", (BOTH,), SEQUENCES, ("float32",)),
    ]
    for direction in directions
    for dtype in dtypes
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_speed(case: Case, benchmark: Any) -> None:
    operation = operations.load(case.operation)
    name = ours(default_backend(operation, case))
    variant = next(v for v in operation.plan(case).variants if v.name == name)
    run, calls = variant.build(), itertools.count()

    def call() -> None:
        run(next(calls))
        synchronize(case.device)

    benchmark(call)
