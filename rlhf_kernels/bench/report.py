"""Rows of figures: on the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rlhf_kernels.bench.memory import Memory
from rlhf_kernels.bench.operation import SIZE_NAMES, Case, Operation
from rlhf_kernels.bench.timing import Comparison

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One variant of one case; `docs/benchmarks.md` says what each column means."""

    operation: str
    direction: str
    N: int | None
    V: int | None
    H: int | None
    B: int | None
    T: int | None
    dtype: str
    device: str
    variant: str
    status: str
    median_ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    turns: int | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    share: float | None = None
    floor: str | None = None
    peak_mib: float | None = None
    kept_mib: float | None = None


def rows(
    operation: Operation,
    case: Case,
    comparison: Comparison,
    floors: Sequence[str],
    missing: dict[str, str],
    memory: dict[str, Memory],
) -> list[Row]:
    """A case's rows: the timed variants, those that failed, and those that are missing."""
    work = operation.work(case)
    floor = comparison.fastest(floors)
    found = []
    for timing in comparison.timings:
        seconds = timing.median_ms / 1e3
        moves_all = operation.floor_moves_all or timing.name not in floors
        used = memory.get(timing.name)
        found.append(
            _row(
                case,
                timing.name,
                "ok",
                median_ms=timing.median_ms,
                lower_ms=timing.lower_ms,
                upper_ms=timing.upper_ms,
                turns=timing.turns,
                gb_per_s=work.bytes / seconds / 1e9 if work.bytes and moves_all else None,
                tflop_per_s=work.flops / seconds / 1e12 if work.flops and moves_all else None,
                share=None if floor is None else comparison.ratio(floor, timing.name),
                floor=floor,
                peak_mib=None if used is None else used.peak / MIB,
                kept_mib=None if used is None else used.kept / MIB,
            )
        )
    found += [_row(case, name, f"failed: {why}") for name, why in comparison.failures.items()]
    found += [_row(case, name, f"missing: {why}") for name, why in missing.items()]
    return found


def not_run(case: Case, why: str) -> Row:
    """The one row of a case that was skipped, or whose data could not be made."""
    return _row(case, "all", why)


def _row(case: Case, variant: str, status: str, **figures: Any) -> Row:
    sizes: dict[str, Any] = {name: case.sizes.get(name) for name in SIZE_NAMES}
    return Row(
        operation=case.operation,
        direction=case.direction,
        **sizes,
        dtype=case.dtype,
        device=case.device,
        variant=variant,
        status=status,
        **figures,
    )


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """The rows of one case as a table."""
    computes = any(row.tflop_per_s for row in rows)
    print(f"\n{title}")
    rate = "TFLOP/s" if computes else "GB/s"
    heads = f"{'variant':<46}{'median ms':>11}  {'quartiles':<19}{rate:>8}"
    print(f"  {heads}{'share':>7}{'peak MiB':>10}{'kept MiB':>10}")
    for row in rows:
        if row.median_ms is None:
            print(f"  {row.variant:<46}  {row.status}")
            continue
        spread = f"{row.lower_ms:.3f}-{row.upper_ms:.3f}"
        figures = (
            _number(row.tflop_per_s if computes else row.gb_per_s, 8, "{:.3g}"),
            _number(row.share, 7, "{:.0%}"),
            _number(row.peak_mib, 10, "{:.1f}"),
            _number(row.kept_mib, 10, "{:.1f}"),
        )
        print(f"  {row.variant:<46}{row.median_ms:>11.3f}  {spread:<19}{''.join(figures)}")


def _number(value: float | None, width: int, form: str) -> str:
    return ("-" if value is None else form.format(value)).rjust(width)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_whole(path, text.getvalue())


def write_json(path: Path, about: dict[str, object], rows: Sequence[Row]) -> None:
    content = {"machine": about, "rows": [asdict(row) for row in rows]}
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Written aside first, so it is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
