"""The operating point: probabilities, thresholds, fusion, escalation, the calibration file, sweeps."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saec.calibrate import (
    Arms,
    Calibration,
    CalibrationData,
    Fusion,
    NotEnoughData,
    ScoreCalibration,
    Thresholds,
    calibrate,
    class_confidences,
    confidences,
    content_digest,
    escalation_mask,
    fit_fusion,
    fit_tau_cloud,
    fit_temperature,
    threshold_sweep,
)
from saec.calibrate._numeric import log_loss, logit
from saec.calibrate.escalation import from_gain, place, uncertainty, with_confidences
from saec.config import CalibrationSettings
from saec.errors import BadInput

DEFAULT = CalibrationSettings()
probabilities = st.floats(0, 1)
scores = st.lists(st.floats(-1e4, 1e4) | st.integers(-3, 3).map(float), min_size=1, max_size=50)


def labelled_data(seed: int = 0, n_good: int = 200, n_defect: int = 100, cloud: bool = True) -> CalibrationData:
    rng = np.random.default_rng(seed)
    good, defect = rng.gamma(4, 1, n_good), rng.gamma(4, 1, n_defect) + 4
    return CalibrationData(
        good,
        rng.uniform(0.3, 0.6, n_good),
        defect,
        rng.uniform(0.3, 0.6, n_defect),
        sigmoid(rng.normal(-2, 1.5, n_good)) if cloud else None,
        sigmoid(rng.normal(2, 1.5, n_defect)) if cloud else None,
        data_sha256=content_digest(["b", "a"]),
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# --- P(defect) -----------------------------------------------------------------------------------------------------


@example(good=[0.0], bad=[0.0, 0.0, 4.0, 2.2250738585072014e-308])  # an interquartile range of nearly nothing
@given(scores, scores)
@settings(max_examples=80, deadline=None)
def test_p_defect_never_falls_with_the_score_even_when_defects_score_lower(good: list[float], bad: list[float]) -> None:
    for fit in (ScoreCalibration.from_labelled(good, bad), ScoreCalibration.from_good(good, max(good))):
        assert fit.scale > 0
        p = fit.p_defect(np.sort(np.array(good + bad)))
        assert np.all(np.diff(p) >= 0)
        assert np.all((p >= 0) & (p <= 1))


def test_good_only_puts_one_half_at_the_threshold_and_5_percent_at_the_median() -> None:
    fit = ScoreCalibration.from_good(np.arange(101.0), 95.0)
    assert fit.p_defect([95.0, 50.0]) == pytest.approx([0.5, 0.05])


def test_platt_recovers_the_sigmoid_that_made_the_labels() -> None:
    rng = np.random.default_rng(1)
    score = rng.uniform(-4, 10, 20_000)
    defect = rng.random(20_000) < sigmoid((score - 3.0) / 1.5)
    fit = ScoreCalibration.from_labelled(score[~defect], score[defect])
    assert (fit.location, fit.scale) == (pytest.approx(3.0, abs=0.1), pytest.approx(1.5, abs=0.1))


def test_separable_scores_stay_finite_and_the_boundary_lies_between_the_classes() -> None:
    fit = ScoreCalibration.from_labelled([1.0, 1.1, 1.2] * 10, [5.0, 5.1, 5.2] * 10)
    assert 1.2 < fit.location < 5.0
    assert 0.001 < fit.p_defect(1.1) < 0.1 < 0.9 < fit.p_defect(5.1) < 0.999


def test_indistinguishable_classes_get_the_base_rate() -> None:
    fit = ScoreCalibration.from_labelled([2.0] * 30, [2.0] * 10)
    assert fit.p_defect(2.0) == pytest.approx(0.25, abs=0.03)


@given(probabilities)
@settings(max_examples=50, deadline=None)
def test_confidences_follow_saec(p: float) -> None:
    s_max, margin, entropy = confidences(np.array([p]))
    assert s_max[0] == pytest.approx(max(p, 1 - p))
    assert margin[0] == pytest.approx(abs(1 - 2 * p))
    expected = -sum(q * math.log(q) for q in (p, 1 - p) if q > 0) / math.log(2)
    assert entropy[0] == pytest.approx(expected, abs=1e-9)


def test_class_confidences_of_k_classes() -> None:
    s_max, margin, entropy = class_confidences([[0.7, 0.2, 0.1], [1 / 3] * 3, [1.0, 0.0, 0.0]])
    assert s_max == pytest.approx([0.7, 1 / 3, 1.0])
    assert margin == pytest.approx([0.5, 0.0, 1.0])
    # -(0.7 ln 0.7 + 0.2 ln 0.2 + 0.1 ln 0.1) / ln 3 = 0.8018 / 1.0986
    assert entropy == pytest.approx([0.72985, 1.0, 0.0], abs=1e-4)
    for bad in ([[1.0]], [[0.5, 0.6]], [[-0.5, 1.5]], 0.5, [[math.nan, 1.0]]):
        with pytest.raises(BadInput):
            class_confidences(bad)


@given(st.integers(0, 1000), st.integers(2, 6), st.floats(0.1, 8))
@settings(max_examples=40, deadline=None)
def test_temperature_never_worsens_the_nll(seed: int, classes: int, sharpness: float) -> None:
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=(40, classes))
    labels = rng.integers(classes, size=40)

    def nll(t: float) -> float:
        z = logits / t
        return float(np.mean(np.logaddexp.reduce(z, axis=1) - z[np.arange(40), labels]))

    t = fit_temperature(logits, labels)
    assert 0.05 <= t <= 20
    assert nll(t) <= nll(1.0) + 1e-12
    assert nll(t) <= min(nll(t * 1.05), nll(t / 1.05)) + 1e-9 or t in (pytest.approx(0.05), pytest.approx(20))


def test_temperature_undoes_a_known_overconfidence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3))
    labels = np.array([rng.choice(3, p=row) for row in np.exp(logits) / np.exp(logits).sum(1, keepdims=True)])
    assert fit_temperature(3.0 * logits, labels) == pytest.approx(3.0, rel=0.06)
    for bad in ((logits[0], labels), (logits, labels + 1), (logits, labels[:5]), (logits * math.inf, labels)):
        with pytest.raises(BadInput):
            fit_temperature(*bad)


# --- thresholds ----------------------------------------------------------------------------------------------------


def test_the_default_thresholds_escalate_nothing() -> None:
    p = np.linspace(0, 1, 101)
    assert not escalation_mask(Thresholds(), np.full(101, 1e9), p).any()


@pytest.mark.parametrize(
    ("change", "escalated"),
    [
        ({"tau_scene": 0.5}, [False, True, False, True]),
        ({"tau_smax": 0.8}, [False, True, True, False]),
        ({"tau_margin": 0.6}, [False, True, True, False]),
        ({"tau_entropy": 0.7}, [False, True, True, False]),
        ({"band_low": 0.4, "band_high": 0.7}, [False, True, True, False]),
        ({"band_low": 0.7, "band_high": 0.7}, [False, False, True, False]),
    ],
)
def test_each_threshold_escalates_by_its_own_rule(change: dict[str, float], escalated: list[bool]) -> None:
    scene, p = [0.1, 0.5, 0.4, 0.9], [0.05, 0.5, 0.7, 0.95]
    assert escalation_mask(replace(Thresholds(), **change), scene, p).tolist() == escalated


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@settings(max_examples=80, deadline=None)
def test_the_fitted_confidence_thresholds_escalate_nothing_outside_the_band(a: float, b: float, tau: float) -> None:
    low, high = min(a, b), max(a, b)
    band = Thresholds(tau_edge=tau, band_low=low, band_high=high)
    p = np.unique(np.concatenate([np.linspace(0, 1, 301), [low, high, 1 - low, 1 - high]]))
    with_all = escalation_mask(with_confidences(band), np.zeros(p.size), p)
    assert np.array_equal(with_all, escalation_mask(band, np.zeros(p.size), p))


def test_a_band_around_one_half_makes_the_confidences_say_the_same() -> None:
    fitted = with_confidences(Thresholds(band_low=0.2, band_high=0.8))
    assert fitted.tau_smax == pytest.approx(0.8)
    assert fitted.tau_margin == pytest.approx(0.6)
    assert fitted.tau_entropy == pytest.approx(0.7219, abs=1e-4)  # binary entropy of 0.2
    off_centre = Thresholds(tau_edge=0.1, band_low=0.05, band_high=0.3)
    assert with_confidences(off_centre) == off_centre


def test_thresholds_out_of_range_are_refused() -> None:
    for change in ({"tau_edge": 1.5}, {"band_low": -0.1}, {"tau_scene": math.nan}, {"tau_scene": -math.inf}):
        with pytest.raises(BadInput):
            replace(Thresholds(), **change)


# --- fusion --------------------------------------------------------------------------------------------------------


def test_by_default_the_cloud_replaces_the_edge() -> None:
    assert Fusion().p_defect([0.9, 0.1], [0.2, 0.7]) == pytest.approx([0.2, 0.7])


@given(st.floats(1e-5, 1 - 1e-5), probabilities, probabilities)
@settings(max_examples=80, deadline=None)
def test_the_clouds_operating_point_becomes_one_half(tau: float, p_edge: float, p_cloud: float) -> None:
    if abs(p_cloud - tau) > 1e-9:
        assert (Fusion.replace_at(tau).p_defect(p_edge, p_cloud) >= 0.5) == (p_cloud >= tau)


@given(st.integers(0, 10_000), st.integers(1, 80), st.floats(-2, 4), st.floats(-2, 4))
@settings(max_examples=60, deadline=None)
def test_fusion_is_never_worse_than_either_arm_and_never_negative(seed: int, n: int, edge: float, cloud: float) -> None:
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.5).astype(float)
    p_edge, p_cloud = (sigmoid(signal * (truth - 0.5) + rng.normal(size=n)) for signal in (edge, cloud))
    fused = fit_fusion(p_edge, p_cloud, truth)
    assert fused.w_edge >= 0 and fused.w_cloud >= 0
    nll = [log_loss(logit(p), truth) for p in (fused.p_defect(p_edge, p_cloud), p_edge, p_cloud)]
    assert nll[0] <= min(nll[1:]) + 1e-9


def test_fusion_ignores_an_arm_that_knows_nothing() -> None:
    rng = np.random.default_rng(2)
    truth = rng.random(3000) < 0.4
    good_arm = sigmoid(3.0 * (truth - 0.5) + rng.normal(size=3000))
    fused = fit_fusion(rng.random(3000), good_arm, truth)
    assert fused.w_edge < 0.1 < 1.0 < fused.w_cloud


def test_fusion_gives_average_weight_without_evidence_and_survives_certain_arms() -> None:
    fused = fit_fusion([0.5], [0.5], [1])
    assert (fused.w_edge, fused.w_cloud) == (pytest.approx(0.5), pytest.approx(0.5))
    certain = fit_fusion([0.0, 1.0] * 20, [0.0, 1.0] * 20, [0, 1] * 20)
    assert certain.p_defect([0.0, 1.0], [0.0, 1.0]) == pytest.approx([0.0, 1.0], abs=1e-3)
    for bad in (([0.5], [0.5, 0.5], [1]), ([], [], []), ([1.5], [0.5], [1]), ([math.nan], [0.5], [1])):
        with pytest.raises(BadInput):
            fit_fusion(*bad)


def test_the_clouds_threshold_finds_a_shifted_scale() -> None:
    rng = np.random.default_rng(5)
    truth = rng.random(4000) < 0.5
    honest = rng.normal(2.0 * (2 * truth - 1), 2.0)  # a logit whose right threshold is 0
    assert fit_tau_cloud(sigmoid(honest - 1.0), truth) == pytest.approx(float(sigmoid(np.array(-1.0))), abs=0.03)
    assert fit_tau_cloud(sigmoid(-honest), truth) == 0.5


# --- escalation ----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(probabilities | st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)), min_size=1, max_size=80),
    st.floats(0.05, 0.95),
    probabilities,
    st.sampled_from([0.0, 0.25, 1.0]),
    st.sampled_from([0.25, 1.0, 4.0]),
)
@example([(0.0, 0.0)], 0.5, 1.0, 1.0, 1.0)
@settings(max_examples=150, deadline=None)
def test_the_rule_never_takes_more_than_its_share_of_the_parts_that_placed_it(
    parts: list[tuple[float, float]], tau: float, share: float, fraction: float, tilt: float
) -> None:
    p, scene = np.round(np.array(parts).T, 6)
    rule = place(Thresholds(tau_edge=tau), scene, p, share, scene_fraction=fraction, tilt=tilt)
    assert escalation_mask(rule, scene, p).sum() <= share * p.size + 1e-9


def test_the_most_uncertain_parts_go_first_and_both_labels_are_kept_at_the_edge() -> None:
    p = np.linspace(0.01, 0.99, 99)
    rule = place(Thresholds(tau_edge=0.2), np.zeros(99), p, 0.3, scene_fraction=0.0)
    sent = escalation_mask(rule, np.zeros(99), p)
    doubt = uncertainty(p, 0.2)
    assert sent.sum() == 29
    assert doubt[sent].max() < doubt[~sent].min()
    assert (p[~sent] < 0.2).any() and (p[~sent] >= 0.2).any()


def test_the_share_goes_to_the_scenes_only_where_they_are_clearly_worth_it() -> None:
    rng = np.random.default_rng(4)
    p, scene = rng.random(400), rng.random(400)
    base = Thresholds()
    band_is_right = (np.abs(p - 0.5) < 0.2).astype(float)
    assert from_gain(base, scene, p, 0.3, band_is_right).thresholds.tau_scene == math.inf
    scene_is_right = (scene > 0.85).astype(float)
    planned = from_gain(base, scene, p, 0.3, scene_is_right)
    assert planned.thresholds.tau_scene < 1
    assert planned.share <= 0.3
    # Too few parts to tell: the plain band, whatever the sample says.
    assert from_gain(base, scene[:60], p[:60], 0.3, scene_is_right[:60]).thresholds.tau_scene == math.inf
    # No evidence at all: the plain band.
    assert from_gain(base, scene, p, 0.3, np.zeros(400)).thresholds.tau_scene == math.inf


def test_the_band_leans_to_the_side_where_the_mistakes_are() -> None:
    rng = np.random.default_rng(6)
    p = rng.random(1000)
    gain = ((p > 0.2) & (p < 0.5)).astype(float)
    plan = from_gain(Thresholds(), np.zeros(1000), p, 0.3, gain)
    assert 0.5 - plan.thresholds.band_low > plan.thresholds.band_high - 0.5


# --- calibrate -----------------------------------------------------------------------------------------------------


def test_good_only_calibration_states_its_overkill_and_escalates_about_its_share() -> None:
    data = labelled_data()
    c = calibrate(CalibrationData(data.good_scores, data.good_scene), DEFAULT)
    assert c.method == "good-only"
    assert c.overkill.achieved and c.overkill.bound <= 0.05
    assert c.thresholds.tau_edge == 0.5 and c.score.location == c.overkill.threshold
    assert 0.25 < c.escalation_expected <= 0.3
    assert math.isfinite(c.thresholds.tau_scene)
    assert "on average (conformal, 200 good parts)" in c.overkill.statement
    assert 0 < c.thresholds.tau_smax < 1 and 0 < c.thresholds.tau_margin < 1 and 0 < c.thresholds.tau_entropy < 1


def test_labelled_defects_raise_the_accuracy_of_the_edge() -> None:
    train, test = labelled_data(1), labelled_data(2, 2000, 1000)
    settings_ = CalibrationSettings(overkill=0.01)

    def accuracy(c: Calibration) -> float:
        wrong = np.mean(c.score.p_defect(test.good_scores) >= c.thresholds.tau_edge) * 2000
        wrong += np.mean(c.score.p_defect(test.defect_scores) < c.thresholds.tau_edge) * 1000
        return float(1 - wrong / 3000)

    good_only = calibrate(CalibrationData(train.good_scores, train.good_scene), settings_)
    both = calibrate(train, settings_)
    assert both.method == "labelled"
    assert accuracy(both) > accuracy(good_only) + 0.02


def test_the_calibrated_cascade_beats_both_of_its_arms_on_fresh_parts() -> None:
    c = calibrate(labelled_data(1), DEFAULT)
    fresh = labelled_data(9, 2000, 1000)
    scene = np.concatenate([fresh.good_scene, fresh.defect_scene])
    p_edge = c.score.p_defect(np.concatenate([fresh.good_scores, fresh.defect_scores]))
    p_cloud = np.concatenate([fresh.cloud_p_good, fresh.cloud_p_defect])
    truth = np.arange(3000) >= 2000
    sent = escalation_mask(c.thresholds, scene, p_edge)
    final = np.where(sent, c.fusion.p_defect(p_edge, p_cloud) >= 0.5, p_edge >= c.thresholds.tau_edge)
    edge_only = np.mean((p_edge >= c.thresholds.tau_edge) == truth)
    cloud_only = np.mean((p_cloud >= c.thresholds.tau_cloud) == truth)
    assert np.mean(final == truth) > max(edge_only, cloud_only)
    assert sent.mean() < 0.35


def test_an_escape_request_lowers_the_threshold_and_never_raises_it() -> None:
    data = labelled_data(cloud=False)
    plain = calibrate(data, DEFAULT)
    strict = calibrate(data, CalibrationSettings(escape=0.05))
    loose = calibrate(data, CalibrationSettings(escape=0.6))
    assert strict.escape is not None and strict.escape.achieved and strict.escape.scope == "edge"
    assert strict.thresholds.tau_edge < plain.thresholds.tau_edge
    assert loose.thresholds.tau_edge == plain.thresholds.tau_edge
    called = strict.score.p_defect(data.defect_scores) >= strict.thresholds.tau_edge
    assert int((~called).sum()) == strict.escape.wrong
    assert not strict.overkill.achieved and "above the 5.00% asked" in strict.overkill.statement


def test_an_escape_request_that_cannot_be_proven_is_refused_with_what_can() -> None:
    with pytest.raises(NotEnoughData, match=r"100 defects can prove at best 2\.95%"):
        calibrate(labelled_data(cloud=False), CalibrationSettings(escape=0.01))
    # With the cloud in the loop each arm gets half: 2 (1 - 0.025^(1/100)).
    with pytest.raises(NotEnoughData, match=r"100 defects can prove at best 7\.24%"):
        calibrate(labelled_data(), CalibrationSettings(escape=0.05))
    with pytest.raises(NotEnoughData, match="0 defects"):
        calibrate(CalibrationData([1.0, 2.0], [0.1, 0.2]), CalibrationSettings(escape=0.05))


def test_a_few_defects_do_not_move_the_threshold_and_the_report_says_so() -> None:
    data = labelled_data(n_defect=9)
    c = calibrate(data, DEFAULT)
    assert c.method == "good-only"
    assert c.thresholds.tau_edge == 0.5 and c.score.location == c.overkill.threshold
    assert any("10 of each are needed" in note for note in c.notes)


def test_a_detector_that_does_not_see_the_defects_is_named() -> None:
    rng = np.random.default_rng(0)
    c = calibrate(CalibrationData(rng.random(50) + 1, np.zeros(50), rng.random(50), np.zeros(50)), DEFAULT)
    assert any("does not see them" in note for note in c.notes)


def test_good_parts_with_cloud_opinions_place_the_clouds_threshold_too() -> None:
    rng = np.random.default_rng(0)
    p_cloud = rng.beta(1, 9, 200)
    c = calibrate(CalibrationData(rng.random(200), rng.random(200), cloud_p_good=p_cloud), DEFAULT)
    assert np.mean(p_cloud >= c.thresholds.tau_cloud) <= 0.05
    fused = c.fusion.p_defect(0.5, p_cloud)
    assert np.array_equal(fused >= 0.5, p_cloud >= c.thresholds.tau_cloud)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_handful_of_good_parts_is_enough_to_start(n: int) -> None:
    c = calibrate(CalibrationData(np.linspace(1, 2, n), np.full(n, 0.4)), DEFAULT)
    assert not c.overkill.achieved
    assert c.thresholds.has_band
    assert c.overkill.wrong == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equal_scores_still_give_a_usable_calibration(share: float) -> None:
    asked = CalibrationSettings(escalation=share)
    c = calibrate(CalibrationData([2.0] * 40, [0.5] * 40), asked)
    assert (c.score.p_defect([2.0, 2.2]) >= c.thresholds.tau_edge).tolist() == [False, True]
    assert c.escalation_expected <= share
    both = calibrate(CalibrationData([2.0] * 40, [0.5] * 40, [2.0] * 40, [0.5] * 40), asked)
    assert both.escalation_expected <= share
    assert Calibration.from_json(both.to_json()) == both
    if share == 0.3:
        assert any("tie at the operating point" in note for note in both.notes)


def test_calibrating_without_good_parts_or_with_ragged_or_broken_vectors_is_refused() -> None:
    data = labelled_data()
    for bad in (
        CalibrationData([], []),
        replace(data, good_scene=[0.1]),
        replace(data, good_scores=np.full(200, math.nan)),
        replace(data, cloud_p_good=[0.5]),
        replace(data, cloud_p_good=np.full(200, 1.5)),
    ):
        with pytest.raises(BadInput):
            calibrate(bad, DEFAULT)


# --- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [DEFAULT, CalibrationSettings(escape=0.2)])
@pytest.mark.parametrize("cloud", [True, False])
def test_a_calibration_survives_json_to_the_last_bit(asked: CalibrationSettings, cloud: bool) -> None:
    c = calibrate(labelled_data(cloud=cloud), asked)
    text = json.dumps(c.to_json(), allow_nan=False)
    assert Calibration.from_json(json.loads(text)) == c


def test_a_disabled_scene_threshold_is_null_in_json() -> None:
    c = calibrate(labelled_data(), DEFAULT)
    disabled = replace(c, thresholds=Thresholds())
    assert disabled.to_json()["thresholds"]["tau_scene"] is None
    assert Calibration.from_json(disabled.to_json()).thresholds.tau_scene == math.inf


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("unheard_of",), 1, "unheard_of"),
        (("thresholds", "tau_new"), 0.5, "thresholds.tau_new"),
        (("score", "scale"), -1.0, "not a calibration"),
        (("score", "scale"), "wide", "score.scale"),
        (("thresholds", "tau_edge"), 7, "thresholds.tau_edge"),
        (("fusion", "w_cloud"), -1.0, "not negative"),
        (("overkill", "bound"), None, "overkill.bound"),
        (("overkill", "bound"), math.nan, "overkill.bound"),
        (("method",), "guess", "method"),
    ],
)
def test_a_damaged_calibration_is_refused_and_the_place_named(
    path: tuple[str, ...], value: object, message: str
) -> None:
    tree = calibrate(labelled_data(), DEFAULT).to_json()
    branch = tree
    for key in path[:-1]:
        branch = branch[key]
    branch[path[-1]] = value
    with pytest.raises(BadInput, match=message):
        Calibration.from_json(tree)


def test_the_data_digest_does_not_depend_on_the_order() -> None:
    assert content_digest(["b", "a"]) == content_digest(["a", "b"]) != content_digest(["a"])
    # printf 'a\nb' | sha256sum
    assert content_digest(["b", "a"]).startswith("7e18f737311b2dc3")


# --- sweeps --------------------------------------------------------------------------------------------------------


def test_a_sweep_on_a_case_done_by_hand() -> None:
    arms = Arms(
        scene=[0.1, 0.2, 0.3, 0.4],
        p_edge=[0.1, 0.6, 0.4, 0.9],
        p_cloud=[0.1, 0.2, 0.9, math.nan],
        truth=[0, 0, 1, 1],
        cloud_seconds=0.5,
    )
    points = threshold_sweep(arms, Thresholds(), Fusion(), scene_quantiles=[0.5], shares=[0.0, 0.5, 1.0])
    scene, none, half, everything = points
    assert (scene.knob, scene.value) == ("tau_scene", 0.25)
    # Parts 3 and 4 are complex: the cloud repairs 3, has no opinion on 4; the edge is wrong about 2.
    assert (scene.accuracy, scene.escalation, scene.escape_rate, scene.overkill_rate) == (0.75, 0.5, 0.0, 0.5)
    assert (none.accuracy, none.escalation, none.cloud_s) == (0.5, 0.0, 0.0)
    assert (half.accuracy, half.escalation, half.cloud_s) == (1.0, 0.5, 1.0)
    assert (everything.accuracy, everything.balanced_accuracy, everything.escalation) == (1.0, 1.0, 1.0)


def test_a_sweep_escalates_more_with_a_larger_share_and_less_with_a_higher_scene_threshold() -> None:
    data = labelled_data()
    c = calibrate(data, DEFAULT)
    p_edge = c.score.p_defect(np.concatenate([data.good_scores, data.defect_scores]))
    arms = Arms(
        np.concatenate([data.good_scene, data.defect_scene]),
        p_edge,
        np.concatenate([data.cloud_p_good, data.cloud_p_defect]),
        np.arange(300) >= 200,
    )
    points = threshold_sweep(arms, c.thresholds, c.fusion)
    by_knob = {knob: [point for point in points if point.knob == knob] for knob in ("tau_scene", "share")}
    assert np.all(np.diff([point.escalation for point in by_knob["share"]]) >= 0)
    assert np.all(np.diff([point.escalation for point in by_knob["tau_scene"]]) <= 0)
    assert all(point.escalation <= point.value + 1e-9 for point in by_knob["share"])
    assert all(point.cloud_s is None for point in points)


def test_a_sweep_over_one_class_leaves_the_other_rate_unmeasured() -> None:
    point = threshold_sweep(Arms([0.1], [0.2], [0.3], [0]), Thresholds(), Fusion(), scene_quantiles=[], shares=[0])[0]
    assert (point.escape_rate, point.balanced_accuracy, point.overkill_rate) == (None, None, 0.0)
    for bad in (Arms([], [], [], []), Arms([0.1], [0.2, 0.3], [0.1], [0]), Arms([0.1], [0.2], [2.0], [0])):
        with pytest.raises(BadInput):
            threshold_sweep(bad, Thresholds(), Fusion())
