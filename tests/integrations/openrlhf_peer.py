"""OpenRLHF itself, where it is installed.

It comes with `pip install --no-deps openrlhf==0.11.2` and what its modules import. flash-attn and
vLLM, which need a GPU, are stood in for where they are missing: nothing compared here uses them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest

NEED_A_GPU = {
    "flash_attn": ["flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"],
    "vllm": ["vllm.inputs", "vllm.utils"],
}
MODULES = {
    "utils": "openrlhf.models.utils",
    "loss": "openrlhf.models.loss",
    "experience_maker": "openrlhf.trainer.ppo_utils.experience_maker",
}


def stand_in(name: str) -> ModuleType:
    module = MagicMock(name=name)
    module.__spec__, module.__path__ = ModuleSpec(name, None), []
    return module


def unpatched() -> SimpleNamespace:
    """Its modules, and its functions as they are unpatched; skips where one cannot be imported."""
    if importlib.util.find_spec("openrlhf") is None:
        pytest.skip("OpenRLHF is not installed: pip install --no-deps openrlhf==0.11.2")
    missing = [name for name in NEED_A_GPU if importlib.util.find_spec(name) is None]
    names = [each for name in missing for each in (name, *NEED_A_GPU[name])]
    sys.modules.update({name: stand_in(name) for name in names})
    try:
        modules = {name: importlib.import_module(path) for name, path in MODULES.items()}
    except ImportError as error:
        pytest.skip(f"OpenRLHF is installed, but not all that it imports: {error}")
    finally:
        for name in names:
            del sys.modules[name]
    utils, loss, experience_maker = modules.values()
    return SimpleNamespace(
        log_probs_from_logits=utils.log_probs_from_logits,
        compute_entropy=utils.compute_entropy.__wrapped__,  # before it is compiled
        compute_approx_kl=utils.compute_approx_kl,
        PolicyLoss=loss.PolicyLoss,
        ValueLoss=loss.ValueLoss,
        get_advantages_and_returns=(
            experience_maker.RemoteExperienceMaker.get_advantages_and_returns
        ),
        **modules,
    )
