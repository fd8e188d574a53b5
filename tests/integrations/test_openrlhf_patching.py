"""Patching OpenRLHF, undoing it, and refusing what ours do not stand for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from held_names import changed, held_by

from rlhf_kernels.integrations import openrlhf


def held() -> dict[str, Any]:
    """What every name of every OpenRLHF module is, and of its classes every attribute."""
    found = held_by("openrlhf")
    for name, value in list(found.items()):
        if isinstance(value, type) and value.__module__ == name.rpartition(".")[0]:
            found |= {f"{name}.{each}": own for each, own in vars(value).items()}
    return found


def test_patching_openrlhf_and_undoing_it(real_openrlhf: SimpleNamespace) -> None:
    before, seed = held(), torch.random.get_rng_state()
    actor = sys.modules["openrlhf.models.actor"]
    earlier = real_openrlhf.PolicyLoss()
    with openrlhf.patched() as places:
        assert torch.equal(torch.random.get_rng_state(), seed)
        assert actor.log_probs_from_logits is openrlhf.log_probs_from_logits
        assert actor.compute_entropy is openrlhf.compute_entropy
        assert real_openrlhf.experience_maker.compute_approx_kl is openrlhf.compute_approx_kl
        assert earlier.forward.__func__ is openrlhf.PolicyLoss.forward
        assert changed(before, held()) == set(places)
    assert changed(before, held()) == set()


def test_patching_by_hand_and_twice(real_openrlhf: SimpleNamespace) -> None:
    before = held()
    places = openrlhf.patch()
    try:
        with pytest.raises(openrlhf.PatchError, match="patched already"):
            openrlhf.patch()
    finally:
        assert sorted(openrlhf.unpatch()) == sorted(places)
    assert changed(before, held()) == set()


def test_openrlhf_with_another_signature_is_refused(
    real_openrlhf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_openrlhf.loss.ValueLoss, "forward", lambda self, x: x)
    before = held()
    with pytest.raises(openrlhf.PatchError, match=r"ValueLoss\.forward takes \(self, x\)"):
        openrlhf.patch()
    assert changed(before, held()) == set()


def test_a_bound_that_has_changed_is_refused(
    real_openrlhf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_openrlhf.utils, "KL_IS_WEIGHT_CLIP", 2.0)
    with pytest.raises(openrlhf.PatchError, match=r"compute_approx_kl and ours are"):
        openrlhf.patch()


def test_importing_the_adapters_imports_nothing_of_openrlhf() -> None:
    script = "import sys, rlhf_kernels.integrations.openrlhf; sys.exit('openrlhf' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_where_openrlhf_is_missing_the_refusal_says_so() -> None:
    if importlib.util.find_spec("openrlhf") is not None:
        pytest.skip("OpenRLHF is installed")
    with pytest.raises(openrlhf.PatchError, match=r"openrlhf is not installed.*>=0\.11,<0\.12"):
        openrlhf.patch()
    assert not [name for name in sys.modules if name.partition(".")[0] == "openrlhf"]
