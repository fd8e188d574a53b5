"""What Triton would launch, compiled for GPUs that are not there.

`compiled_for(90)` gives the launches of a call on CPU tensors a compiler for that architecture and
collects what they compile; nothing runs, and what the call returns is not initialized. So the block
sizes, numbers of warps and specializations are those of the real launches.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@contextlib.contextmanager
def compiled_for(architecture: int) -> Iterator[list[tuple[str, Any]]]:
    """A growing list of (kernel's name, compiled kernel), one for each launch."""
    launches: list[tuple[str, Any]] = []
    run, active = JITFunction.run, driver._active
    # Compiled kernels are remembered by device, so each architecture is one.
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", architecture, 32),
            get_current_device=lambda: architecture,
            get_current_stream=lambda device: 0,
        )
    )

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = active


def resources(kernel: Any) -> SimpleNamespace:
    """registers; stack (bytes a thread, which spills would take); instructions of the SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", cubin.name)
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return SimpleNamespace(
        registers=numbers["REG"],
        stack=numbers["STACK"] + numbers["LOCAL"],
        instructions=re.findall(
            r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M
        ),
    )


def _tool(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, env=environment, check=True
    )
    return result.stdout
