"""Fine-tuning rows are held to their form; an epoch's questions follow from seed and epoch alone."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as few
from hypothesis import strategies as st

from saec.config import PromptSettings
from saec.errors import BadInput
from saec.train.config import TrainSettings, load_train_settings
from saec.train.rows import Example, Row, RowEvidence, epoch_plan, pose, read_rows
from saec.vlm.prompt import Ask
from train_rows import make_files, row, write_rows

PROMPT = PromptSettings(max_side=56)


def settings(*overrides: str) -> TrainSettings:
    return load_train_settings(preset="tiny", overrides=overrides)


def test_rows_of_saec_data_sft_are_read(tmp_path: Path):
    train, _ = make_files(tmp_path, n_train=4)
    rows = read_rows(train)
    assert [one.label for one in rows] == [0, 0, 1, 1]
    assert [one.p_defect for one in rows] == [0, 0, 1, 1]
    assert rows[0].image == tmp_path / "images/0.png"
    assert rows[2].evidence is not None
    assert rows[2].evidence.bboxes == [(1, 2, 21, 22)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, "label"),
        ({"answer": "0"}, "label 1 but answer '0'"),
        ({"colour": "red"}, "colour"),
        ({"sha256": "abc"}, "sha256"),
        ({"p_defect": 1.5}, "p_defect"),
        ({"evidence": '{"kind": "surface"}'}, "bboxes"),
        ({"evidence": '{"kind": "rust", "bboxes": [], "desc": ""}'}, "kind"),
        ({"image": "images/none.png"}, "no such file"),
        ({"anomaly_map": "maps/none.npy"}, "no such file"),
    ],
)
def test_a_wrong_line_is_told_with_its_number(change: dict[str, object], message: str, tmp_path: Path):
    good = row(tmp_path, 1, label=1)
    file = write_rows(tmp_path / "train.jsonl", [good, {**good, **change}])
    with pytest.raises(BadInput, match=message) as told:
        read_rows(file)
    assert f"{file}:2" in str(told.value)


def test_a_line_that_is_no_json_and_an_empty_file_are_told(tmp_path: Path):
    file = tmp_path / "train.jsonl"
    for text in ("", "{", "[]\n"):
        file.write_text(text)
        with pytest.raises(BadInput):
            read_rows(file)


# -- the plan of an epoch


def made(p_defect: float = 1.0, desc: str | None = None) -> Row:
    evidence = None if desc is None else RowEvidence(kind="surface", bboxes=[(1, 2, 3, 4)], desc=desc)
    return Row("p", "bolt", Path("p.png"), int(p_defect >= 0.5), p_defect, "0" * 64, "g", None, evidence)


def test_the_plan_is_the_same_for_the_same_seed_and_epoch_and_another_for_the_next():
    rows = [made(0.5) for _ in range(40)]
    s = settings('augment=["hflip","vflip"]')
    assert epoch_plan(rows, s, 3) == epoch_plan(rows, s, 3)
    assert epoch_plan(rows, s, 3) != epoch_plan(rows, s, 4)
    assert epoch_plan(rows, s, 3) != epoch_plan(rows, settings("seed=1"), 3)


def test_a_soft_label_is_drawn_anew_each_epoch_with_its_probability():
    plans = [epoch_plan([made(1 / 3)] * 50, settings(), epoch) for epoch in range(40)]
    drawn = [example.label for plan in plans for example in plan]
    assert len(drawn) == 2000
    assert np.mean(drawn) == pytest.approx(1 / 3, abs=0.04)
    sure = epoch_plan([made(0.0)] * 50 + [made(1.0)] * 50, settings(), 0)
    assert all(example.label == example.row.label for example in sure)


def test_evidence_is_asked_about_drawn_defects_in_the_share_that_is_set():
    rows = [made(0.5, "stain")] * 400
    for share in (0.0, 0.5, 1.0):
        plan = epoch_plan(rows, settings(f"evidence_share={share}"), 0)
        defects = sum(one.label for one in plan if one.ask is Ask.LABEL)
        asked = sum(one.ask is Ask.EVIDENCE for one in plan)
        assert len(plan) == 400 + asked
        assert asked == pytest.approx(share * defects, abs=30)


def test_nothing_is_flipped_unless_asked_and_a_sentence_that_names_a_side_never_is():
    assert not any(one.hflip or one.vflip for one in epoch_plan([made()] * 50, settings(), 0))
    plan = epoch_plan([made(1, "Stain at the left")] * 100, settings('augment=["hflip"]'), 0)
    assert not any(one.hflip for one in plan if one.ask is Ask.EVIDENCE)
    assert {one.hflip for one in plan if one.ask is Ask.LABEL} == {True, False}


# -- questions


def test_a_label_question_is_the_one_that_is_served_and_its_answer_is_the_drawn_label(tmp_path: Path):
    train, _ = make_files(tmp_path, n_train=4)
    question, answer = pose(Example(read_rows(train)[2], Ask.LABEL, 0), PROMPT)
    assert (question.ask, question.prefill, question.product, answer) == (Ask.LABEL, "Label: ", "nut", "0")


def test_image_map_and_boxes_are_flipped_together(tmp_path: Path):
    bright = np.zeros((56, 112, 3), np.uint8)
    bright[4:12, 8:40] = 255  # x 8-40, y 4-12
    heat = np.zeros((7, 14), np.float32)
    heat[0, 1] = 1
    np.save(tmp_path / "map.npy", heat)
    evidence = json.dumps({"kind": "surface", "bboxes": [[8, 4, 40, 12]], "desc": "stain"})
    line = row(tmp_path, 1, label=1, anomaly_map="map.npy", evidence=evidence)
    cv2.imwrite(str(tmp_path / line["image"]), bright)
    (one,) = read_rows(write_rows(tmp_path / "train.jsonl", [line]))
    for h in (False, True):
        for v in (False, True):
            question, answer = pose(Example(one, Ask.EVIDENCE, 1, h, v), PromptSettings(max_side=112))
            (x1, y1, x2, y2) = json.loads(answer)["bboxes"][0]
            assert question.part[y1:y2, x1:x2].min() == 255
            assert int(question.part.astype(int).sum()) == 255 * 3 * (x2 - x1) * (y2 - y1)
            assert question.anomaly_map is not None
            assert question.anomaly_map[-1 if v else 0, -2 if h else 1] == 1


@few(deadline=None, max_examples=40)
@given(st.integers(0, 49), st.integers(0, 49), st.integers(1, 50), st.integers(1, 50), st.booleans(), st.booleans())
def test_a_box_in_an_answer_is_never_empty_nor_outside(x: int, y: int, w: int, h: int, hflip: bool, vflip: bool):
    from saec.train.rows import _seen_box

    box = (x, y, min(50, x + w), min(50, y + h))
    seen = _seen_box(box, Example(made(), Ask.EVIDENCE, 1, hflip, vflip), (50, 50), (28, 56))
    assert 0 <= seen[0] < seen[2] <= 28
    assert 0 <= seen[1] < seen[3] <= 56


def test_a_box_outside_the_image_and_a_bad_map_are_told(tmp_path: Path):
    evidence = json.dumps({"kind": "surface", "bboxes": [[8, 4, 400, 12]], "desc": "stain"})
    (one,) = read_rows(write_rows(tmp_path / "a.jsonl", [row(tmp_path, 1, label=1, evidence=evidence)]))
    with pytest.raises(BadInput, match=r"not inside the image.*1\.png"):
        pose(Example(one, Ask.EVIDENCE, 1), PROMPT)
    for bad in (np.zeros((4, 4)), np.zeros(4, np.float32), np.full((4, 4), np.nan, np.float32)):
        np.save(tmp_path / "map.npy", bad)
        (one,) = read_rows(write_rows(tmp_path / "b.jsonl", [row(tmp_path, 1, label=1, anomaly_map="map.npy")]))
        with pytest.raises(BadInput, match=r"map\.npy"):
            pose(Example(one, Ask.LABEL, 1), PROMPT)
