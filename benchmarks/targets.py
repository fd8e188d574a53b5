"""Figures that must be reached: how they are judged, printed and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_kernels.bench.report import write_whole
from rlhf_kernels.bench.runner import Result

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Target:
    """A ratio, or another number, and what it must be at the least (or, for a limit, at most).

    measured: None where it could not be measured; `why` says the reason.
    """

    what: str
    measured: float | None
    required: float
    at_most: bool = False
    unit: str = "x"
    why: str = ""

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.required if self.at_most else self.measured >= self.required


def at_most(what: str, result: Result, slow: str | None, fast: str | None, limit: float) -> Target:
    """`slow` may take `limit` times as long as `fast`."""
    return _ratio(what, result, slow, fast, limit, True)


def at_least(what: str, result: Result, slow: str | None, fast: str | None, times: float) -> Target:
    """`slow` must take `times` as long as `fast`."""
    return _ratio(what, result, slow, fast, times, False)


def _ratio(
    what: str, result: Result, slow: str | None, fast: str | None, required: float, limit: bool
) -> Target:
    timed = {} if result.comparison is None else result.comparison.samples
    for name in (slow, fast):
        if name is None or name not in timed:
            why = absence(result, name)
            return Target(what, None, required, limit, why=why)
    assert result.comparison is not None and slow is not None and fast is not None
    return Target(what, result.comparison.ratio(slow, fast), required, limit)


def absence(result: Result, name: str | None) -> str:
    """Why there is no figure of that name."""
    why = result.absent.get("all") or result.absent.get(name or "")
    if why is None and name is not None:
        why = result.absent.get(name.split()[0].replace("-", "_"))  # a whole peer
    return f"{name or 'floor'}: {why or 'not measured'}"


def print_targets(targets: Sequence[Target]) -> None:
    print("\nTargets")
    width = max(len(target.what) for target in targets)
    for target in targets:
        goal = f"{'at most' if target.at_most else 'at least'} {target.required:g}{target.unit}"
        if target.measured is None:
            print(f"  {target.what:<{width}}{'-':>9}   {goal:<17} not measured ({target.why})")
            continue
        verdict = "met" if target.met else "NOT MET"
        figure = f"{target.measured:.2f}{target.unit}"
        print(f"  {target.what:<{width}}{figure:>9}   {goal:<17} {verdict}")


def write_results(
    path: Path, about: dict[str, object], results: Sequence[Result], targets: Sequence[Target]
) -> None:
    content = {
        "machine": about,
        "targets": [{**asdict(target), "met": target.met} for target in targets],
        "rows": [asdict(row) for result in results for row in result.rows],
    }
    write_whole(path, json.dumps(content, indent=2) + "\n")
