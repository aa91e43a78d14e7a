"""From an image to a tower's pixels: never squashed, normalised, and the same bytes for graphs and torch models."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest

from saec.vlm.contract.bundle import Preprocess
from saec.vlm.edge.pixels import fitted, pixel_values

PLAIN = Preprocess(side=4, place="corner", fill=(255, 0, 51), mean=(0, 0, 0), std=(1, 1, 1))
WIDE = np.zeros((2, 4, 3), np.uint8)
WIDE[0, :, 0], WIDE[1, :, 2] = 102, 204  # upper row blue, lower row red: OpenCV's order is BGR


def test_four_by_two_pixels_by_hand():
    red, green, blue = pixel_values(WIDE, PLAIN)[0]
    assert red.tolist() == [[0] * 4, [np.float32(0.8)] * 4, [1] * 4, [1] * 4]
    assert green.tolist() == [[0] * 4] * 4
    assert blue.tolist() == [[np.float32(0.4)] * 4, [0] * 4, [np.float32(0.2)] * 4, [np.float32(0.2)] * 4]


def test_in_the_middle_the_margin_is_on_both_sides():
    red = pixel_values(WIDE, PLAIN.model_copy(update={"place": "centre"}))[0, 0]
    assert red.tolist() == [[1] * 4, [0] * 4, [np.float32(0.8)] * 4, [1] * 4]


def test_image_and_margin_are_normalised_alike():
    how = Preprocess(side=4, place="corner", fill=(51, 51, 51), mean=(0.2, 0.2, 0.2), std=(0.5, 0.25, 0.1))
    made = pixel_values(WIDE, how)[0]
    assert np.allclose(made[:, 2:], 0, atol=1e-6)
    assert np.allclose(made[:, 1, 0], [(0.8 - 0.2) / 0.5, -0.2 / 0.25, -0.2 / 0.1])


@pytest.mark.parametrize(("size", "into"), [((4, 2), (8, 4)), ((30, 10), (8, 3)), ((1, 999), (1, 8)), ((8, 8), (8, 8))])
def test_the_longest_side_fills_the_square_and_the_other_keeps_its_ratio(size, into):
    assert fitted(*size, 8) == into


@pytest.mark.parametrize("height", [30, 60, 90])
def test_a_circle_stays_a_circle(height: int):
    image = np.zeros((height, 90, 3), np.uint8)
    cv2.circle(image, (20, height // 2), 12, (255, 255, 255), -1)
    seen = pixel_values(image, Preprocess(side=45, place="centre", fill=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1)))[0, 0]
    rows, columns = (np.flatnonzero(seen.max(axis=axis) > 0.5) for axis in (1, 0))
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1


def test_padding_in_the_middle_is_llava_s_own():
    """Against the square that Transformers' LLaVA processor pads to, whose pixels are not resized here."""
    pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    processor = module.LlavaImageProcessorPil(image_mean=list(mean), image_std=list(std))
    image = np.random.default_rng(0).integers(0, 255, (5, 12, 3), dtype=np.uint8)
    rgb = np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))
    background = tuple(int(255 * value) for value in mean)
    square = processor.pad_to_square(rgb, background_color=background)
    wanted = (square.astype(np.float32).transpose(1, 2, 0) / 255 - mean) / std
    how = Preprocess(side=12, place="centre", fill=background, mean=mean, std=std)
    assert np.abs(pixel_values(image, how)[0] - wanted.transpose(2, 0, 1)).max() < 1e-5


LIGHT = """
import sys
import saec.vlm.edge.pixels, saec.vlm.loupe.inputs, saec.vlm.export.ready
print(*{name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "peft", "onnx", "gguf"})
"""


def test_inputs_and_a_ready_bundle_need_neither_torch_nor_onnx():
    found = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == ""
