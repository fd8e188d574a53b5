"""PPOTrainer beside TRL 1.12.0's on the same work: seconds an update and peak memory.

    python -m benchmarks.ppo_trainer [--device cpu|cuda] [--cases NAME ...] [--turns N]
                                     [--updates N] [--quick] [--models FOLDER] [--output PATH]

SmolLM2-135M, 16 prompts of 32 tokens, responses of 32 (on a GPU 64 of 128 and 128), 4 epochs of one
optimizer step each. Ours takes all rows in one micro-batch; TRL in one and in two, of which the
faster counts. Every run is a process of its own; the runs take turns. Prints a table, then met or
NOT MET for each target, and writes benchmarks/results/ppo_trainer.json (on a GPU
ppo_trainer-cuda.json), or PATH. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch

from benchmarks.ppo_trainer.cases import (
    Case,
    Run,
    cases,
    median_seconds,
    peak_mib,
    seconds_ratio,
)
from benchmarks.ppo_trainer.inputs import drawn_models, models, trl_python
from benchmarks.ppo_trainer.work import Device, Report
from benchmarks.targets import RESULTS, print_targets
from rlhf_kernels.bench.machine import machine, print_machine
from rlhf_kernels.bench.report import write_whole
from rlhf_kernels.bench.timing import warn_if_busy

Reports = Mapping[Run, list[Report]]


def take_turns(runs: list[Run], turns: int) -> dict[Run, list[Report]]:
    """Every run once in each turn; each turn begins with another one."""
    reports: dict[Run, list[Report]] = {run: [] for run in runs}
    for turn in range(turns):
        first = turn % len(runs)
        for run in (*runs[first:], *runs[:first]):
            report = run.start()
            reports[run].append(report)
            lengths = "varied lengths" if run.work.varied else "one length"
            print(
                f"turn {turn + 1}: {run.work.dtype}, {lengths}, {run.name}: "
                f"{median_seconds([report]):.2f} s, {report.peak_mib:.0f} MiB",
                flush=True,
            )
    return reports


def rows(case: Case, reports: Reports) -> list[dict[str, object]]:
    """A case's figures, a row for each of its runs."""
    found: list[dict[str, object]] = []
    for run in case.runs:
        of_run = reports[run]
        seconds = sorted(second for report in of_run for second in report.seconds)
        phases = {
            name: statistics.median(report.phases[name] for report in of_run)
            for name in of_run[0].phases
        }
        found.append(
            {
                "case": case.name,
                "variant": run.name,
                "work": {key: value for key, value in asdict(run.work).items() if key != "models"},
                "median_s": median_seconds(of_run),
                "lowest_s": seconds[0],
                "highest_s": seconds[-1],
                "turns": len(of_run),
                "share": seconds_ratio(reports[case.floor], of_run),
                "peak_mib": peak_mib(of_run),
                "phases_s": phases,
            }
        )
    return found


def print_case(case: Case, found: list[dict[str, object]]) -> None:
    print(f"\n{case.name}")
    print(f"  {'variant':<40}{'s/update':>9}{'range':>15}{'floor':>7}{'peak MiB':>10}  phases")
    for row in found:
        phases = row["phases_s"]
        assert isinstance(phases, dict)
        spread = f"{row['lowest_s']:.2f}-{row['highest_s']:.2f}"
        print(
            f"  {row['variant']:<40}{row['median_s']:>9.2f}{spread:>15}{row['share']:>7.0%}"
            f"{row['peak_mib']:>10.0f}  "
            + ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
        )


def main() -> None:
    names = list(cases("", 1))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=get_args(Device), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)}; all unless given")  # fmt: skip
    parser.add_argument("--turns", type=int, default=2, help="processes of each run (2)")
    parser.add_argument("--updates", type=int, default=1, help="timed updates in each (1)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model; JSON only with --output"
    )
    parser.add_argument(
        "--models", type=Path, metavar="FOLDER", help="with `policy`, a model or what makes one"
    )
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    if options.updates < 1 or options.turns < 1:
        parser.error("--updates and --turns must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if options.models and not (options.models / "policy" / "config.json").is_file():
        parser.error(f"--models {options.models}: there is no policy/config.json in it")
    file = "ppo_trainer.json" if options.device == "cpu" else "ppo_trainer-cuda.json"
    output = options.output or (None if options.quick else RESULTS / file)
    about = machine()
    print_machine(about)
    trl_python()
    folder = drawn_models(options.models) if options.models else models(tiny=options.quick)
    warn_if_busy()
    chosen = [
        case
        for name, case in cases(str(folder), options.updates, options.device).items()
        if name in options.cases
    ]
    runs = list(dict.fromkeys(run for case in chosen for run in case.runs))
    reports = take_turns(runs, options.turns)
    table = [rows(case, reports) for case in chosen]
    for case, found in zip(chosen, table):
        print_case(case, found)
    targets = [target for case in chosen for target in case.targets(reports)]
    print_targets(targets)
    if output is not None:
        content = {
            "machine": about,
            "targets": [{**asdict(target), "met": target.met} for target in targets],
            "rows": [row for found in table for row in found],
        }
        write_whole(output, json.dumps(content, indent=2) + "\n")
        print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
