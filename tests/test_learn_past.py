"""What a line need not ask about again, and what it asks about until it is learnt."""

from __future__ import annotations

import pytest

from saec.config import LearnSettings
from saec.errors import BadInput
from saec.learn.past import SAMPLES, End, Past, known_parts, past_samples
from saec.learn.round import Taken
from saec.learn.rulings import Ruling
from saec.types import Label, Reason, Verdict, Where

ONE, OTHER, PROBE = "00000001" + "a" * 56, "00000002" + "b" * 56, "00000005" + "c" * 56


def said(sha256: str, p: float, who: str = "model") -> Ruling:
    return Ruling(sha256, "part", p, who, "oracle", "2026-01-01T00:00:00+00:00", "f" * 64)  # type: ignore[arg-type]


def past(sha256: str, job: int, end: End = "dropped", human: Label | None = None) -> Past:
    verdict = Verdict("part", sha256, "plate", "a.png", Label.GOOD, 0.4, Where.EDGE, Reason.IN_BAND)
    return Past(job=f"{job:064x}", end=end, taken=Taken.of(verdict, human))


def known(learnt=(), rulings=(), people=None, before=()) -> set[str]:
    return known_parts(dict(learnt), rulings, people or {}, before, LearnSettings())


def test_an_opinion_is_known_once_the_version_at_work_has_learnt_it():
    assert known(rulings=[said(ONE, 0.9)]) == set()
    assert known([(ONE, 0.9)], [said(ONE, 0.9)]) == {ONE}


def test_what_the_teacher_is_not_sure_of_and_the_probe_set_are_not_asked_about_again():
    assert known(rulings=[said(ONE, 0.6), said(PROBE, 0.9)]) == {ONE, PROBE}


def test_what_the_station_was_fitted_on_is_known_but_for_another_label():
    assert known([(ONE, 1.0), (OTHER, None)]) == {ONE, OTHER}
    assert known([(ONE, 1.0)], people={ONE: Label.DEFECT}) == {ONE}
    assert known([(ONE, 1.0)], people={ONE: Label.GOOD}) == set()


@pytest.mark.parametrize("sha256", [ONE, PROBE])
def test_a_persons_label_goes_up_once_and_again_when_it_changes(sha256):
    people = {sha256: Label.DEFECT}
    learnt = [] if sha256 == PROBE else [(sha256, 1.0)]
    assert known(rulings=[said(sha256, 0.95)], people=people) == set()
    assert known(learnt, [said(sha256, 0.95), said(sha256, 1.0, "human")], people) == {sha256}
    assert known(learnt, [said(sha256, 1.0, "human")], {sha256: Label.GOOD}) == set()


def test_a_label_whose_update_was_dropped_is_not_known_though_the_version_has_learnt_another():
    assert known([(ONE, 0.0)], [said(ONE, 1.0, "human")], {ONE: Label.DEFECT}) == set()


def test_a_models_opinion_rests_after_two_dropped_updates_and_a_persons_never():
    rulings = [said(ONE, 0.9), said(OTHER, 1.0, "human")]
    both = [past(sha256, job) for job in (1, 2) for sha256 in (ONE, OTHER)]
    assert known(rulings=rulings, before=both[:2]) == set()
    assert known(rulings=rulings, before=[*both[:2], *both[:2]]) == set(), "the same round noted twice is one"
    assert known(rulings=rulings, before=[*both[:2], past(ONE, 3, "over"), past(ONE, 4, "learnt")]) == set()
    assert known(rulings=rulings, before=both) == {ONE}
    assert known(rulings=rulings, before=both, people={ONE: Label.GOOD}) == set()


def test_a_line_that_a_killed_process_left_unfinished_is_dropped(tmp_path):
    file = tmp_path / SAMPLES
    whole = past(ONE, 1).model_dump_json() + "\n"
    file.write_text(whole + whole[:40])
    assert [each.taken.sha256 for each in past_samples(tmp_path)] == [ONE]
    assert file.read_text() == whole
    file.write_text("{}\n")
    with pytest.raises(BadInput, match=r"not samples.*samples\.jsonl \(restore or remove the file"):
        past_samples(tmp_path)
