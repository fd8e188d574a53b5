"""The same examples every run, and the peers of the OpenRLHF tests."""

from __future__ import annotations

from types import SimpleNamespace

import openrlhf_peer
import pytest
from hypothesis import settings
from openrlhf_definitions import DEFINITIONS

# So that a failed comparison shows its values, as an assertion in a test file does.
pytest.register_assert_rewrite("comparisons", "held_names", "openrlhf_check", "verl_check")

settings.register_profile("integrations", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("integrations")


@pytest.fixture(scope="module")
def real_openrlhf() -> SimpleNamespace:
    """Its modules, and its functions as they are unpatched; skips where one cannot be imported."""
    return openrlhf_peer.unpatched()


@pytest.fixture(scope="module", params=["definitions", "openrlhf"])
def peer(request: pytest.FixtureRequest) -> SimpleNamespace:
    """What ours are compared with: the definitions, then OpenRLHF itself."""
    if request.param == "definitions":
        return DEFINITIONS
    return request.getfixturevalue("real_openrlhf")
