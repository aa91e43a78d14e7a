"""Scene complexity: the product's score and the reference's."""

from __future__ import annotations

import os
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saec.errors import BadInput
from saec.evaluate.bench_scene import bench_scene, reference_transcription, scene_agreement, spearman
from saec.scene import WEIGHTS, legacy_complexity, scene_complexity

SHARED = os.environ.get("SAEC_SHARED_DATA")


def noise(seed: int, height: int = 192, width: int = 192, amplitude: float = 255.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (128 + amplitude * (rng.random((height, width, 3)) - 0.5)).astype(np.uint8)


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    return cv2.GaussianBlur(noise(seed, height, width), (0, 0), 3).astype(np.uint8)


def checkerboard(height: int, width: int, cell: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width] // cell
    return np.repeat((255 * ((x + y) % 2)).astype(np.uint8)[:, :, None], 3, axis=2)


images = st.builds(
    lambda seed, height, width, kind, cell: {
        "noise": noise(seed, height, width),
        "smooth": smooth(seed, height, width),
        "checkerboard": checkerboard(height, width, cell),
        "constant": np.full((height, width, 3), seed % 256, np.uint8),
    }[kind],
    st.integers(0, 10_000),
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from(["noise", "smooth", "checkerboard", "constant"]),
    st.integers(1, 9),
)


@given(images)
@settings(max_examples=60, deadline=None)
def test_every_term_and_the_score_lie_in_the_unit_interval(image: np.ndarray) -> None:
    result = scene_complexity(image)
    assert all(0.0 <= value <= 1.0 for value in (*astuple(result.terms), result.score))


@given(images)
@settings(max_examples=40, deadline=None)
def test_legacy_equals_a_plain_transcription(image: np.ndarray) -> None:
    assert legacy_complexity(image).score == pytest.approx(reference_transcription(image), abs=1e-4)


@given(images)
@settings(max_examples=20, deadline=None)
def test_the_score_is_the_weighted_sum_of_the_terms(image: np.ndarray) -> None:
    for result in (scene_complexity(image), legacy_complexity(image)):
        assert result.score == pytest.approx(float(np.dot(WEIGHTS, astuple(result.terms))))


def test_the_weights_are_the_published_ones() -> None:
    assert WEIGHTS == (0.30, 0.25, 0.20, 0.15, 0.10)  # saec.md section 1


def test_legacy_terms_follow_their_definition_on_an_image_that_needs_no_resizing() -> None:
    image = smooth(3, 192, 192)
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float64)
    padded = np.pad(grey, 1, mode="reflect")  # OpenCV's default border, 101
    up, down, left, right = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    laplacian = up + down + left + right - 4 * grey
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    gradient = np.hypot(rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2])
    p = np.bincount(grey.astype(int).ravel(), minlength=256) / grey.size
    terms = legacy_complexity(image).terms
    assert terms.laplacian == pytest.approx(np.log(1 + laplacian.var()) / 8, abs=1e-5)
    assert terms.gradient == pytest.approx(gradient.mean() / 16, abs=1e-4)  # borders of Sobel agree too
    assert terms.entropy == pytest.approx(-np.sum(p * np.log(p + 1e-12)) / np.log(256), abs=1e-6)


def test_legacy_counts_edges_on_the_0_to_255_scale_and_the_product_as_a_fraction() -> None:
    board = checkerboard(192, 192, 16)
    assert legacy_complexity(board).terms.edges > 10
    assert 0 < scene_complexity(board).terms.edges < 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (7, 5), (640, 1800), (1000, 999)])
def test_a_constant_image_of_any_shape_has_nothing_but_jpeg_rounding(shape: tuple[int, int]) -> None:
    for level in (0, 77, 128, 200, 255):
        result = scene_complexity(np.full((*shape, 3), level, np.uint8))
        assert astuple(result.terms)[:4] == (0.0, 0.0, 0.0, 0.0)
        assert result.score <= 0.02


