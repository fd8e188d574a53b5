"""When the triton backend runs: by name, where there is a GPU or the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from rlhf_kernels import BackendUnavailableError, UnsupportedOperationError, backends, info

pytest.importorskip("triton")

REPORT = """
import sys, torch
from rlhf_kernels import backends, info, token_logprobs
logits, targets = torch.zeros(2, 8), torch.tensor([1, 2])
token_logprobs(logits, targets)
assert "rlhf_kernels.backends.triton" not in sys.modules, "the default imported Triton's kernels"
print(info.report())
try:
    print(token_logprobs(logits, targets, backend="triton"))
except RuntimeError as error:
    print(type(error).__name__, error)
assert not torch.cuda.is_initialized()
"""


def report(interpreted: bool, **variables: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_without_a_gpu():
    text = report(interpreted=False)
    reason = "no GPU was found; TRITON_INTERPRET=1 runs the kernels interpreted on CPU tensors"
    assert f"triton      not available: {reason}" in text
    assert "BackendUnavailableError backend= asks for the backend 'triton'" in text
    assert f"which cannot run here: {reason}" in text


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@pytest.mark.skipif(
    numbers(version("triton")) < (3, 7) and numbers(version("numpy")) >= (2, 4),
    reason="Triton's interpreter before 3.7 does not run with this numpy",
)
def test_interpreted():
    text = report(interpreted=True)
    assert "triton      available, by name only: Triton" in text and "interpreted" in text
    assert "tensor([-2.0794, -2.0794])" in text


def test_no_default_until_a_gpu_confirmed_it(monkeypatch):
    """BackendSpec.default is the one thing to change then."""
    for cache in (backends.default, backends.unavailable_reason):
        cache.cache_clear()
    monkeypatch.setattr(backends.load("triton"), "availability", lambda: None)
    devices = (backends.BACKENDS["triton"].devices or frozenset()) | {"cuda"}
    try:
        for chosen, wanted in ((False, "reference"), (True, "triton")):
            spec = backends.BACKENDS["triton"]._replace(default=chosen, devices=devices)
            monkeypatch.setitem(backends.BACKENDS, "triton", spec)
            backends.default.cache_clear()
            for primitive in ("token_logprobs_forward", "gae_forward", "ppo_loss_forward"):
                by_default = backends.default(primitive, "cuda", torch.bfloat16).NAME
                assert by_default == wanted
            assert backends.default("kl_penalty", "cuda", torch.float32).NAME == "reference"
            assert ("by name only" in info._state("triton")) is not chosen
    finally:
        for cache in (backends.default, backends.unavailable_reason):
            cache.cache_clear()
    monkeypatch.undo()
    assert not backends.BACKENDS["triton"].default


def test_by_name_where_it_is_not_made_for(monkeypatch):
    monkeypatch.setattr(backends, "unavailable_reason", lambda name: None)
    monkeypatch.setitem(
        backends.BACKENDS,
        "triton",
        backends.BACKENDS["triton"]._replace(devices=frozenset({"cuda"})),
    )
    backends.named.cache_clear()
    with pytest.raises(UnsupportedOperationError, match="runs on cuda tensors, not on cpu ones"):
        backends.choose("token_logprobs_forward", torch.zeros(2, 3), "triton")
    with pytest.raises(UnsupportedOperationError, match="does not implement kl_penalty"):
        backends.named("triton", "kl_penalty", "cuda", torch.float32)
    backends.named.cache_clear()


def test_without_triton(monkeypatch):
    """Where the package is missing, a name asks for what is not installed; nothing else changes."""
    caches = (backends.load, backends.unavailable_reason, backends.named)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [n for n in sys.modules if n.startswith("rlhf_kernels.backends.triton")]:
        monkeypatch.delitem(sys.modules, name)
    try:
        with pytest.raises(BackendUnavailableError, match="triton is not installed"):
            backends.choose("token_logprobs_forward", torch.zeros(2, 3), "triton")
        assert "triton      not available: triton is not installed" in info.report()
    finally:
        monkeypatch.undo()
        for cache in caches:
            cache.cache_clear()
