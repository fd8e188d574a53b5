"""What the sides need: TRL's environment and the models, made once and kept in .benchmarks/."""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlhf.demo.model import convert_smollm2

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".benchmarks" / "ppo_trainer"  # git ignores it
TRL, TORCH = "1.12.0", "2.13.0"


def trl_python() -> Path:
    """This interpreter where it has that TRL, or that of an environment which is made for it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("trl") == TRL:
            return Path(sys.executable)
    folder = KEPT / f"trl-{TRL}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"making an environment with trl {TRL} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pins = folder / "constraints.txt"  # ours, but for TRL's version
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pins.write_text("\n".join(line for line in lines if not line.startswith("trl==")) + "\n")
        pip = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "-c",
            str(pins),
        ]
        # torch first, pinned: left to TRL's requirements it may come as a build of several GB.
        subprocess.run([*pip, f"torch=={TORCH}"], check=True)
        transformers = importlib.metadata.version("transformers")
        subprocess.run([*pip, f"trl=={TRL}", f"transformers=={transformers}"], check=True)
        ready.touch()
    return python


def drawn_models(folder: Path) -> Path:
    """Models as ``models`` gives, from a ``policy`` that need have no weights: they are drawn.

    Neither seconds nor memory depend on what the weights are.
    """
    policy = folder / "policy"
    torch.manual_seed(0)
    if not list(policy.glob("*.safetensors")):
        config = AutoConfig.from_pretrained(policy)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(policy)
    return _with_reward(folder)


def models(tiny: bool) -> Path:
    """A folder with ``policy``, SmolLM2-135M, and ``reward``, its trunk with a score head.

    Args:
        tiny: Two small layers drawn at random instead, to try the script out.
    """
    smollm2 = convert_smollm2(KEPT / "smollm2" / "policy")
    folder = KEPT / ("tiny" if tiny else "smollm2")
    torch.manual_seed(0)
    if tiny and not (folder / "policy").exists():
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config = AutoConfig.from_pretrained(
            smollm2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, **small
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "policy")
        AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder / "policy")
    return _with_reward(folder)


def _with_reward(folder: Path) -> Path:
    if not (folder / "reward").exists():
        reward = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
        reward.save_pretrained(folder / "reward")
    return folder
