"""Times variants of one piece of work side by side, and records the machine they ran on.

Variants take turns in one process, so a change of the machine's speed hits all of them alike; the
median and the quartiles are reported, and ratios are medians of the turns' own ratios.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Variant:
    """One way to do the work; `run` takes the call's number, to rotate its buffers by."""

    name: str
    run: Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles over the turns."""

    name: str
    median_ms: float
    lower_ms: float
    upper_ms: float
    turns: int


@dataclass(frozen=True)
class Target:
    """How many times faster (or, for a limit, slower) `fast` must be than `slow`."""

    what: str
    measured: float
    required: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.required if self.at_most else self.measured >= self.required


class Comparison:
    """The timings of the variants of one piece of work."""

    def __init__(self, title: str, variants: Sequence[Variant], samples: dict[str, list[float]]):
        self.title = title
        self.samples = samples
        self.timings = [_timing(variant.name, samples[variant.name]) for variant in variants]

    def ratio(self, slow: str, fast: str) -> float:
        """How many times longer `slow` takes than `fast`, turn by turn, in the median."""
        pairs = zip(self.samples[slow], self.samples[fast])
        return statistics.median(a / b for a, b in pairs)


def compare(
    title: str, variants: Sequence[Variant], *, turns: int, calls_per_turn: int = 1, warmup: int = 2
) -> Comparison:
    """Run the variants in turns. Small work repeats `calls_per_turn` times in each.

    Each turn starts with another variant, and the calls are numbered through: who rotates buffers
    by that number never finds what the call before, its own or another variant's, left in a cache.
    """
    _warn_if_busy()
    samples: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for variant in variants:
        for turn in range(warmup):
            variant.run(turn)
    number = 0
    for turn in range(turns):
        first = turn % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            start = time.perf_counter()
            for call in range(number, number + calls_per_turn):
                variant.run(call)
            seconds = (time.perf_counter() - start) / calls_per_turn
            number += calls_per_turn
            samples[variant.name].append(seconds * 1e3)
    return Comparison(title, variants, samples)


def _warn_if_busy() -> None:
    busy = _load_average()
    if busy is not None and busy > (os.cpu_count() or 1) / 2:
        print(f"warning: load average {busy:.1f} on {os.cpu_count()} cores; figures will be noisy")


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _timing(name: str, samples: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(name, median, lower, upper, len(samples))


def machine() -> dict[str, object]:
    """What the figures depend on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average_at_start": _load_average(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def print_report(comparisons: Sequence[Comparison], targets: Sequence[Target]) -> None:
    for comparison in comparisons:
        print(f"\n{comparison.title}")
        for timing in comparison.timings:
            spread = f"{timing.lower_ms:.3f}-{timing.upper_ms:.3f}"
            print(f"  {timing.name:<44}{timing.median_ms:>10.3f} ms   ({spread})")
    print("\nTargets")
    for target in targets:
        relation = "at most" if target.at_most else "at least"
        verdict = "met" if target.met else "NOT MET"
        goal = f"{relation} {target.required:g}x"
        print(f"  {target.what:<58}{target.measured:>8.2f}x   {goal:<15} {verdict}")


def write_json(
    path: Path,
    about: dict[str, object],
    comparisons: Sequence[Comparison],
    targets: Sequence[Target],
) -> None:
    """Written aside first, so it is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": about,
        "comparisons": [
            {"title": comparison.title, "timings": [asdict(t) for t in comparison.timings]}
            for comparison in comparisons
        ],
        "targets": [{**asdict(target), "met": target.met} for target in targets],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)
