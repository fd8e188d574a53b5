"""Reading rows: files, folders and hub names, or a slice of one."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from rlhf.data.errors import DataError
from rlhf.data.types import describe

if TYPE_CHECKING:  # a second to import; loaded where rows are
    import datasets

_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
Item = TypeVar("Item")

_SLICE = re.compile(r"^(?P<name>.+)\[(?P<start>-?\d*):(?P<stop>-?\d*)\]$")
_SUFFIXES = ", ".join(_KINDS)


def load_rows(
    source: str | Path | Sequence[dict[str, Any]] | datasets.Dataset, *, split: str = "train"
) -> datasets.Dataset:
    """Rows from wherever they are.

    Args:
        source: a ``.json`` (a list of objects), ``.jsonl``, ``.csv`` (every cell is text) or
            ``.parquet`` file, each also with ``.gz``; a folder written by
            ``Dataset.save_to_disk``; a data set's name on the Hugging Face Hub; a list of
            dicts; or a ``Dataset``, which is returned as it is. A name given as text may end with
            a slice of its rows, as in ``pairs.jsonl[:2000]``.
        split: which part of a folder or hub data set; a file is all "train".

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
    if isinstance(name, datasets.Dataset):
        rows = name
    elif isinstance(name, str | Path):
        rows = _load_named(name, split)
    else:
        rows = _from_list(list(name), "data")
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

    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, split)
    if path.is_file():
        return _load_file(path, split)
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


def _kind(path: Path) -> str | None:
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
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
    if split not in loaded:
        raise DataError(f"{path}: there is no split {split!r}; the folder has {', '.join(loaded)}.")
    return loaded[split]


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
            return _load_csv(path, split)
        if kind == "parquet" and path.suffix == ".gz":
            return _load_zipped_parquet(path)
        return datasets.load_dataset(kind, data_files=str(path), split=split)
    except DataError:
        raise
    except Exception as error:  # pyarrow, pandas and datasets each raise their own
        cause = error.__cause__ or error
        raise DataError(f"{path}: cannot be read as {kind}: {cause}") from error


def _open(path: Path, mode: str = "rt") -> IO[Any]:
    opener: Callable[..., IO[Any]] = gzip.open if path.suffix == ".gz" else open
    # utf-8-sig: spreadsheets put a byte order mark in front of UTF-8.
    text = {} if "b" in mode else {"encoding": "utf-8-sig", "newline": ""}
    return opener(path, mode, **text)


def _check_not_empty(path: Path) -> None:
    with _open(path, "rb") as file:
        beginning = file.read(1024).strip()
    if beginning in (b"", b"[]", b"{}"):
        raise DataError(f"{path}: the file is empty; give at least one row.")


def _load_csv(path: Path, split: str) -> datasets.Dataset:
    import datasets

    # Left to guess, the reader would turn the answers "4" and "None" into a number and a null.
    features = datasets.Features({name: datasets.Value("string") for name in _csv_header(path)})
    return datasets.load_dataset(
        "csv",
        data_files=str(path),
        split=split,
        features=features,
        keep_default_na=False,
        encoding="utf-8-sig",
    )


def _csv_header(path: Path) -> list[str]:
    """The columns of a CSV file in which every row has as many cells as there are columns.

    The reader would shift the cells of a longer row into wrong columns without a word.
    """
    header: list[str] = []
    number = 0
    with _open(path) as file:
        for cells in csv.reader(file):
            if not cells:
                continue
            if not header:
                header = cells
                continue
            number += 1
            if len(cells) != len(header):
                raise DataError(
                    f"{len(cells)} cells, but the header has {len(header)}; quote cells that "
                    "hold commas or line breaks."
                ).at(str(path), number)
    if not number:
        raise DataError(f"{path}: there is a header but no row; give at least one row.")
    return header


def _load_zipped_parquet(path: Path) -> datasets.Dataset:
    import datasets
    import pyarrow.parquet

    # datasets unpacks the other kinds, but looks for this one's schema in the packed file.
    with _open(path, "rb") as file:
        return datasets.Dataset(pyarrow.parquet.read_table(io.BytesIO(file.read())))


def _load_json(path: Path) -> datasets.Dataset:
    # Not left to datasets: it would turn text that looks like a date into one.
    return _from_list(_parse_json(path), str(path))


def _parse_json(path: Path) -> list[Any]:
    """The rows of a file that holds a list, or an object a line."""
    if ".jsonl" not in path.suffixes:
        with _open(path) as file:
            try:
                value = json.load(file)
                return value if isinstance(value, list) else [value]
            except json.JSONDecodeError as error:
                if error.msg != "Extra data":  # more than one value: lines after all
                    raise DataError(f"{path}: not valid JSON: {error}.") from error
    rows: list[Any] = []
    with _open(path) as file:
        for line in file:
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line.strip()))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"not valid JSON: {error.msg} at column {error.colno}; correct the line."
                ).at(str(path), len(rows) + 1) from error
    return rows


def _from_list(rows: list[dict[str, Any]], source: str) -> datasets.Dataset:
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
        raise DataError(f"{source}: the rows fit no table: {error}") from error
