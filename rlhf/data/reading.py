"""Reading rows: files, folders and hub names, or a slice of one."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from rlhf.data.errors import DataError
from rlhf.data.types import SURROGATE, as_list, describe

if TYPE_CHECKING:  # a second to import; loaded where rows are
    import datasets
    import pandas

_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
Item = TypeVar("Item")

_SLICE = re.compile(r"^(?P<name>.+)\[ *(?P<start>(-?\d+)?) *: *(?P<stop>(-?\d+)?) *\]$")
_SUFFIXES = ", ".join(_KINDS)


def load_rows(
    source: str
    | Path
    | Iterable[dict[str, Any]]
    | datasets.Dataset
    | datasets.DatasetDict
    | pandas.DataFrame,
    *,
    split: str = "train",
) -> datasets.Dataset:
    """Rows from wherever they are.

    Args:
        source: a ``.json`` (a list of objects), ``.jsonl``, ``.csv`` (every cell is text) or
            ``.parquet`` file, each also with ``.gz``; a folder written by
            ``Dataset.save_to_disk``; a data set's name on the Hugging Face Hub; a list of
            dicts; a pandas ``DataFrame`` or a ``DatasetDict``; or a ``Dataset``, which is returned
            as it is. A name given as text may end with a slice of its rows, as in
            ``pairs.jsonl[:2000]``; ``[start:stop]`` is the only form.
        split: which part of a folder, hub data set or ``DatasetDict``; a file is all "train".

    Raises:
        DataError: for a missing, empty or broken source, naming the row where there is one, and
            for a slice without rows.
    """
    return _load(source, split)[0]


def load_as(source: Any, convert: Callable[[Iterable[Any], str, int], list[Item]]) -> list[Item]:
    """Rows of anything ``load_rows`` reads, made into items by ``to_demonstrations`` and the like.

    Errors name the file, and its row also where the source is a slice.

    Raises:
        DataError: naming source and row.
    """
    rows, first_row = _load(source, "train")
    return convert(rows, source_name(source), first_row)


def source_name(source: object) -> str:
    """What errors call a source: its path or name, without a slice, or "data" for rows."""
    return split_slice(source)[0] if isinstance(source, str) else _name(source)


def split_slice(source: str) -> tuple[str, slice]:
    """``"pairs.jsonl[:2000]"`` as ``("pairs.jsonl", slice(None, 2000))``; no brackets, all rows."""
    match = _SLICE.match(source)
    if match is None or Path(source).expanduser().exists():
        return source, slice(None)
    start, stop = (int(match[name]) if match[name] else None for name in ("start", "stop"))
    return match["name"], slice(start, stop)


def _load(source: Any, split: str) -> tuple[datasets.Dataset, int]:
    """The rows, and the number of the first of them in the source, counted from 1."""
    import datasets

    name, part = split_slice(source) if isinstance(source, str) else (source, slice(None))
    if isinstance(name, datasets.DatasetDict):
        name = _choose_split(name, split, "data")
    if isinstance(name, datasets.Dataset):
        rows = name
    elif isinstance(name, str | Path):
        rows = _load_named(name, split)
    elif hasattr(name, "iterrows"):
        rows = _from_frame(name)
    else:
        rows = _from_list(as_list(name, "data"), "data")
    if not len(rows):
        raise DataError(f"{_name(source)}: there are no rows; give at least one.")
    indices = range(*part.indices(len(rows)))
    if not indices:
        raise DataError(f"{source}: the slice holds none of the {len(rows)} rows; change it.")
    return rows if len(indices) == len(rows) else rows.select(indices), indices.start + 1


def _name(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else "data"


def _load_named(source: str | Path, split: str) -> datasets.Dataset:
    import datasets

    if not str(source).strip():
        raise DataError("the name of the data is empty; give a file, a folder or a hub name.")
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, split)
    if path.is_file():
        return _load_file(path, split)
    if isinstance(source, str) and source.endswith("]"):
        raise DataError(
            f"{source}: there is no such file, and this is no slice that is understood; write "
            "[start:stop], where either may be left out."
        )
    if isinstance(source, Path) or _looks_like_path(source):
        raise DataError(f"{source}: there is no such file or folder; check the path.")
    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the hub client raises many unrelated kinds
        raise DataError(
            f"{source}: no such file or folder here, and loading it from the Hugging Face Hub "
            f"failed: {error}"
        ) from error


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~", "/"))
        or "\\" in name
        or name.count("/") > 1
        or _kind(Path(name)) is not None
    )


def is_zipped(path: Path) -> bool:
    """Whether a file is packed by gzip, by its name."""
    return path.suffix.lower() == ".gz"


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes[:-1] if is_zipped(path) else path.suffixes
    return _KINDS.get(suffixes[-1].lower()) if suffixes else None


def _load_folder(path: Path, split: str) -> datasets.Dataset:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: the folder was not written by Dataset.save_to_disk; name a data file in it."
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    return _choose_split(loaded, split, str(path))


def _choose_split(splits: datasets.DatasetDict, split: str, source: str) -> datasets.Dataset:
    if split not in splits:
        raise DataError(
            f"{source}: there is no split {split!r}; its splits are {', '.join(splits)}."
        )
    return splits[split]


def _load_file(path: Path, split: str) -> datasets.Dataset:
    import datasets

    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; use {_SUFFIXES}, each also with .gz.")
    try:
        _check_not_empty(path)
        if kind == "json":
            return _load_json(path)
        if kind == "csv":
            return _load_csv(path)
        if kind == "parquet" and is_zipped(path):
            return _load_zipped_parquet(path)
        return datasets.load_dataset(kind, data_files=str(path), split=split)
    except DataError:
        raise
    except Exception as error:  # pyarrow, pandas and datasets each raise their own
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read as {kind}: {cause}") from error


def _open(path: Path) -> IO[bytes]:
    opener: Callable[..., Any] = gzip.open if is_zipped(path) else open
    return opener(path, "rb")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, packed or not, with their line ends.

    Raises:
        DataError: for bytes that are no UTF-8, naming the line.
    """
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front of UTF-8.
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {_undecodable_line(path)}: {error.reason} for UTF-8; save the file as "
            "UTF-8."
        ) from error


