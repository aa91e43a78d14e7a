"""Pictures of the gallery: thumbnails and heat overlays as data URIs, so that the report needs no other file."""

from __future__ import annotations

import base64
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from saec.data.decode import UnreadableImage, read_image
from saec.types import Heatmap, Image

THUMBNAIL_SIDE = 400
OVERLAY_SIDE = 128
AT_THRESHOLD = 128
"""Grey level of a stored heatmap that equals the decision threshold."""


def thumbnail(image: Image) -> str:
    """Return a JPEG data URI of ``image`` shrunk (never enlarged) to a longest side of 400 pixels."""
    small = _fit(image, THUMBNAIL_SIDE, enlarge=False)
    return _data_uri(".jpg", "image/jpeg", small, [cv2.IMWRITE_JPEG_QUALITY, 82])


def overlay(heat: NDArray[np.uint8]) -> str:
    """Return a PNG data URI that shows where ``heat`` [h, w] uint8 (128 = threshold) is suspicious.

    Clear below half the threshold, amber towards it, red above it: a part that was passed shows little red.
    """
    level = _fit(heat, OVERLAY_SIDE, enlarge=True).astype(np.float32) / AT_THRESHOLD
    warm = np.clip((level - 0.5) / 0.5, 0, 1)  # 0 at half the threshold, 1 at the threshold
    hot = np.clip(level - 1, 0, 1)
    amber, red = np.array([40, 176, 255], np.float32), np.array([60, 20, 214], np.float32)
    colour = amber + (red - amber) * np.clip(hot * 2.5, 0, 1)[..., None]
    alpha = 255 * np.clip(0.45 * warm + 0.4 * np.clip(hot * 2, 0, 1), 0, 1)
    rgba = np.dstack([colour, alpha]).round().astype(np.uint8)
    # Coarser colour steps are invisible under the alpha blend and halve the file.
    return _data_uri(".png", "image/png", rgba & np.uint8(0xF8), [cv2.IMWRITE_PNG_COMPRESSION, 9])


def encode_heatmap(heat: Heatmap) -> NDArray[np.uint8]:
    """Scale an edge's heatmap [h, w] to 8-bit grey: 0 stays 0, the mark level 1 becomes 128, twice it saturates."""
    scaled = np.nan_to_num(np.asarray(heat, np.float64), nan=0.0, posinf=1e30, neginf=0.0) * AT_THRESHOLD
    return np.asarray(np.clip(scaled, 0, 255).round(), dtype=np.uint8)


def read_heatmap(path: Path) -> NDArray[np.uint8] | None:
    """Return the stored map [h, w] or ``None`` when there is none that can be read."""
    try:
        return read_image(path)[..., 0]
    except UnreadableImage:
        return None  # the gallery then simply has no overlay for this part


def _fit(image: NDArray[np.uint8], side: int, *, enlarge: bool) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1 and not enlarge:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))  # OpenCV wants (width, height)
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return np.asarray(resized, dtype=np.uint8)


def _data_uri(suffix: str, mime: str, pixels: NDArray[np.uint8], options: list[int]) -> str:
    _, data = cv2.imencode(suffix, pixels, options)
    return f"data:{mime};base64,{base64.b64encode(data.tobytes()).decode('ascii')}"
