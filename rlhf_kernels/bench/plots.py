"""Bars of what was reached at each vocabulary; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_kernels.bench.report import Row


def write_plots(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """A PNG for each operation, direction and dtype that was timed at vocabularies.

    Raises ImportError without matplotlib.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.median_ms is not None and row.V is not None:
            groups.setdefault((row.operation, row.direction, row.dtype), []).append(row)
    written = []
    for (operation, direction, dtype), group in groups.items():
        figure = Figure(figsize=(10, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        vocabularies = sorted({row.V for row in group if row.V is not None})
        series = _series(group)
        width = 0.8 / len(series)
        for place, (name, values) in enumerate(series.items()):
            shift = (place - (len(series) - 1) / 2) * width
            at = [index + shift for index, v in enumerate(vocabularies) if v in values]
            heights = [values[v] for v in vocabularies if v in values]
            color = "0.8" if name == "floor" else colormaps["tab20"](place % 20)
            axes.bar(at, heights, width, label=name, color=color)
        axes.set_xticks(range(len(vocabularies)), [f"{v:,}" for v in vocabularies])
        axes.set_xlabel("vocabulary")
        axes.set_ylabel("TFLOP/s" if group[0].tflop_per_s else "GB/s")
        axes.set_title(f"{operation}, {direction}, {dtype}")
        axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
        path = folder / f"{operation}-{direction.replace('+', '-')}-{dtype}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _series(group: Sequence[Row]) -> dict[str, dict[int, float]]:
    """By variant, the rate at each vocabulary; the fastest floor alone, under one name."""
    found: dict[str, dict[int, float]] = {"floor": {}}
    floors = {row.floor for row in group}
    for row in group:
        rate = row.tflop_per_s or row.gb_per_s
        if rate is None or row.V is None:
            continue
        if row.variant == row.floor:
            found["floor"][row.V] = rate
        elif row.variant not in floors and not row.variant.startswith("one read"):
            found.setdefault(row.variant, {})[row.V] = rate
    return found
