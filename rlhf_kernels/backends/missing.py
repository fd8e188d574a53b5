"""Why a compiled extension is not there."""

from __future__ import annotations

import importlib


def why_missing(extension: str, error: ImportError) -> str:
    """What the build noted for ``_cpu`` or ``_cuda``, or else what importing it raised."""
    name = f"rlhf_kernels.{extension}"
    try:
        notes = importlib.import_module("rlhf_kernels._build_info")
    except ImportError:
        return f"{name} is not built (run `pip install -e .` in the checkout): {error}"
    noted: str | None = getattr(notes, f"{extension.removeprefix('_').upper()}_MISSING", None)
    return noted or f"{name} cannot be loaded: {error}"
