"""Explaining on the edge: rejects get a sentence after their verdict, which neither waits for it nor changes by it."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from route_fakes import (
    FakeCloud,
    FakeEdge,
    FakeExplainer,
    fake_decode,
    make_part,
    make_parts,
    make_settings,
    run_line,
)
from saec.errors import BadInput
from saec.fleet.ledger import Ledger, read_verdicts
from saec.fleet.schema import APPLICATION_ID, MIGRATIONS
from saec.route import explain_side
from saec.types import Box, CloudError, Evidence, Explanation, Image, Label, Opinion, Query, Reason, Verdict, Where


def verdicts_of(folder: Path) -> dict[str, Verdict]:
    return {v.part_id: v for v in read_verdicts(folder / "ledger.sqlite")}


def refused(_: int) -> None:
    raise CloudError(Reason.CLOUD_REFUSED, "no")


# -- what is explained, and by whom ---------------------------------------------------------------------------------


def test_without_a_cloud_every_reject_keeps_its_boxes_and_gets_a_sentence_with_both_sources_named(tmp_path):
    explainer = FakeExplainer()
    stats = run_line(tmp_path, make_parts(21), FakeEdge(), None, explainer=explainer)
    found = verdicts_of(tmp_path)
    rejects = [v for v in found.values() if v.label is Label.DEFECT]
    assert len(rejects) == len(explainer.queries) == stats.explained > 1
    for v in rejects:
        assert v.explanation is Explanation.GIVEN
        assert v.evidence == Evidence((Box(0, 0, 4, 4),), "surface", f"a scratch on {v.part_id}", "fake-vlm-1")
        assert v.models["explain"] == "fake-vlm-1"
        assert v.timings_ms["explain"] >= 0
    assert all(v.explanation is None for v in found.values() if v.label is not Label.DEFECT)


def test_the_source_names_who_marked_and_who_spoke(tmp_path):
    class Marking(FakeEdge):
        def predict(self, image: Image, product: str):
            result = super().predict(image, product)
            return replace(result, evidence=replace(result.evidence, source="edge-heatmap"))

    run_line(tmp_path, [make_part(1, "bad")], Marking(), None, explainer=FakeExplainer())
    assert verdicts_of(tmp_path)["00001-bad"].evidence.source == "edge-heatmap+fake-vlm-1"


def test_the_explainer_sees_the_whole_part_and_its_anomaly_map(tmp_path):
    explainer = FakeExplainer()
    settings = make_settings(cloud={"uplink": "crop"})
    run_line(tmp_path, [make_part(1, "bad")], FakeEdge(), None, settings, explainer=explainer)
    (query,) = explainer.queries
    assert (query.image == fake_decode(Path("00001-bad.png"))[1]).all()
    assert query.region is None
    assert query.anomaly_map is not None and query.anomaly_map.tolist() == [[pytest.approx(0.95)] * 2] * 2


def test_a_reject_whose_cloud_fell_back_is_explained_and_one_that_the_cloud_explained_is_not(tmp_path):
    class Wordless(FakeCloud):
        """Fails on the second part, and says nothing but P(defect) of the third."""

        def judge(self, query: Query, *, deadline_s: float) -> Opinion:
            opinion = super().judge(query, deadline_s=deadline_s)
            number = int(query.part_id[:5])
            if number == 2:
                refused(number)
            return replace(opinion, evidence=Evidence(source=self.model_id)) if number == 3 else opinion

    settings = make_settings(cloud={"retries": 0})
    edge, explainer = FakeEdge(mode="cloud_only"), FakeExplainer()
    run_line(tmp_path, [make_part(n, "bad") for n in (1, 2, 3)], edge, Wordless(), settings, explainer=explainer)
    said = {v.part_id: (v.where, v.evidence.kind, v.explanation) for v in verdicts_of(tmp_path).values()}
    assert said == {
        "00001-bad": (Where.CLOUD, "scratch", None),
        "00002-bad": (Where.FALLBACK, "surface", Explanation.GIVEN),
        "00003-bad": (Where.CLOUD, "surface", Explanation.GIVEN),
    }
    assert all(query.anomaly_map is not None for query in explainer.queries)


# -- what it never does ---------------------------------------------------------------------------------------------


def test_an_explanation_changes_nothing_but_evidence_models_and_timings(tmp_path):
    parts = make_parts(30)
    for name, explainer in (("with", FakeExplainer()), ("without", None)):
        cloud = FakeCloud(fails=lambda number: refused(number) if number % 2 else None)
        settings = make_settings(cloud={"in_flight": 1, "retries": 0, "breaker_failures": 99})
        run_line(tmp_path / name, parts, FakeEdge(), cloud, settings, explainer=explainer)
    plain, explained = verdicts_of(tmp_path / "without"), verdicts_of(tmp_path / "with")
    assert any(v.explanation for v in explained.values())
    for name, v in explained.items():
        undone = {"evidence": plain[name].evidence, "models": plain[name].models, "explanation": None}
        assert replace(v, timings_ms={}, **undone) == replace(plain[name], timings_ms={})
        assert v.evidence.boxes == plain[name].evidence.boxes


def test_no_local_verdict_waits_for_an_explanation_however_many_are_open(tmp_path):
    """The first sentence takes until all verdicts are there: with any queue that fills up, they never were."""
    all_there = threading.Event()
    told = []

    def on_verdict(verdict: Verdict, final: bool) -> None:
        told.append(verdict.explanation)
        if len(told) == 60:
            all_there.set()

    def wait(_: int) -> None:
        assert all_there.wait(20), "the line waited for the explainer"

    settings = make_settings(route={"queue": 1})
    parts = [make_part(n, "bad") for n in range(60)]
    explainer = FakeExplainer(before=wait)
    run_line(tmp_path, parts, FakeEdge(), None, settings, explainer=explainer, on_verdict=on_verdict)
    assert told == [None] * 60 + [Explanation.GIVEN] * 60


def test_explanations_cost_nothing_of_the_clouds_budget(tmp_path):
    run_line(tmp_path, make_parts(21), FakeEdge(), None, explainer=FakeExplainer())
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        spent = ledger.spent()
    assert (spent.questions, spent.answered) == (0, 0)


# -- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "in_time"),
    [(None, False), (lambda _: time.sleep(0.03), True)],
    ids=["gives up in time", "answers after the deadline"],
)
def test_too_late_leaves_the_boxes_alone_and_is_counted_with_its_reason(tmp_path, before, in_time):
    settings = make_settings(explain={"budget_ms": 20})
    explainer = FakeExplainer(before=before, in_time=in_time)
    run_line(tmp_path, [make_part(1, "bad")], FakeEdge(), None, settings, explainer=explainer)
    (v,) = verdicts_of(tmp_path).values()
    assert (v.explanation, v.error) == (Explanation.LATE, "no explanation: no sentence within 0.02 s")
    assert v.evidence == Evidence((Box(0, 0, 4, 4),))
    assert v.models["explain"] == "fake-vlm-1"


def test_an_explainer_that_fails_is_recorded_part_by_part(tmp_path):
    def fails(number: int) -> None:
        if number == 1:
            raise ValueError("not the asked JSON")

    parts = [make_part(1, "bad"), make_part(2, "bad")]
    run_line(tmp_path, parts, FakeEdge(), None, explainer=FakeExplainer(before=fails))
    first, second = verdicts_of(tmp_path).values()
    assert (first.explanation, first.error) == (
        Explanation.FAILED,
        "no explanation: ValueError: not the asked JSON",
    )
    assert second.explanation is Explanation.GIVEN and second.error is None


def test_an_explainer_that_says_nothing_has_failed(tmp_path):
    class Mute(FakeExplainer):
        def explain(self, query: Query, *, deadline: float) -> Evidence | None:
            return Evidence(source=self.model_id)

    run_line(tmp_path, [make_part(1, "bad")], FakeEdge(), None, explainer=Mute())
    (v,) = verdicts_of(tmp_path).values()
    assert (v.explanation, v.error) == (Explanation.FAILED, "no explanation: the model said nothing")


def test_an_image_that_changed_after_its_verdict_is_not_explained_as_if_it_were_the_same(tmp_path):
    reads = Counter()

    def decode(path: Path):
        reads[path] += 1
        sha256, image = fake_decode(path)
        return (sha256 if reads[path] == 1 else "0" * 64), image

    explainer = FakeExplainer()
    run_line(tmp_path, [make_part(1, "bad")], FakeEdge(), None, explainer=explainer, decode=decode)
    (v,) = verdicts_of(tmp_path).values()
    assert v.explanation is Explanation.FAILED and "has changed" in (v.error or "")
    assert explainer.queries == []


def test_an_explainer_that_never_comes_back_does_not_hold_up_the_end_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(explain_side, "HUNG_S", 0.1)
    release = threading.Event()
    parts = [make_part(1, "bad"), make_part(2, "bad")]
    hung = FakeExplainer(before=lambda _: release.wait(20))
    settings = make_settings(explain={"budget_ms": 50})
    stats = run_line(tmp_path, parts, FakeEdge(), None, settings, explainer=hung)
    release.set()
    assert (stats.parts, stats.explained, stats.left_unexplained) == (2, 0, 2)
    run_line(tmp_path, parts, FakeEdge(), None, settings, explainer=FakeExplainer())
    assert {v.explanation for v in verdicts_of(tmp_path).values()} == {Explanation.GIVEN}


# -- interrupted runs (kill -9: test_route_kill.py) -----------------------------------------------------------------


def test_a_run_interrupted_between_explanations_is_taken_up_and_equals_an_undisturbed_one(tmp_path):
    told = []

    def interrupted(verdict: Verdict, final: bool) -> None:
        if verdict.explanation is not None:
            told.append(verdict)
            if len(told) == 1:
                raise KeyboardInterrupt

    parts = [make_part(n, "bad") for n in range(12)]
    slow = FakeExplainer(before=lambda _: time.sleep(0.05))
    stats = run_line(tmp_path / "run", parts, FakeEdge(), None, explainer=slow, on_verdict=interrupted)
    assert stats.interrupted and stats.left_unexplained > 0
    rest = FakeExplainer()
    edge = FakeEdge()
    resumed = run_line(tmp_path / "run", parts, edge, None, explainer=rest)
    assert len(slow.queries) + len(rest.queries) == len(parts)
    assert edge.calls == len(parts) - stats.parts  # none is judged again for its sentence
    assert (resumed.explained, resumed.left_unexplained) == (len(rest.queries), 0)
    run_line(tmp_path / "whole", parts, FakeEdge(), None, explainer=FakeExplainer())
    left, right = (verdicts_of(tmp_path / name) for name in ("run", "whole"))
    assert {n: replace(v, timings_ms={}) for n, v in left.items()} == {
        n: replace(v, timings_ms={}) for n, v in right.items()
    }


def test_what_is_open_stays_open_while_nobody_explains(tmp_path):
    release = threading.Event()
    parts = [make_part(n, "bad") for n in range(3)]

    def interrupted(verdict: Verdict, final: bool) -> None:
        if not release.is_set():
            release.set()
            raise KeyboardInterrupt

    explainer = FakeExplainer(before=lambda _: release.wait(20))
    run_line(tmp_path, parts, FakeEdge(), None, explainer=explainer, on_verdict=interrupted)
    open_before = run_line(tmp_path, parts, FakeEdge(), None).left_unexplained
    assert open_before > 0
    assert run_line(tmp_path, parts, FakeEdge(), None, explainer=FakeExplainer()).explained == open_before


def test_an_explanation_is_recorded_once_and_its_heatmap_is_kept_no_longer(tmp_path):
    run_line(tmp_path, [make_part(1, "bad")], FakeEdge(), None, explainer=FakeExplainer())
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        (v,) = ledger.verdicts()
        with pytest.raises(BadInput, match="no explanation is open"):
            ledger.explain(1, replace(v, label=Label.GOOD)).result()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("SELECT count(*) FROM heatmaps").fetchone() == (0,)
    db.close()
    assert verdicts_of(tmp_path) == {"00001-bad": v}


def test_a_ledger_from_before_explanations_is_taken_up(tmp_path):
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        MIGRATIONS[0](db)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
    db.close()
    run_line(tmp_path, [make_part(1, "bad")], FakeEdge(), None, explainer=FakeExplainer())
    assert verdicts_of(tmp_path)["00001-bad"].explanation is Explanation.GIVEN
