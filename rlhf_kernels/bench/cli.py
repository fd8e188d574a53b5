"""The command: which cases, in what order, and what is written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rlhf_kernels.bench import machine, operations, plots, report
from rlhf_kernels.bench.operation import Grid
from rlhf_kernels.bench.runner import measure, memory_of
from rlhf_kernels.bench.timing import warn_if_busy

# Llama 2, SmolLM2, Llama 3, Qwen 2.5, Gemma 3.
VOCABULARIES = (32_000, 49_152, 128_256, 151_936, 262_144)
GRIDS = {
    # Few processors multiply bfloat16 faster than float32; the products then hide all else.
    "cpu": Grid("cpu", 256, 576, VOCABULARIES, ("float32", "bfloat16"), ("float32",)),
    "cuda": Grid("cuda", 8192, 4096, VOCABULARIES, ("bfloat16", "float32"), ("bfloat16",)),
}
_TURNS, _SECONDS_A_CASE = 15, 2.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, run the cases, write what was found after each."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output}: {error.strerror}")
    torch.manual_seed(0)
    grid = _grid(options)
    about = machine.machine()
    machine.print_machine(about)
    warn_if_busy()
    rows: list[report.Row] = []
    turns = 3 if options.quick else _TURNS
    for name in options.operations:
        operation = operations.load(name)
        cases = list(operation.cases(grid))
        used = memory_of(operation, cases)
        for case in cases:
            result = measure(
                operation, case, turns=turns, seconds=_SECONDS_A_CASE, used=used.get(case.title)
            )
            rows += result.rows
            report.write_csv(options.output / "bench.csv", rows)
            report.write_json(options.output / "bench.json", about, rows)
    try:
        drawn = plots.write_plots(options.output, rows)
        print(f"\nwritten to {options.output}: bench.csv, bench.json, {len(drawn)} plots")
    except ImportError as error:
        print(f"\nwritten to {options.output}: bench.csv, bench.json; no plots: {error}")


def _grid(options: argparse.Namespace) -> Grid:
    grid = GRIDS[options.device]
    if options.quick:
        grid = replace(grid, rows=64, hidden=64, vocabularies=(32_000,), sequences=((8, 128),))
    return replace(
        grid,
        rows=options.rows or grid.rows,
        hidden=options.hidden or grid.hidden,
        vocabularies=tuple(options.vocabularies or grid.vocabularies),
        dtypes=tuple(options.dtypes or grid.dtypes),
        linear_dtypes=tuple(options.dtypes or grid.linear_dtypes),
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_kernels.bench",
        description="Times the operations of rlhf_kernels beside PyTorch and the peers installed.",
    )
    add = parser.add_argument
    names = operations.OPERATIONS
    add("--operations", nargs="+", choices=names, default=names, metavar="NAME")
    add("--device", choices=GRIDS, default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--vocabularies",
        nargs="+",
        type=_positive,
        metavar="V",
        help="default: those of five models",
    )
    add("--rows", type=_positive, metavar="N", help="tokens; default: 256 on a CPU, 8192 on a GPU")
    add("--hidden", type=_positive, metavar="H", help="default: 576 on a CPU, 4096 on a GPU")
    add("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), metavar="DTYPE")
    add("--quick", action="store_true", help="one small vocabulary, three turns")
    add("--output", type=Path, default=Path("runs/bench"), help="folder; default: runs/bench")
    return parser
