"""The CUDA kernels on CPU tensors: their sources as they are, compiled by the host's compiler.

RLHF_KERNELS_EMULATE_CUDA=1 lets the tests run the `cuda` backend so (see `make test`). What stands
in for CUDA is cuda_emulation/cuda_runtime.h; it says what it checks besides the results.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from rlhf_kernels import backends

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
# As nvcc is told to: a product and a sum are rounded each for themselves. A fortified longjmp would
# refuse to change stacks.
FLAGS = shlex.split(
    "-std=c++17 -O2 -fPIC -ffp-contract=off -fvisibility=hidden -Wall -Wextra -Werror"
    " -Wno-unknown-pragmas -U_FORTIFY_SOURCE -DRK_ISA=cuda"
)
EMULATED = os.environ.get("RLHF_KERNELS_EMULATE_CUDA", "") not in ("", "0")


def build(folder: Path) -> Path:
    """Compile the kernels and the bindings to a Python module in `folder`."""
    import pybind11

    includes = [f"-I{HERE / 'cuda_emulation'}", f"-I{CSRC}"]
    includes += [f"-isystem{pybind11.get_include()}"]
    includes += [f"-isystem{sysconfig.get_paths()['include']}"]
    command = [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS, *includes]
    sources = {f"{path.stem}.o": path for path in sorted((CSRC / "cuda").glob("*.cu"))}
    sources["bindings.o"] = CSRC / "bindings" / "cuda.cpp"
    running = [
        subprocess.Popen([*command, "-x", "c++", "-c", str(source), "-o", str(folder / name)])
        for name, source in sources.items()
    ]
    assert all(process.wait() == 0 for process in running), "the kernels do not compile"
    module = folder / "_cuda.so"
    objects = [str(folder / name) for name in sources]
    subprocess.run([*command, "-shared", *objects, "-o", str(module)], check=True)
    return module


def load() -> ModuleType:
    with tempfile.TemporaryDirectory() as folder:
        path = build(Path(folder))
        spec = importlib.util.spec_from_file_location("rlhf_kernels._cuda", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def install() -> None:
    """Have the `cuda` backend run the emulated kernels, on CPU tensors."""
    sys.modules["rlhf_kernels._cuda"] = module = load()
    backend = backends.load("cuda")
    backend._cuda, backend._unavailable = module, None
    backend.availability = lambda: None
    backend._stream = lambda x: 0
    backend._processors = lambda device: 1
    spec = backends.BACKENDS["cuda"]
    backends.BACKENDS["cuda"] = spec._replace(devices=frozenset({"cpu", "cuda"}))
