"""load_rows: every kind of file, and what is said of broken ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from rlhf.data import (
    DataError,
    load_as,
    load_rows,
    source_name,
    split_slice,
    to_demonstrations,
    to_preferences,
    to_prompts,
)

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


def test_csv_as_pandas_writes_it(tmp_path: Path) -> None:
    pd.DataFrame(ROWS, index=[5, 9]).to_csv(tmp_path / "x.csv")
    assert load_rows(tmp_path / "x.csv").to_list() == ROWS


@pytest.mark.parametrize("name", ["x.jsonl.GZ", "x.JSONL", "x.CSV.Gz"])
def test_capital_letters_in_names(tmp_path: Path, name: str) -> None:
    data = as_bytes("." + name.split(".")[1].lower(), tmp_path)
    (tmp_path / name).write_bytes(gzip.compress(data) if name[-1] in "zZ" else data)
    assert load_rows(tmp_path / name).to_list() == ROWS


def test_saved_folders(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    assert load_rows(tmp_path / "one").to_list() == ROWS
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    assert load_rows(tmp_path / "two", split="test").to_list() == ROWS[1:]
    with pytest.raises(DataError, match="no split 'dev'; its splits are train, test"):
        load_rows(tmp_path / "two", split="dev")
    with pytest.raises(DataError, match=r"not written by Dataset\.save_to_disk"):
        load_rows(tmp_path)


def test_lists_and_datasets() -> None:
    table = load_rows(ROWS)
    assert table.to_list() == ROWS
    assert load_rows(table) is table
    assert load_rows(pd.DataFrame(ROWS, index=[5, 9])).to_list() == ROWS
    parts = datasets.DatasetDict(train=table, test=table.select([1]))
    assert load_rows(parts).to_list() == ROWS
    assert load_rows(parts, split="test").to_list() == ROWS[1:]
    uneven = load_rows([{"prompt": "a"}, {"prompt": "b", "extra": 1}])
    assert uneven.to_list() == [{"prompt": "a", "extra": None}, {"prompt": "b", "extra": 1}]


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
def test_a_missing_file_is_not_looked_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)  # whatever stands beside the checkout

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
        ("x.csv", b"a,b\nx,caf\xe9\n", "x.csv, line 2: .* for UTF-8; save the file as UTF-8"),
        ("x.jsonl", b'{"a":"b"}\n{"a":"caf\xe9"}\n', "x.jsonl, line 2: .* for UTF-8"),
        ("x.json.gz", b'[{"a":"b"},\n{"a":"caf\xe9"}]', "x.json.gz, line 2: .* for UTF-8"),
        ("x.csv", "a,b,a\n1,2,3\n", "x.csv: several columns are called a; rename or remove"),
        ("x.csv", ",\n1,2\n", "x.csv: no column has a name"),
        ("x.csv", b"\xef\xbb\xbf", "x.csv: there is a header but no row"),
        ("x.csv", 'a\n1\n"2\n', "x.csv, row 2: not valid CSV: .*missing quote"),
        ("x.csv", f"a\n1\n{'x' * 140_000}\n", r"x.csv, row 2: .*JSON Lines \(.jsonl\)"),
        ("x.jsonl", '{"a":"b"}\n\n{"a":\n', "x.jsonl, row 2: not valid JSON: .*column 6"),
        ("x.jsonl", '{"a":"b"}\n[1]\n', "x.jsonl, row 2: the row is a list; give an object"),
        ("x.json", "5", "x.json, row 1: the row is a value of type int; give an object"),
        ("x.jsonl", '{"a":1}\n{"a":1180591620717411303424}', "x.jsonl, row 2: .*more than 64 bits"),
        ("x.jsonl", '{"a":"b"}\n{"a":["\\ud83d"]}', "x.jsonl, row 2: .*half a surrogate pair"),
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
        ([{"a": "b"}, {"a": "\ud83d"}], "data, row 2: .*half a surrogate pair"),
        (None, "data: the rows are null; give a list"),
        ({"prompt": ["a"]}, "data: the rows are an object; give a list"),
        ("", "the name of the data is empty"),
        (pd.DataFrame({"a": ["b", ["c"]]}), r"data: the DataFrame fits .*to_dict\('records'\)"),
        (datasets.DatasetDict(dev=datasets.Dataset.from_list(ROWS)), "no split 'train'; .* dev"),
    ],
)
def test_broken_lists(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(rows)


@pytest.mark.parametrize("day", ["2024-01-31", "2024-01-31 10:00:00", "2024-01-31T10:00:00Z"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz"])
def test_json_text_that_looks_like_a_date_stays_text(tmp_path: Path, suffix: str, day: str) -> None:
    rows = [{"prompt": day, "messages": [{"role": "user", "content": day}]}] * 2
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    assert load_rows(write(tmp_path / f"x{suffix}", text)).to_list() == rows


def test_a_column_may_hold_text_and_messages(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}, {"prompt": None}]
    assert load_rows(rows).to_list() == rows
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    assert load_rows(path).to_list() == rows


# Slices


def numbered(folder: Path, *replaced: str) -> str:
    """A file of ten preference pairs; ``replaced`` stand for its last rows."""
    lines = [json.dumps({"prompt": "p", "chosen": f"c{n}", "rejected": "r"}) for n in range(10)]
    lines[len(lines) - len(replaced) :] = replaced
    return str(write(folder / "pairs.jsonl", "\n".join(lines)))


def test_slices_of_names(tmp_path: Path) -> None:
    assert split_slice("a.jsonl.gz[:2000]") == ("a.jsonl.gz", slice(None, 2000))
    assert split_slice("a[1].jsonl") == ("a[1].jsonl", slice(None))
    assert split_slice("a[-3:]") == ("a", slice(-3, None))
    assert source_name("a.jsonl[:5]") == source_name(Path("a.jsonl")) == "a.jsonl"
    assert source_name([]) == "data"
    literal = tmp_path / "rows[1:2]"
    datasets.Dataset.from_list(ROWS).save_to_disk(literal)
    assert load_rows(str(literal)).to_list() == ROWS


@pytest.mark.parametrize("part", ["[::2]", "[3]", "[-:2]", "[]"])
def test_other_slices_are_refused(tmp_path: Path, part: str) -> None:
    for name in (numbered(tmp_path), "somebody/things"):
        with pytest.raises(DataError, match=r"no slice that is understood; write \[start:stop\]"):
            load_rows(name + part)


def test_slices_divide_a_file(tmp_path: Path) -> None:
    path = numbered(tmp_path)
    everything = load_rows(path).to_list()
    assert load_rows(path + "[:4]").to_list() == everything[:4]
    assert load_rows(path + "[4:]").to_list() == everything[4:]
    assert load_rows(path + "[-3:-1]").to_list() == everything[-3:-1]
    assert load_rows(path + "[ :3 ]").to_list() == everything[:3]
    with pytest.raises(DataError, match=r"pairs.jsonl\[10:\]: the slice holds none of the 10 rows"):
        load_rows(path + "[10:]")


@pytest.mark.parametrize("part", ["", "[8:]", "[-2:]", "[:]", "[3:10]"])
def test_errors_give_the_row_of_the_file_whatever_the_slice(tmp_path: Path, part: str) -> None:
    path = numbered(tmp_path, '{"prompt": "p", "chosen": "same", "rejected": "same"}')
    with pytest.raises(DataError, match=r"pairs\.jsonl, row 10: chosen and rejected are identical"):
        load_as(path + part, to_preferences)


def test_items_keep_the_row_of_the_file(tmp_path: Path) -> None:
    path = numbered(tmp_path)
    assert [pair.row for pair in load_as(path + "[7:9]", to_preferences)] == [8, 9]
    rows = [{"prompt": "p", "completion": "c"}] * 3
    text = "\n".join(map(json.dumps, rows))
    demos = str(write(tmp_path / "demos.jsonl", text))
    assert [demo.row for demo in load_as(demos + "[1:]", to_demonstrations)] == [2, 3]
    bad = {"prompt": [{"role": "robot", "content": "x"}]}
    good = {"prompt": [{"role": "user", "content": "x"}]}
    prompts = str(write(tmp_path / "q.json", json.dumps([good, good, bad])))
    assert load_as(prompts + "[1:2]", to_prompts) == [good]
    with pytest.raises(
        DataError, match=r"q\.json, row 3: message 1 of prompt has the unknown role"
    ):
        load_as(prompts + "[1:]", to_prompts)
