"""The report without a browser: what it reads, what it says, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate_fakes import BAD, GOOD, verdicts, write_run
from saec.calibrate.sweep import SweepPoint
from saec.errors import BadInput
from saec.evaluate.report import RunFolder, render, write_report
from saec.evaluate.report_images import AT_THRESHOLD, encode_heatmap, overlay
from saec.evaluate.report_svg import nice_ticks, thin
from saec.evaluate.report_view import comparison, gallery, main_cards
from saec.evaluate.report_words import (
    REASONS,
    WHERE,
    all_defect,
    attention,
    drifted,
    headline,
    interval,
    number,
    percent,
    size,
    uncertainty,
)
from saec.evaluate.run_record import ASK_ALWAYS
from saec.evaluate.summary import summarise
from saec.types import Label, Reason, Verdict, Where


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path / "cascade", verdicts(tmp_path / "images"))


def judged(truth: Label | None, label: Label, n: int) -> list[Verdict]:
    p = 0.9 if label is BAD else 0.1
    one = Verdict("p", "0" * 64, "cell", "gone.png", label, p, Where.EDGE, Reason.EDGE_CONFIDENT, truth=truth)
    return [one] * n


# ---- words


def test_the_headline_counts_mistakes_in_plain_words() -> None:
    found = judged(BAD, GOOD, 4) + judged(BAD, BAD, 100) + judged(GOOD, BAD, 1) + judged(GOOD, GOOD, 199)
    assert headline(summarise(found)) == "4 of 104 defects slipped through and 1 of 200 good parts was rejected."
    perfect = headline(summarise(judged(BAD, BAD, 9) + judged(GOOD, GOOD, 9)))
    assert perfect == "None of 9 defects slipped through and none of 9 good parts were rejected."


def test_the_headline_admits_what_it_cannot_know() -> None:
    unknown = summarise(judged(None, GOOD, 3) + judged(None, BAD, 1))
    assert headline(unknown) == "1 of 4 parts was called defect."
    assert uncertainty(unknown).startswith("Their truth is unknown, so mistakes cannot be counted.")
    assert [(card.name, card.value) for card in main_cards(unknown)[:2]] == [
        ("Called defect", "1"),
        ("Called good", "3"),
    ]
    assert headline(summarise([])) == "No parts were inspected."
    partly = headline(summarise(judged(GOOD, GOOD, 3) + judged(None, GOOD, 7)))
    assert partly.endswith("Truth is known for 3 of 10 parts.")


def alarm(since: int, statement: str, kind: str = "score") -> dict[str, Any]:
    return {"kind": kind, "value": 0.5, "limit": 0.3, "n": 50, "since": since, "statement": statement}


def test_drift_that_stands_is_said_first_with_its_figures_at_the_end_and_what_to_do(run: RunFolder) -> None:
    stale, now, gone = alarm(30, "median 3"), alarm(30, "median -8.2"), alarm(70, "90% rejected", "rejects")
    proposal = {"action": "re-calibrate", "why": "new thresholds are enough"}
    seen = {"n": 120, "window": 50, "standing": [now], "raised": [stale, gone], "proposal": proposal}
    over = {**seen, "standing": []}
    said = drifted({"drift": {"cell": seen, "nut": over, "bolt": {**over, "raised": [], "proposal": None}}})
    assert said == [
        "cell has drifted: median \N{MINUS SIGN}8.2 (from part 30 on). "
        "Proposal: re-calibrate: new thresholds are enough.",
        "nut: alarms of the drift watch came up and were over at the end (score, rejects).",
    ]
    page = render([replace(run, summary={**run.summary, "drift": {"cell": seen}})])
    before_relying = page[page.index('class="attention"') : page.index('id="parts"')]
    assert f'{said[0]} <a href="#drift">' in before_relying
    assert "median 3" not in page
    section = page[page.index('<section id="drift">') :]
    assert "rejects: 90% rejected (from part 70 on); over 50 parts, over at the end" in section
    assert "stands at the end" in section
    assert 'href="#drift"' not in render([run])


def test_few_defects_come_with_a_warning_about_what_they_prove() -> None:
    notes = attention(summarise(judged(BAD, BAD, 10) + judged(GOOD, GOOD, 10)))
    assert notes == [
        "With 10 defects the true escape rate may be as high as 30.8\u202f%. More labelled defects narrow this."
    ]
    assert "says nothing about escapes" in attention(summarise(judged(GOOD, GOOD, 10)))[0]


def test_an_edge_that_escalates_almost_everything_is_called_out() -> None:
    sent = [replace(v, where=Where.CLOUD, reason=Reason.IN_BAND) for v in judged(GOOD, GOOD, 10)]
    assert any("no longer fits" in note for note in attention(summarise(sent)))
    asked = [replace(v, reason=Reason.CLOUD_ONLY) for v in sent]
    assert not any("no longer fits" in note for note in attention(summarise(asked)))


def test_rates_on_parts_that_the_station_has_learnt_from_come_with_a_warning() -> None:
    found = judged(BAD, BAD, 400) + judged(GOOD, GOOD, 400)
    assert not attention(summarise(found))
    assert "the rates flatter it" in attention(summarise(found, learnt={found[0].sha256}))[0]


def test_parts_that_are_all_called_defect_raise_the_question_whether_they_belong_here() -> None:
    assert "Every part was called defect" in attention(summarise(judged(None, BAD, 10)))[0]
    assert not attention(summarise(judged(None, BAD, 9)))  # nine defects in a row happen
    assert not all_defect(summarise(judged(BAD, BAD, 50)))  # they are defects
    assert not all_defect(summarise(judged(None, BAD, 50) + judged(None, GOOD, 1)))


def test_a_run_for_a_sweep_is_not_told_to_recalibrate() -> None:
    sent = [replace(v, where=Where.CLOUD, reason=Reason.IN_BAND) for v in judged(GOOD, GOOD, 10)]
    notes = attention(summarise(sent, models={"router": ASK_ALWAYS}))
    assert any("for a sweep" in note for note in notes) and not any("Recalibrate" in note for note in notes)


def test_every_reason_and_every_place_has_plain_words() -> None:
    assert set(REASONS) == set(Reason) and set(WHERE) == set(Where)


def test_figures_are_written_with_three_digits_and_missing_ones_as_a_dash() -> None:
    assert [number(v) for v in (0.1302, 20.61, 412.7, 0, 0.0, 60, 1234.5)] == [
        *("0.130", "20.6", "413", "0", "0", "60", "1,234")
    ]
    assert (number(None), percent(None), interval(None), size(None)) == ("–", "–", "–", "–")
    assert size(3_400_000) == "3.4\u202fMB"


# ---- charts and pictures


@settings(deadline=None, max_examples=100)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_rise_and_cover_the_range(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 12 and list(ticks) == sorted(set(ticks))
    slack = 1e-6 * max(1.0, abs(low), span)
    assert ticks[0] <= low + slack and ticks[-1] >= low + span - slack


def test_thinning_a_line_keeps_its_ends() -> None:
    points = [(float(i), 0.0) for i in range(5000)]
    kept = thin(points)
    assert len(kept) == 300 and kept[0] == points[0] and kept[-1] == points[-1]


def test_the_stored_heatmap_puts_the_threshold_at_128() -> None:
    heat = np.array([[0.0, 1.5, 3.0, 9.0, np.nan, np.inf, -1.0]], np.float32)
    assert encode_heatmap(heat / 3).tolist() == [[0, 64, AT_THRESHOLD, 255, 0, 255, 0]]


def test_an_ordinary_heatmap_is_clear_and_a_suspicious_one_is_not() -> None:
    import base64

    import cv2

    def alpha(level: int) -> int:
        uri = overlay(np.full((8, 8), level, np.uint8))
        data = np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8)
        return int(cv2.imdecode(data, cv2.IMREAD_UNCHANGED)[..., 3].mean())

    assert alpha(30) == 0 < alpha(100) < alpha(128) < alpha(200)


# ---- the page


class Page(HTMLParser):
    """Collects what the tests ask about: addresses, tags, ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "srcset") and value:
                self.addresses.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_the_page_asks_for_nothing_outside_itself(run: RunFolder) -> None:
    text = render([run])
    page = Page(text)
    assert all(a.startswith(("data:", "#")) for a in page.addresses)
    assert "@import" not in text and "url(" not in text
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_shows_each_section_and_the_honest_status_of_energy(run: RunFolder) -> None:
    text = render([run])
    for heading in (
        "Parts",
        "Quality",
        "Routing",
        "Speed",
        "Products",
        "Calibration",
        "Record",
        "How to read this page",
    ):
        assert f">{heading}</h2>" in text
    for chart in ("Threshold sweep", "Risk against coverage", "Time to the local verdict"):
        assert f"<h3>{chart}</h3>" in text
    assert "unavailable: no energy counter on this machine" in text
    assert "nothing is guaranteed" in text  # no calibration was recorded with this run


