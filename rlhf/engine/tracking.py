"""Where metrics go: a JSONL file, TensorBoard, the terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf.engine.config import TRACKERS
from rlhf.engine.engine import NonFiniteError
from rlhf.files import write_text

# Shown on the terminal, in this order, when they are among the metrics.
KEY_FIGURES = (
    "loss",
    "eval_loss",
    "accuracy",
    "eval_accuracy",
    "learning_rate",
    "tokens_per_second",
)
SECONDS_BETWEEN_LINES = 10.0


class Tracker(Protocol):
    """One destination."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class Trackers:
    """Sends metrics to every tracker named; a context manager.

    Args:
        names: Any of "jsonl" (``metrics.jsonl``), "tensorboard" (``tb/``), "progress".
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
        unknown = set(names) - set(TRACKERS)
        if unknown:
            raise ValueError(f"unknown trackers {sorted(unknown)}; there are {', '.join(TRACKERS)}")
        folder = Path(output_dir)
        self._trackers: list[Tracker] = []
        if "jsonl" in names:
            self._trackers.append(JsonlTracker(folder / "metrics.jsonl", resumed_at))
        if "tensorboard" in names:
            self._trackers.append(TensorBoardTracker(folder / "tb", resumed_at))
        if "progress" in names:
            console = Console(stderr=True)
            kind = ProgressBar if console.is_terminal else ProgressLines
            self._trackers.append(kind(console, title, total, key_figures))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step.

        Raises:
            NonFiniteError: A metric is NaN or infinite; the message names it.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"metric {name!r} is {value} at step {step}")
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

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
    """One JSON object a line, flushed at once; a new run starts a new file."""

    def __init__(self, path: Path, resumed_at: int | None = None) -> None:
        write_text(path, "" if resumed_at is None else lines_up_to(path, resumed_at))
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: dict[str, float], step: int) -> None:
        record = {"step": step, "time": round(time.time(), 3)}
        record.update({name: float(value) for name, value in metrics.items()})
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def lines_up_to(path: Path, step: int) -> str:
    """The lines of a ``metrics.jsonl`` up to a step, without one that was left half-written."""
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

    def close(self) -> None:
        self._writer.close()


class ProgressBar:
    """A live bar with the key figures, for a terminal."""

    def __init__(
        self, console: Console, title: str, total: int | None, key_figures: Sequence[str]
    ) -> None:
        self._key_figures = key_figures
        self._shown: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._task = self._progress.add_task(title, total=total, figures="")
        self._progress.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._shown.update(metrics)
        figures = describe(self._shown, self._key_figures)
        self._progress.update(self._task, completed=step, figures=figures)

    def close(self) -> None:
        self._progress.stop()


class ProgressLines:
    """A plain line every ten seconds, for logs and pipes; the last figures are always printed."""

    def __init__(
        self, console: Console, title: str, total: int | None, key_figures: Sequence[str]
    ) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._key_figures = key_figures
        self._shown: dict[str, float] = {}
        self._pending: str | None = None
        self._printed_at = -math.inf

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._shown.update(metrics)
        place = f"{step}/{self._total}" if self._total else str(step)
        self._pending = f"{self._title} {place}  {describe(self._shown, self._key_figures)}"
        if time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._print()

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        if self._pending is not None:
            self._console.print(self._pending, markup=False, highlight=False, soft_wrap=True)
            self._printed_at = time.monotonic()
            self._pending = None


def describe(metrics: dict[str, float], names: Sequence[str]) -> str:
    """The named metrics that are there, short enough for a line."""
    return "  ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
