"""Figures of a run: golden values worked out by hand, and properties that hold for every run."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saec.calibrate.metrics import (
    Confusion,
    accuracy,
    auroc,
    balanced_accuracy,
    confusion,
    escape_rate,
    overkill_rate,
)
from saec.errors import BadInput
from saec.evaluate.metrics import clopper_pearson, percentiles, risk_coverage, threshold_sweep

few = settings(deadline=None, max_examples=60)
parts = st.lists(st.tuples(st.integers(-4, 4).map(float), st.booleans()), min_size=1, max_size=40)


def test_auroc_of_a_worked_example() -> None:
    # Defects 0.8, 0.4; good 0.4, 0.1: pairs won 1, 1, ½ (the tie), 1 of 4.
    assert auroc([0.8, 0.4, 0.4, 0.1], [True, True, False, False]) == 3.5 / 4


def test_auroc_is_not_measured_without_both_classes() -> None:
    assert auroc([0.1, 0.2], [True, True]) is None
    assert auroc([], []) is None


@few
@given(parts)
def test_auroc_equals_the_count_over_all_pairs(sample: list[tuple[float, bool]]) -> None:
    bad, good = [s for s, t in sample if t], [s for s, t in sample if not t]
    found = auroc([s for s, _ in sample], [t for _, t in sample])
    if not bad or not good:
        assert found is None
        return
    wins = sum((b > g) + 0.5 * (b == g) for b in bad for g in good)
    assert found == pytest.approx(wins / (len(bad) * len(good)), abs=1e-12)


@few
@given(parts)
def test_auroc_only_depends_on_the_order_and_flips_with_it(sample: list[tuple[float, bool]]) -> None:
    scores, labels = np.array([s for s, _ in sample]), np.array([t for _, t in sample])
    plain = auroc(scores, labels)
    assert auroc(np.exp(scores), labels) == plain
    if plain is not None:
        assert auroc(-scores, labels) == pytest.approx(1 - plain, abs=1e-12)


def test_rates_of_a_worked_example() -> None:
    c = confusion([True, True, True, False, False, False, False], [True, True, False, True, False, False, False])
    assert c == Confusion(tp=2, fp=1, tn=3, fn=1)
    assert accuracy(c) == 5 / 7
    assert escape_rate(c) == 1 / 3
    assert overkill_rate(c) == 1 / 4
    assert balanced_accuracy(c) == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_a_rate_without_parts_is_not_measured_rather_than_zero() -> None:
    only_good = Confusion(tp=0, fp=1, tn=9, fn=0)
    assert escape_rate(only_good) is None and balanced_accuracy(only_good) is None
    assert overkill_rate(only_good) == 0.1
    assert accuracy(Confusion(0, 0, 0, 0)) is None


@few
@given(parts)
def test_confusion_counts_every_part_once(sample: list[tuple[float, bool]]) -> None:
    c = confusion([s > 0 for s, _ in sample], [t for _, t in sample])
    assert c.n == len(sample) == c.defects + c.goods
    assert c.defects == sum(t for _, t in sample)


def test_vectors_of_different_length_and_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(BadInput, match="one length"):
        auroc([1.0, 2.0], [True])
    with pytest.raises(BadInput, match=r"finite numbers: index 1"):
        auroc([1.0, math.nan], [True, False])


def test_percentiles_interpolate_and_are_absent_without_values() -> None:
    assert percentiles([1, 2, 3, 4, 5]) == {"p50": 3.0, "p90": pytest.approx(4.6), "p99": pytest.approx(4.96)}
    assert percentiles([]) is None


def test_clopper_pearson_reproduces_published_values() -> None:
    # Rule of three in its exact form: no escape in n defects leaves 1 - (α/2)^(1/n).
    low, high = clopper_pearson(0, 30) or (None, None)
    assert low == 0.0 and high == pytest.approx(1 - 0.025 ** (1 / 30), abs=1e-9)
    # Newcombe (1998), table I: 81/263, 15/148, 0/20 and 1/29 at 95 %.
    for k, n, want in [
        (81, 263, (0.2527, 0.3676)),
        (15, 148, (0.0578, 0.1617)),
        (0, 20, (0.0, 0.1684)),
        (1, 29, (0.0009, 0.1776)),
    ]:
        assert clopper_pearson(k, n) == pytest.approx(want, abs=5e-5)


def test_an_interval_needs_parts_and_sensible_counts() -> None:
    assert clopper_pearson(0, 0) is None
    with pytest.raises(BadInput, match="k=3, n=2"):
        clopper_pearson(3, 2)


@few
@given(
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95, 0.99])
)
def test_intervals_contain_the_rate_mirror_each_other_and_widen_with_confidence(
    kn: tuple[int, int], level: float
) -> None:
    k, n = kn
    low, high = clopper_pearson(k, n, level) or (math.nan, math.nan)
    assert 0 <= low <= k / n <= high <= 1
    mirror = clopper_pearson(n - k, n, level)
    assert mirror == pytest.approx((1 - high, 1 - low), abs=1e-9)
    wider = clopper_pearson(k, n, 0.999) or (math.nan, math.nan)
    assert wider[0] <= low + 1e-12 and high <= wider[1] + 1e-12


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_clopper_pearson_covers_the_true_rate_at_least_as_often_as_stated(rate: float) -> None:
    n = 40
    covered = sum(
        math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
        for k in range(n + 1)
        if (bounds := clopper_pearson(k, n)) and bounds[0] <= rate <= bounds[1]
    )
    assert covered >= 0.95


def test_a_large_sample_does_not_underflow() -> None:
    low, high = clopper_pearson(50_000, 100_000) or (None, None)
    assert (low, high) == pytest.approx((0.5 - 0.0031, 0.5 + 0.0031), abs=1e-4)


@few
@given(parts)
def test_a_higher_threshold_never_lowers_escapes_nor_raises_overkills(sample: list[tuple[float, bool]]) -> None:
    scores, labels = [s for s, _ in sample], [t for _, t in sample]
    sweep = threshold_sweep(scores, labels)
    if sweep is None:
        assert len(set(labels)) == 1
        return
    assert (np.diff(sweep.escape) >= 0).all() and (np.diff(sweep.overkill) <= 1e-12).all()
    assert sweep.escape[0] == 0 and sweep.overkill[0] == 1 and sweep.escape[-1] == 1
    assert sweep.overkill[-1] == pytest.approx(0)
    for i, threshold in enumerate(sweep.thresholds):
        c = confusion(np.array(scores) >= threshold, labels)
        assert (sweep.escape[i], sweep.overkill[i]) == pytest.approx((escape_rate(c), overkill_rate(c)))


def test_risk_coverage_of_a_worked_example() -> None:
    curve = risk_coverage([0.9, 0.8, 0.8, 0.1], [True, True, False, False])
    assert curve is not None
    assert curve.coverage.tolist() == [0.25, 0.75, 1.0]  # the tied pair is accepted together
    assert curve.risk.tolist() == [0.0, pytest.approx(1 / 3), 0.5]
    assert curve.area == pytest.approx(0.25 * 0 + 0.5 / 3 + 0.25 * 0.5)
    assert risk_coverage([], []) is None
