"""How the comparison with TRL tells rounding from another number."""

from __future__ import annotations

import pytest

from benchmarks.integrations.agreement import EPS, Deviation, deviations

LOGGED = {"loss/value_avg": 0.5, "val/ratio_var": 1e-6, "objective/entropy": 80.0, "eps": 3.0}


def of(metric: str, ours: float, logit_size: float = 20.0) -> Deviation:
    found = deviations([LOGGED], [{**LOGGED, metric: ours}], logit_size)
    return next(each for each in found if each.metric == metric)


def test_a_ten_thousandth_is_the_limit() -> None:
    assert of("loss/value_avg", 0.5 * (1 + 0.9e-4)).within
    assert not of("loss/value_avg", 0.5 * (1 + 1.1e-4)).within
    assert of("loss/value_avg", 0.5 * (1 + 1.1e-4)).relative == pytest.approx(1.1e-4, rel=1e-3)


def test_a_variance_of_ratios_may_be_off_by_the_rounding_of_logits() -> None:
    # Deviations of 1e-3 around 1, each off by the last digit of 20: 2 * 1e-3 * 20 * EPS.
    rounding = 2 * 1e-3 * 20 * EPS
    assert of("val/ratio_var", 1e-6 + 0.9 * rounding).within
    assert not of("val/ratio_var", 1e-6 + 1.2 * rounding).within
    assert not of("val/ratio_var", 1e-6 + 0.9 * rounding, logit_size=10.0).within


def test_the_clock_is_no_metric_and_the_worst_update_is_told() -> None:
    theirs = [LOGGED, {**LOGGED, "loss/value_avg": 2.0}]
    ours = [LOGGED, {**LOGGED, "loss/value_avg": 3.0, "eps": 9.0}]
    found = {each.metric: each for each in deviations(theirs, ours, 20.0)}
    assert "eps" not in found and not found["loss/value_avg"].within
    assert found["loss/value_avg"].update == 2 and found["loss/value_avg"].relative == 0.5


def test_what_only_one_side_logged_is_no_agreement() -> None:
    with pytest.raises(ValueError, match="did not log the same metrics"):
        deviations([LOGGED], [LOGGED, LOGGED], 20.0)
    with pytest.raises(ValueError, match="did not log the same metrics"):
        deviations([LOGGED], [{"loss/value_avg": 0.5}], 20.0)
