"""How far annotators agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.errors import DataError
from rlhf.data.types import describe

if TYPE_CHECKING:
    import pandas

Label = Hashable


@dataclass(frozen=True)
class AgreementStats:
    """Agreement of several annotators on the same items.

    A kappa or alpha is None where it is undefined: when the annotators concerned used one label
    only, chance alone explains full agreement.

    Attributes:
        items: number of items.
        annotators: number of annotators.
        label_counts: how often each label was given, by all together.
        unanimous_rate: share of items with one label from everybody.
        pairwise_agreement: share of items on which annotators i and j agree, by (i, j).
        mean_pairwise_agreement: mean of those shares.
        cohen_kappa: Cohen's kappa (1960) of annotators i and j, by (i, j).
        fleiss_kappa: Fleiss' kappa (1971).
        krippendorff_alpha: Krippendorff's alpha for nominal data.
    """

    items: int
    annotators: int
    label_counts: dict[Label, int]
    unanimous_rate: float
    pairwise_agreement: dict[tuple[int, int], float]
    mean_pairwise_agreement: float
    cohen_kappa: dict[tuple[int, int], float | None]
    fleiss_kappa: float | None
    krippendorff_alpha: float | None

    def __str__(self) -> str:
        counts = ", ".join(f"{label}: {count}" for label, count in self.label_counts.items())
        lines = [
            f"{self.items} items, {self.annotators} annotators; labels {counts}",
            f"unanimous             {self.unanimous_rate:.3f}",
            f"pairwise agreement    {self.mean_pairwise_agreement:.3f}",
        ]
        for i, j in self.pairwise_agreement:
            share, kappa = self.pairwise_agreement[i, j], _shown(self.cohen_kappa[i, j])
            lines.append(f"  annotators {i + 1} and {j + 1}  {share:.3f}   Cohen's kappa {kappa}")
        lines.append(f"Fleiss' kappa         {_shown(self.fleiss_kappa)}")
        lines.append(f"Krippendorff's alpha  {_shown(self.krippendorff_alpha)}")
        return "\n".join(lines)


def agreement_stats(
    annotations: Sequence[Sequence[Label]] | np.ndarray | pandas.DataFrame,
) -> AgreementStats:
    """Agreement statistics of ``annotations``: one row an item, one column an annotator.

    Labels are anything hashable, such as "A", "B", "tie" or 0, 1, 2. None, NaN (pandas' NA and NaT
    too) and blank text are missing labels. A two-dimensional array or a DataFrame is read row by
    row too.

    Raises:
        DataError: for no items, fewer than two annotators, ragged rows, missing or unhashable
            labels, and rows that are no lists.
    """
    rows = _listed(annotations)
    _check(rows)
    label_counts = Counter(label for row in rows for label in row)
    codes = {label: code for code, label in enumerate(label_counts)}
    table = np.array([[codes[label] for label in row] for row in rows])
    pairs = list(combinations(range(table.shape[1]), 2))
    shares = {(i, j): float(np.mean(table[:, i] == table[:, j])) for i, j in pairs}
    return AgreementStats(
        items=table.shape[0],
        annotators=table.shape[1],
        label_counts=dict(label_counts),
        unanimous_rate=float(np.mean((table == table[:, :1]).all(axis=1))),
        pairwise_agreement=shares,
        mean_pairwise_agreement=float(np.mean(list(shares.values()))),
        cohen_kappa={(i, j): _cohen(table[:, i], table[:, j]) for i, j in pairs},
        fleiss_kappa=_fleiss(table),
        krippendorff_alpha=_krippendorff(table),
    )


def _listed(annotations: Any) -> list[list[Label]]:
    if hasattr(annotations, "to_numpy"):  # a DataFrame would give its columns' names
        annotations = annotations.to_numpy()
    if isinstance(annotations, np.ndarray):
        annotations = annotations.tolist()
    if not isinstance(annotations, list | tuple):
        raise DataError(
            f"annotations is {describe(annotations)}; give a list with a list of labels an item."
        )
    rows = []
    for number, row in enumerate(annotations, start=1):
        labels = row.tolist() if isinstance(row, np.ndarray) else row
        if not isinstance(labels, list | tuple):
            raise DataError(
                f"annotations, row {number}: the row is {describe(row)}; give a list of labels, "
                "one an annotator."
            )
        rows.append(list(labels))
    return rows


def _check(rows: list[list[Label]]) -> None:
    if not rows:
        raise DataError("annotations holds no items; give at least one.")
    width = len(rows[0])
    if width < 2:
        raise DataError(
            f"annotations has {width} annotator(s); agreement needs at least two columns."
        )
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise DataError(
                f"annotations, row {number}: {len(row)} labels, but the first row has {width}; "
                "every item needs a label from every annotator."
            )
        for label in row:
            if not _is_hashable(label):
                raise DataError(
                    f"annotations, row {number}: the label {label!r} is {describe(label)}; give "
                    "text, a number or anything else hashable."
                )
            if _is_missing(label):
                raise DataError(
                    f"annotations, row {number}: a label is missing ({label!r}); fill it in or "
                    "leave the item out."
                )


def _is_hashable(label: Any) -> bool:
    try:
        hash(label)
    except TypeError:
        return False
    return True


def _is_missing(label: Any) -> bool:
    if label is None or (isinstance(label, str) and not label.strip()):
        return True
    try:
        return bool(label != label)  # NaN and NaT alone
    except TypeError:  # pandas' NA says neither yes nor no
        return True


def _cohen(one: np.ndarray, other: np.ndarray) -> float | None:
    from sklearn.metrics import cohen_kappa_score

    if len(np.union1d(one, other)) < 2:
        return None
    return _defined(cohen_kappa_score(one, other))


def _fleiss(table: np.ndarray) -> float | None:
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

    if table.min() == table.max():
        return None
    return _defined(fleiss_kappa(aggregate_raters(table)[0], method="fleiss"))


def _krippendorff(table: np.ndarray) -> float | None:
    import krippendorff

    if table.min() == table.max():
        return None
    return _defined(krippendorff.alpha(reliability_data=table.T, level_of_measurement="nominal"))


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _shown(value: float | None) -> str:
    return "undefined (one label only)" if value is None else f"{value:.3f}"
