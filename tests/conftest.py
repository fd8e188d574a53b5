"""Fixtures that every test folder uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("RLHF_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and the tiny real model, which lies beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED} (set RLHF_SHARED_DATA to point at it)")
    return SHARED


@pytest.fixture(scope="session")
def stories_dir(shared_dir: Path) -> Path:
    """stories260k: a real 260,032-parameter Llama that writes tiny stories."""
    folder = shared_dir / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no stories260k model at {folder}")
    return folder
