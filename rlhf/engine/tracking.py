"""Where metrics go: a JSONL file, TensorBoard, Weights & Biases, the terminal."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console

from rlhf.engine.config import ALL_TRACKERS, WANDB_MISSING
from rlhf.engine.engine import NonFiniteError
from rlhf.engine.progress import KEY_FIGURES, ProgressBar, ProgressLines
from rlhf.files import write_text

logger = logging.getLogger(__name__)

# Metrics that count the steps of an update that were skipped.
SKIPPED = ("skipped_step", "critic_skipped_step")

Sample = dict[str, Any]  # prompt and response as texts, numbers beside them


class Tracker(Protocol):
    """One destination."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def log_samples(self, samples: list[Sample], step: int) -> None: ...
    def close(self) -> None: ...


class Trackers:
    """Sends metrics to every tracker named; a context manager.

    Args:
        names: Any of "jsonl" (``metrics.jsonl``, ``samples.jsonl``), "tensorboard" (``tb/``),
            "wandb" (if it is installed), "progress".
        output_dir: Existing folder for the files.
        total: Steps in all, for the progress bar.
        title: What the terminal calls this training.
        key_figures: Metrics that the terminal shows.
        resumed_at: The step that the training was taken up at: what files say of it so far stays,
            what they say of later steps goes. None: they start anew.
    """

    def __init__(
        self,
        names: Sequence[str],
        output_dir: str | Path,
        total: int | None = None,
        *,
        title: str = "training",
        key_figures: Sequence[str] = KEY_FIGURES,
        resumed_at: int | None = None,
    ) -> None:
        unknown = set(names) - set(ALL_TRACKERS)
        if unknown:
            there_are = ", ".join(ALL_TRACKERS)
            raise ValueError(f"unknown trackers {sorted(unknown)}; there are {there_are}")
        folder = Path(output_dir)
        self._trackers: list[Tracker] = []
        if "wandb" in names:  # first: if it cannot begin, an earlier run's files stay
            self._trackers.append(WandbTracker(folder, title))
        if "jsonl" in names:
            self._trackers.append(JsonlTracker(folder, resumed_at))
        if "tensorboard" in names:
            self._trackers.append(TensorBoardTracker(folder / "tb", resumed_at))
        if "progress" in names:
            console = Console(stderr=True)
            kind = ProgressBar if console.is_terminal else ProgressLines
            self._trackers.append(kind(console, title, total, key_figures))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step.

        What made an optimizer step be skipped shows in metrics of the same batch too: where
        ``metrics`` say that one was, those that are NaN or infinite are left out, with a warning.

        Raises:
            NonFiniteError: A metric is NaN or infinite though no step was skipped, or one of an
                evaluation is; the message names it.
        """
        skipped = any(metrics.get(name) for name in SKIPPED)
        bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        for name, value in bad.items():
            if not skipped or name.startswith("eval_"):
                raise NonFiniteError(
                    f"metric {name!r} is {value} at step {step}, though no optimizer step was "
                    "skipped for it. Look at the data and the models."
                )
        if bad:
            listed = " and ".join(f"{name} ({value})" for name, value in bad.items())
            logger.warning("step %d: %s cannot be logged; a step was skipped", step, listed)
        finite = {name: value for name, value in metrics.items() if name not in bad}
        self._each(lambda tracker: tracker.log(finite, step))

    def log_samples(self, samples: list[Sample], step: int) -> None:
        """Show some prompts with their responses and numbers."""
        self._each(lambda tracker: tracker.log_samples(samples, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        """On every tracker; where a disk is full, a line is lost and not the training."""
        for tracker in self._trackers:
            try:
                action(tracker)
            except OSError as error:
                logger.error("%s cannot write: %s", type(tracker).__name__, error)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class JsonlTracker:
    """One JSON object a line, flushed at once: metrics.jsonl, and samples.jsonl if there are any.

    A new run starts new files; one that is resumed cuts them to where it was.
    """

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        self._samples = folder / "samples.jsonl"
        for path in (folder / "metrics.jsonl", self._samples):
            if resumed_at is not None:
                write_text(path, lines_up_to(path, resumed_at))
            else:
                path.unlink(missing_ok=True)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def log(self, metrics: dict[str, float], step: int) -> None:
        record = {"step": step, "time": round(time.time(), 3)}
        record.update({name: float(value) for name, value in metrics.items()})
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def log_samples(self, samples: list[Sample], step: int) -> None:
        with self._samples.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


def lines_up_to(path: Path, step: int) -> str:
    """The lines of a JSONL file up to a step, without one that was left half-written."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    return "".join(kept)


class TensorBoardTracker:
    """Scalars for TensorBoard; events of an earlier run in the same folder are hidden."""

    def __init__(self, folder: Path, resumed_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        first = 0 if resumed_at is None else resumed_at + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=first)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, samples: list[Sample], step: int) -> None:
        rows = [json.dumps(sample, ensure_ascii=False, indent=2) for sample in samples]
        self._writer.add_text("samples", "\n\n".join(f"```\n{row}\n```" for row in rows), step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases; its environment variables name the project, and may set it offline."""

    def __init__(self, folder: Path, title: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(WANDB_MISSING) from error
        self._wandb: Any = wandb
        # The folder's name as the run's, so that a resumed training goes on with the same one.
        self._run: Any = wandb.init(dir=str(folder), name=f"{title} {folder.name}", resume="allow")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_samples(self, samples: list[Sample], step: int) -> None:
        columns = list(samples[0])
        rows = [[sample[name] for name in columns] for sample in samples]
        self._run.log({"samples": self._wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        self._run.finish()
