"""The router's promises, over all combinations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saec.calibrate.fusion import Fusion
from saec.calibrate.policy import Policy
from saec.calibrate.score import confidences
from saec.calibrate.thresholds import Thresholds, escalation_mask
from saec.config import RouteSettings
from saec.route.decide import decide, edge_label, final_label, lot
from saec.types import EdgeResult, Label, Reason, SceneScore, SceneTerms, Where

TERMS = SceneTerms(0, 0, 0, 0, 0)
UNIT = st.floats(0, 1)
UNIT_OR_NAN = st.one_of(UNIT, st.just(math.nan))
ESCALATIONS = [
    Reason.SCENE_COMPLEX,
    Reason.LOW_SMAX,
    Reason.LOW_MARGIN,
    Reason.HIGH_ENTROPY,
    Reason.IN_BAND,
]
thresholds = st.builds(
    Thresholds,
    tau_edge=UNIT,
    tau_cloud=UNIT,
    tau_scene=st.one_of(UNIT, st.just(math.inf)),
    tau_smax=UNIT,
    tau_margin=UNIT,
    tau_entropy=UNIT,
    band_low=UNIT,
    band_high=UNIT,
)
edges = st.builds(
    EdgeResult, score=UNIT_OR_NAN, p_defect=UNIT_OR_NAN, s_max=UNIT_OR_NAN, margin=UNIT_OR_NAN, entropy=UNIT_OR_NAN
)
scenes = st.one_of(st.none(), st.builds(lambda s: SceneScore(s, TERMS), UNIT_OR_NAN))
CALM = SceneScore(0.1, TERMS)
SURE_GOOD = EdgeResult(1.0, 0.02, 0.98, 0.96, 0.1)
SURE_BAD = EdgeResult(9.0, 0.98, 0.98, 0.96, 0.1)
SAEC = Thresholds(tau_scene=0.6, tau_smax=0.55, tau_margin=0.03, tau_entropy=0.95, band_low=0.3, band_high=0.7)


@settings(deadline=None, max_examples=300)
@given(scenes, edges, thresholds, st.sampled_from(["cascade", "edge_only", "cloud_only", "random"]), UNIT, st.text())
def test_every_combination_yields_exactly_one_route(scene, edge, tau, mode, ratio, sha256):
    route = decide(scene, edge, Policy(mode, tau, ratio), sha256=sha256)
    kept = {Reason.EDGE_CONFIDENT, Reason.EDGE_ONLY, Reason.EDGE_RANDOM}
    sent = {*ESCALATIONS, Reason.CLOUD_ONLY, Reason.CLOUD_RANDOM}
    assert route.reason in (kept if route.where is Where.EDGE else sent)
    assert route.where in (Where.EDGE, Where.CLOUD)
    assert route == decide(scene, edge, Policy(mode, tau, ratio), sha256=sha256)


@settings(deadline=None, max_examples=300)
@given(UNIT, UNIT, thresholds)
def test_the_router_sends_what_the_calibration_counted_on(scene, p_defect, tau):
    s_max, margin, entropy = (float(value) for value in confidences(p_defect))
    edge = EdgeResult(0.0, p_defect, s_max, margin, entropy)
    route = decide(SceneScore(scene, TERMS), edge, Policy("cascade", tau))
    assert (route.where is Where.CLOUD) == bool(escalation_mask(tau, [scene], [p_defect])[0])


@settings(deadline=None, max_examples=300)
@given(
    scenes,
    edges,
    thresholds,
    st.sampled_from(["tau_scene", "tau_smax", "tau_margin", "tau_entropy", "band_low", "band_high"]),
    UNIT,
)
def test_raising_a_threshold_never_moves_a_part_the_wrong_way(scene, edge, tau, name, value):
    low, high = sorted((getattr(tau, name), value))
    before = decide(scene, edge, Policy("cascade", replace(tau, **{name: low}))).where
    after = decide(scene, edge, Policy("cascade", replace(tau, **{name: high}))).where
    if name in ("tau_smax", "tau_margin", "band_high"):  # a stricter edge: more parts go up
        assert not (before is Where.CLOUD and after is Where.EDGE)
    else:  # a more tolerant one, or a band that begins later: fewer parts go up
        assert not (before is Where.EDGE and after is Where.CLOUD)


@settings(deadline=None, max_examples=200)
@given(UNIT_OR_NAN, UNIT, UNIT)
def test_raising_the_label_threshold_never_turns_good_into_defect(p, tau, other):
    low, high = sorted((tau, other))
    labels = [edge_label(p, Thresholds(tau_edge=t)) for t in (low, high)]
    assert labels != [Label.GOOD, Label.DEFECT]


@settings(deadline=None, max_examples=200)
@given(scenes, edges, thresholds)
def test_a_nan_anywhere_is_never_a_confident_edge_verdict(scene, edge, tau):
    figures = [
        edge.score,
        edge.p_defect,
        edge.s_max,
        edge.margin,
        edge.entropy,
        math.nan if scene is None else scene.score,
    ]
    if any(map(math.isnan, figures)):
        assert decide(scene, edge, Policy("cascade", tau)).where is Where.CLOUD


def test_both_labels_can_be_kept_at_the_edge():
    for edge, label in ((SURE_GOOD, Label.GOOD), (SURE_BAD, Label.DEFECT)):
        route = decide(CALM, edge, Policy("cascade", SAEC))
        assert (route.where, route.reason) == (Where.EDGE, Reason.EDGE_CONFIDENT)
        assert edge_label(edge.p_defect, SAEC) is label


@pytest.mark.parametrize(
    ("scene", "change", "reason"),
    [
        (0.6, {}, Reason.SCENE_COMPLEX),
        (0.1, {"s_max": 0.549}, Reason.LOW_SMAX),
        (0.1, {"margin": 0.029}, Reason.LOW_MARGIN),
        (0.1, {"entropy": 0.951}, Reason.HIGH_ENTROPY),
        (0.1, {"p_defect": 0.3}, Reason.IN_BAND),
        (0.1, {"p_defect": 0.7}, Reason.IN_BAND),
    ],
)
def test_each_test_of_the_acceptance_rule_escalates_for_its_own_reason(scene, change, reason):
    # the reference's default thresholds, arXiv 2509.17136: 0.55 / 0.03 / 0.95
    assert decide(SceneScore(scene, TERMS), replace(SURE_GOOD, **change), Policy("cascade", SAEC)).reason is reason


@pytest.mark.parametrize("change", [{"s_max": 0.55}, {"margin": 0.03}, {"entropy": 0.95}, {"p_defect": 0.2999}])
def test_a_part_exactly_on_the_tolerant_side_of_a_threshold_is_kept(change):
    assert decide(CALM, replace(SURE_GOOD, **change), Policy("cascade", SAEC)).where is Where.EDGE


def test_the_first_reason_in_the_stated_order_is_given():
    edge = EdgeResult(1.0, 0.5, 0.1, 0.0, 1.0)
    tau = SAEC
    found = []
    for lift in ({}, {"tau_scene": math.inf}, {"tau_smax": 0.0}, {"tau_margin": 0.0}, {"tau_entropy": 1.0}):
        tau = replace(tau, **lift)
        found.append(decide(SceneScore(0.9, TERMS), edge, Policy("cascade", tau)).reason)
    assert found == ESCALATIONS


def test_default_thresholds_escalate_nothing():
    for p in (0.0, 0.25, 0.5, 0.75, 1.0):
        edge = EdgeResult(1.0, p, max(p, 1 - p), abs(1 - 2 * p), 1.0)
        assert decide(SceneScore(1.0, TERMS), edge, Policy("cascade", Thresholds())).where is Where.EDGE


def test_random_routing_meets_its_ratio_and_depends_on_content_and_seed_only():
    hashes = [f"{i:064x}" for i in range(4000)]

    def routes(seed: int) -> list[Where]:
        return [decide(None, SURE_GOOD, Policy("random", SAEC, 0.3, seed), sha256=h).where for h in hashes]

    first = routes(1)
    assert first == routes(1) != routes(2)
    # 4,000 draws at 0.3: the standard deviation of the share is 0.0072
    assert abs(first.count(Where.CLOUD) / 4000 - 0.3) < 0.03
    assert all(0 <= lot(7, h) < 1 for h in hashes)


@pytest.mark.parametrize(("ratio", "where"), [(0.0, Where.EDGE), (1.0, Where.CLOUD)])
def test_random_routing_reaches_both_ends(ratio, where):
    assert {decide(None, SURE_GOOD, Policy("random", SAEC, ratio), sha256=str(i)).where for i in range(200)} == {where}


def test_a_probability_that_is_not_a_number_is_never_good():
    assert edge_label(math.nan, Thresholds(tau_edge=1.0)) is Label.DEFECT
    assert final_label(math.nan, 0.1, Thresholds(), Fusion(1.0, 1.0, 0.0)) == (
        Label.GOOD,
        0.1,
    )  # the cloud's word alone


def test_without_a_fusion_the_cloud_decides_at_its_own_threshold():
    tau = Thresholds(tau_cloud=0.26)
    assert final_label(0.99, 0.25, tau, None) == (Label.GOOD, 0.25)
    assert final_label(0.01, 0.26, tau, None) == (Label.DEFECT, 0.26)


def test_a_fusion_weighs_both_opinions():
    half = Fusion(0.5, 0.5, 0.0)
    assert final_label(0.1, 0.9, Thresholds(), half)[1] == pytest.approx(0.5)
    assert final_label(0.1, 0.8, Thresholds(), half)[0] is Label.GOOD
    assert final_label(0.3, 0.8, Thresholds(), half)[0] is Label.DEFECT


def test_the_policy_comes_from_the_settings():
    policy = Policy.of(RouteSettings(mode="random", random_ratio=0.1, seed=7), SAEC)
    assert policy == Policy("random", SAEC, 0.1, 7)
