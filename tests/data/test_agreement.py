"""agreement_stats, against figures worked out elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlhf.data import DataError, agreement_stats, load_rows


def test_pandalm_figures(shared_dir: Path) -> None:
    rows = load_rows(shared_dir / "data" / "pandalm-testset-v1.json")
    stats = agreement_stats([[row[f"annotator{i}"] for i in (1, 2, 3)] for row in rows])
    # Half a unit of the last digit that the published figures give.
    expected = {(0, 1): (0.852, 0.913), (0, 2): (0.879, 0.929), (1, 2): (0.862, 0.918)}
    for pair, (kappa, agreement) in expected.items():
        assert stats.cohen_kappa[pair] == pytest.approx(kappa, abs=5e-4)
        assert stats.pairwise_agreement[pair] == pytest.approx(agreement, abs=5e-4)
    assert stats.fleiss_kappa == pytest.approx(0.8642, abs=5e-5)
    assert stats.krippendorff_alpha == pytest.approx(0.8642, abs=5e-5)
    assert (stats.items, stats.annotators) == (999, 3)
    assert sum(stats.label_counts.values()) == 3 * 999


def test_two_annotators_by_hand() -> None:
    # 50 items: both A 20, both B 15, A then B 5, B then A 10 (the textbook case of Cohen's kappa).
    rows = [["A", "A"]] * 20 + [["B", "B"]] * 15 + [["A", "B"]] * 5 + [["B", "A"]] * 10
    stats = agreement_stats(rows)
    assert stats.unanimous_rate == stats.mean_pairwise_agreement == pytest.approx(0.7)
    assert stats.cohen_kappa[0, 1] == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    # Fleiss and Krippendorff pool the labels: 55 A and 45 B of 100.
    chance = 0.55**2 + 0.45**2
    assert stats.fleiss_kappa == pytest.approx((0.7 - chance) / (1 - chance))
    disagreement = 2 * 55 * 45 / (100 * 99)
    assert stats.krippendorff_alpha == pytest.approx(1 - 0.3 / disagreement)
    assert stats.label_counts == {"A": 55, "B": 45}


def test_labels_of_any_kind_count_the_same() -> None:
    letters = [["A", "B", "tie"], ["A", "A", "A"], ["B", "B", "tie"]]
    mixed = [[{"A": 1, "B": "B", "tie": (0,)}[label] for label in row] for row in letters]
    one, other = agreement_stats(letters), agreement_stats(mixed)
    assert one.cohen_kappa == other.cohen_kappa
    assert one.fleiss_kappa == other.fleiss_kappa
    assert one.unanimous_rate == pytest.approx(1 / 3)
    assert one.pairwise_agreement == {(0, 1): 2 / 3, (0, 2): 1 / 3, (1, 2): 1 / 3}
    assert one.mean_pairwise_agreement == pytest.approx(4 / 9)


def test_tables_are_read_row_by_row() -> None:
    rows = [["A", "B"], ["A", "A"], ["B", "B"]]
    frame = pd.DataFrame(rows, columns=["first annotator", "second"])
    for table in (frame, np.array(rows), [np.array(row) for row in rows]):
        assert agreement_stats(table) == agreement_stats(rows)


@pytest.mark.filterwarnings("error")
def test_one_label_leaves_kappa_undefined() -> None:
    stats = agreement_stats([["A", "A"], ["A", "A"]])
    assert stats.unanimous_rate == 1.0
    assert stats.cohen_kappa == {(0, 1): None}
    assert stats.fleiss_kappa is None and stats.krippendorff_alpha is None
    assert "undefined" in str(stats)
    some = agreement_stats([["A", "A", "B"], ["A", "A", "A"]])
    assert some.cohen_kappa[0, 1] is None and some.cohen_kappa[0, 2] == 0.0


def test_it_prints_as_a_table() -> None:
    text = str(agreement_stats([["A", "A", "B"], ["B", "B", "B"]]))
    assert "2 items, 3 annotators; labels A: 2, B: 4" in text
    assert "annotators 1 and 2  1.000   Cohen's kappa 1.000" in text


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([], "holds no items"),
        ([["A"], ["B"]], "has 1 annotator"),
        ([[], []], "has 0 annotator"),
        ([["A", "B"], ["A"]], "row 2: 1 labels, but the first row has 2"),
        ([["A", "B"], ["A", None]], "row 2: a label is missing"),
        ([["A", "B"], ["A", float("nan")]], r"row 2: a label is missing \(nan\)"),
        (np.array([[1.0, 1.0], [np.nan, 1.0]]), "row 2: a label is missing"),
        (pd.DataFrame({"a": ["A", "B"], "b": ["A", np.nan]}), "row 2: a label is missing"),
        ([["A", pd.NA], ["A", "A"]], "row 1: a label is missing"),
        ([["A", pd.NaT], ["A", "A"]], "row 1: a label is missing"),
        ([["A", " "], ["A", "A"]], "row 1: a label is missing"),
        ([["A", "A"], ["A", ["B"]]], r"row 2: the label \['B'\] is a list; .*hashable"),
        ([["A", "A"], ["A", (["B"],)]], "row 2: the label .*hashable"),
        (["AB", "AA"], "row 1: the row is text; give a list of labels"),
        ([{"a": "A", "b": "B"}], "row 1: the row is an object; give a list of labels"),
        (pd.Series(["AB", "AA"]), "row 1: the row is text; give a list of labels"),
        ({"a": ["A"], "b": ["B"]}, "annotations is an object; give a list"),
        (None, "annotations is null; give a list"),
    ],
)
def test_bad_annotations(annotations: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        agreement_stats(annotations)
