"""What figures depend on: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from rlhf_kernels import backends
from rlhf_kernels.bench import peers
from rlhf_kernels.bench.timing import load_average


def machine() -> dict[str, object]:
    """All of it, for the top of a report."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average_at_start": load_average(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "rlhf_kernels": _version("rlhf-kernels"),
        "commit": _commit(),
        "backends": {name: _backend(name) for name in backends.BACKENDS},
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": platform.system(),
        "peers": peers.versions(),
    }


def print_machine(about: dict[str, object]) -> None:
    for key, value in about.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {text}" for name, text in value.items())
        if value is not None:
            print(f"{key}: {value}")


def available_memory(device: str) -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _backend(name: str) -> str:
    reason = backends.unavailable_reason(name)
    if reason is not None:
        return f"not available: {reason}"
    describe = getattr(backends.load(name), "describe", None)
    return "available" if describe is None else str(describe())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+" where files were changed since; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