def test_the_same_runs_give_the_same_bytes(run: RunFolder) -> None:
    assert render([run]) == render([run])


def test_hostile_names_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    found = [
        replace(v, product=evil, part_id=evil, error=evil, evidence=replace(v.evidence, kind=evil, text=evil))
        for v in verdicts(tmp_path / "images")
    ]
    found[2] = replace(found[2], path=f"/nowhere/{evil}.png", models={"edge": evil})
    hostile: dict[str, Any] = {"name": evil, evil: evil, "environment": {evil: [evil]}}
    calibration = {"statement": evil, "products": {evil: {"statement": evil, evil: 1}}, evil: evil}
    run = write_run(tmp_path / "run", found, manifest=hostile, calibration=calibration)
    text = render([run, run])
    page = Page(text)
    assert page.tags.count("script") == 1  # the page's own
    assert "<script>alert" not in text and "<img src=x" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_calibration_statements_are_shown_as_given(tmp_path: Path) -> None:
    calibration = {
        "statement": "Overkill at most 5 %.",
        "products": {"cell": {"statement": "not enough data: 9 defects can prove at best 28 %"}},
    }
    text = render([write_run(tmp_path / "run", verdicts(tmp_path / "images"), calibration=calibration)])
    assert "Overkill at most 5 %." in text and "9 defects can prove at best 28 %" in text


