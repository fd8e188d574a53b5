"""docs/peers.md: its options exist, its defaults are the code's, its lines give TRL's numbers."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np
import peer_oracles as peers
import torch
from float64_oracle import array
from kernel_cases import close
from test_kernel_gae import tolerance
from test_peer_formulas import flags, rollout_inputs, whitened_tolerance

import rlhf_kernels
from rlhf_kernels import PPOLossConfig

PAGE = (Path(__file__).parents[2] / "docs" / "peers.md").read_text(encoding="utf-8")
FUNCTIONS = [getattr(rlhf_kernels, name) for name in rlhf_kernels.__all__ if name[0].islower()]


def options() -> dict[str, list[object]]:
    """The defaults of each keyword of the public functions and each setting of the loss."""
    found = {field.name: [field.default] for field in dataclasses.fields(PPOLossConfig)}
    for function in FUNCTIONS:
        for name, parameter in inspect.signature(function).parameters.items():
            found.setdefault(name, []).append(parameter.default)
    return found


def test_the_defaults_are_these():
    section = PAGE.split("## Defaults")[1].split("\n## ")[0]
    ours = [line.split("|")[-2] for line in section.splitlines() if line.startswith("| ")]
    stated = re.findall(r"`(\w+)=([^`]+)`", " ".join(ours))
    for name, value in stated:
        assert ast.literal_eval(value) in options()[name], name
    settings = {field.name for field in dataclasses.fields(PPOLossConfig)}
    assert settings <= {name for name, _ in stated}, "each setting of the loss has its row"


def test_every_option_exists():
    last_cells = [line.split("|")[-2] for line in PAGE.splitlines() if line.startswith("| ")]
    named = re.findall(r"\b(\w+)=", " ".join(re.findall(r"`([^`]+)`", " ".join(last_cells))))
    assert len(named) > 15 and set(named) <= set(options())


def test_the_lines_for_trl():
    lengths, width = [4, 0, 6, 2], 6
    (logprobs, reference, values), scores = rollout_inputs(4, width, seed=3)
    mask = torch.as_tensor(peers.trl_masks(lengths, width)[0])
    names = {"logprobs": logprobs, "ref_logprobs": reference, "values": values}
    names |= {"scores": scores, "mask": mask}
    (lines,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(lines, "docs/peers.md", "exec"), names)
    kl = np.vectorize(peers.trl_kl)("k1", array(logprobs) - array(reference))
    expected = peers.trl_rollout(array(scores), kl, array(values), lengths, 0.05, 1.0, 0.95)
    error = tolerance(width, 1.0, 0.95, 10 + abs(expected.returns).max())
    close(names["returns"], np.where(flags(names["critic_mask"]), expected.returns, 0.0), error)
    atol = whitened_tolerance(expected.raw_advantages, flags(mask), error)
    close(names["advantages"], expected.advantages, atol)
