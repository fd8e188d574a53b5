"""The CUDA kernels as nvcc compiles them: without warnings, and without spilled registers."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "advantages": {"advantages_kernel": 4, "count_kernel": 1},
    "ppo_loss": {"count_kernel": 1, "ppo_loss_kernel": 1, "results_kernel": 1, "weights_kernel": 1},
    "whiten": {"combine_moments_kernel": 1, "moments_kernel": 1, "whiten_kernel": 1},
}


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, without the build that it starts."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reason = module.why_no_cuda()
    if reason is not None:
        pytest.skip(reason)
    return module


def kernels_in(report: str) -> list[tuple[str, str]]:
    """What ptxas -v says of each kernel, by the kernel's name."""
    parts = re.split(r"Compiling entry function '(\w+)' for ", report)
    assert len(parts) > 1, report
    return list(zip(parts[1::2], parts[2::2]))


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("source", KERNELS)
def test_no_warnings_and_no_spills(setup_script, tmp_path, source, architecture):
    nvcc = setup_script.nvcc_command()
    if not any(f"sm_{architecture}" in flag for flag in setup_script.architecture_flags(nvcc[0])):
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    command = [*nvcc, *setup_script.CUDA_FLAGS, f"-arch=sm_{architecture}"]
    command += ["-DRK_ISA=cuda", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += ["-c", str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(tmp_path / "object")]
    result = subprocess.run(command, capture_output=True, text=True)
    report = result.stdout + result.stderr
    assert result.returncode == 0 and "warning" not in report, report
    found = kernels_in(report)
    names = [re.search(r"\d([a-z_]+_kernel)", mangled) for mangled, _ in found]
    counted = [match[1] for match in names if match is not None]
    assert {name: counted.count(name) for name in counted} == KERNELS[source]
    for name, what in found:
        registers = re.search(r"Used (\d+) registers", what)
        assert registers is not None
        print(f"sm_{architecture} {name}: {registers[1]} registers")
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in what, name


def test_every_source_is_built_and_checked(setup_script):
    sources = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert sources == set(KERNELS) == set(setup_script.CUDA_KERNELS)


def test_newer_gpus_find_ptx(setup_script):
    flags = setup_script.architecture_flags(setup_script.nvcc_command()[0])
    newest = re.search(r"arch=compute_(\d+),code=sm_\1$", flags[-2])
    assert newest is not None
    assert flags[-1] == f"-gencode=arch=compute_{newest[1]},code=compute_{newest[1]}"