def test_several_runs_stand_side_by_side_with_the_best_marked(tmp_path: Path) -> None:
    good = verdicts(tmp_path / "images")
    worse = [replace(v, label=BAD, p_defect=0.9) if i % 4 == 1 else v for i, v in enumerate(good)]
    runs = [
        write_run(tmp_path / "edge only", worse, manifest={"mode": "edge_only"}),
        write_run(tmp_path / "main", good),
    ]
    columns, rows = comparison(runs)
    place = columns.index("Accuracy")
    assert [(name, cells[place].best) for name, cells in rows] == [("edge only", False), ("main", True)]
    assert not any(cells[columns.index("To the cloud")].best for _, cells in rows)  # a dial, not a merit
    text = render(runs)
    assert "<h3>Accuracy against escalation</h3>" in text and "Escalated share turned" not in text
    points = [SweepPoint("share", s, 30, 0.9 + s / 20, None, None, None, s, None) for s in (0.0, 0.5, 1.0)]
    assert "Escalated share turned" in render(runs, sweep=points)
    assert "Inspection report · main" in text  # the cascade is the main run although it came second


def test_runs_that_tie_in_everything_have_no_best(run: RunFolder) -> None:
    assert not any(cell.best for _, cells in comparison([run, run])[1] for cell in cells)


def test_a_run_without_truth_still_makes_a_page(tmp_path: Path) -> None:
    found = [replace(v, truth=None) for v in verdicts(tmp_path / "images")]
    text = render([write_run(tmp_path / "run", found)])
    assert "Their truth is unknown" in text and "truth unknown" not in text and "need parts of both classes" in text


def test_an_empty_run_makes_a_page(tmp_path: Path) -> None:
    assert "No parts were inspected." in render([write_run(tmp_path / "run", [])])


# ---- the gallery


def test_the_gallery_shows_mistakes_first_and_states_the_total(run: RunFolder) -> None:
    shown = gallery(run, limit=10)
    assert [i.kind for i in shown.items[:4]] == ["escape", "escape", "overkill", "unreadable"]
    assert "fallback" in shown.items[4].flags
    assert shown.statement.startswith("10 parts of 30,") and len(shown.items) == 10
    assert {key: n for key, _, n in shown.filters}["escape"] == 2


def test_a_missing_image_is_a_placeholder(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "images" / "part00.png").unlink()
    item = next(i for i in gallery(run).items if i.part_id == "part00")
    assert item.image is None and item.missing == "the image is no longer at its place"


