"""PreferencePair and PreferenceDataset."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import (
    DataError,
    PreferenceDataset,
    PreferencePair,
    TiedComparison,
    load_rows,
    to_preferences,
)
from rlhf.files import OutputError

USER = {"role": "user", "content": "hello"}


def filled() -> PreferenceDataset:
    dataset = PreferenceDataset()
    dataset.add_comparison("p", "a", "b", "A", judge="me")
    dataset.add_comparison("p", "a", "b", "B", sure=0.5)
    dataset.add_comparison([USER], "a", [{"role": "assistant", "content": "é\n"}], "tie", n=1)
    return dataset


def test_comparisons_become_pairs_and_ties() -> None:
    dataset = filled()
    assert (
        dataset.pairs
        == list(dataset)
        == [
            PreferencePair("p", "a", "b", {"judge": "me"}),
            PreferencePair("p", "b", "a", {"sure": 0.5}),
        ]
    )
    assert len(dataset) == 2 and dataset[1].chosen == "b"
    assert dataset.ties == [
        TiedComparison([USER], "a", [{"role": "assistant", "content": "é\n"}], {"n": 1})
    ]
    assert repr(dataset) == "PreferenceDataset(2 pairs, 1 ties)"


def test_training_format_leaves_ties_out() -> None:
    assert filled().to_training_format() == [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
    ]


def test_saved_and_loaded(tmp_path: Path) -> None:
    dataset, path = filled(), tmp_path / "pairs.jsonl"
    dataset.save(path)
    again = PreferenceDataset.load(path)
    assert (again.pairs, again.ties) == (dataset.pairs, dataset.ties)
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_saved_file_can_be_trained_on(tmp_path: Path) -> None:
    filled().save(tmp_path / "pairs.jsonl")
    with pytest.warns(UserWarning, match="1 ties were left out"):
        pairs = to_preferences(load_rows(tmp_path / "pairs.jsonl"))
    assert pairs == filled().pairs


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.jsonl.GZ"])
def test_saved_and_loaded_packed(tmp_path: Path, name: str) -> None:
    filled().save(tmp_path / name)
    assert gzip.decompress((tmp_path / name).read_bytes()).startswith(b'{"prompt": "p"')
    again = PreferenceDataset.load(tmp_path / name)
    assert (again.pairs, again.ties) == (filled().pairs, filled().ties)


def test_loaded_with_a_byte_order_mark(tmp_path: Path) -> None:
    filled().save(tmp_path / "pairs.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "pairs.jsonl").read_bytes())
    assert PreferenceDataset.load(tmp_path / "x.jsonl").pairs == filled().pairs


@pytest.mark.parametrize("preference", ["a", "", "C", None, 1, "TIE"])
def test_other_preferences_are_refused(preference: Any) -> None:
    dataset = PreferenceDataset()
    with pytest.raises(DataError, match='it must be "A", "B" or "tie"'):
        dataset.add_comparison("p", "a", "b", preference)
    assert len(dataset) == 0 and not dataset.ties


@pytest.mark.parametrize(
    ("comparison", "message"),
    [
        (("p", "same", "same ", "A"), "chosen and rejected are identical"),
        (("p", "", "b", "A"), "response_a is empty"),
        (("p", "", "b", "B"), "response_a is empty"),
        (("p", "a\ud83d", "b", "A"), "response_a holds half a surrogate pair"),
        (("p", "a", "", "tie"), "response_b is empty"),
        (("", "a", "b", "A"), "prompt is empty"),
        (([{"role": "x", "content": "y"}], "a", "b", "A"), "unknown role 'x'"),
    ],
)
def test_bad_comparisons(comparison: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        PreferenceDataset().add_comparison(*comparison)


def test_identical_responses_may_tie() -> None:
    dataset = PreferenceDataset()
    dataset.add_comparison("p", "same", "same", "tie")
    assert len(dataset.ties) == 1


def test_pairs_check_themselves() -> None:
    with pytest.raises(DataError, match="identical"):
        PreferencePair("p", "a", [{"role": "assistant", "content": "a"}])
    with pytest.raises(DataError, match="chosen is empty"):
        PreferencePair("p", " ", "b")
    with pytest.raises(DataError, match="rejected begins with the user's"):
        PreferencePair("p", "a", [USER])


def test_metadata_has_names_of_its_own() -> None:
    with pytest.raises(DataError, match="metadata cannot be called chosen"):
        PreferenceDataset().add_comparison("p", "a", "b", "A", chosen="a")


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    filled().save(path)
    before = path.read_bytes()
    for metadata in ({"x": object()}, {"x": float("nan")}, {"prompt": "p"}, {"x": "\ud83d"}):
        with pytest.raises(DataError, match=r"pairs, row 1: .*metadata"):
            PreferenceDataset([PreferencePair("p", "a", "b", metadata)]).save(path)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    places = {"missing/pairs.jsonl": "No such file", "file/x": "Not a dir", "folder": "Is a dir"}
    for name, reason in places.items():
        with pytest.raises(OutputError, match=f"cannot write .*{name}: {reason}.*choose another"):
            filled().save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 2: not valid JSON"),
        ("[]", "row 2: expected an object with prompt, chosen, rejected"),
        ('{"prompt": "p", "chosen": "a"}', "row 2: expected an object with"),
        (
            '{"prompt": "p", "preference": "tie"}',
            "row 2: expected an object with prompt, response_a",
        ),
        ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "row 2: chosen and rejected are ident"),
    ],
)
def test_broken_files(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message):
        PreferenceDataset.load(path)
    with pytest.raises(DataError, match="there is no such file"):
        PreferenceDataset.load(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="there is no such file"):
        PreferenceDataset.load(tmp_path)
    path.write_bytes(b"\n{\xe9}")
    with pytest.raises(DataError, match=r"pairs.jsonl, line 2: .* for UTF-8"):
        PreferenceDataset.load(path)
    packed = gzip.compress(b"{}")
    for data in (b"{}", packed[:-9], packed[:10] + b"\xff" * 20):
        (tmp_path / "x.gz").write_bytes(data)
        with pytest.raises(DataError, match=r"x.gz: cannot be read: "):
            PreferenceDataset.load(tmp_path / "x.gz")
