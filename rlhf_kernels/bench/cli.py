"""The command: which cases, in what order, and what is written."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rlhf_kernels.bench import machine, operations, peers, plots, report
from rlhf_kernels.bench.operation import Grid
from rlhf_kernels.bench.peers import PEERS
from rlhf_kernels.bench.progress import Progress
from rlhf_kernels.bench.runner import measure, memory_of
from rlhf_kernels.bench.sizes import SIZES
from rlhf_kernels.bench.timing import warn_if_busy

_NONE = "none"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, run the cases, write what was found after each."""
    options = _options(arguments)
    torch.manual_seed(0)
    about = machine.machine()
    machine.print_machine(about)
    warn_if_busy()
    no_plots = plots.unavailable_reason()
    if no_plots is not None:
        print(f"no plots: {no_plots}")
    rows = _run(options, about)
    files = ["bench.csv", "bench.json"]
    if no_plots is None:
        files += [path.name for path in plots.write_plots(options.output, rows)]
    print(f"written to {options.output}: {', '.join(files)}")
    if no_plots is not None:
        print(f"no plots: {no_plots}")


def _run(options: argparse.Namespace, about: dict[str, object]) -> list[report.Row]:
    """All cases; the files are written anew after each."""
    size = SIZES[options.device][options.size]
    grid = _grid(options, size.grid)
    chosen = [operations.load(name) for name in dict.fromkeys(options.op)]
    cases = {operation.name: list(operation.cases(grid)) for operation in chosen}
    progress = Progress(sum(map(len, cases.values())))
    rows: list[report.Row] = []
    # In one process for all: its imports and the start of the compiler take seconds each time.
    every = [case for own in cases.values() for case in own]
    used = memory_of(every, rivals=options.peers, tell=progress.tell)
    for operation in chosen:
        for case in cases[operation.name]:
            progress.next_case()
            result = measure(
                operation,
                case,
                turns=size.turns,
                seconds=size.seconds,
                used=used.get(case.title),
                rivals=options.peers,
                place=progress.place,
                tell=progress.tell,
            )
            rows += result.rows
            report.write_csv(options.output / "bench.csv", rows)
            report.write_json(options.output / "bench.json", about, rows)
    print(f"\ndone after {progress.elapsed}")
    return rows


def _grid(options: argparse.Namespace, grid: Grid) -> Grid:
    return replace(
        grid,
        rows=options.rows or grid.rows,
        hidden=options.hidden or grid.hidden,
        vocabularies=tuple(options.vocabularies or grid.vocabularies),
        dtypes=tuple(options.dtypes or grid.dtypes),
        linear_dtypes=tuple(options.dtypes or grid.linear_dtypes),
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed, and refused where they cannot be met; `peers` holds names of peers alone."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    if options.peers is None:
        options.peers = list(PEERS)
    elif _NONE in options.peers:
        if set(options.peers) != {_NONE}:
            parser.error(f"--peers: {_NONE} goes with no other name")
        options.peers = []
    else:
        for name in options.peers:
            why = peers.unavailable_reason(name, options.device)
            if why is not None:
                parser.error(f"--peers {name}: {why}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output}: {error.strerror}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_kernels.bench",
        description="Times the operations of rlhf_kernels beside PyTorch and the peers installed.",
    )
    add = parser.add_argument
    names = operations.OPERATIONS
    add(
        "--op",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"of {', '.join(names)}; default: all",
    )
    add(
        "--peers",
        nargs="+",
        choices=(*PEERS, _NONE),
        metavar="NAME",
        help=f"of {', '.join(PEERS)}, or {_NONE}; default: all that are installed",
    )
    add(
        "--size",
        choices=SIZES["cpu"],
        default="default",
        help="small: a trial; default: one vocabulary, on a GPU two; large: those of five models",
    )
    add("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    sizes = parser.add_argument_group("in place of what --size says")
    sizes.add_argument("--vocabularies", nargs="+", type=_positive, metavar="V")
    sizes.add_argument("--rows", type=_positive, metavar="N", help="tokens")
    sizes.add_argument("--hidden", type=_positive, metavar="H")
    sizes.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), metavar="DTYPE"
    )
    add("--output", type=Path, default=Path("runs/bench"), help="folder; default: runs/bench")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)