def test_another_image_at_the_same_path_is_not_shown_as_the_part(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "images" / "part00.png").write_bytes((tmp_path / "images" / "part01.png").read_bytes())
    item = next(i for i in gallery(run).items if i.part_id == "part00")
    assert item.image is None and item.missing == "another image is at this place now"


def test_a_damaged_image_or_heatmap_does_not_stop_the_report(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "images" / "part00.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (run.path / "heatmaps" / f"{run.verdicts[1].sha256[:16]}.png").write_bytes(b"")
    items = {i.part_id: i for i in gallery(run).items}
    assert items["part00"].image is None and items["part00"].missing
    assert items["part01"].image and items["part01"].heat is None


def test_relative_paths_may_start_at_the_run_folder(tmp_path: Path) -> None:
    found = [replace(v, path=f"../images/{Path(v.path).name}") for v in verdicts(tmp_path / "images")]
    shown = gallery(write_run(tmp_path / "run", found))
    assert all(i.image for i in shown.items if i.kind != "unreadable")


def test_suspicion_puts_every_threshold_at_one_half(tmp_path: Path) -> None:
    one = Verdict("p", "0" * 64, "a", "", GOOD, 0.2, Where.EDGE, Reason.EDGE_CONFIDENT)
    found = [
        one,
        replace(one, label=BAD, p_defect=0.3),  # product a cuts between 0.2 and 0.3 at the edge,
        replace(one, p_defect=0.7, where=Where.CLOUD),  # between 0.7 and 0.8 in the cloud,
        replace(one, label=BAD, p_defect=0.8, where=Where.CLOUD),
        replace(one, product="b", p_defect=0.4),  # and b at the stated 0.45
        replace(one, product="b", p_defect=0.5, label=BAD),
    ]
    calibration = {"products": {"b": {"thresholds": {"tau_edge": 0.45}}}}
    run = write_run(tmp_path / "run", found, calibration=calibration)
    assert [run.suspicion[i] < 0.5 for i in range(6)] == [True, False] * 3
    assert run.suspicion[4] == pytest.approx(0.5 * 0.4 / 0.45)


# ---- refusals


def damaged(run: RunFolder, name: str, text: str) -> str:
    (run.path / name).write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as error:
        RunFolder.load(run.path)
    return str(error.value)


def test_a_damaged_prediction_names_the_file_and_the_line(run: RunFolder) -> None:
    lines = (run.path / "predictions.jsonl").read_text().splitlines()
    lines[4] = lines[4][:50]
    assert re.search(r"predictions\.jsonl:5", damaged(run, "predictions.jsonl", "\n".join(lines)))


def test_a_damaged_summary_or_manifest_names_the_file_and_the_line(run: RunFolder) -> None:
    assert re.search(r"damaged JSON .*manifest\.json:2", damaged(run, "manifest.json", '{"a": 1,\n oops}'))
    assert re.search(r"expected a JSON object: .*summary\.json:1", damaged(run, "summary.json", "[]"))


def test_a_summary_of_another_version_or_of_other_parts_is_refused(run: RunFolder) -> None:
    summary = json.loads((run.path / "summary.json").read_text())
    assert "counts 31 parts, predictions.jsonl has 30" in damaged(run, "summary.json", json.dumps(summary | {"n": 31}))
    del summary["routing"]
    assert "the summary lacks routing" in damaged(run, "summary.json", json.dumps(summary))


@pytest.mark.parametrize("name", ["predictions.jsonl", "summary.json", "manifest.json"])
def test_an_unfinished_run_is_refused_with_the_missing_file(run: RunFolder, name: str) -> None:
    (run.path / name).unlink()
    with pytest.raises(BadInput, match=rf"file missing: .*{re.escape(name)}"):
        RunFolder.load(run.path)


def test_text_that_is_not_utf8_names_the_line(run: RunFolder) -> None:
    (run.path / "manifest.json").write_bytes(b'{\n"a": "\xff"}')
    with pytest.raises(BadInput, match=r"not UTF-8 text: .*manifest\.json:2"):
        RunFolder.load(run.path)


def test_no_run_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no run to report on"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(BadInput, match="no such run folder"):
        RunFolder.load(tmp_path / "nothing")


def test_the_report_is_written_whole(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report([run], out)
    assert out.read_text(encoding="utf-8") == render([run])
    assert not list(tmp_path.glob(".report*"))
