"""Overkill and escape bounds: the statistics that the product stakes its name on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saec.calibrate import (
    CalibrationData,
    NotEnoughData,
    best_escape,
    calibrate,
    clopper_pearson_upper,
    escape_threshold,
    overkill_threshold,
    p_value,
)
from saec.calibrate._numeric import binomial_cdf
from saec.config import CalibrationSettings
from saec.errors import BadInput

# Few distinct values: ties are the rule.
tied = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=60)
spread_out = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)
some_scores = tied | spread_out
RESAMPLES = 1000


# --- the bounds hold -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "escape"), [(150, 0.05), (400, 0.02), (90, 0.10)])
def test_over_1000_resampled_calibrations_the_escape_bound_holds_in_95_percent(n: int, escape: float) -> None:
    rng = np.random.default_rng(n)
    draws = rng.exponential(size=(RESAMPLES, n))  # escape rate below t is 1 - exp(-t), exactly
    rates = np.array([-math.expm1(-escape_threshold(row, escape, 0.95).threshold) for row in draws])
    assert np.mean(rates <= escape) >= 0.95


@pytest.mark.parametrize(("n", "allowed"), [(59, 0), (93, 1), (124, 2)])  # Wilks' 95/95 sample sizes, one-sided
def test_the_escape_bound_is_sharp(n: int, allowed: int) -> None:
    rng = np.random.default_rng(n)
    draws = rng.normal(size=(RESAMPLES, n))
    results = [escape_threshold(row, 0.05, 0.95) for row in draws]
    assert {result.wrong for result in results} == {allowed}
    with pytest.raises(NotEnoughData):
        escape_threshold(draws[0][:58], 0.05, 0.95)
    normal_cdf = [0.5 * math.erfc(-result.threshold / math.sqrt(2)) for result in results]
    exact = 1 - float(binomial_cdf(n, 0.05)[allowed])
    # The number of successes is Binomial(1000, exact): four standard deviations either way.
    slack = 4 * math.sqrt(exact * (1 - exact) / RESAMPLES)
    assert 0.95 <= exact < 0.96
    assert abs(np.mean(np.array(normal_cdf) <= 0.05) - exact) < slack


@pytest.mark.parametrize("n", [19, 60, 333])
@pytest.mark.parametrize("overkill", [0.05, 0.1])
def test_conformal_overkill_holds_on_average_for_skewed_scores(n: int, overkill: float) -> None:
    rng = np.random.default_rng(n)
    draws = rng.pareto(2.0, size=(RESAMPLES, n))  # overkill rate above t is (1 + t)^-2, exactly
    results = [overkill_threshold(row, overkill) for row in draws]
    rates = np.array([(1 + result.threshold) ** -2 for result in results])
    bound = results[0].bound
    assert bound <= overkill * (1 + 1e-9)
    # The rate is Beta(r, n + 1 - r) with mean r / (n + 1) = bound (order statistics).
    slack = 4 * math.sqrt(bound * (1 - bound) / (n + 2) / RESAMPLES)
    assert abs(rates.mean() - bound) < slack + 1e-4


def test_conformal_overkill_is_conservative_under_heavy_ties() -> None:
    rng = np.random.default_rng(7)
    mass = np.array([0.5, 0.3, 0.12, 0.05, 0.02, 0.01])
    tail = mass[::-1].cumsum()[::-1]  # P(score >= level)
    rates = []
    for row in rng.choice(6, size=(RESAMPLES, 80), p=mass).astype(float):
        threshold = overkill_threshold(row, 0.05).threshold
        rates.append(tail[math.ceil(threshold)] if threshold <= 5 else 0.0)
    assert np.mean(rates) <= 0.05


def test_over_resampled_calibrations_the_escape_of_the_whole_cascade_stays_bounded() -> None:
    rng = np.random.default_rng(3)
    asked = CalibrationSettings(escape=0.1)
    fresh_edge, fresh_cloud = rng.normal(1.5, 1, 20_000), _sigmoid(rng.normal(1.5, 1.5, 20_000))
    worst_routing = []
    for _ in range(200):
        c = calibrate(
            CalibrationData(
                good_scores=rng.normal(0, 1, 60),
                good_scene=rng.random(60),
                defect_scores=rng.normal(1.5, 1, 120),
                defect_scene=rng.random(120),
                cloud_p_good=_sigmoid(rng.normal(-1.5, 1.5, 60)),
                cloud_p_defect=_sigmoid(rng.normal(1.5, 1.5, 120)),
            ),
            asked,
        )
        assert c.escape is not None and c.escape.scope == "cascade" and c.escape.achieved
        p_edge = c.score.p_defect(fresh_edge)
        missed_by_edge = p_edge < c.thresholds.tau_edge
        cleared_by_cloud = c.fusion.p_defect(p_edge, fresh_cloud) < 0.5
        # A router that always asks the arm that is wrong: no routing can do worse.
        worst_routing.append(float(np.mean(missed_by_edge | cleared_by_cloud)))
    # 95 % promised; Binomial(200, 0.95) stays above 0.95 - 3 sd = 0.904
    assert np.mean(np.array(worst_routing) <= 0.1) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 200)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# --- golden values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "confidence", "upper"),
    [
        (0, 10, 0.95, 0.2589),  # 1 - 0.05^(1/10)
        (1, 10, 0.95, 0.3942),  # upper end of the 90 % two-sided interval
        (5, 10, 0.975, 0.8129),  # 95 % two-sided Clopper-Pearson interval of 5/10: 0.1871 to 0.8129
        (2, 20, 0.975, 0.3170),  # of 2/20: 0.0123 to 0.3170
        (10, 10, 0.95, 1.0),
        (0, 0, 0.95, 1.0),
    ],
)
def test_clopper_pearson_agrees_with_the_tables(k: int, n: int, confidence: float, upper: float) -> None:
    assert clopper_pearson_upper(k, n, confidence) == pytest.approx(upper, abs=5e-5)


def test_zero_escapes_follow_the_rule_of_three() -> None:
    for n in (100, 1000, 3000):
        assert clopper_pearson_upper(0, n) == pytest.approx(best_escape(n), rel=1e-6)
        assert best_escape(n) == pytest.approx(3 / n, rel=0.02)
    assert best_escape(59) < 0.05 < best_escape(58)


def test_one_permille_needs_about_3000_defects() -> None:
    with pytest.raises(NotEnoughData):
        escape_threshold(np.arange(2990.0), 0.001)
    assert escape_threshold(np.arange(3000.0), 0.001).achieved


def test_the_binomial_tail_sums_in_log_space() -> None:
    assert binomial_cdf(3, 0.5) == pytest.approx([0.125, 0.5, 0.875, 1.0])
    assert binomial_cdf(0, 0.3) == pytest.approx([1.0])
    assert np.isfinite(binomial_cdf(50_000, 1e-3)).all()


def test_too_few_defects_are_told_what_they_can_prove() -> None:
    with pytest.raises(NotEnoughData, match=r"10 defects can prove at best 25\.89% escape") as caught:
        escape_threshold(np.arange(10.0), 0.01)
    assert (caught.value.n, round(caught.value.best, 4)) == (10, 0.2589)
    with pytest.raises(NotEnoughData, match="0 defects can prove at best 100"):
        escape_threshold([], 0.5)


def test_too_few_good_parts_give_the_best_threshold_and_say_what_it_proves() -> None:
    result = overkill_threshold([3.0, 1.0, 2.0], 0.05)
    assert not result.achieved
    assert result.bound == 0.25
    assert 3.0 < result.threshold < 3.001
    assert result.statement == "3 good parts can prove at best 25.00% overkill, 5.00% was asked"


# --- properties ----------------------------------------------------------------------------------------------------


@given(some_scores, st.floats(0.01, 0.9))
@settings(max_examples=80, deadline=None)
def test_the_threshold_keeps_the_promised_number_of_good_parts_ties_included(good: list[float], rate: float) -> None:
    result = overkill_threshold(good, rate)
    assert result.wrong == sum(score >= result.threshold for score in good)
    assert result.wrong <= max(0, math.floor((len(good) + 1) * rate + 1e-9) - 1) or result.wrong == 0
    assert result.achieved == (1 / (len(good) + 1) <= rate * (1 + 1e-9))


@given(some_scores, st.floats(0.02, 0.95), st.floats(0.55, 0.99))
@settings(max_examples=80, deadline=None)
def test_every_defect_that_ties_with_the_limit_is_caught(defects: list[float], rate: float, confidence: float) -> None:
    try:
        result = escape_threshold(defects, rate, confidence)
    except NotEnoughData as error:
        assert error.best > rate * (1 - 1e-9)
        return
    ordered = sorted(defects)
    tail = binomial_cdf(len(defects), rate)
    assert result.wrong == sum(score < result.threshold for score in defects)
    assert tail[result.wrong] <= (1 - confidence) * (1 + 1e-9)
    assert result.threshold < ordered[result.wrong]
    assert result.bound <= rate


@given(some_scores, st.floats(0.01, 0.5), st.floats(0.01, 0.5))
@settings(max_examples=60, deadline=None)
def test_a_stricter_request_never_moves_a_threshold_the_wrong_way(scores: list[float], a: float, b: float) -> None:
    strict, loose = sorted((a, b))
    assert overkill_threshold(scores, strict).threshold >= overkill_threshold(scores, loose).threshold
    try:
        assert escape_threshold(scores, strict).threshold <= escape_threshold(scores, loose).threshold
    except NotEnoughData:
        assert len(scores) < 300


@given(some_scores, spread_out)
@settings(max_examples=60, deadline=None)
def test_p_values_fall_with_the_score_and_agree_with_the_threshold(good: list[float], asked: list[float]) -> None:
    p = p_value(good, sorted(asked))
    assert np.all(np.diff(p) <= 0)
    assert np.all((p >= 1 / (len(good) + 1)) & (p <= 1))
    threshold = overkill_threshold(good, 0.2).threshold
    above = np.array(sorted(asked)) >= threshold
    if 1 / (len(good) + 1) <= 0.2:
        assert np.all(p[above] <= 0.2 + 1e-9)


def test_p_values_without_good_parts_are_no_evidence() -> None:
    assert p_value([], [5.0]) == pytest.approx([1.0])
    assert p_value([1.0, 2.0, 2.0, 3.0], [2.0, 9.0]) == pytest.approx([4 / 5, 1 / 5])


@given(some_scores, st.floats(0.02, 0.4))
@settings(max_examples=60, deadline=None)
def test_a_part_that_ties_with_the_limit_stays_good_also_as_a_probability(good: list[float], rate: float) -> None:
    c = calibrate(CalibrationData(good, np.zeros(len(good))), CalibrationSettings(overkill=rate))
    called = c.score.p_defect(good) >= c.thresholds.tau_edge
    assert int(called.sum()) == c.overkill.wrong


@pytest.mark.parametrize("bad", [[1.0, math.nan], [math.inf], [[1.0]]])
def test_scores_that_are_no_numbers_are_refused(bad: list[float]) -> None:
    for call in (
        lambda: overkill_threshold(bad, 0.05),
        lambda: escape_threshold(bad, 0.5),
        lambda: p_value(bad, [1.0]),
        lambda: p_value([1.0], bad),
    ):
        with pytest.raises(BadInput):
            call()


def test_shares_outside_zero_to_one_and_empty_calibrations_are_refused() -> None:
    for share in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(BadInput):
            overkill_threshold([1.0], share)
        with pytest.raises(BadInput):
            escape_threshold([1.0], share)
    with pytest.raises(BadInput, match="no good parts"):
        overkill_threshold([], 0.05)
    with pytest.raises(BadInput):
        clopper_pearson_upper(3, 2)
    with pytest.raises(BadInput):
        clopper_pearson_upper(1, 2, 1.0)
