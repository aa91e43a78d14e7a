"""The question that every multimodal LLM is asked, and the pixels it is shown."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_fakes import query
from saec.config import PromptSettings
from saec.types import Box, Evidence
from saec.vlm.answers import UnusableAnswer, no_evidence, read_evidence
from saec.vlm.prompt import KINDS, Ask, ask_evidence, build_question
from saec.vlm.view import anomaly_crop, resize_for_model, shown_map

EVIDENCE = {"kind": "surface", "bboxes": [[14, 28, 28, 56]], "desc": "A scratch near the left edge."}


def picture(shade: int, height: int = 56, width: int = 56) -> np.ndarray:
    return np.full((height, width, 3), shade, np.uint8)


def hot(row: int = 3, column: int = 0) -> np.ndarray:
    heat = np.zeros((4, 4), np.float32)
    heat[row, column] = 1
    return heat


def test_the_label_question_shows_reference_close_up_and_part_and_begins_the_answer():
    asked = query(image=picture(90, 112, 112), original_size=(112, 112), references=(picture(30),), anomaly_map=hot())
    question = build_question(asked, Ask.LABEL, PromptSettings())
    kinds = ["text" if isinstance(item, str) else item.shape[:2] for item in question.content]
    assert kinds == ["text", "text", (56, 56), "text", (56, 56), "text", (112, 112), "text"]
    assert question.content[-2] is question.part
    assert question.prefill == "Label: "
    assert (question.product, question.seen, question.shared) == ("cell", (112, 112), 3)
    assert question.anomaly_map is asked.anomaly_map


def test_the_items_that_parts_of_a_product_share_do_not_depend_on_the_part():
    settings = PromptSettings(references=2)
    references = (picture(30), picture(40))
    one = build_question(query(references=references, anomaly_map=hot()), Ask.LABEL, settings)
    other = build_question(query("p2", size=90, references=references), Ask.LABEL, settings)
    assert one.shared == other.shared == 5
    for ours, theirs in zip(one.content[:5], other.content[:5], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert build_question(query(references=references), Ask.LABEL, PromptSettings(references=0)).shared == 1


def test_the_evidence_question_repeats_all_but_the_last_text_of_the_verdicts():
    label = build_question(query(references=(picture(30),)), Ask.LABEL, PromptSettings())
    evidence = ask_evidence(label)
    assert evidence.ask is Ask.EVIDENCE
    for ours, theirs in zip(label.content[:-1], evidence.content[:-1], strict=True):
        assert ours is theirs


def test_the_map_is_cut_to_the_shown_region():
    heat = np.arange(16, dtype=np.float32).reshape(4, 4)
    asked = query(original_size=(400, 200), anomaly_map=heat, region=Box(100, 60, 250, 200))
    np.testing.assert_array_equal(shown_map(asked), heat[1:4, 1:3])
    assert shown_map(query(anomaly_map=heat)) is heat
    assert shown_map(query()) is None


def test_the_close_up_shows_the_peak_of_the_anomaly_map():
    image = np.zeros((100, 200, 3), np.uint8)
    image[80:, :20] = 255
    heat = np.zeros((10, 10), np.float32)
    heat[9, 0] = 1
    crop = anomaly_crop(query(image=image, original_size=(400, 200), anomaly_map=heat))
    assert crop is not None
    assert crop.shape == (50, 100, 3)
    assert (crop[30:, :20] == 255).all()
    assert anomaly_crop(query(anomaly_map=np.zeros((4, 4), np.float32))) is None
    assert anomaly_crop(query()) is None
    outside = query(image=image, original_size=(400, 200), anomaly_map=heat, region=Box(200, 0, 400, 100))
    assert anomaly_crop(outside) is None


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(56, 600), st.sampled_from([1, 14, 28]))
def test_the_model_sees_whole_patches_within_the_stated_size(width: int, height: int, side: int, multiple: int):
    seen = resize_for_model(np.zeros((height, width, 3), np.uint8), max_side=side, multiple=multiple)
    for length in seen.shape[:2]:
        assert length % multiple == 0
        assert multiple <= length <= max(side, multiple)
    scale = min(1.0, side / max(width, height))
    assert abs(seen.shape[1] - width * scale) <= multiple
    assert abs(seen.shape[0] - height * scale) <= multiple


def test_the_evidence_question_names_the_size_the_model_sees():
    question = build_question(query(size=300), Ask.EVIDENCE, PromptSettings())
    assert question.seen == (308, 308)
    assert "308 x 308" in question.content[-1]
    assert question.prefill == ""


def test_an_answer_of_the_asked_form_becomes_evidence_in_original_pixels():
    asked = query(image=picture(0, 112, 112), original_size=(1000, 800), region=Box(100, 200, 324, 424))
    found = read_evidence(json.dumps(EVIDENCE), (112, 112), asked, source="m")
    # The region is 224 pixels wide and was seen at 112: every seen pixel is two of the original.
    assert found == Evidence((Box(128, 256, 156, 312),), "surface", EVIDENCE["desc"], "m")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The part is scratched.",
        json.dumps(EVIDENCE)[:-3],
        json.dumps(EVIDENCE) + " I hope this helps.",
        json.dumps({**EVIDENCE, "kind": "magic"}),
        json.dumps({**EVIDENCE, "more": 1}),
        json.dumps({**EVIDENCE, "bboxes": [[0, 0, 57, 20]]}),
        json.dumps({**EVIDENCE, "bboxes": [[9, 0, 3, 20]]}),
        json.dumps({**EVIDENCE, "bboxes": [[0, 0, float("inf"), 20]]}),
    ],
)
def test_an_answer_of_another_form_is_refused_whole(text: str):
    with pytest.raises(UnusableAnswer):
        read_evidence(text, (56, 56), query(), source="m")


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60))
def test_whatever_the_model_writes_it_is_evidence_or_refused(text: str):
    try:
        found = read_evidence(text, (64, 64), query(), source="m")
    except UnusableAnswer as error:
        assert no_evidence(error, source="m").text.startswith("no evidence: ")
    else:
        assert found.kind in KINDS
