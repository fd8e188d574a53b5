"""Writing results so that a folder never looks finished when it is not."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rlhf.files import PARTIAL, OutputError, write_json

STAGE_MARKER = "stage.json"  # see rlhf.stages
EARLIER_CONFIG = "config.json.earlier"


def ensure_writable(folder: str | Path) -> Path:
    """Create the folder and check that a file can be written there: call it before training.

    Raises:
        OutputError: It cannot; the message names the folder and the reason.
    """
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write to the output folder {path}: {reason}. "
            "Choose another output_dir or change its permissions."
        ) from error
    return path


def save_model(
    model: Any, tokenizer: Any, folder: str | Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a Hugging Face folder: weights as safetensors, config and tokenizer.

    The weights are the model's own, or those given (``Engine.whole_weights``).

    Everything is written under ``folder/.partial`` first (inside, so that it is the same file
    system), then moved into place file by file. ``config.json`` is taken away first and comes back
    last: a folder that has it is complete, and an interrupted save never leaves new weights under
    an old config. Other files in the folder, such as logs, stay.

    Raises:
        OutputError: The folder cannot be written to, or the disk is full.
    """
    target = ensure_writable(folder)
    partial = target / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # the latter where a disk is full
            raise OutputError(f"cannot save the model to {target}: {error}") from error
        raise
    _move_into_place(partial, target)


def _move_into_place(partial: Path, target: Path) -> None:
    mark_unfinished(target)
    for stale in [*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json")]:
        stale.unlink()
    names = sorted(path.name for path in partial.iterdir())
    for name in sorted(names, key=lambda name: name == "config.json"):
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        os.replace(partial / name, target / name)
    (target / EARLIER_CONFIG).unlink(missing_ok=True)
    partial.rmdir()


def begin_training(config: Any, *folders: Path) -> None:
    """Take over ``config.output_dir`` for a new training and write its config there.

    A model of an earlier one is no longer a finished one, so that nobody takes it for this
    training's if this one ends early: its ``config.json`` becomes ``config.json.earlier``, which
    whoever wants it back renames.

    Args:
        config: Of the training.
        folders: Others that it writes models to.
    """
    output = Path(config.output_dir)
    for folder in (output, *folders):
        mark_unfinished(folder)
    save_config(config, output)


def mark_unfinished(folder: Path) -> None:
    """Set the config of a model aside, and drop a pipeline's word that its stage is done."""
    (folder / STAGE_MARKER).unlink(missing_ok=True)
    if (folder / "config.json").exists():
        os.replace(folder / "config.json", folder / EARLIER_CONFIG)


def save_config(config: Any, folder: str | Path) -> None:
    """Write a config dataclass as ``training_config.json``, for people to read."""
    write_json(Path(folder) / "training_config.json", dataclasses.asdict(config))
