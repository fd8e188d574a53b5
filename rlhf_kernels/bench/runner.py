"""One case from its data to its rows: memory, timing, table."""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from rlhf_kernels.bench import machine, memory, operations, report
from rlhf_kernels.bench.memory import Memory
from rlhf_kernels.bench.operation import Case, Operation, forget_compiled
from rlhf_kernels.bench.peers import PEERS
from rlhf_kernels.bench.progress import Tell, silent
from rlhf_kernels.bench.timing import Comparison, compare, reason


@dataclass(frozen=True)
class Result:
    """What was found: the rows, and for ratios the comparison and memory they came from.

    floors: the names of the floors. absent: why a name has no timing.
    """

    rows: list[report.Row]
    comparison: Comparison | None = None
    floors: list[str] = field(default_factory=list)
    memory: dict[str, Memory] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def memory_of(
    cases: Sequence[Case],
    only: Collection[str] | None = None,
    *,
    rivals: Sequence[str] = PEERS,
    tell: Tell = silent,
) -> dict[str, dict[str, Memory]]:
    """On a CPU: the memory of the cases' variants, by title and name. On CUDA `measure` sees it."""
    fitting = [c for c in cases if c.device == "cpu" and _fits(c)]
    if not fitting:
        return {}
    print(f"\nmemory of {len(fitting)} cases, in a process of their own")
    return memory.in_a_fresh_process(fitting, only, rivals=rivals, tell=tell)


def measure(
    operation: Operation,
    case: Case,
    *,
    turns: int,
    warmup: int = 2,
    seconds: float | None = None,
    only: Collection[str] | None = None,
    used: dict[str, Memory] | None = None,
    rivals: Sequence[str] = PEERS,
    place: str = "",
    tell: Tell = silent,
) -> Result:
    """Time a case's variants, print the table; say so where the case does not fit in memory.

    only: the variants that take part beside the floors; None: all. used: from `memory_of`.
    rivals: the peers that take part. place: of the case in a run, for the table's title.
    """
    title = f"{place} {case.title}".strip()
    why = _does_not_fit(operation, case)
    if why is not None:
        return _nothing(case, title, f"skipped: {why}")
    forget_compiled()
    tell(f"{case.operation}, {case.direction}: making the data")
    try:
        plan = operation.plan(case, rivals)
    except Exception as error:  # out of memory, say; the next case may fit
        tell("")
        return _nothing(case, title, f"failed: {reason(error)}")
    floors = plan.floors()
    variants = [v for v in plan.variants if v.floor or only is None or v.name in only]
    comparison = compare(
        case.title,
        variants,
        turns=turns,
        warmup=warmup,
        calls_per_turn=operation.calls_per_turn,
        uncounted_calls=operation.uncounted_calls,
        device=case.device,
        seconds=seconds,
        tell=lambda what: tell(f"{case.operation}, {case.direction}: {what}"),
    )
    if case.device == "cuda":
        timed = [v for v in variants if v.name in comparison.samples and not v.floor]
        used = memory.of_the_allocator(timed)
    used = used or {}
    absent = {**plan.missing, **comparison.failures}
    rows = report.rows(operation, case, comparison, floors, plan.missing, used)
    tell("")
    report.print_rows(title, rows)
    del plan, variants
    gc.collect()
    return Result(rows, comparison, floors, used, absent)


def _fits(case: Case) -> bool:
    return _does_not_fit(operations.load(case.operation), case) is None


def _does_not_fit(operation: Operation, case: Case) -> str | None:
    needed, available = operation.memory(case), machine.available_memory(case.device)
    if available is None or needed <= 0.8 * available:
        return None
    return f"needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"


def _nothing(case: Case, title: str, why: str) -> Result:
    row = report.not_run(case, why)
    report.print_rows(title, [row])
    return Result([row], absent={"all": why})
