"""What a person sees of a training: a live bar, or plain lines for logs and pipes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Sample = dict[str, Any]

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
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
        )
        self._task = self._progress.add_task(title, total=total, figures="")
        self._progress.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._shown.update(metrics)
        figures = describe(self._shown, self._key_figures)
        self._progress.update(self._task, completed=step, figures=figures)

    def log_samples(self, samples: list[Sample], step: int) -> None:
        self._progress.console.print(sample_table(samples, step))

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
        self._began: tuple[float, int] | None = None  # when the first step was logged, and which

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._shown.update(metrics)
        place = f"{step}/{self._total}" if self._total else str(step)
        figures = describe(self._shown, self._key_figures)
        self._pending = f"{self._title} {place}{self._time_left(step)}  {figures}"
        if time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._print()

    def log_samples(self, samples: list[Sample], step: int) -> None:
        self._print()
        for sample in samples:
            line = "  ".join(f"{name}: {value}" for name, value in sample.items())
            self._console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        """What the steps still to come will take, if they go on as those since the first."""
        now = time.monotonic()
        if self._began is None:
            self._began = now, step
        began, first = self._began
        if not self._total or step == first or step >= self._total:
            return ""
        left = (now - began) / (step - first) * (self._total - step)
        return f"  {timedelta(seconds=round(left))} left"

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        if self._pending is not None:
            self._console.print(self._pending, markup=False, highlight=False, soft_wrap=True)
            self._printed_at = time.monotonic()
            self._pending = None


def describe(metrics: dict[str, float], names: Sequence[str]) -> str:
    """The named metrics that are there, short enough for a line."""
    figures = [f"{name} {metrics[name]:.4g}" for name in names if name in metrics]
    prefix = "seconds/"
    phases = [
        f"{name.removeprefix(prefix)} {value:.1f}s"
        for name, value in metrics.items()
        if name.startswith(prefix)
    ]
    return "  ".join([*figures, *([f"({', '.join(phases)})"] if phases else [])])


def sample_table(samples: list[Sample], step: int) -> Table:
    """Prompts and responses side by side; nothing in them is taken for markup."""
    table = Table(title=f"samples at {step}", show_lines=True)
    for name in samples[0]:
        table.add_column(name, overflow="fold")
    for sample in samples:
        cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in sample.values()]
        table.add_row(*map(Text, cells))
    return table
