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
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rlhf_kernels.bench import operations
from rlhf_kernels.bench.operation import Case, forget_compiled
from rlhf_kernels.bench.peers import PEERS
from rlhf_kernels.bench.progress import Tell, silent
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
    cases: Sequence[Case],
    only: Collection[str] | None = None,
    seconds_a_case: float = 180,
    *,
    rivals: Sequence[str] = PEERS,
    tell: Tell = silent,
) -> dict[str, dict[str, Memory]]:
    """On a CPU: by each case's title, the memory of its variants (those in `only`), no floors.

    What could not be measured, here or in time, has no entry; a case that ends the process does
    not take those after it along. rivals: the peers among them.
    """
    found: dict[str, dict[str, Memory]] = {}
    left = list(cases) if _CLEAR.exists() else []
    while left:
        asked = {
            "cases": [asdict(case) for case in left],
            "only": None if only is None else list(only),
            "rivals": list(rivals),
        }
        listener = _Listener(found, tell)
        why = _run_process(json.dumps(asked), seconds_a_case * len(left), listener.take)
        tell("")
        if why:
            print(f"memory: the measuring process ended early: {why}")
        # One that did not come to its first case would not come to the next either.
        left = left[listener.begun :] if why and listener.begun else []
    return found


class _Listener:
    """Takes the lines of the fresh process, of which other libraries may print some."""

    def __init__(self, found: dict[str, dict[str, Memory]], tell: Tell) -> None:
        self._found, self._tell = found, tell
        self._operation = ""
        self.begun = 0  # cases

    def take(self, line: str) -> None:
        if not (line.startswith("{") and line.endswith("}\n")):
            return
        entry = json.loads(line)
        title = entry["case"]
        if "variant" not in entry:
            self.begun += 1
            self._show(title)
            return
        used = Memory(entry["peak"], entry["kept"])
        self._found.setdefault(title, {})[entry["variant"]] = used
        self._tell(f"memory of {title}: {entry['variant']}")

    def _show(self, title: str) -> None:
        """An operation has a line that stays: where nothing is rewritten, too, a run shows life."""
        operation = title.split(",")[0]
        if operation != self._operation:
            self._tell("")
            print(f"  {operation}")
            self._operation = operation
        self._tell(f"memory of {title}")


def _run_process(request: str, seconds: float, take: Callable[[str], None]) -> str:
    """Hand on each line that it prints; why it ended early, or nothing."""
    command = [sys.executable, "-m", "rlhf_kernels.bench.memory", request]
    environment = {**os.environ, **_ENVIRONMENT}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            for line in process.stdout:
                take(line)
            late, failed = not timer.is_alive(), process.wait() != 0
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
        if late and failed:
            return f"not done after {seconds:.0f} s"
        if not failed:
            return ""
        errors.seek(0)
        return _last_line(errors.read())


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
    """The fresh process: a line of JSON for each case that begins and each variant measured."""
    asked = json.loads(request)
    for case in (Case(**fields) for fields in asked["cases"]):
        print(json.dumps({"case": case.title}), flush=True)
        torch.manual_seed(0)
        forget_compiled()
        _measure_case(case, asked["only"], asked["rivals"])


def _measure_case(case: Case, only: list[str] | None, rivals: list[str]) -> None:
    for variant in operations.load(case.operation).plan(case, rivals).variants:
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
