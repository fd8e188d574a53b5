"""Times variants of one piece of work side by side.

Variants take turns in one process, so a change of the machine's speed hits all of them alike; the
median and the quartiles are reported, and ratios are medians of the turns' own ratios.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlhf_kernels.bench.progress import Tell, silent

Run = Callable[[int], object]

_SCRATCH_BYTES = 512 * 2**20
_LONG = 0.05  # seconds that repeated calls of one turn may take before another is begun


@dataclass(frozen=True)
class Variant:
    """One way to do the work.

    build: makes `run(call)`, which takes the call's number to rotate its buffers by, and returns
        what it computed: the result, then gradients where it forms them.
    floor: no way to do the work but a part that nothing can do without, to measure others by.
    comparable: whether the first result must agree with the other variants'.
    """

    name: str
    build: Callable[[], Run]
    floor: bool = False
    comparable: bool = True


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median and quartiles over the turns."""

    name: str
    median_ms: float
    lower_ms: float
    upper_ms: float
    turns: int


class Comparison:
    """The timings of the variants of one piece of work, and why the others have none."""

    def __init__(self, title: str, samples: dict[str, list[float]], failures: dict[str, str]):
        self.title = title
        self.samples = samples
        self.failures = failures
        self.timings = [_timing(name, values) for name, values in samples.items()]

    def timing(self, name: str) -> Timing:
        return next(timing for timing in self.timings if timing.name == name)

    def ratio(self, slow: str, fast: str) -> float:
        """How many times longer `slow` takes than `fast`, turn by turn, in the median."""
        pairs = zip(self.samples[slow], self.samples[fast])
        return statistics.median(a / b for a, b in pairs)

    def fastest(self, names: Sequence[str]) -> str | None:
        """The one of these names with the lowest median; None where none was timed."""
        timed = [name for name in names if name in self.samples]
        return min(timed, key=lambda name: self.timing(name).median_ms, default=None)


def compare(
    title: str,
    variants: Sequence[Variant],
    *,
    turns: int,
    calls_per_turn: int = 1,
    uncounted_calls: int = 0,
    warmup: int = 2,
    device: str = "cpu",
    seconds: float | None = None,
    tell: Tell = silent,
) -> Comparison:
    """Run the variants in turns. Small work repeats `calls_per_turn` times in each, after
    `uncounted_calls` that are not timed.

    Each turn starts with another variant, and the calls are numbered through: who rotates buffers
    by that number never finds what the call before, its own or another variant's, left in a cache.
    A variant that raises is named in `failures` and takes no further part. After three turns no
    new one begins once `seconds` have passed. warmup: calls before the first turn, at least 1.
    tell: is told what begins; never within a turn.

    Raises:
        ValueError: There is to be no turn.
    """
    if turns < 1:
        raise ValueError(f"turns is {turns}; expected at least 1")
    failures: dict[str, str] = {}
    runs = _warm_up(variants, warmup, device, failures, tell)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    number, start = 0, time.perf_counter()
    for turn in range(turns):
        late = seconds is not None and time.perf_counter() - start > seconds
        if not runs or (late and turn >= 3):
            break
        tell(f"turn {turn + 1} of at most {turns}")
        names = list(runs)
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            uncounted = range(number, number + uncounted_calls)
            calls = range(uncounted.stop, uncounted.stop + calls_per_turn)
            number = calls.stop
            try:
                for call in uncounted:
                    runs[name](call)
                samples[name].append(_milliseconds(runs[name], calls, device))
            except Exception as error:
                failures[name] = reason(error)
                del runs[name], samples[name]
    return Comparison(title, samples, failures)


def _warm_up(
    variants: Sequence[Variant], calls: int, device: str, failures: dict[str, str], tell: Tell
) -> dict[str, Run]:
    """What can be run, by name: built, called, and its result compared with the first one's."""
    runs: dict[str, Run] = {}
    expected: torch.Tensor | None = None
    for number, variant in enumerate(variants, start=1):
        tell(f"warm-up {number} of {len(variants)}, {variant.name}")
        try:
            run = variant.build()
            # The first call's: a variant may destroy its data.
            found = _first_tensor(run(0))
            for _ in range(calls - 1):
                run(0)
            synchronize(device)
            if found is not None and variant.comparable and not variant.floor:
                expected = found if expected is None else expected
                _check_agreement(found, expected)
        except Exception as error:
            failures[variant.name] = reason(error)
            continue
        runs[variant.name] = run
    return runs


def _check_agreement(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Catches a variant that computes something else, not one that rounds otherwise."""
    found, expected = found.float().reshape(-1), expected.float().reshape(-1)
    if found.shape != expected.shape:
        raise RuntimeError(f"gives {found.numel()} results, not {expected.numel()}")
    difference = (found - expected).abs().max().item()
    allowed = 0.05 * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise RuntimeError(f"its result differs by {difference:.3g} from the first variant's")


def _first_tensor(result: object) -> torch.Tensor | None:
    if isinstance(result, (tuple, list)):
        result = result[0]
    return result.detach().clone() if isinstance(result, torch.Tensor) else None


def _milliseconds(run: Run, calls: range, device: str) -> float:
    """A call's time, in the mean over the calls of one turn; a long one is called once."""
    if device == "cuda":
        return _cuda_milliseconds(run, calls)
    start, seconds, done = time.perf_counter(), 0.0, 0
    while done < len(calls) and seconds < _LONG:
        run(calls[done])
        seconds, done = time.perf_counter() - start, done + 1
    return seconds / done * 1e3


def _cuda_milliseconds(run: Run, calls: range) -> float:
    events = []
    for call in calls:
        # Pushes everything out of the L2 cache, and keeps the GPU busy while the host launches the
        # call: what is measured is the GPU's time, not Python's.
        _scratch().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(call)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.fmean(start.elapsed_time(end) for start, end in events)


@functools.cache
def _scratch() -> torch.Tensor:
    return torch.empty(_SCRATCH_BYTES, dtype=torch.int8, device="cuda")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:160]}" if text else name


def warn_if_busy() -> None:
    """Say that something else is running: the figures will be noisy."""
    busy = load_average()
    if busy is not None and busy > (os.cpu_count() or 1) / 2:
        print(f"warning: load average {busy:.1f} on {os.cpu_count()} cores; figures will be noisy")


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _timing(name: str, samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(name, samples[0], samples[0], samples[0], 1)
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(name, median, lower, upper, len(samples))
