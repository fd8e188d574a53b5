"""Checkpoints: all that a training needs to go on as if it had not stopped.

Weights and optimizer states go through ``torch.distributed.checkpoint`` into safetensors, each rank
writing what it holds; everything else is ``state.json``. A checkpoint is written beside its place
and renamed when it is whole, so one that is there can be loaded.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from rlhf.engine.engine import Engine
from rlhf.engine.randomness import random_state, set_random_state
from rlhf.engine.world import World
from rlhf.files import PARTIAL, OutputError, write_json

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE = "state.json"
PREFIX = "step-"
DISCARDED = ".discarded-"
EARLIER = ".earlier"
WRITTEN = {"engines", "metric", "random", "state"}  # what every state.json has
# safetensors builds a file in memory before it writes it, so files are kept small.
BYTES_PER_FILE = 1 << 30


class CheckpointError(ValueError):
    """A checkpoint is not there, cannot be read, or belongs to another training."""


class Checkpoints:
    """The checkpoints of one training, in ``output_dir/checkpoints``.

    Every rank calls ``save`` and ``load``; the main rank does what is done once.

    Args:
        output_dir: The training's folder.
        keep: How many of the newest to keep. The one with the largest metric is kept besides.
    """

    def __init__(self, output_dir: str | Path, keep: int) -> None:
        self.folder = Path(output_dir) / FOLDER
        self.keep = keep
        self.world = World()

    def save(
        self,
        step: int,
        engines: Mapping[str, Engine],
        state: Mapping[str, Any],
        metric: float | None = None,
    ) -> Path:
        """Write a checkpoint, then remove those that need not be kept.

        Those of later steps are set aside: see ``set_aside_after``.

        Args:
            step: Its number; a later one of the same number takes its place.
            engines: Whose weights, optimizer states and counters to write, by name.
            state: Everything else; JSON values.
            metric: How good the models are (larger is better); None if unknown.

        Returns:
            The checkpoint's folder.

        Raises:
            OutputError: It cannot be written; earlier ones are untouched.
        """
        target = self.folder / f"{PREFIX}{step:08d}"
        partial = self.folder / f"{PARTIAL}-{target.name}"
        written = {
            "step": step,
            "metric": metric,
            "world_size": self.world.size,
            "engines": {name: engine_state(engine) for name, engine in engines.items()},
            "state": dict(state),
            "random": self.world.gather(random_state()),
        }
        with self._naming_failures(target, partial):
            self._on_main(lambda: self._begin(partial))
            for name, engine in engines.items():
                save_tensors(engine_tensors(engine), partial / name)
            self.set_aside_after(step)
            self._on_main(lambda: self._finish(partial, target, written))
        return target

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps, since training goes on from this one.

        They are of a branch that is left: as the newest they would be resumed by mistake. They are
        no longer listed, but a resume that names one still finds it.
        """
        self._on_main(lambda: self._set_aside_after(step))

    def list(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        return checkpoints_in(self.folder)

    def find(self, name: str | Path | None) -> Path:
        """A checkpoint's folder: the newest one for None or "latest", else the one named.

        Raises:
            CheckpointError: There is none.
        """
        if name is None or str(name) == "latest":
            found = self.list()
            if not found:
                raise CheckpointError(
                    f"there is no checkpoint in {self.folder}, so nothing to resume. Set "
                    "save_every to have some written, and start without resume."
                )
            return found[-1]
        folder = Path(name).expanduser()
        if not (folder / STATE).is_file():
            raise CheckpointError(
                f"{folder} is no checkpoint: it has no {STATE}. Name one of those in "
                f"{self.folder}, or none for the newest."
            )
        return folder

    def read(self, folder: Path) -> dict[str, Any]:
        """A checkpoint's ``state.json``: see ``save``.

        Raises:
            CheckpointError: It is damaged.
        """
        try:
            written = json.loads((folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(folder, f"{folder / STATE} cannot be read: {error}") from error
        if not isinstance(written, dict) or (lacking := WRITTEN - written.keys()):
            what = ", ".join(sorted(lacking)) if isinstance(written, dict) else "everything"
            raise self._damaged(folder, f"{folder / STATE} lacks {what}")
        return written

    def load(self, folder: Path, engines: Mapping[str, Engine]) -> None:
        """Put weights, optimizer states, counters and random states back, at any world size.

        Raises:
            CheckpointError: It is damaged, or a model of the checkpoint has other weights than the
                engine's. All files are looked at before the first model is changed.
        """
        written = self.read(folder)
        if missing := engines.keys() - written["engines"].keys():
            raise CheckpointError(
                f"{folder} has no {min(missing)}: it is of a training without one. Go back to that "
                "training's settings and models."
            )
        for name, size in written.get("files", {}).items():  # none in those of earlier versions
            if not (folder / name).is_file():
                raise self._damaged(folder, f"{folder / name} is missing")
            if (found := (folder / name).stat().st_size) != size:
                raise self._damaged(folder, f"{folder / name} has {found} bytes instead of {size}")
        try:
            tensors = {name: matching(engine, folder / name) for name, engine in engines.items()}
            for name, engine in engines.items():
                load_tensors(engine, tensors[name], folder / name, written["engines"][name])
        except (OSError, SafetensorError, CheckpointException) as error:
            raise self._damaged(folder, f"{folder} cannot be read: {cause(error)}") from error
        ranks = written["random"]
        if self.world.rank < len(ranks):
            set_random_state(ranks[self.world.rank])

    def _damaged(self, folder: Path, what: str) -> CheckpointError:
        """What is wrong with a checkpoint, and where else the training can go on."""
        older = [other for other in checkpoints_in(folder.parent) if other.name < folder.name]
        advice = "There is none before it: delete it and start anew."
        if older:
            advice = (
                f"Name the one before it, {older[-1]}, or delete this one; then resume (in Python, "
                "with a new trainer: parts of this one may be loaded)."
            )
        return CheckpointError(f"the checkpoint is damaged: {what}. {advice}")

    def _on_main(self, action: Callable[[], None]) -> None:
        """Have the main rank do something; if it fails, it fails on every rank."""
        failure = None
        if self.world.is_main:
            try:
                action()
            except OSError as error:
                failure = error
        failure = self.world.broadcast(failure)
        if failure is not None:
            raise failure

    def _begin(self, partial: Path) -> None:
        """Make the folder to write to, and remove what an interrupted save or removal left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for pattern in (f"{PARTIAL}-*", f"{DISCARDED}*"):
            for leftover in self.folder.glob(pattern):
                shutil.rmtree(leftover)
        partial.mkdir()

    def _set_aside_after(self, step: int) -> None:
        for folder in self.list():
            if folder.name > f"{PREFIX}{step:08d}":
                aside = set_aside(folder)
                logger.warning(
                    "%s is of a later step than %d, where training goes on: it is now %s. Delete "
                    "that to make room.",
                    *(folder, step, aside.name),
                )

    def _finish(self, partial: Path, target: Path, written: dict[str, Any]) -> None:
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        written["files"] = {
            path.relative_to(partial).as_posix(): path.stat().st_size for path in files
        }
        write_json(partial / STATE, written)
        put_in_place(partial, target)
        found = self.list()
        rated = [(self._metric(folder), folder) for folder in found]
        known = [(metric, folder) for metric, folder in rated if metric is not None]
        keep = {*found[-self.keep :], *([max(known)[1]] if known else [])}
        for folder in set(found) - keep:
            discard(folder)

    def _metric(self, folder: Path) -> float | None:
        """How good a checkpoint is; a damaged one is nothing that a save should fail of."""
        try:
            return self.read(folder)["metric"]
        except CheckpointError:
            return None

    @contextmanager
    def _naming_failures(self, target: Path, partial: Path) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError | SafetensorError | CheckpointException):
                raise OutputError(
                    f"cannot write the checkpoint {target}: {cause(error)}. Earlier checkpoints "
                    "are untouched. Make room, or change keep_checkpoints or output_dir."
                ) from error
            raise


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"{PREFIX}{'[0-9]' * 8}/{STATE}"))


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a whole checkpoint, once the disk has it."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    if target.exists():
        discard(target)
    os.rename(partial, target)
    sync(target.parent)


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it is kept and not listed; its new place."""
    places = (folder.with_name(f"{folder.name}{EARLIER}-{number}") for number in count(1))
    aside = next(place for place in places if not place.exists())
    os.rename(folder, aside)
    return aside


def discard(folder: Path) -> None:
    """Remove a checkpoint; an interrupted removal leaves none that looks whole."""
    away = folder.with_name(DISCARDED + folder.name)
    os.rename(folder, away)
    shutil.rmtree(away)


def sync(path: Path) -> None:
    """Have the disk write a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cause(error: BaseException) -> str:
    """Why a save failed, in a line: of several ranks' failures the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def engine_state(engine: Engine) -> dict[str, Any]:
    """An engine's counters."""
    return {"steps_done": engine.steps_done, "skipped_in_a_row": engine.skipped_in_a_row}


def engine_tensors(engine: Engine) -> dict[str, Tensor]:
    """What an engine's optimizer reads and writes, by name; under FSDP this rank's shards."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in engine.named_parameters.items():
        tensors[f"weights.{name}"] = parameter.detach()
        for key, value in engine.optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors as safetensors files into a new folder; DTensors as their shards."""
    number, filled, files = 1, 0, {}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > BYTES_PER_FILE:
            number, filled = number + 1, 0
        files[name] = number
        filled += size
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=files, save_distributed=True
    )
    with ignoring_single_process():
        dcp.save(tensors, storage_writer=writer)


def matching(engine: Engine, folder: Path) -> dict[str, Tensor]:
    """``engine_tensors`` to be filled from a folder, which must hold the same ones."""
    metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    saved = {name: tuple(tensor.size) for name, tensor in metadata.items()}  # type: ignore[union-attr]
    if any(name.startswith("optimizer.") for name in saved):
        create_optimizer_state(engine)
    tensors = engine_tensors(engine)
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if saved != own:
        name = min(n for n in saved.keys() | own.keys() if saved.get(n) != own.get(n))
        if name in saved and name in own:
            what = f"has the shape {saved[name]} in the checkpoint and {own[name]} in the model"
        else:
            what = f"is only in {'the checkpoint' if name in saved else 'the model'}"
        raise CheckpointError(
            f"{folder} belongs to another model: {name} {what}. Give the models that this "
            "training began with."
        )
    return tensors


def load_tensors(
    engine: Engine, tensors: dict[str, Tensor], folder: Path, counters: Mapping[str, Any]
) -> None:
    """Fill an engine, by its ``matching`` tensors, with what ``save_tensors`` wrote."""
    with ignoring_single_process():
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    if engine.masters is not None:
        engine.masters.write_back()
    engine.steps_done = counters["steps_done"]
    engine.skipped_in_a_row = counters["skipped_in_a_row"]


def create_optimizer_state(engine: Engine) -> None:
    """Have the optimizer make its state, as its first step does, by one that changes nothing."""
    for parameter in engine.parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.optimizer.step()
    engine.optimizer.zero_grad()


@contextmanager
def ignoring_single_process() -> Iterator[None]:
    """Without torch.distributed's note that a single process saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        yield
