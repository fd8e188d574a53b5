"""Builds rlhf_kernels._cpu where a C++ compiler with OpenMP works, and rlhf_kernels._cuda where
nvcc ($CUDA_HOME/bin/nvcc, or the PATH's) does too; the rest is in pyproject.toml.

Without them the install succeeds all the same: the reference backend does the work, and
rlhf_kernels/_build_info.py, written here, tells `python -m rlhf_kernels.info` why.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CPU_KERNELS = [
    "token_logprobs",
    "advantages",
    "ppo_loss",
    "transpose",
    "square_sum",
    "adamw_8bit",
    "swiglu",
    "rms_norm",
    "rotary",
    "row_attention_forward",
    "row_attention_backward",
    "cached_attention",
]
CPU_BINDINGS = ["cpu", "cpu_layers", "cpu_instruction_sets"]
CUDA_KERNELS = ["advantages", "ppo_loss", "whiten"]
# -ffp-contract=fast: a*b+c may become one fused instruction; no other liberty with arithmetic.
COMMON_FLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno"
    " -fno-trapping-math -Wall -Wextra -Wno-psabi"
)
# What equals PyTorch's operations to the bit rounds after each of them as these do.
KERNEL_FLAGS = {"adamw_8bit": ["-ffp-contract=off"]}
AVX2 = shlex.split("-mavx2 -mfma -mf16c")
AVX512 = shlex.split("-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512")
X86_ISAS = {"baseline": [], "avx2": AVX2, "avx512": [*AVX2, *AVX512]}
# Code for these, of those that nvcc knows, and PTX of the newest, from which drivers compile for
# later ones.
CUDA_ARCHITECTURES = [80, 90, 100]
# -fmad=false: products and sums are fused where the source says so alone, so that two kernels that
# compute the same number give the same bits.
CUDA_FLAGS = shlex.split(
    "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
)
CUDA_PROBE = """
#include <Python.h>
__global__ void nothing() {}
int main() { nothing<<<1, 1>>>(); }
"""
PROBE = """
#include <Python.h>
#include <omp.h>
typedef float lanes __attribute__((vector_size(16)));
int main() {
  lanes x = {1, 2, 3, 4};
  x = x > 2.0f ? x : -x;
  return omp_get_max_threads() + int(x[0]) < 0;
}
"""


def isa_flags() -> dict[str, list[str]]:
    """Instruction sets to compile the kernels for; the module chooses among them at run time."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return X86_ISAS if x86 else {"baseline": []}


def compiler_command() -> list[str]:
    """The C++ compiler: $CXX, or else the first usual name on the PATH."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return [next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), "g++")]


def why_not_buildable() -> str | None:
    """Compile and link the smallest program that needs what the kernels and bindings need."""
    if sys.platform == "win32":
        return "the C++ kernels are built with GCC or Clang, on Linux and macOS only"
    command = compiler_command()
    if shutil.which(command[0]) is None:
        return f"no C++ compiler was found when it was installed (looked for {command[0]!r})"
    flags = [flag for isa in isa_flags().values() for flag in isa]
    error = probe_error("probe.cpp", PROBE, [*command, *COMMON_FLAGS, *flags, *python_includes()])
    if error is None:
        return None
    what = "Python extensions with OpenMP"
    return f"the C++ compiler {command[0]!r} cannot build {what}: {error}"


def nvcc_command() -> list[str]:
    """The CUDA compiler, with the C++ compiler that it is to use."""
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else "nvcc"
    return [nvcc, "-ccbin", *compiler_command()]


def architecture_flags(nvcc: str) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    targets = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
    newest = [f"-gencode=arch=compute_{number},code=compute_{number}" for number in targets[-1:]]
    return flags + newest


def why_no_cuda() -> str | None:
    """Compile and link the smallest CUDA program that needs what the kernels and bindings need."""
    command = nvcc_command()
    if shutil.which(command[0]) is None:
        return f"no CUDA compiler was found when it was installed (looked for {command[0]!r})"
    flags = architecture_flags(command[0])
    if not flags:
        known = ", ".join(f"sm_{number}" for number in CUDA_ARCHITECTURES)
        return f"the CUDA compiler {command[0]!r} knows none of {known}"
    error = probe_error("probe.cu", CUDA_PROBE, [*command, *CUDA_FLAGS, *flags, *python_includes()])
    return None if error is None else f"the CUDA compiler {command[0]!r} does not work: {error}"


def probe_error(name: str, content: str, command: list[str]) -> str | None:
    """What a compiler objects to a program; None: nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, name)
        source.write_text(content)
        probe = [*command, str(source), "-o", str(Path(folder, "probe"))]
        result = subprocess.run(probe, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    lines = result.stderr.splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[-1]).strip()


