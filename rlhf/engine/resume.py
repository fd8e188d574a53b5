"""Whether a checkpoint belongs to this training, and what has changed since."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.engine.checkpoint import CheckpointError
from rlhf.engine.weight_bits import sum_of_bits

logger = logging.getLogger(__name__)

# These change where results go, what is shown, memory and speed, but not the results (to rounding).
WITHOUT_EFFECT = frozenset(
    {
        "output_dir",
        "trackers",
        "log_every",
        "micro_batch_size",
        "micro_batch_tokens",
        "gradient_checkpointing",
        "torch_compile",
        "frozen_on_disk",
        "max_skipped_steps",
        "save_every",
        "keep_checkpoints",
        "generation_batch_size",
        "samples_every",
        "samples_count",
        "eval_every",
        "eval_greedy",
    }
)

# What checkpoints of earlier versions do not have: a change of it cannot be seen there.
ADDED = frozenset({"eval_prompts", "eos_token_ids"})
# Entries of a model's config that say where it comes from or what it returns.
WITHOUT_MEANING = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "reward_template",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def identity(config: Any, world_size: int, **inputs: Any) -> dict[str, Any]:
    """What makes a training the one it is, as JSON values.

    Args:
        config: Its settings.
        world_size: Its number of ranks.
        inputs: Fingerprints of its data and models, by name.
    """
    values = {**dataclasses.asdict(config), "world_size": world_size, **inputs}
    return json.loads(json.dumps(values, default=str))


def check_same(
    saved: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str], source: Path
) -> None:
    """Check that a training may go on from a checkpoint.

    Args:
        saved: ``identity`` of the training that wrote it.
        now: Of the one that reads it.
        allow: Names of differences that are meant.
        source: The checkpoint, for the message.

    Raises:
        CheckpointError: Something differs that changes the results; each difference is named.
    """
    now = as_written_then(saved, now)
    unknown = set(allow) - saved.keys() - now.keys()
    if unknown:
        raise CheckpointError(
            f"{', '.join(sorted(unknown))} cannot be allowed to differ: there is no such setting"
        )
    changed = [
        name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)
    ]
    refused = [name for name in changed if name not in WITHOUT_EFFECT and name not in allow]
    listed = "".join(f"\n  - {line}" for line in differences(saved, now) if named(line, refused))
    if refused:
        raise CheckpointError(
            f"{source} was written by a training that differs from this one:{listed}\nGo back to "
            "the earlier settings; or, if the change is meant, allow it by name: "
            f"--resume_allow '[{', '.join(refused)}]' (in Python, resume(allow=[...]))."
        )
    for line in differences(saved, now):
        if not named(line, ["output_dir"]):
            logger.warning("resumed with another setting: %s", line)


def as_written_then(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """``now`` as the version that wrote ``saved`` would have written it."""
    older = {name for name, value in saved.items() if isinstance(value, str)}
    return {
        name: value["ends"] if name in older and isinstance(value, dict) else value
        for name, value in now.items()
        if name in saved or name not in ADDED
    }


def named(line: str, names: Sequence[str]) -> bool:
    """Whether a line of ``differences`` is about one of these."""
    return line.split(":")[0].split(".")[0] in names


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each setting that differs, as "name: 1 before, 2 now"."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, "(not set)"), now.get(key, "(not set)")
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            if isinstance(old, dict) and key not in now:  # a whole model's
                old = "(set)"
            if isinstance(new, dict) and key not in before:
                new = "(set)"
            found.append(f"{prefix}{key}: {old!r} before, {new!r} now")
    return found


def fingerprint(data: Any) -> str:
    """A short hash, to notice a change: of a file's content; of a folder's file names, sizes and
    times of change; or of any other text (a hub name, say) and of rows as Python values.
    """
    digest = hashlib.sha256()
    path = Path(data).expanduser() if isinstance(data, str | Path) else None
    if path is not None and path.is_file():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    elif path is not None and path.is_dir():
        for file_path in sorted(path.rglob("*")):
            if file_path.is_file():
                stat = file_path.stat()
                entry = (file_path.relative_to(path).as_posix(), stat.st_size, stat.st_mtime_ns)
                digest.update(json.dumps(entry).encode())
    else:
        digest.update(json.dumps(data, default=str, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def ids_fingerprint(sequences: Iterable[Sequence[int]]) -> str:
    """A short hash of token ids (or other whole numbers) in sequences."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.asarray([len(sequence), *sequence], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a model computes, to notice a change: JSON values.

    Returns:
        ``ends``, a short hash of each weight's name, shape, and first and last numbers; ``bits``, a
        short hash of the sum of each weight's bits; ``config``, the settings of its Hugging Face
        config, if it has one.
    """
    ends, bits = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = whole(parameter.detach()).flatten()
        numbers = [*flat[:8].float().tolist(), *flat[-8:].float().tolist()]
        ends.update(json.dumps([name, list(parameter.shape), numbers]).encode())
        bits.update(json.dumps([name, int(sum_of_bits(flat))]).encode())
    model_config: Any = getattr(model, "config", None)
    config = {} if model_config is None else model_config.to_dict()
    return {
        "ends": ends.hexdigest()[:16],
        "bits": bits.hexdigest()[:16],
        "config": {name: value for name, value in config.items() if name not in WITHOUT_MEANING},
    }


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP may have split, whole on each rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
