"""The memory that a call takes: what the caching allocator counts, or the process's resident set.

On a CPU the variants of a case are measured in a fresh process (this module is its program), after
a warm-up call: the peak of the resident set above its level before the call. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rlhf_kernels.bench import operations
from rlhf_kernels.bench.operation import Case, forget_compiled
from rlhf_kernels.bench.timing import Run, Variant, reason

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
# The C library then takes every larger tensor from the system and gives it back when it is freed,
# so that the resident set follows what is alive.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**18)}


@dataclass(frozen=True)
class Memory:
    """Bytes above the level before the call.

    peak: the most while it ran. kept: what it leaves, results and gradients.
    """

    peak: int
    kept: int

    @property
    def extra(self) -> int:
        """What it needed beyond what it gives."""
        return max(0, self.peak - self.kept)


def cuda_memory(run: Run) -> Memory:
    """The caching allocator's count."""
    run(0)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run(0)
    torch.cuda.synchronize()
    memory = Memory(
        torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    )
    del result
    return memory


def resident_memory(run: Run) -> Memory:
    """The resident set's change. For a process that does nothing else, with _ENVIRONMENT set."""
    run(0)
    _give_back()
    before = _resident("VmRSS")
    _CLEAR.write_text(_RESET_PEAK)
    result = run(0)
    peak = _resident("VmHWM")
    kept = _resident("VmRSS")
    del result
    return Memory(peak - before, max(0, kept - before))


def of_the_allocator(variants: Iterable[Variant]) -> dict[str, Memory]:
    """On CUDA, in this process: the memory of each variant that can run."""
    found = {}
    for variant in variants:
        try:
            found[variant.name] = cuda_memory(variant.build())
        except Exception as error:
            print(f"  memory of {variant.name}: {reason(error)}")
    return found


def in_a_fresh_process(
    cases: Sequence[Case], only: Collection[str] | None = None, seconds_a_case: float = 180
) -> dict[str, dict[str, Memory]]:
    """On a CPU: by each case's title, the memory of its variants (those in `only`), no floors.

    What could not be measured, here or in time, has no entry.
    """
    if not _CLEAR.exists():
        return {}
    names = None if only is None else list(only)
    request = json.dumps({"cases": [asdict(case) for case in cases], "only": names})
    command = [sys.executable, "-m", "rlhf_kernels.bench.memory", request]
    environment = {**os.environ, **_ENVIRONMENT}
    seconds = seconds_a_case * len(cases)
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=seconds
        )
        output, why = ended.stdout, _last_line(ended.stderr) if ended.returncode else ""
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        why = f"not done after {seconds:.0f} s"
    if why:
        print(f"memory: the measuring process ended early: {why}")
    found: dict[str, dict[str, Memory]] = {}
    for line in output.splitlines():
        if line.startswith("{") and line.endswith("}"):
            entry = json.loads(line)
            memory = Memory(entry["peak"], entry["kept"])
            found.setdefault(entry["case"], {})[entry["variant"]] = memory
    return found


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _give_back() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _main(request: str) -> None:
    """The fresh process: a line of JSON for each variant, as soon as it is measured."""
    asked = json.loads(request)
    for case in (Case(**fields) for fields in asked["cases"]):
        torch.manual_seed(0)
        forget_compiled()
        _measure_case(case, asked["only"])


def _measure_case(case: Case, only: list[str] | None) -> None:
    for variant in operations.load(case.operation).plan(case).variants:
        if variant.floor or (only is not None and variant.name not in only):
            continue
        try:
            memory = resident_memory(variant.build())
        except Exception as error:
            print(f"{case.title}, {variant.name}: {reason(error)}", file=sys.stderr)
            continue
        entry = {"case": case.title, "variant": variant.name, **asdict(memory)}
        print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
