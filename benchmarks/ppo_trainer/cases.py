"""Which runs are compared, and what is required of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import get_args

from benchmarks.ppo_trainer.inputs import ROOT, trl_python
from benchmarks.ppo_trainer.work import Device, Number, Report, Work
from benchmarks.targets import Target

TRL, OURS, FLOOR = "trl", "ours", "floor"
PROGRAMS = {TRL: "trl_side", OURS: "our_side", FLOOR: "floor"}


@dataclass(frozen=True)
class Run:
    """A side and what it is to do; runs that cases have in common are equal and made once."""

    side: str
    work: Work

    @property
    def name(self) -> str:
        work = self.work
        optimizer = f", {work.optimizer}" if self.side == OURS else ""
        parts = f", {work.batch // work.micro_batch} micro-batches" if self.side == TRL else ""
        return f"{self.side}, {work.critic} critic{optimizer}{parts}"

    def start(self) -> Report:
        """Do it in a process of its own.

        Raises:
            RuntimeError: It failed; the message has the end of what it printed.
        """
        python = str(trl_python()) if self.side == TRL else sys.executable
        program = f"benchmarks.ppo_trainer.{PROGRAMS[self.side]}"
        ended = subprocess.run(
            [python, "-m", program, json.dumps(asdict(self.work))],
            cwd=ROOT,
            env=environment(self.work),
            capture_output=True,
            text=True,
        )
        if ended.returncode:
            raise RuntimeError(f"{self.name} failed:\n{ended.stderr[-3000:]}")
        report = Report(**json.loads(ended.stdout.splitlines()[-1]))
        self._check(report)
        return report

    def _check(self, report: Report) -> None:
        """The work must be the same on all sides, or its figures mean nothing."""
        steps = 0 if self.side == FLOOR else self.work.epochs
        if report.lengths != self.work.lengths or report.optimizer_steps != steps:
            raise RuntimeError(
                f"{self.name} did other work than was asked: {report.optimizer_steps} optimizer "
                f"steps instead of {steps}, or responses of {report.lengths} tokens instead of "
                f"{self.work.lengths}"
            )


def environment(work: Work) -> dict[str, str]:
    """Of a run's process: this project first, no hub, and no GPU where it is not to use one."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if work.device == "cpu" else {}
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **hidden}


@dataclass(frozen=True)
class Case:
    """TRL's runs, ours, and the floor under them.

    trl: The same training in micro-batches of different sizes: the fastest one is compared. faster:
    How many times as long as ours its update must take. memory: Ours over its peak, at the most;
    None where nothing is required of it.
    """

    name: str
    trl: tuple[Run, ...]
    ours: Run
    floor: Run
    faster: float
    memory: float | None = None

    @property
    def runs(self) -> list[Run]:
        return [*self.trl, self.ours, self.floor]

    def targets(self, reports: Mapping[Run, list[Report]]) -> list[Target]:
        theirs = min((reports[run] for run in self.trl), key=median_seconds)
        ours = reports[self.ours]
        what = f"{self.name}: {self.ours.name}"
        ratio = seconds_ratio(theirs, ours)
        found = [Target(f"{what}: seconds, TRL / ours", ratio, self.faster)]
        if self.memory is not None:
            used = peak_mib(ours) / peak_mib(theirs)
            found.append(Target(f"{what}: memory, ours / TRL", used, self.memory, at_most=True))
        return found


def cases(models: str, updates: int, device: Device = "cpu") -> dict[str, Case]:
    """All of them, by name."""
    found = {}
    for dtype in get_args(Number):
        work = Work(models, dtype=dtype, weights=dtype, updates=updates, device=device)
        if device == "cuda":  # more, to be worth a GPU's while
            work = replace(work, batch=64, micro_batch=64, prompt=128, response=128)
        shared, varied = replace(work, critic="shared"), replace(work, varied=True)
        trl, floor = _trl(work), Run(FLOOR, work)
        for case in (
            Case(f"separate-{dtype}", trl, _ours(work), floor, 1.4, memory=0.7),
            Case(f"shared-{dtype}", trl, _ours(shared), Run(FLOOR, shared), 2.0),
            Case(f"varied-{dtype}", _trl(varied), _ours(varied), Run(FLOOR, varied), 1.8),
        ):
            found[case.name] = case
    return found


def _trl(work: Work) -> tuple[Run, ...]:
    """The batch at once, as ours has it, and in two halves, which TRL does faster in float32."""
    return Run(TRL, work), Run(TRL, replace(work, micro_batch=work.batch // 2))


def _ours(work: Work) -> Run:
    """In bfloat16 with the optimizer that has no float32 beside it, as TRL's has none."""
    return Run(OURS, replace(work, optimizer="adamw_8bit" if work.dtype == "bfloat16" else "adamw"))


def median_seconds(reports: Sequence[Report]) -> float:
    """Of an update, over all turns."""
    return statistics.median(second for report in reports for second in report.seconds)


def seconds_ratio(slow: Sequence[Report], fast: Sequence[Report]) -> float:
    """How many times longer an update takes, turn by turn, in the median."""
    pairs = zip(slow, fast)
    return statistics.median(median_seconds([a]) / median_seconds([b]) for a, b in pairs)


def peak_mib(reports: Sequence[Report]) -> float:
    return statistics.median(report.peak_mib for report in reports)
