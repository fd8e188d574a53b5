"""Builds rlhf_kernels._cpu where a C++ compiler with OpenMP works; the rest is in pyproject.toml.

Without a compiler the install succeeds all the same: the reference backend does the work, and
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

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
KERNELS = ["token_logprobs", "advantages", "ppo_loss"]
# -ffp-contract=fast: a*b+c may become one fused instruction; no other liberty with arithmetic.
COMMON_FLAGS = shlex.split(
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno"
    " -fno-trapping-math -Wall -Wextra -Wno-psabi"
)
AVX2 = shlex.split("-mavx2 -mfma -mf16c")
AVX512 = shlex.split("-mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512")
X86_ISAS = {"baseline": [], "avx2": AVX2, "avx512": [*AVX2, *AVX512]}
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
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        flags = [flag for isa in isa_flags().values() for flag in isa]
        flags += python_includes()
        probe = [*command, *COMMON_FLAGS, *flags, str(source), "-o", str(Path(folder, "probe"))]
        result = subprocess.run(probe, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    error = next((line for line in result.stderr.splitlines() if "error" in line), "no message")
    what = "Python extensions with OpenMP"
    return f"the C++ compiler {command[0]!r} cannot build {what}: {error.strip()}"


def python_includes() -> list[str]:
    paths = sysconfig.get_paths()
    return [f"-isystem{folder}" for folder in sorted({paths["include"], paths["platinclude"]})]


def ninja_program() -> str:
    """Ninja from its Python package (a build requirement), or else from the PATH."""
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR, "ninja"))


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_rules(build_dir: Path, target: Path) -> str:
    """The build as a ninja file: every kernel once per instruction set, the bindings once."""
    import pybind11

    includes = [f"-I{ROOT / 'csrc'}", *(["-DRK_X86"] if len(isa_flags()) > 1 else [])]
    python = [f"-isystem{pybind11.get_include()}", *python_includes()]
    link = ["-shared", "-fopenmp"]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    lines = [
        f"cxx = {shlex.join(compiler_command())}",
        f"flags = {shlex.join(COMMON_FLAGS + includes)}",
        f"link = {shlex.join(link)}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in -o $out $link",
    ]
    objects = []

    def compile_source(source: str, name: str, extra: list[str]) -> None:
        objects.append(ninja_escape(str(build_dir / f"{name}.o")))
        lines.append(f"build {objects[-1]}: compile {ninja_escape(str(ROOT / 'csrc' / source))}")
        lines.append(f"  extra = {shlex.join(extra)}")

    compile_source("bindings/cpu.cpp", "bindings", python)
    for isa, flags in isa_flags().items():
        for kernel in KERNELS:
            extra = [f"-DRK_ISA={isa}", *flags]
            compile_source(f"cpu/{kernel}.cpp", f"{kernel}.{isa}", extra)
    lines.append(f"build {ninja_escape(str(target))}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildKernels(build_ext):
    """Compiles the one extension with ninja, or records why it could not."""

    def run(self) -> None:
        self.reason = why_not_buildable()
        self.write_build_info()
        if self.reason is not None and (self.inplace or self.editable_mode):
            for left in (ROOT / "rlhf_kernels").glob("_cpu*.so"):
                left.unlink()  # nor must the checkout import one
        super().run()
        if self.reason is not None:
            print(
                f"\nrlhf-kernels: the cpu backend was not built: {self.reason}.\n"
                "The reference backend (PyTorch) will be used instead; it is correct but slower.\n",
                file=sys.stderr,
            )

    def write_build_info(self) -> None:
        base = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        path = base / "rlhf_kernels" / "_build_info.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            '"""Written by setup.py: why the cpu backend was not built (None: it was)."""\n\n'
            f"CPU_MISSING: str | None = {self.reason!r}\n"
        )

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if self.reason is not None:
            target.unlink(missing_ok=True)  # one left by an earlier build must not be packed
            raise CompileError(self.reason)  # the extension is optional: the install goes on
        build_dir = Path(self.build_temp).resolve() / "cpu"
        for folder in (build_dir, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_rules(build_dir, target))
        try:
            subprocess.run([ninja_program(), "-C", str(build_dir)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            # A compiler that works but rejects our code is our bug: say so, do not hide it.
            raise RuntimeError(f"building {ext.name} failed: {error}") from error


setup(
    ext_modules=[Extension("rlhf_kernels._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
