"""When the cuda backend runs, and what is said where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from emulated_cuda import EMULATED

from rlhf_kernels import UnsupportedOperationError, backends
from rlhf_kernels.backends import cuda

REPORT = """
import sys, torch
from rlhf_kernels import backends, gae, info
x, mask = torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.bool)
gae(x, x, mask)
assert sys.modules.get("rlhf_kernels._cuda") is None, "the default loaded the CUDA kernels"
print(info.report())
try:
    gae(x, x, mask, backend="cuda")
except RuntimeError as error:
    print(type(error).__name__, error)
assert not torch.cuda.is_initialized()
"""

built = pytest.mark.skipif(
    EMULATED or cuda._cuda is None, reason="rlhf_kernels._cuda is not built, or emulated"
)


def report(prelude: str = "") -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", prelude + REPORT],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@built
def test_without_a_gpu():
    text = report()
    reason = "no GPU was found; its kernels take tensors on an NVIDIA GPU (cuda) alone"
    assert f"cuda        not available: {reason}" in text
    assert "BackendUnavailableError backend= asks for the backend 'cuda'" in text
    assert f"which cannot run here: {reason}" in text


def test_where_it_was_not_built():
    missing = """
import sys, types
sys.modules["rlhf_kernels._cuda"] = None
info = types.ModuleType("rlhf_kernels._build_info")
info.CPU_MISSING, info.CUDA_MISSING = None, "no CUDA compiler was found"
sys.modules["rlhf_kernels._build_info"] = info
"""
    text = report(missing)
    assert "cuda        not available: no CUDA compiler was found" in text
    assert "which cannot run here: no CUDA compiler was found" in text


@built
def test_importing_the_module_asks_nothing_of_a_driver(tmp_path):
    """Nor does it need one: the runtime is linked in, and only calls look for the driver."""
    libraries = subprocess.run(["ldd", cuda._cuda.__file__], capture_output=True, text=True).stdout
    assert "libc.so" in libraries
    assert "cuda" not in libraries.lower().replace(cuda._cuda.__file__.lower(), "")


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_that_fails_raises():
    x = torch.zeros(8)
    arguments = ((1, 8, 0), (x.data_ptr(), 8), (x.data_ptr(), 8), (x.data_ptr(), 8))
    with pytest.raises(RuntimeError, match=r"the CUDA kernel 'gae' could not be launched: .*CUDA"):
        cuda._cuda.gae(
            *arguments, 0, (1.0, 1.0, 1.0, 0), 0, x.data_ptr(), x.data_ptr(), (1, 0, 0), 0
        )


@pytest.mark.skipif(EMULATED, reason="emulated kernels need no driver")
@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (0, "no GPU was found"),
        (12090, "the GPU's driver supports CUDA 12.9, and the kernels were built with 13.0"),
        (13000, None),
        (14010, None),
    ],
)
def test_a_driver_that_is_too_old(monkeypatch, driver, reason):
    class Module:
        RUNTIME_VERSION = 13000

        @staticmethod
        def driver_version() -> int:
            return driver

    monkeypatch.setattr(cuda, "_cuda", Module)
    monkeypatch.setattr(cuda, "_unavailable", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = cuda.availability()
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.skipif(EMULATED, reason="emulated kernels take CPU tensors")
def test_by_name_where_it_is_not_made_for(monkeypatch):
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: None)
    backends.named.cache_clear()
    with pytest.raises(UnsupportedOperationError, match="runs on cuda tensors, not on cpu ones"):
        backends.choose("gae_forward", torch.zeros(2, 3), "cuda")
    with pytest.raises(UnsupportedOperationError, match="does not implement token_logprobs"):
        backends.named("cuda", "token_logprobs_forward", "cuda", torch.float32)
    with pytest.raises(UnsupportedOperationError, match=r"takes .*float32, not float64"):
        backends.named("cuda", "gae_forward", "cuda", torch.float64)
    backends.named.cache_clear()


def test_no_default_until_a_gpu_confirmed_it():
    assert not backends.BACKENDS["cuda"].default
