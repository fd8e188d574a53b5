"""The same examples every run."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("integrations", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("integrations")
