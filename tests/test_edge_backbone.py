"""The shipped backbone and how images are shown to it."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_parts import plate
from saec.edge.backbone import MAX_SIDE, MIN_SIDE, MODEL, PASS_PIXELS, STRIDE, Backbone, grid_size, working_sides
from saec.errors import BadInput

TOOL = Path(__file__).parents[1] / "tools" / "build_backbone.py"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(threads=1)


def test_the_shipped_file_is_the_one_that_the_tool_rebuilds(backbone):
    stated = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(TOOL.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and "SHA256" in node.targets[0].id
    }
    found = hashlib.sha256(MODEL.read_bytes()).hexdigest()
    assert found == stated["MODEL_SHA256"] == backbone.sha256
    assert backbone.model_id == f"efficientnet-lite2@{found[:12]}"


def test_a_cell_is_a_vector_of_two_stages(backbone):
    features = backbone(plate(0), 160)
    assert features.shape == (5, 5, 120 + 208)
    assert features.dtype == np.float32
    assert np.array_equal(features, backbone(plate(0), 160))


def test_an_image_that_is_not_writable_or_not_contiguous_is_seen_alike(backbone):
    image = plate(0)
    image.flags.writeable = False
    turned = np.asfortranarray(plate(0))
    assert np.array_equal(backbone(image, 160), backbone(turned, 160))


@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([96, 160, 224, 448, 640]))
@settings(deadline=None, max_examples=200)
def test_the_grid_is_whole_cells_of_about_the_area_asked_for(height, width, side):
    rows, columns = grid_size(height, width, side)
    assert rows % STRIDE == columns % STRIDE == 0
    assert min(rows, columns) >= STRIDE
    assert rows * columns <= 3 * side**2
    if max(height, width) <= 3 * min(height, width):
        assert 0.7 < rows * columns / side**2 < 1.4
        assert rows / columns == pytest.approx(height / width, rel=0.6)


@pytest.mark.parametrize("size", [(1, 60_000_000), (60_000_000, 1), (1, 1), (3, 40_000)])
def test_a_sliver_of_an_image_does_not_take_the_memory_of_the_machine(size):
    rows, columns = grid_size(*size, 448)
    assert rows * columns <= 2 * 448**2


def test_a_one_pixel_image_has_features(backbone):
    assert np.isfinite(backbone(plate(0)[:1, :1], 96)).all()


@given(st.lists(st.tuples(st.integers(1, 8000), st.integers(1, 8000)), min_size=1, max_size=9))
@settings(deadline=None, max_examples=100)
def test_all_passes_over_a_part_stay_within_their_time(sizes):
    sides = working_sides(sizes)
    assert all(MIN_SIDE <= side <= MAX_SIDE and side % STRIDE == 0 for side in sides)
    assert list(sides) == sorted(set(sides), reverse=True)
    assert sum(side**2 for side in sides) <= PASS_PIXELS


@pytest.mark.parametrize(("size", "first"), [((320, 320), 320), ((5000, 400), 448), ((50, 50), 96), ((160, 160), 160)])
def test_images_are_shown_at_their_own_size_up_to_the_largest(size, first):
    assert working_sides([size] * 3)[0] == first


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(BadInput, match=r"cannot read the model: .*none\.onnx"):
        Backbone(tmp_path / "none.onnx")


@pytest.mark.parametrize("content", [b"", b"not a model", MODEL.read_bytes()[:5000]], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_model_is_one_line(tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(BadInput, match=r"not a usable ONNX model") as caught:
        Backbone(tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value)
    assert "bad.onnx" in str(caught.value)
