"""From an image to a vision tower's pixels: in a square with its own aspect ratio, normalised."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from saec.types import Image
from saec.vlm.contract.bundle import Preprocess

_WAYS = {"cubic": cv2.INTER_CUBIC, "linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}


def pixel_values(image: Image, how: Preprocess) -> NDArray[np.float32]:
    """Return a BGR image as [1, 3, side, side] float32, RGB and normalised; it is never squashed nor cut."""
    height, width = image.shape[:2]
    across, down = fitted(width, height, how.side)
    way = how.shrink if across * down < height * width else how.enlarge
    rgb = cv2.cvtColor(cv2.resize(image, (across, down), interpolation=_WAYS[way]), cv2.COLOR_BGR2RGB)
    left, top = (0, 0) if how.place == "corner" else ((how.side - across) // 2, (how.side - down) // 2)
    mean, std = np.array(how.mean, np.float32), np.array(how.std, np.float32)
    square = np.empty((how.side, how.side, 3), dtype=np.float32)
    square[:] = (np.array(how.fill, np.float32) / 255 - mean) / std
    square[top : top + down, left : left + across] = (rgb.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(square.transpose(2, 0, 1)[None])


def fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """Return (width, height) with the longest side ``side`` and the same aspect ratio, none below 1."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
