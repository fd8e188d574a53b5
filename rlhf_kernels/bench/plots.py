"""Bars of the rate that was reached at each size; needs matplotlib."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_kernels.bench.report import Row

_Rates = dict[str, dict[str, float]]


def unavailable_reason() -> str | None:
    """Why nothing can be drawn, with what to install; None: it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed (pip install matplotlib)"
    try:
        importlib.import_module("matplotlib.figure")
    except Exception as error:  # whatever an installation lacks, hours of measuring are worth more
        return f"matplotlib cannot be imported ({error}; pip install --force-reinstall matplotlib)"
    return None


def write_plots(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """A PNG for each operation, direction and dtype that was timed."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.median_ms is not None:
            groups.setdefault((row.operation, row.direction, row.dtype), []).append(row)
    written = []
    for (operation, direction, dtype), group in groups.items():
        figure = _figure(group, f"{operation}, {direction}, {dtype}")
        path = folder / f"{operation}-{direction.replace('+', '-')}-{dtype}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _figure(group: Sequence[Row], title: str) -> Any:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sizes = list(dict.fromkeys(map(_size, group)))
    series = _series(group)
    width = 0.8 / len(series)
    for place, (name, rates) in enumerate(series.items()):
        shift = (place - (len(series) - 1) / 2) * width
        at = [index + shift for index, size in enumerate(sizes) if size in rates]
        heights = [rates[size] for size in sizes if size in rates]
        color = "0.8" if name == "floor" else colormaps["tab20"](place % 20)
        axes.bar(at, heights, width, label=name, color=color)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_xlabel("sequences × positions" if group[0].V is None else "vocabulary")
    axes.set_ylabel("TFLOP/s" if group[0].tflop_per_s else "GB/s")
    axes.set_title(title)
    axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def _size(row: Row) -> str:
    return f"{row.B} × {row.T}" if row.V is None else f"{row.V:,}"


def _series(group: Sequence[Row]) -> _Rates:
    """By variant, the rate at each size; the fastest floor alone, where it has a rate."""
    floors = {row.floor for row in group}
    found: _Rates = {"floor": {}}
    for row in group:
        rate = row.tflop_per_s or row.gb_per_s
        if rate is None:
            continue
        if row.variant == row.floor:
            found["floor"][_size(row)] = rate
        elif row.variant not in floors and not row.variant.startswith("one read"):
            found.setdefault(row.variant, {})[_size(row)] = rate
    return {name: rates for name, rates in found.items() if rates}
