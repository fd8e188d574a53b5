"""Patching verl, undoing it, and what of verl runs on ours meanwhile."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from comparisons import close, normal
from held_names import changed, held_by
from torch import Tensor
from verl_peer import WHOLE_BATCH, actor_config, algorithms

from rlhf_kernels.integrations import verl


def held() -> dict[str, Any]:
    """What every name of every verl module is, and every entry of its registries."""
    names = held_by("verl")
    for registry in ("POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY"):
        entries = getattr(algorithms, registry).items()
        names |= {f"{registry}[{key}]": entry for key, entry in entries}
    return names


def test_patching_verl_and_undoing_it() -> None:
    losses = pytest.importorskip("verl.workers.utils.losses")
    before, seed = held(), torch.random.get_rng_state()
    with verl.patched() as places:
        assert torch.equal(torch.random.get_rng_state(), seed)
        assert algorithms.get_policy_loss_fn("vanilla") is verl.compute_policy_loss_vanilla
        assert algorithms.get_adv_estimator_fn("gae") is verl.compute_gae_advantage_return
        assert losses.agg_loss is algorithms.agg_loss is verl.agg_loss
        assert losses.kl_penalty is verl.kl_penalty
        assert algorithms.verl_F.masked_whiten is verl.masked_whiten
        of_registries = [place for place in places if "REGISTRY" in place]
        assert len(of_registries) == 2
        assert len(changed(before, held())) == len(places)
    assert changed(before, held()) == set()


def test_patching_by_hand_and_twice() -> None:
    before = held()
    places = verl.patch()
    try:
        with pytest.raises(verl.PatchError, match="patched already"):
            verl.patch()
    finally:
        assert sorted(verl.unpatch()) == sorted(places)
    assert changed(before, held()) == set()


def test_other_losses_of_verl_run_on_what_was_replaced() -> None:
    series = [normal(3, 5, seed=seed, dtype=torch.float32) for seed in range(3)]
    mask = torch.ones(3, 5, dtype=torch.bool)

    def gspo() -> Tensor:
        function = algorithms.get_policy_loss_fn("gspo")
        return function(*series, mask, "seq-mean-token-mean", actor_config({}))[0]

    expected = gspo()
    with verl.patched():
        close(gspo(), expected, 1e-6)


def test_verl_may_change_the_loss_in_place() -> None:
    new = torch.zeros(1, 2, requires_grad=True)
    old, mask = torch.zeros(1, 2), torch.ones(1, 2)
    for whole in ({}, WHOLE_BATCH):
        loss, _ = verl.compute_policy_loss_vanilla(
            old, new, old + 1, mask, config=actor_config(whole)
        )
        loss -= 0.1 * new.sum()
        loss.backward()
        assert new.grad is not None


@pytest.mark.parametrize("name", ["agg_loss", "kl_penalty"])
def test_verl_with_another_signature_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, name, lambda x: x)
    before = held()
    with pytest.raises(verl.PatchError, match=rf"core_algos\.{name} takes \(x\)"):
        verl.patch()
    assert changed(before, held()) == set()


def test_importing_the_adapters_imports_nothing_of_verl() -> None:
    script = "import sys, rlhf_kernels.integrations.verl; sys.exit('verl' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
