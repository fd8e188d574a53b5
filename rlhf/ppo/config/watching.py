"""Settings of what a run shows while it goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class WatchingConfig:
    """What a run shows while it goes on."""

    def check_watching(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
