"""One picture in many file formats: the station's score is that of its plain 8-bit twin."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow

from edge_parts import blotted, plate, put, station
from saec.data.decode import read_image

TURNS = {1: 0, 3: 2, 6: 3, 8: 1}
"""How often np.rot90 (counter-clockwise) makes a picture with this EXIF orientation upright."""


def score(path: Path) -> float:
    return station().predict(read_image(path), "plate").score


def picture(image: np.ndarray) -> Pillow.Image:
    return Pillow.fromarray(np.ascontiguousarray(image[..., ::-1]))


@pytest.fixture(params=[plate(700), blotted(7)], ids=["good", "defect"])
def image(request) -> np.ndarray:
    return request.param


@pytest.fixture
def plain(image, tmp_path) -> float:
    return score(put(tmp_path / "plain.png", image))


def test_16_bit(image, plain, tmp_path):
    deep = image.astype(np.uint16) * 257
    assert score(put(tmp_path / "deep.png", deep)) == pytest.approx(plain, abs=1e-5)
    assert score(put(tmp_path / "deep.tiff", deep)) == pytest.approx(plain, abs=1e-5)


def test_16_bit_grey(image, tmp_path):
    grey = image[..., 1]
    twin = score(put(tmp_path / "grey.png", grey))
    assert score(put(tmp_path / "deep.png", grey.astype(np.uint16) * 257)) == pytest.approx(twin, abs=1e-5)
    assert score(put(tmp_path / "three.png", np.repeat(grey[..., None], 3, axis=2))) == pytest.approx(twin, abs=1e-5)


def test_palette(image, tmp_path):
    few = picture(image).quantize(256)
    few.save(tmp_path / "palette.png")
    few.convert("RGB").save(tmp_path / "twin.png")
    assert score(tmp_path / "palette.png") == pytest.approx(score(tmp_path / "twin.png"), abs=1e-5)


def test_alpha(image, plain, tmp_path):
    for alpha in (0, 128, 255):
        clear = np.dstack([image, np.full(image.shape[:2], alpha, np.uint8)])
        assert score(put(tmp_path / f"{alpha}.png", clear)) == pytest.approx(plain, abs=1e-5)


def test_cmyk(image, plain, tmp_path):
    inks = picture(image).convert("CMYK")
    inks.save(tmp_path / "inks.tiff")
    assert score(tmp_path / "inks.tiff") == pytest.approx(plain, abs=1e-5)
    inks.save(tmp_path / "inks.jpg", quality=100, subsampling=0)
    assert score(tmp_path / "inks.jpg") == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("orientation", sorted(TURNS))
def test_exif_rotated(image, plain, tmp_path, orientation):
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    as_stored = np.rot90(image, -TURNS[orientation])
    picture(as_stored).save(tmp_path / "turned.png", exif=exif)
    assert score(tmp_path / "turned.png") == pytest.approx(plain, abs=1e-5)
    picture(as_stored).save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    picture(as_stored).save(tmp_path / "stored.jpg", quality=100, subsampling=0)
    upright = np.rot90(read_image(tmp_path / "stored.jpg"), TURNS[orientation])
    assert score(tmp_path / "turned.jpg") == pytest.approx(score(put(tmp_path / "upright.png", upright)), abs=1e-5)


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".webp"])
def test_other_lossless_containers(image, plain, tmp_path, suffix):
    picture(image).save(tmp_path / f"twin{suffix}", lossless=True)
    assert score(tmp_path / f"twin{suffix}") == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("size", [(320, 320), (240, 240), (1024, 1024)])
def test_the_same_part_at_another_resolution_scores_about_the_same(image, plain, tmp_path, size):
    larger = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    assert score(put(tmp_path / "larger.png", larger)) == pytest.approx(plain, rel=0.25)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (33, 47), (900, 60)])
def test_an_image_of_any_size_has_a_finite_score_and_boxes_inside(size):
    seen = station().predict(plate(1, size=(max(size[0], 8), max(size[1], 8)))[: size[0], : size[1]], "plate")
    assert np.isfinite(seen.score)
    assert 0 <= seen.p_defect <= 1
    for box in seen.evidence.boxes:
        assert 0 <= box.x1 < box.x2 <= size[1]
        assert 0 <= box.y1 < box.y2 <= size[0]
