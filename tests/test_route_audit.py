"""Audits: a fair lot over what the edge is sure of, more of it under drift, the same in a resumed run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from route_fakes import THRESHOLDS, FakeCloud, FakeEdge, make_part, make_parts, make_settings, run_line
from saec.calibrate.drift import FEWEST, Reference
from saec.calibrate.policy import Policy
from saec.calibrate.score import confidences
from saec.calibrate.thresholds import Thresholds, escalation_mask
from saec.config import Settings
from saec.fleet.ledger import Ledger
from saec.route.decide import decide
from saec.route.pipeline import routing_fingerprint
from saec.types import EdgeResult, Image, Part, Reason, SceneScore, SceneTerms, Verdict, Where

TERMS = SceneTerms(0, 0, 0, 0, 0)
UNIT = st.floats(0, 1)
CALM = SceneScore(0.1, TERMS)
SURE = EdgeResult(1.0, 0.02, 0.98, 0.96, 0.1)
HASHES = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(4000)]
QUIET = np.linspace(0, 1, 200)
"""Raw scores at the calibration."""


def audited(share: float, drift_share: float = 0.5, **route: object) -> Settings:
    learn = {"audit_share": share, "drift_share": drift_share}
    return make_settings(route=route).model_copy(update={"learn": Settings.model_validate({"learn": learn}).learn})


class WatchedEdge(FakeEdge):
    """An edge whose calibration saw raw scores from 0 to 1: ``bad`` parts (9.5) are nothing that it knows."""

    def predict(self, image: Image, product: str) -> EdgeResult:
        found = super().predict(image, product)
        return replace(found, score=float(image[0, 0, 0]) % 20 / 20) if found.p_defect < 0.1 else found

    def policy(self, product: str) -> Policy:
        flags = np.zeros(200, dtype=bool)
        known = Reference.of(QUIET, np.full(200, 0.2), QUIET / 10, flags, flags, THRESHOLDS)
        return replace(super().policy(product), drift=known)


def verdicts(folder: Path) -> list[Verdict]:
    with Ledger(folder / "ledger.sqlite") as ledger:
        return list(ledger.verdicts())


def audits(found: list[Verdict]) -> list[str]:
    return [v.part_id for v in found if v.escalated_for is Reason.AUDIT]


def stream(count: int, kind: str, first: int = 1) -> list[Part]:
    return [make_part(number, kind) for number in range(first, first + count)]


# -- the rule


@settings(deadline=None, max_examples=300)
@given(UNIT, UNIT, UNIT, st.text(), st.sampled_from([0.3, 0.6]))
def test_an_audit_only_ever_adds_to_what_the_rule_sends(scene, p_defect, share, sha256, low):
    tau = Thresholds(tau_scene=0.8, band_low=low, band_high=0.7)
    s_max, margin, entropy = (float(value) for value in confidences(p_defect))
    edge = EdgeResult(0.0, p_defect, s_max, margin, entropy)
    plain = decide(SceneScore(scene, TERMS), edge, Policy("cascade", tau), sha256=sha256)
    route = decide(SceneScore(scene, TERMS), edge, Policy("cascade", tau, audit_share=share), sha256=sha256)
    if escalation_mask(tau, [scene], [p_defect])[0]:
        assert route == plain
    else:
        assert route.reason in (Reason.AUDIT, Reason.EDGE_CONFIDENT)
        assert (route.where is Where.CLOUD) == (route.reason is Reason.AUDIT)


def test_the_lot_is_fair_and_the_same_every_time():
    policy = Policy("cascade", THRESHOLDS, audit_share=0.1)
    drawn = [decide(CALM, SURE, policy, sha256=h).where is Where.CLOUD for h in HASHES]
    assert 0.08 < np.mean(drawn) < 0.12
    assert drawn == [decide(CALM, SURE, policy, sha256=h).where is Where.CLOUD for h in HASHES]
    more = [decide(CALM, SURE, replace(policy, audit_share=0.5), sha256=h).where is Where.CLOUD for h in HASHES]
    assert all(later for first, later in zip(drawn, more, strict=True) if first)  # a larger share keeps the smaller one


def test_another_seed_audits_other_parts():
    one, other = ([decide(CALM, SURE, Policy("cascade", THRESHOLDS, seed=seed, audit_share=0.5), sha256=h).where
                   for h in HASHES[:200]] for seed in (1, 2))  # fmt: skip
    assert one != other


@pytest.mark.parametrize("mode", ["edge_only", "cloud_only", "random"])
def test_the_baselines_are_never_audited(mode):
    policy = Policy(mode, THRESHOLDS, audit_share=1.0)
    assert all(decide(CALM, SURE, policy, sha256=h).reason is not Reason.AUDIT for h in HASHES[:100])


# -- on the line


def test_without_being_asked_nothing_is_audited_and_a_run_is_what_it_was(tmp_path):
    assert Settings().learn.audit_share == 0
    run_line(tmp_path, stream(80, "bad"), WatchedEdge(), FakeCloud())
    assert audits(verdicts(tmp_path)) == []
    tree: Mapping[str, object] = Settings().model_dump()
    assert routing_fingerprint(Settings()) == routing_fingerprint(Settings.model_validate(tree))
    assert routing_fingerprint(audited(0.02)) != routing_fingerprint(Settings())


def test_while_the_watch_has_an_alarm_more_is_audited(tmp_path):
    parts = stream(60, "good") + stream(60, "bad", 100) + stream(100, "bad", 200)
    run_line(tmp_path, parts, WatchedEdge(), FakeCloud(), audited(0.02, 0.9))
    found = audits(verdicts(tmp_path))
    calm, drifted = ([p for p in found if low <= int(p[:5]) < high] for low, high in ((0, 60), (200, 300)))
    assert len(calm) < 10
    assert len(drifted) > 80


def test_an_edge_without_a_reference_is_audited_at_the_quiet_share(tmp_path):
    run_line(tmp_path, stream(200, "bad"), FakeEdge(), FakeCloud(), audited(0.1, 1.0))
    assert 5 < len(audits(verdicts(tmp_path))) < 40


def test_audits_keep_to_the_budget(tmp_path):
    stats = run_line(tmp_path, stream(50, "good"), WatchedEdge(), FakeCloud(), audited(1.0, budget_share=0.1))
    found = verdicts(tmp_path)
    assert stats.escalated == 5
    assert len(audits(found)) == 50  # all were wanted, and the rest says what kept it
    assert sum(v.reason is Reason.EDGE_BUDGET for v in found) == 45


def test_a_resumed_run_audits_what_an_undisturbed_one_does(tmp_path):
    parts = stream(40, "good") + stream(FEWEST + 30, "bad", 100) + make_parts(60)[40:]
    settings = audited(0.05, 0.8)
    run_line(tmp_path / "whole", parts, WatchedEdge(), FakeCloud(), settings)
    for cut in (55, 83, len(parts)):
        run_line(tmp_path / "cut", parts[:cut], WatchedEdge(), FakeCloud(), settings)
    whole, again = (verdicts(tmp_path / name) for name in ("whole", "cut"))
    assert audits(again) == audits(whole)
    assert [(v.part_id, v.label, v.where, v.reason) for v in again] == [
        (v.part_id, v.label, v.where, v.reason) for v in whole
    ]
