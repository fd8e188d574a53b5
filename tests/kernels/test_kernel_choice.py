"""Which backend runs, and what is said when one cannot."""

from __future__ import annotations

import importlib
import inspect
import runpy
import sys

import pytest
import torch
from kernel_cases import normal, random_mask

import rlhf_kernels as kernels
from rlhf_kernels import (
    BackendUnavailableError,
    UnsupportedOperationError,
    backends,
    gae,
    info,
    kl_penalty,
    ppo_loss,
    rollout_advantages,
    token_logprobs,
)
from rlhf_kernels.backends import reference

ARGUMENTS = (normal(2, 5, seed=1), torch.tensor([1, 2]))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def fresh():
    """Answers about availability are remembered; forget them around a test that changes them."""
    caches = (backends.load, backends.unavailable_reason, backends.default, backends.named)
    for cache in (*caches, backends._warn_missing):
        cache.cache_clear()
    yield
    for cache in (*caches, backends._warn_missing):
        cache.cache_clear()


def test_unknown_backend_by_argument():
    with pytest.raises(
        BackendUnavailableError, match=r"backend=.*'cudnn'.*choose one of cpu, cuda, ref"
    ):
        token_logprobs(*ARGUMENTS, backend="cudnn")


@pytest.mark.parametrize("name", ["cudnn", ""])
def test_backend_by_environment(monkeypatch, name):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, name)
    if not name:
        assert token_logprobs(*ARGUMENTS).shape == (2,)
        return
    for call in (
        lambda: token_logprobs(*ARGUMENTS),
        lambda: kl_penalty(ARGUMENTS[0], ARGUMENTS[0]),
    ):
        with pytest.raises(BackendUnavailableError, match=r"RLHF_KERNELS_BACKEND asks .*'cudnn'"):
            call()


def test_environment_forces_reference(monkeypatch):
    seen = []
    original = reference.token_logprobs_forward
    monkeypatch.setattr(
        reference, "token_logprobs_forward", lambda *a: seen.append(1) or original(*a)
    )
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    token_logprobs(*ARGUMENTS)
    assert seen == [1]


def test_argument_goes_before_environment(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cudnn")
    assert token_logprobs(*ARGUMENTS, backend="reference").shape == (2,)


def test_a_backend_that_is_not_built_says_why(monkeypatch, fresh):
    module = backends.load("cpu")
    monkeypatch.setattr(module, "availability", lambda: "the extension was not compiled")
    with pytest.raises(BackendUnavailableError, match=r"'cpu'.*the extension was not compiled"):
        token_logprobs(*ARGUMENTS, backend="cpu")
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(BackendUnavailableError, match=r"RLHF_KERNELS_BACKEND.*not compiled"):
        gae(*(normal(2, 3, seed=1),) * 2, random_mask(2, 3))
    assert "cpu         not available: the extension was not compiled" in info.report()


def test_the_default_warns_once_when_a_faster_one_is_missing(monkeypatch, fresh):
    module = backends.load("cpu")
    monkeypatch.setattr(module, "availability", lambda: "the extension was not compiled")
    with pytest.warns(UserWarning, match="cpu backend is not available.*not compiled") as record:
        token_logprobs(*ARGUMENTS)
        token_logprobs(*ARGUMENTS, return_entropy=True)
        gae(*(normal(2, 3, seed=1),) * 2, random_mask(2, 3))
    assert len(record) == 1


cpu_only = pytest.mark.skipif(
    backends.unavailable_reason("cpu") is not None, reason="the cpu backend is not built"
)


@cpu_only
def test_cpu_is_the_default_for_cpu_tensors(monkeypatch):
    module = backends.load("cpu")
    seen = []
    original = module.gae_forward
    monkeypatch.setattr(module, "gae_forward", lambda *a: seen.append(1) or original(*a))
    values, mask = normal(2, 3, seed=1), random_mask(2, 3)
    gae(values, values, mask)
    assert seen == [1]
    # float64 is the oracle's precision: by default it goes to reference.
    assert gae(values.double(), values.double(), mask)[0].dtype == torch.float64
    assert seen == [1]


@cpu_only
def test_cpu_by_name_refuses_what_it_does_not_do():
    with pytest.raises(UnsupportedOperationError, match=r"'cpu'.*takes .*float32, not float64"):
        token_logprobs(ARGUMENTS[0].double(), ARGUMENTS[1], backend="cpu")
    with pytest.raises(UnsupportedOperationError, match=r"'cpu'.*does not implement kl_penalty"):
        kl_penalty(*(ARGUMENTS[0],) * 2, backend="cpu")
    with pytest.raises(UnsupportedOperationError, match="runs on cpu tensors, not on meta"):
        backends.choose("gae_forward", torch.empty(2, device="meta"), "cpu")


@cpu_only
def test_cpu_by_environment_serves_what_is_built_on_it(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cpu")
    x, mask = normal(2, 3, seed=1), random_mask(2, 3)
    rollout_advantages(x[:, 0], x, x, x, mask, kl_coef=0.1)
    ppo_loss(x, x, x, mask)
    with pytest.raises(UnsupportedOperationError, match=r"RLHF_KERNELS_BACKEND.*kl_penalty"):
        kl_penalty(x, x)


def test_info_names_every_operation_and_backend():
    public = {name for name in kernels.__all__ if inspect.isfunction(getattr(kernels, name))}
    assert {name.split()[0] for name in info.OPERATIONS} == public
    text = info.report()
    for word in (*info.OPERATIONS, *backends.BACKENDS, "cpu:", torch.__version__):
        assert word in text


def test_info_runs_as_a_module_and_reports_a_forced_backend(monkeypatch, capsys):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "cudnn")
    monkeypatch.delitem(sys.modules, "rlhf_kernels.info")
    runpy.run_module("rlhf_kernels.info", run_name="__main__")
    output = capsys.readouterr().out
    assert "RLHF_KERNELS_BACKEND=cudnn is set" in output
    assert "does not exist" in output


def test_package_holds_the_public_names_and_nothing_else():
    package = importlib.import_module("rlhf_kernels")
    for name in package.__all__:
        assert callable(getattr(package, name)) and getattr(package, name).__doc__
