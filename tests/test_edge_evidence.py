"""From heatmaps to boxes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from edge_parts import SETTINGS, blot_of, blotted, dataset, parts, plate, station
from saec.edge.evidence import MAX_BOXES, SOURCE, heatmap_evidence
from saec.edge.fit import fit_station
from saec.types import Label

HEATMAPS = nps.arrays(
    np.float32, nps.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24), elements=st.floats(0, 1e3, width=32)
)
LONE_PEAK = np.pad(np.ones((1, 1), np.float32), 3)


@given(HEATMAPS, st.floats(1e-6, 2e3), st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
@example(LONE_PEAK, 1e3, (100, 100))
@example(np.zeros((1, 1), np.float32), 1.0, (1, 1))
@settings(deadline=None, max_examples=150)
def test_a_defect_has_a_box_and_every_box_lies_inside_the_image(heatmap, threshold, size):
    found = heatmap_evidence(heatmap, threshold, size, is_defect=True)
    assert 1 <= len(found.boxes) <= MAX_BOXES
    assert found.source == SOURCE
    for box in found.boxes:
        assert 0 <= box.x1 < box.x2 <= size[0]
        assert 0 <= box.y1 < box.y2 <= size[1]
    scores = [box.score for box in found.boxes]
    assert scores[0] <= heatmap.max()
    assert scores == sorted(scores, reverse=True)


@given(HEATMAPS, st.floats(1e-6, 2e3))
@settings(deadline=None, max_examples=30)
def test_a_good_part_has_no_box(heatmap, threshold):
    found = heatmap_evidence(heatmap, threshold, (50, 50), is_defect=False)
    assert found.boxes == ()
    assert found.source == ""


def test_each_region_above_the_threshold_has_its_own_box_and_score_worst_first():
    heatmap = np.zeros((10, 20), np.float32)
    heatmap[1:3, 2:4] = 5
    heatmap[7:9, 15:17] = 9
    one, other = heatmap_evidence(heatmap, 3, (400, 200), is_defect=True).boxes
    assert (one.x1 + one.x2) / 2 == pytest.approx(320, abs=3)
    assert (one.y1 + one.y2) / 2 == pytest.approx(160, abs=3)
    assert (other.x1 + other.x2) / 2 == pytest.approx(60, abs=3)
    assert (other.y1 + other.y2) / 2 == pytest.approx(40, abs=3)
    assert one.score == pytest.approx(9)
    assert other.score == pytest.approx(5, rel=0.5)


def test_a_region_inside_the_frame_of_another_keeps_its_own_score():
    heatmap = np.zeros((12, 12), np.float32)
    heatmap[0], heatmap[:, 0] = 5, 5  # an L whose bounding box is the whole map
    heatmap[8:10, 8:10] = 50
    boxes = heatmap_evidence(heatmap, 3, (120, 120), is_defect=True).boxes
    assert len(boxes) == 2
    assert boxes[0].score == pytest.approx(50)
    assert boxes[1].score == pytest.approx(5, rel=0.5)


def test_a_defect_scores_above_all_good_parts_and_is_called_one():
    good = [station().predict(plate(500 + number), "plate") for number in range(8)]
    bad = [station().predict(blotted(number), "plate") for number in range(8)]
    assert min(seen.score for seen in bad) > max(seen.score for seen in good)
    assert all(seen.p_defect >= 0.5 and seen.evidence.boxes for seen in bad)
    assert sum(seen.p_defect >= 0.5 for seen in good) <= 1
    assert all(not seen.evidence.boxes for seen in good if seen.p_defect < 0.5)


def test_the_box_covers_the_defect_also_on_a_wide_image(tmp_path):
    size = (256, 352)
    good = parts(tmp_path, [plate(number, size=size) for number in range(8)], label=Label.GOOD)
    wide = fit_station(dataset(tmp_path, good), SETTINGS)
    for number in range(4):
        blot = blot_of(number, size)
        seen = wide.predict(blotted(number, size), "plate")
        assert seen.heatmap is not None
        assert seen.heatmap.shape[0] < seen.heatmap.shape[1]
        box = seen.evidence.boxes[0]
        middle = (blot.x1 + blot.x2) / 2, (blot.y1 + blot.y2) / 2
        assert box.x1 < middle[0] < box.x2
        assert box.y1 < middle[1] < box.y2
        width, height = min(box.x2, blot.x2) - max(box.x1, blot.x1), min(box.y2, blot.y2) - max(box.y1, blot.y1)
        assert width * height >= 0.8 * 48 * 48
        assert (box.x2 - box.x1) * (box.y2 - box.y1) < 0.65 * size[0] * size[1]  # a cell sees far beyond itself
