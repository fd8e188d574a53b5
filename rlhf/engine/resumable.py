"""What every trainer has around its loop: checkpoints, signals, and going on after them."""

from __future__ import annotations

import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from rlhf.engine.checkpoint import CheckpointError, Checkpoints
from rlhf.engine.engine import Engine, SkippedStepsError
from rlhf.engine.interruption import Interrupted, Interruption, StopRequested
from rlhf.engine.resume import check_same, identity
from rlhf.engine.saving import begin_training
from rlhf.engine.world import World
from rlhf.files import OutputError

logger = logging.getLogger(__name__)


class Resumable(ABC):
    """A training that can be stopped and taken up again, with the same result.

    A subclass's constructor sets ``config`` and calls ``_prepare_to_resume`` when its engines and
    data are there; its loop runs inside ``_session`` and calls ``_after_step`` after each step.
    """

    config: Any
    # Errors that spoil nothing, so that a checkpoint is as good as one at a signal. Every rank must
    # raise them together.
    harmless_errors: ClassVar[tuple[type[Exception], ...]] = (SkippedStepsError,)

    @property
    @abstractmethod
    def step(self) -> int:
        """Steps done so far: what checkpoints are numbered by."""

    @property
    def metric(self) -> float | None:
        """How good the models of the present step are (larger is better); None if unknown."""
        return None

    @property
    @abstractmethod
    def engines(self) -> Mapping[str, Engine]:
        """The engines whose state a checkpoint holds, by name."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What else must survive, as JSON values."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up ``state_dict`` again."""

    def _prepare_to_resume(self, **inputs: Any) -> None:
        """Remember what this training is made from, before it changes anything.

        Args:
            inputs: Fingerprints of data and models, by name.
        """
        self.world = World()
        self.checkpoints = Checkpoints(self.config.output_dir, self.config.keep_checkpoints)
        self.resumed_at: int | None = None
        self._interruption = Interruption()
        self._identity = identity(self.config, self.world.size, **inputs)
        self._saved_at: int | None = None
        self._saved_to: Path | None = None

    def resume(self, checkpoint: str | Path | None = None, allow: Sequence[str] = ()) -> Path:
        """Take up the training at a checkpoint; ``train`` then does what is left of it.

        It goes on exactly as if it had not stopped: on one machine bit for bit.

        Checkpoints of later steps are set aside as soon as it goes on.

        Args:
            checkpoint: A checkpoint's folder; None or "latest": the newest of ``output_dir``.
            allow: Names of settings, ``world_size`` or inputs that may differ from those that the
                checkpoint was written with.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: There is none, it is damaged, or it was written by a training that
                differs; the differences are named.
        """
        folder = self.checkpoints.find(checkpoint)
        written = self.checkpoints.read(folder)
        check_same(written["state"]["identity"], self._identity, allow, folder)
        self.checkpoints.load(folder, self.engines)
        self.load_state_dict(written["state"])
        self.resumed_at = self._saved_at = self.step
        self._saved_to = folder
        return folder

    def resume_if_possible(self) -> None:
        """``resume`` at the newest checkpoint, if there is one."""
        if self.checkpoints.list():
            self.resume()

    def save_checkpoint(self, metric: float | None = None) -> Path:
        """Write a checkpoint of the present state to ``output_dir/checkpoints``.

        Args:
            metric: How good the models are, instead of ``self.metric``; the best checkpoint is kept
                besides the newest ones.

        Raises:
            OutputError: It cannot be written; earlier checkpoints are untouched.
        """
        state = {**self.state_dict(), "identity": self._identity}
        metric = self.metric if metric is None else metric
        folder = self.checkpoints.save(self.step, self.engines, state, metric)
        self._saved_at, self._saved_to = self.step, folder
        return folder

    @contextmanager
    def _session(self, *folders: Path) -> Iterator[None]:
        """Around the loop: a signal or a harmless error ends it with a checkpoint and a message.

        Args:
            folders: Folders beside ``output_dir`` that models will be written to.

        Raises:
            CheckpointError: ``output_dir`` has checkpoints and this training was not resumed.
            Interrupted: A signal has come.
        """
        if self.resumed_at is None and (found := self.checkpoints.list()):
            raise CheckpointError(
                f"{self.checkpoints.folder} has checkpoints of an earlier training, the newest "
                f"{found[-1].name}. Go on with it (--resume; in Python, trainer.resume()), choose "
                "another output_dir, or delete that folder."
            )
        self.world.barrier()
        self.checkpoints.set_aside_after(self.step)
        if self.world.is_main:
            begin_training(self.config, *folders)
        try:
            with self._interruption:
                yield
        except StopRequested as stop:
            raise self._interrupted(stop.signal_number) from None
        except self.harmless_errors as error:
            if self.step == 0:
                raise
            raise self._kept(error) from error

    def _after_step(self, *, last: bool) -> None:
        """Between two steps: write a checkpoint if it is time, and stop if a signal has come."""
        every = self.config.save_every
        if every and self.step % every == 0 and not last:
            try:
                self.save_checkpoint()
            except OutputError as error:  # training goes on: more would be lost by stopping
                logger.error("%s The training goes on without this checkpoint.", error)
        if not last:
            self._interruption.check()

    def _interrupted(self, number: int) -> Interrupted:
        name = signal.Signals(number).name
        place = f"{name} at step {self.step}"
        if self.step == 0:
            return Interrupted(f"{place}: nothing was done yet", number)
        return Interrupted(f"{place}: {self._saved()}", number)

    def _kept(self, error: Exception) -> Exception:
        """The same error, which says that what was trained until then is kept."""
        what = f"{error}".removesuffix(".")
        try:
            return type(error)(f"{what}. Step {self.step} is {self._saved()}")
        except OutputError as failure:
            return type(error)(f"{what}. Besides: {failure}")

    def _saved(self) -> str:
        """Have a checkpoint of the present step; where it is and how to go on."""
        if self._saved_at != self.step or self._saved_to not in self.checkpoints.list():
            self.save_checkpoint()
        return (
            f"saved to {self._saved_to}. Run the same command with --resume "
            "to go on (in Python: trainer.resume(), then trainer.train())."
        )
