"""load_rows: every kind of file, and what is said of broken ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf.data import DataError, load_rows

ROWS = [{"prompt": "one", "completion": "1"}, {"prompt": "two, with é\n", "completion": "None"}]


def write(path: Path, data: str | bytes) -> Path:
    raw = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def as_bytes(kind: str, tmp_path: Path) -> bytes:
    if kind == ".json":
        return json.dumps(ROWS).encode()
    if kind == ".jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    table = datasets.Dataset.from_list(ROWS)
    file = tmp_path / ("made" + kind)
    table.to_csv(file) if kind == ".csv" else table.to_parquet(file)
    return file.read_bytes()


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".parquet"])
def test_files(tmp_path: Path, kind: str, packed: str) -> None:
    path = write(tmp_path / f"rows{kind}{packed}", as_bytes(kind, tmp_path))
    for source in (path, str(path)):
        assert load_rows(source).to_list() == ROWS


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "x.json", '{"prompt":"a"}\n{"prompt":"b"}\n')).to_list() == [
        {"prompt": "a"},
        {"prompt": "b"},
    ]


def test_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", b"\xef\xbb\xbfprompt,completion\na,4\n")
    assert load_rows(path).to_list() == [{"prompt": "a", "completion": "4"}]


def test_saved_folders(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    assert load_rows(tmp_path / "one").to_list() == ROWS
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    assert load_rows(tmp_path / "two", split="test").to_list() == ROWS[1:]
    with pytest.raises(DataError, match="no split 'dev'; the folder has train, test"):
        load_rows(tmp_path / "two", split="dev")
    with pytest.raises(DataError, match=r"not written by Dataset\.save_to_disk"):
        load_rows(tmp_path)


def test_lists_datasets_and_limit() -> None:
    table = load_rows(ROWS)
    assert table.to_list() == ROWS
    assert load_rows(table) is table
    assert load_rows(ROWS, limit=1).to_list() == ROWS[:1]
    assert len(load_rows(table, limit=10)) == 2
    uneven = load_rows([{"prompt": "a"}, {"prompt": "b", "extra": 1}])
    assert uneven.to_list() == [{"prompt": "a", "extra": None}, {"prompt": "b", "extra": 1}]
    with pytest.raises(DataError, match="limit is 0; give at least 1"):
        load_rows(ROWS, limit=0)


def test_hub_names_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        if name == "somebody/missing":
            raise ConnectionError("no network")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("somebody/things", split="test").to_list() == ROWS
    assert asked == [("somebody/things", "test")]
    with pytest.raises(DataError, match=r"somebody/missing: no such file.*no network"):
        load_rows("somebody/missing")


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.csv.gz", "./rows", "../x", "~/rows", "a/b/c", "/rows", "a\\rows"]
)
def test_a_missing_file_is_not_looked_up(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("asked the hub")

    monkeypatch.setattr(datasets, "load_dataset", never)
    with pytest.raises(DataError, match="there is no such file or folder; check the path"):
        load_rows(name)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", "", "x.jsonl: the file is empty"),
        ("x.jsonl.gz", " \n", "x.jsonl.gz: the file is empty"),
        ("x.json", "[]", "x.json: the file is empty"),
        ("x.csv", "", "x.csv: the file is empty"),
        ("x.csv", "prompt,completion\n", "a header but no row"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", r"x.csv, row 2: 3 cells, but the header has 2"),
        ("x.csv", b"a,b\nx,caf\xe9\n", "x.csv: cannot be read as csv: .*utf-8"),
        ("x.jsonl", '{"a":"b"}\n\n{"a":\n', "x.jsonl, row 2: not valid JSON: .*column 6"),
        ("x.jsonl", '{"a":"b"}\n[1]\n', "x.jsonl, row 2: the line is a list; give an object"),
        ("x.json", '[{"a":"b"},', "x.json: not valid JSON: .*line 1 column"),
        ("x.json", '{"a":"b"}\n{"a"\n', "x.json, row 2: not valid JSON"),
        ("x.parquet", "PAR1 nothing", "x.parquet: cannot be read as parquet"),
        ("x.txt", "hello", "unknown kind of file; use .json, .jsonl, .csv, .parquet"),
        ("x.gz", "hello", "unknown kind of file"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / name, data))


def test_a_file_that_only_claims_to_be_packed(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_text('{"a":"b"}\n')
    with pytest.raises(DataError, match=r"x.jsonl.gz: cannot be read as json: Not a gzipped file"):
        load_rows(tmp_path / "x.jsonl.gz")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data: there are no rows"),
        (["text"], "data, row 1: the row is text; give an object"),
        ([{"a": "x"}, {"a": 5}], "data, row 2: a is a value of type int, but text in the rows"),
    ],
)
def test_broken_lists(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(rows)