def _undecodable_line(path: Path) -> int:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.decode("utf-8", errors="ignore").encode() != line:
                return number
    return 0


def _check_not_empty(path: Path) -> None:
    with _open(path) as file:
        beginning = file.read(1024).strip()
    if beginning in (b"", b"[]", b"{}"):
        raise DataError(f"{path}: the file is empty; give at least one row.")


def _load_csv(path: Path) -> datasets.Dataset:
    import datasets

    # Not left to datasets: it would turn the answers "4" and "None" into a number and a null, and
    # shift the cells of a longer row into wrong columns without a word.
    header, rows = _csv_cells(path)
    if not rows:
        raise DataError(f"{path}: there is a header but no row; give at least one row.")
    # A column without a name is the row numbers that pandas writes beside a table.
    named = [(column, name) for column, name in enumerate(header) if name.strip()]
    if not named:
        raise DataError(f"{path}: no column has a name; give a header.")
    twice = sorted({name for _, name in named if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: several columns are called {', '.join(twice)}; rename or remove all but one."
        )
    return datasets.Dataset.from_dict({name: [row[i] for row in rows] for i, name in named})


def _csv_cells(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a CSV file, all of one width."""
    header: list[str] = []
    rows: list[list[str]] = []
    try:
        for cells in filter(None, csv.reader(read_lines(path), strict=True)):
            if not header:
                header = cells
                continue
            rows.append(cells)
            if len(cells) != len(header):
                raise DataError(
                    f"{len(cells)} cells, but the header has {len(header)}; quote cells that "
                    "hold commas or line breaks."
                ).at(str(path), len(rows))
    except csv.Error as error:
        raise DataError(
            f"not valid CSV: {error}. Look for a missing quote; data with very long cells can be "
            "given as JSON Lines (.jsonl) instead."
        ).at(str(path), len(rows) + 1) from error
    return header, rows


def _load_zipped_parquet(path: Path) -> datasets.Dataset:
    import datasets
    import pyarrow.parquet

    # datasets unpacks the other kinds, but looks for this one's schema in the packed file.
    with _open(path) as file:
        return datasets.Dataset(pyarrow.parquet.read_table(io.BytesIO(file.read())))


def _load_json(path: Path) -> datasets.Dataset:
    # Not left to datasets: it would turn text that looks like a date into one.
    return _from_list(_parse_json(path), str(path))


def _parse_json(path: Path) -> list[Any]:
    """The rows of a file that holds a list, or an object a line."""
    if ".jsonl" not in map(str.lower, path.suffixes):
        try:
            value = json.loads("".join(read_lines(path)))
            return value if isinstance(value, list) else [value]
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # more than one value: lines after all
                raise DataError(f"{path}: not valid JSON: {error}.") from error
    rows: list[Any] = []
    for line in read_lines(path):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line.strip()))
        except json.JSONDecodeError as error:
            raise DataError(
                f"not valid JSON: {error.msg} at column {error.colno}; correct the line."
            ).at(str(path), len(rows) + 1) from error
    return rows


def _from_frame(frame: pandas.DataFrame) -> datasets.Dataset:
    import datasets

    try:
        return datasets.Dataset.from_pandas(frame, preserve_index=False)
    except Exception as error:  # pyarrow raises several kinds
        raise DataError(
            f"data: the DataFrame fits no table: {error}. Give frame.to_dict('records')."
        ) from error


def _from_list(rows: list[Any], source: str) -> datasets.Dataset:
    import datasets

    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"the row is {describe(row)}; give an object.").at(source, number)
    # Dataset.from_list knows the first row's columns only and would drop the others.
    columns = dict.fromkeys(name for row in rows for name in row)
    table = {name: [row.get(name) for row in rows] for name in columns}
    try:
        # A prompt may be text in one row and messages in the next.
        return datasets.Dataset.from_dict(table, on_mixed_types="use_json")
    except Exception as error:  # pyarrow raises several kinds
        for number, row in enumerate(rows, start=1):
            if flaw := _flaw(row):
                raise DataError(f"{flaw}; correct or remove it.").at(source, number) from error
        raise DataError(f"{source}: the rows fit no table: {error}") from error


def _flaw(value: Any) -> str | None:
    """What in a row no table can hold."""
    if isinstance(value, str) and SURROGATE.search(value):
        return f"the text {value[:40]!r} holds half a surrogate pair, which is no character"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"the number {value} has more than 64 bits"
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(_flaw, inner)), None)
