"""Preference pairs and a data set of them that people's comparisons can be added to."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.errors import DataError
from rlhf.data.reading import is_zipped, read_lines
from rlhf.data.types import (
    Message,
    Text,
    check_completion,
    check_prompt,
    completion_messages,
)
from rlhf.files import write_bytes

_PAIR_COLUMNS = ("prompt", "chosen", "rejected")
_TIE_COLUMNS = ("prompt", "response_a", "response_b", "preference")


def _said(completion: Text) -> list[tuple[str, str]]:
    return [(m["role"], m["content"].strip()) for m in completion_messages(completion)]


@dataclass(frozen=True)
class PreferencePair:
    """One prompt and two different completions, the first preferred to the second.

    Attributes:
        prompt: text, or messages that end with the user's turn.
        chosen: text (one assistant turn), or messages from assistant turn to assistant turn.
        rejected: the same for the completion that lost.
        metadata: anything else that is known of the pair (who judged it, when, how surely).
        row: the row of the source it came from, counted from 1; 0 when it came from none.

    Raises:
        DataError: for empty texts, unknown roles, and completions that say the same.
    """

    prompt: Text
    chosen: str | list[Message]
    rejected: str | list[Message]
    metadata: dict[str, Any] = field(default_factory=dict)
    row: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        # An empty turn inside messages is let through: hh-rlhf holds silent assistants.
        check_completion(self.chosen, "chosen", allow_empty=True)
        check_completion(self.rejected, "rejected", allow_empty=True)
        if _said(self.chosen) == _said(self.rejected):
            raise DataError(
                "chosen and rejected are identical, so they hold no preference; remove the row."
            )


@dataclass(frozen=True)
class TiedComparison:
    """A prompt with two responses between which the judge saw no difference."""

    prompt: Text
    response_a: str | list[Message]
    response_b: str | list[Message]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        check_completion(self.response_a, "response_a")
        check_completion(self.response_b, "response_b")


class PreferenceDataset:
    """Preference pairs in order, and the comparisons that ended in a tie beside them.

    Length, iteration and indexing are over the decided pairs; ``ties`` holds the others.
    """

    def __init__(self, pairs: Iterable[PreferencePair] = ()) -> None:
        self.pairs: list[PreferencePair] = list(pairs)
        self.ties: list[TiedComparison] = []

    def add_comparison(
        self,
        prompt: Text,
        response_a: str | list[Message],
        response_b: str | list[Message],
        preference: str,
        **metadata: Any,
    ) -> None:
        """Add one judgement: ``preference`` is "A", "B" or "tie".

        Raises:
            DataError: for any other preference, empty texts, a decision between identical
                responses, and metadata named like a column of the saved file.
        """
        taken = sorted(set(metadata) & {*_PAIR_COLUMNS, *_TIE_COLUMNS})
        if taken:
            raise DataError(f"metadata cannot be called {', '.join(taken)}; choose other names.")
        for name, response in (("response_a", response_a), ("response_b", response_b)):
            check_completion(response, name, allow_empty=True)  # pairs and ties ask for more
        if preference == "tie":
            self.ties.append(TiedComparison(prompt, response_a, response_b, metadata))
        elif preference == "A":
            self.pairs.append(PreferencePair(prompt, response_a, response_b, metadata))
        elif preference == "B":
            self.pairs.append(PreferencePair(prompt, response_b, response_a, metadata))
        else:
            raise DataError(f'the preference is {preference!r}; it must be "A", "B" or "tie".')

    def to_training_format(self) -> list[dict[str, Any]]:
        """One ``{"prompt", "chosen", "rejected"}`` a decided pair.

        Ties say nothing to a pairwise loss and are left out; ``len(dataset.ties)`` counts them.
        """
        return [{name: getattr(pair, name) for name in _PAIR_COLUMNS} for pair in self.pairs]

    def save(self, path: str | Path) -> None:
        """Write JSON Lines: pairs as ``prompt, chosen, rejected``, then ties as ``prompt,
        response_a, response_b, preference``; metadata as further columns. A name that ends in
        ``.gz`` is packed.

        Raises:
            DataError: naming the pair or tie, if metadata is no JSON or text, or is named like
                one of those columns.
            OutputError: if the file cannot be written.
        """
        data = self._lines(self.pairs, _PAIR_COLUMNS, "pairs")
        data += self._lines(self.ties, _TIE_COLUMNS, "ties")
        write_bytes(path, gzip.compress(data, mtime=0) if is_zipped(Path(path)) else data)

    @classmethod
    def _lines(
        cls, items: Sequence[PreferencePair | TiedComparison], columns: tuple[str, ...], name: str
    ) -> bytes:
        lines = []
        for number, item in enumerate(items, start=1):
            try:
                lines.append(cls._line(item, columns))
            except DataError as error:
                raise error.at(name, number) from error
        return b"".join(lines)

    @staticmethod
    def _line(item: PreferencePair | TiedComparison, columns: tuple[str, ...]) -> bytes:
        row = {name: getattr(item, name, "tie") for name in columns}
        taken = sorted(set(item.metadata) & {*_PAIR_COLUMNS, *_TIE_COLUMNS})
        if taken:
            raise DataError(f"metadata cannot be called {', '.join(taken)}; choose other names.")
        try:
            line = json.dumps({**row, **item.metadata}, ensure_ascii=False, allow_nan=False)
            return line.encode() + b"\n"
        except UnicodeEncodeError as error:
            raise DataError(
                f"the metadata {item.metadata!r} holds half a surrogate pair, which is no "
                "character; correct the text."
            ) from error
        except (TypeError, ValueError) as error:
            raise DataError(f"the metadata {item.metadata!r} is no JSON: {error}.") from error

    @classmethod
    def load(cls, path: str | Path) -> PreferenceDataset:
        """Read what ``save`` wrote.

        Raises:
            DataError: for what is no file, is not packed though its name ends in ``.gz`` or is no
                UTF-8, and for broken JSON and rows of another form, with their number.
        """
        dataset = cls()
        file = Path(path).expanduser()
        if not file.is_file():
            raise DataError(f"{path}: there is no such file; check the path.")
        try:
            lines = list(read_lines(file))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read: {error}.") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    dataset._read(line, number)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, row {number}: not valid JSON ({error}).") from error
                except DataError as error:
                    raise error.at(str(path), number) from error
        return dataset

    def _read(self, line: str, number: int) -> None:
        row = json.loads(line)
        columns = _TIE_COLUMNS if isinstance(row, dict) and "preference" in row else _PAIR_COLUMNS
        if not isinstance(row, dict) or not set(columns) <= set(row):
            raise DataError(f"expected an object with {', '.join(columns)}; correct the row.")
        values = [row.pop(name) for name in columns]
        if columns is _PAIR_COLUMNS:
            prompt, chosen, rejected = values
            self.pairs.append(PreferencePair(prompt, chosen, rejected, row, number))
        else:
            self.add_comparison(*values, **row)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[PreferencePair]:
        return iter(self.pairs)

    def __getitem__(self, index: int) -> PreferencePair:
        return self.pairs[index]

    def __repr__(self) -> str:
        return f"PreferenceDataset({len(self.pairs)} pairs, {len(self.ties)} ties)"
