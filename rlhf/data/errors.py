"""The one error of this package."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used as it stands.

    The message names the source and the row (counted from 1), says what is wrong and what to do.
    """

    def at(self, source: str, row: int) -> DataError:
        """The same error with its place in front."""
        return DataError(f"{source}, row {row}: {self}")
