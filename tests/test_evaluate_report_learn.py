"""The page about rounds of learning says what was measured, and nothing else."""

from __future__ import annotations

import json
import re

import pytest

from saec.errors import BadInput
from saec.evaluate.report_learn import headline, read_curve, render_learn, rounds_table, write_learn_report
from saec.evaluate.report_learn_charts import accuracies
from saec.learn.rounds import ARMS


def record(edge: float, *, learns: bool = True, cloud: float | None = None) -> dict:
    figures = {"n": 60, "edge": edge, "final": edge + 0.01, "escalated": 0.4, "fallbacks": 0}
    stream = {**figures, "reasons": {"audit": 7}, "uplink_bytes": 90_000}
    found = {"stream": stream, "alarms": [], "held_out": figures, "before": figures}
    if cloud is not None:
        found["cloud_alone"] = cloud
    if learns:
        applied = {"version": 1, "slot": "1", "before": 0.5, "after": 0.75, "kept": True}
        found["learnt"] = {
            **{"samples": 20, "rulings": 20, "by_people": 0, "teacher_right": 0.9, "taught": "cloud"},
            **{"applied": applied, "update_bytes": 400_000, "bytes_up": 300_000, "bytes_down": 410_000, "seconds": 2.0},
        }
    return found


def tree() -> dict:
    arms = []
    for at, arm in enumerate(ARMS):
        cloud = 0.88 if arm.cloud else None
        edges = [0.4 + 0.2 * r - 0.02 * at if arm.learns else 0.35 for r in range(3)]
        rounds = [record(edge, learns=arm.learns, cloud=cloud) for edge in edges]
        arms.append({"name": arm.name, "what": arm.what, "rounds": rounds})
    plan = {
        **{"data": "cells", "first": "mono", "then": "poly", "drift": None, "product": "mono", "backend": "onnx-vlm"},
        **{"teacher": "model", "uplink": "image", "rounds": 3, "parts": 60, "link_mbit": 10.0, "seed": 1},
    }
    start = record(0.35, learns=False, cloud=0.36)
    plan |= {"stream": "f" * 64, "settings": {"learn.samples": 5}}
    made = {"cloud": "loupe@int8", "station": "a" * 64}
    return {"plan": plan, "made": made, "start": start, "arms": arms, "environment": {"machine": "x86_64"}}


def test_the_outcome_stands_at_the_top():
    said = headline(tree()).replace("\N{NARROW NO-BREAK SPACE}", "")
    assert said == (
        "After 3 rounds the adapted edge alone is right in 80.0% of the cases, without adaptation in 35.0%; "
        "with the cloud, asked about 40%, in 81.0%."
    )
    assert "The cloud alone, asked about every part, is right in 88.0" in render_learn(tree())


def test_figures_of_the_last_round_and_of_all_rounds_say_so():
    page = render_learn(tree())
    for group, columns in (("Edge alone, after round", 3), ("After round 3", 4), ("All rounds together", 4)):
        assert f'colspan="{columns}" class="group">{group}</th>' in page
    assert "cascade, cloud alone, to cloud, first product: after round 3" in rounds_table(tree()).notes[1]


def test_every_arm_is_drawn_and_all_accuracies_on_one_scale():
    drawn = accuracies(tree())
    names = {name for chart in drawn for _, _, name in chart.names}
    assert names >= {arm.name for arm in ARMS}
    scales = {tuple(re.findall(r">(\d+)\N{NARROW NO-BREAK SPACE}%<", chart.svg)) for chart in drawn}
    assert len(drawn) == 3 and len(scales) == 1


def test_the_page_has_every_arm_with_its_figures_and_asks_the_network_for_nothing():
    page = render_learn(tree())
    for arm in ARMS:
        assert f"<dt>{arm.name}</dt><dd>{arm.what}</dd>" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert "<script" not in page
    assert page == render_learn(tree())


def test_the_record_says_what_it_takes_to_make_the_figures_again():
    page = render_learn(tree())
    for name, value in (("cloud", "loupe@int8"), ("station", "a" * 64), ("learn.samples", "5"), ("stream", "f" * 64)):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page


def test_seconds_on_the_link_are_those_of_all_bytes():
    row = rounds_table(tree()).rows[0]
    seconds = 3 * 8 * (90_000 + 300_000 + 410_000) / 1e7
    assert row["on the link"].startswith(f"{seconds:.1f}")


def test_a_dropped_update_and_lost_questions_are_said_before_anything_is_relied_on():
    found = tree()
    first = found["arms"][0]["rounds"]
    first[1]["learnt"]["applied"]["kept"] = False
    first[2]["stream"]["fallbacks"] = 4
    page = render_learn(found)
    assert "adapted, round 2: worse on the probe set, so the update was dropped." in page
    assert "adapted, round 3: 4 questions came to nothing." in page


def test_questions_lost_on_the_parts_held_out_count_too():
    found = tree()
    found["arms"][0]["rounds"][1]["held_out"]["fallbacks"] = 3
    assert "adapted, round 2: 3 questions came to nothing." in render_learn(found)


def test_alarms_are_shown_with_their_evidence():
    found = tree()
    alarm = {"kind": "score", "since": 30, "statement": "score distance 0.4 > 0.3; median -2.9"}
    found["arms"][0]["rounds"][0]["alarms"] = [alarm]
    page = render_learn(found)
    assert "score distance 0.4 &gt; 0.3; median \N{MINUS SIGN}2.9 (from part 30 on)" in page
    assert "on its own scale without a unit" in page


def test_what_people_wrote_into_names_is_text_and_no_markup():
    found = tree()
    found["plan"]["then"] = "<b>poly</b>"
    assert "<b>poly" not in render_learn(found)


@pytest.mark.parametrize("count", [1, 2])
def test_a_few_arms_are_enough_for_a_page(count, tmp_path):
    found = tree()
    found["arms"] = found["arms"][:count]
    for arm in found["arms"]:
        arm["rounds"] = arm["rounds"][:2]
    write_learn_report(found, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("<figure") >= 2


def test_a_benchmarks_curve_of_accuracy_against_bytes_is_drawn_beside(tmp_path):
    ways = (
        "image, quality 92",
        "image, quality 30",
        "tokens, 0.5 by dropout, 64",
        "tokens by entropy, 64",
        "by random,",
    )
    rows = [{"what goes up": way, "bytes": 9_000 - 1000 * at, "accuracy": 0.9} for at, way in enumerate(ways)]
    table = {"title": "What goes up", "columns": list(rows[0]), "rows": rows, "notes": []}
    saved, other = tmp_path / "uplink.json", tmp_path / "rounds.json"
    saved.write_text(json.dumps({"tables": [table]}))
    other.write_text(json.dumps({"rounds": []}))
    assert "tokens beside JPEGs" in render_learn(tree(), uplink=read_curve(saved))
    assert "tokens beside JPEGs" not in render_learn(tree())
    with pytest.raises(BadInput, match="not the tables of saec bench uplink"):
        read_curve(other)