def test_more_texture_is_more_complex_in_every_term() -> None:
    results = [astuple(scene_complexity(noise(1, 300, 300, amplitude)).terms) for amplitude in (8, 32, 96, 250)]
    assert all(low <= high for before, after in pairwise(results) for low, high in zip(before, after, strict=True))
    assert results[0] != results[-1]


def test_a_part_does_not_become_complex_by_being_long() -> None:
    # Squeezed into a square, the strip's stripes would be four times as dense.
    square = np.repeat(np.repeat(noise(5, 20, 20), 16, axis=0), 16, axis=1)
    strip = np.concatenate([square[:160], square[160:]], axis=1)
    assert scene_complexity(strip).score == pytest.approx(scene_complexity(square).score, abs=0.02)


def test_the_score_hardly_depends_on_the_resolution_of_the_camera() -> None:
    small = smooth(6, 320, 320)
    large = cv2.resize(small, (1280, 1280), interpolation=cv2.INTER_CUBIC)
    assert scene_complexity(large).score == pytest.approx(scene_complexity(small).score, abs=0.02)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((10, 10), np.uint8),
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((10, 10, 3), np.float32),
        np.zeros((0, 10, 3), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(bad: np.ndarray) -> None:
    for score in (scene_complexity, legacy_complexity):
        with pytest.raises(BadInput, match="not an image"):
            score(bad)


def test_the_image_is_left_as_it_was() -> None:
    image = noise(2)
    before = image.copy()
    scene_complexity(image)
    legacy_complexity(image)
    assert np.array_equal(image, before)


def test_the_benchmark_has_a_row_for_each_size_and_restores_the_threads() -> None:
    threads = cv2.getNumThreads()
    table = bench_scene([noise(1), noise(2)], sizes=((300, 300), (200, 320)), rounds=1)
    assert [row["size"] for row in table.rows] == ["300×300", "200×320"]
    assert all(isinstance(row["ratio"], float) and row["ratio"] > 0 for row in table.rows)
    assert cv2.getNumThreads() == threads
    with pytest.raises(BadInput):
        bench_scene([])


@pytest.mark.slow
def test_the_product_is_twice_as_fast_as_the_transcription() -> None:
    parts = [smooth(1, 448, 448), noise(2, 448, 448, 60)]
    table = bench_scene(parts, sizes=((300, 300), (448, 448), (640, 1800), (960, 960)), rounds=30)
    assert all(float(row["ratio"] or 0) >= 2 for row in table.rows), table.to_markdown()


def test_spearman_is_one_for_any_increasing_map_and_uses_mean_ranks_for_ties() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, np.exp(a)) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, squares 4.5 and 5
    assert spearman(np.array([1.0, 5.0, 5.0, 9.0]), a) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman(a, np.ones(4)) is None


def test_the_agreement_table_names_every_term() -> None:
    table = scene_agreement([smooth(seed, 100 + 10 * seed, 120) for seed in range(5)])
    assert [row["term"] for row in table.rows][:6] == ["entropy", "edges", "laplacian", "gradient", "jpeg", "score"]
    with pytest.raises(BadInput):
        scene_agreement([noise(1)])


@pytest.mark.skipif(SHARED is None, reason="SAEC_SHARED_DATA does not name a folder of real images")
def test_on_real_images_the_product_ranks_like_the_repaired_reference() -> None:
    assert SHARED is not None
    root = Path(SHARED)
    paths = [
        *sorted(root.glob("mvtec_ad/*/test/*/*.png"))[::8],
        *sorted(root.glob("KolektorSDD/*/Part*.jpg"))[::16],
        *sorted(root.glob("circuit_board/*/*/*.jp*g"))[::8],
    ]
    table = scene_agreement([np.asarray(cv2.imread(str(path)), np.uint8) for path in paths])
    agreement = {row["term"]: row["spearman"] for row in table.rows}
    assert float(agreement["score, edges as a fraction"] or 0) > 0.85