def python_includes() -> list[str]:
    paths = sysconfig.get_paths()
    folders = sorted({paths["include"], paths["platinclude"]})
    return [flag for folder in folders for flag in ("-isystem", folder)]  # apart, as nvcc needs it


def ninja_program() -> str:
    """Ninja from its Python package (a build requirement), or else from the PATH."""
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR, "ninja"))


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Source(NamedTuple):
    path: str  # in csrc
    name: str  # of its object
    flags: list[str]


def ninja_file(
    compiler: list[str], flags: list[str], link: list[str], sources: list[Source], target: Path
) -> str:
    """The build of one extension, for ninja to run in a folder of its own."""
    includes = [f"-I{ROOT / 'csrc'}"]
    lines = [
        f"cxx = {shlex.join(compiler)}",
        f"flags = {shlex.join(flags + includes)}",
        f"link = {shlex.join(link)}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in -o $out $link",
    ]
    objects = []
    for source in sources:
        objects.append(ninja_escape(f"{source.name}.o"))
        path = ninja_escape(str(ROOT / "csrc" / source.path))
        lines.append(f"build {objects[-1]}: compile {path}")
        lines.append(f"  extra = {shlex.join(source.flags)}")
    lines.append(f"build {ninja_escape(str(target))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def binding_flags() -> list[str]:
    import pybind11

    return ["-isystem", pybind11.get_include(), *python_includes()]


def cpu_build(target: Path) -> str:
    """Every kernel once per instruction set, the bindings once."""
    sources = [Source(f"bindings/{name}.cpp", name, binding_flags()) for name in CPU_BINDINGS]
    for isa, flags in isa_flags().items():
        for kernel in CPU_KERNELS:
            extra = [f"-DRK_ISA={isa}", *flags, *KERNEL_FLAGS.get(kernel, [])]
            sources.append(Source(f"cpu/{kernel}.cpp", f"{kernel}.{isa}", extra))
    flags = [*COMMON_FLAGS, *(["-DRK_X86"] if len(isa_flags()) > 1 else [])]
    link = ["-shared", "-fopenmp"]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    return ninja_file(compiler_command(), flags, link, sources, target)


def cuda_build(target: Path) -> str:
    """Every kernel for all architectures. The runtime is linked in: no library must be found."""
    command = nvcc_command()
    architectures = architecture_flags(command[0])
    sources = [Source("bindings/cuda.cpp", "bindings", binding_flags())]
    sources += [Source(f"cuda/{name}.cu", name, architectures) for name in CUDA_KERNELS]
    flags = [*CUDA_FLAGS, "-DRK_ISA=cuda"]
    return ninja_file(command, flags, ["-shared", "-cudart=static"], sources, target)


BUILDS = {"rlhf_kernels._cpu": cpu_build, "rlhf_kernels._cuda": cuda_build}


class BuildKernels(build_ext):
    """Compiles the extensions with ninja, or records why it could not."""

    def run(self) -> None:
        self.missing = {
            "rlhf_kernels._cpu": why_not_buildable(),
            "rlhf_kernels._cuda": why_no_cuda(),
        }
        self.write_build_info()
        for name, reason in self.missing.items():
            if reason is not None and (self.inplace or self.editable_mode):
                for left in (ROOT / "rlhf_kernels").glob(f"{name.split('.')[1]}.*so"):
                    left.unlink()  # nor must the checkout import one
        super().run()
        for name, reason in self.missing.items():
            if reason is not None:
                backend = name.split("_")[-1]
                print(
                    f"\nrlhf-kernels: the {backend} backend was not built: {reason}.\n"
                    "Other backends will be used instead; they are correct, but may be slower.\n",
                    file=sys.stderr,
                )

    def write_build_info(self) -> None:
        base = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        path = base / "rlhf_kernels" / "_build_info.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            '"""Written by setup.py: why a backend was not built (None: it was)."""\n\n'
            f"CPU_MISSING: str | None = {self.missing['rlhf_kernels._cpu']!r}\n"
            f"CUDA_MISSING: str | None = {self.missing['rlhf_kernels._cuda']!r}\n"
        )

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        reason = self.missing[ext.name]
        if reason is not None:
            target.unlink(missing_ok=True)  # one left by an earlier build must not be packed
            raise CompileError(reason)  # the extension is optional: the install goes on
        build_dir = Path(self.build_temp).resolve() / ext.name.split("_")[-1]
        for folder in (build_dir, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(BUILDS[ext.name](target))
        try:
            subprocess.run([ninja_program(), "-C", str(build_dir)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # A compiler that works but rejects our code is our bug: say so, do not hide it.
            raise RuntimeError(f"building {ext.name} failed: {error}") from error


setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in BUILDS],
    cmdclass={"build_ext": BuildKernels},
)
