"""Which parts a teacher is asked about, and that they arrive as they were sent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_parts import plate
from saec.config import CloudSettings
from saec.fleet.frame import BadFrame, Frame, decode_frame, encode_frame
from saec.learn.samples import SAMPLE, Sample, choose, decode_sample, encode_sample, pack_map, unpack_map
from saec.types import Box, Label, Query, Reason, Tokens, Verdict, Where

SETTINGS = CloudSettings()


def verdict(number: int, p: float | None, *, asked: bool = True, sha256: str | None = None) -> Verdict:
    return Verdict(
        part_id=f"part{number}",
        sha256=sha256 or f"{number:064x}",
        product="plate",
        path="",
        label=Label.GOOD,
        p_defect=p,
        where=Where.EDGE,
        reason=Reason.IN_BAND if asked else Reason.EDGE_CONFIDENT,
        escalated_for=Reason.IN_BAND if asked else None,
    )


def ids(verdicts: list[Verdict]) -> list[str]:
    return [each.part_id for each in verdicts]


def test_the_least_certain_parts_go_first():
    round_ = [verdict(0, 0.99), verdict(1, 0.45), verdict(2, 0.7), verdict(3, 0.1)]
    assert ids(choose(round_, most=3, known=())) == ["part1", "part2", "part3"]


def test_a_part_that_the_router_did_not_want_the_cloud_for_is_no_sample():
    assert ids(choose([verdict(0, 0.5, asked=False), verdict(1, 0.9)], most=9, known=())) == ["part1"]


def test_no_content_is_put_to_the_teacher_twice():
    twins = [verdict(0, 0.5), verdict(1, 0.5, sha256=f"{0:064x}")]
    assert len(choose(twins, most=9, known=())) == 1
    assert choose(twins, most=9, known={f"{0:064x}"}) == []


def test_an_unreadable_part_is_no_sample():
    assert choose([verdict(0, None)], most=9, known=()) == []


def test_among_parts_that_the_edge_is_wholly_sure_of_the_lot_decides_and_not_the_last_digit():
    sure = [verdict(number, 1 - 1e-6 * number) for number in range(40)]
    drawn = [ids(choose(sure, most=10, known=(), seed=seed)) for seed in range(2)]
    assert drawn[0] != drawn[1]
    assert drawn[0] != [f"part{number}" for number in range(39, 29, -1)]
    assert drawn[0] == ids(choose(sure[::-1], most=10, known=(), seed=0))


def test_what_people_have_labelled_comes_before_all_else():
    round_ = [verdict(0, 0.5), verdict(1, 0.99, asked=False)]
    assert ids(choose(round_, most=1, known=(), labelled={f"{1:064x}"})) == ["part1"]


def test_without_uncertainty_as_many_parts_are_drawn_from_all():
    round_ = [verdict(number, 0.5 + 0.01 * number, asked=number < 5) for number in range(40)]
    drawn = choose(round_, most=9, known=(), uncertain=False, seed=3)
    assert len(drawn) == len(choose(round_, most=9, known=())) == 5
    assert any(each.escalated_for is None for each in drawn)


def sample(**changes: object) -> Sample:
    query = Query(
        part_id="part",
        product="plate",
        image=plate(1),
        original_size=(160, 160),
        anomaly_map=np.linspace(0.05, 9, 30, dtype=np.float32).reshape(5, 6),
        edge_p_defect=0.75,
        evidence=False,
    )
    return Sample(replace(query, **changes), "a" * 64, 21.5, 0.4, Label.DEFECT, Label.GOOD, 0.3)


def there_and_back(one: Sample) -> Sample:
    data = encode_frame(encode_sample(one, SETTINGS))
    return decode_sample(decode_frame(data, kinds={SAMPLE}, most=10_000_000), max_pixels=1_000_000)


def test_a_sample_arrives_with_all_that_the_teacher_needs():
    one = sample(region=Box(10, 20, 90, 100))
    two = there_and_back(one)
    assert (two.sha256, two.score, two.scene, two.label, two.human) == ("a" * 64, 21.5, 0.4, "defect", "good")
    assert two.p_cloud == 0.3
    assert two.query.region == one.query.region
    assert two.query.original_size == (160, 160)
    assert two.query.edge_p_defect == 0.75
    assert np.abs(two.query.image.astype(int) - one.query.image).mean() < 3
    np.testing.assert_allclose(two.query.anomaly_map, one.query.anomaly_map, rtol=0.018)


def test_with_tokens_no_image_is_in_the_frame():
    tokens = Tokens(np.ones((3, 8), np.int8), 0.25, np.array([1, 4, 6], np.int32), 16, "loupe")
    frame = encode_sample(sample(tokens=tokens), SETTINGS)
    assert "image" not in frame.arrays
    two = there_and_back(sample(tokens=tokens))
    assert two.query.image is None
    assert two.query.tokens.total == 16
    np.testing.assert_array_equal(two.query.tokens.indices, [1, 4, 6])
    np.testing.assert_array_equal(two.query.tokens.levels, tokens.levels)


@given(arrays.arrays(np.float32, (3, 4), elements=st.floats(0.03125, 64, width=32)))
def test_a_map_comes_back_within_two_percent(heatmap):
    np.testing.assert_allclose(unpack_map(pack_map(heatmap)), heatmap, rtol=0.018)


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "short"},
        {"label": "perhaps"},
        {"size": [1]},
        {"more": 1},
        {"score": "high"},
    ],
)
def test_a_frame_that_breaks_the_contract_is_refused(change):
    frame = encode_sample(sample(), SETTINGS)
    with pytest.raises(BadFrame, match="not a sample"):
        decode_sample(Frame(SAMPLE, {**frame.header, **change}, frame.arrays), max_pixels=1_000_000)


def test_an_image_that_is_none_or_too_large_is_refused():
    frame = encode_sample(sample(), SETTINGS)
    with pytest.raises(BadFrame, match="not a sample"):
        decode_sample(frame, max_pixels=100)
    for bad in ({}, {"image": np.zeros(10, np.uint8)}, {"image": np.zeros((2, 2), np.float32)}):
        with pytest.raises(BadFrame, match="not a sample"):
            decode_sample(Frame(SAMPLE, frame.header, {"map": frame.arrays["map"], **bad}), max_pixels=1_000_000)
