"""Settings of the kernel tests: the same examples every run, and each backend on its device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulated_cuda import EMULATED, install
from hypothesis import settings
from kernel_cases import INTERPRETED, device_of

settings.register_profile("kernels", derandomize=True, deadline=None, max_examples=40)
# An interpreted kernel takes milliseconds to start.
settings.register_profile("interpreted", parent=settings.get_profile("kernels"), max_examples=10)
settings.load_profile("interpreted" if INTERPRETED else "kernels")

if INTERPRETED:
    from interpreted_triton import correct

    correct()

if EMULATED:
    install()


def pytest_configure(config: pytest.Config) -> None:
    # numpy warns of what is meant to happen: exponentials of differences that overflow.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def on_the_device_of_its_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors that a test of a GPU's backend makes are the GPU's, without its saying so."""
    parameters = getattr(request.node, "callspec", None)
    backend = None if parameters is None else parameters.params.get("backend")
    if device_of(backend) == "cpu":
        yield
    else:
        with torch.device(device_of(backend)):
            yield
