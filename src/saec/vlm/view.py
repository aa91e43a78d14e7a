"""Which pixels of a part a model is shown: its size, the close-up of the anomaly, and the map of what is shown."""

from __future__ import annotations

import math

import cv2
import numpy as np

from saec.errors import BadInput
from saec.types import Heatmap, Image, Query
from saec.vlm.geometry import shown_region


def pixels_of(query: Query) -> Image:
    """Return the query's image.

    Raises:
        BadInput: the part came as tokens, and whoever calls needs its pixels.
    """
    if query.image is None:
        fix = "serve a model that takes them (--backend onnx-vlm), or set cloud.uplink to image or crop"
        raise BadInput("this model needs a part's pixels, and the part came as tokens", where=query.part_id, fix=fix)
    return query.image


def resize_for_model(image: Image, *, max_side: int, multiple: int) -> Image:
    """Return the image at the size the model sees: longest side at most ``max_side``, sides multiples of ``multiple``.

    Sides are rounded to the nearest multiple (at least one, at most the largest that fits into ``max_side``), which
    changes the aspect ratio by half a multiple at most.
    """
    height, width = image.shape[:2]
    across, down = model_size(width, height, max_side=max_side, multiple=multiple)
    if (across, down) == (width, height):
        return image
    shrinks = across * down < width * height
    way = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (across, down), interpolation=way), dtype=np.uint8)


def model_size(width: int, height: int, *, max_side: int, multiple: int) -> tuple[int, int]:
    """Return (width, height) at which :func:`resize_for_model` shows an image."""
    scale = min(1.0, max_side / max(height, width))
    most = max(1, max_side // multiple)
    across, down = (min(most, max(1, round(side * scale / multiple))) * multiple for side in (width, height))
    return across, down


def anomaly_crop(query: Query) -> Image | None:
    """Return the part of ``query.image``, half as wide and high, around the peak of the anomaly map, if there is one.

    The map covers the whole original; a peak outside the shown region gives no crop, and neither does a flat map.
    """
    peak = None if query.anomaly_map is None else _peak(query.anomaly_map, query.original_size)
    if peak is None:
        return None
    region = shown_region(query)
    if not (region.x1 <= peak[0] < region.x2 and region.y1 <= peak[1] < region.y2):
        return None
    image = pixels_of(query)
    height, width = image.shape[:2]
    centre_x = (peak[0] - region.x1) / (region.x2 - region.x1) * width
    centre_y = (peak[1] - region.y1) / (region.y2 - region.y1) * height
    left = _start(centre_x, width)
    top = _start(centre_y, height)
    return image[top : top + max(1, height // 2), left : left + max(1, width // 2)]


def shown_map(query: Query) -> Heatmap | None:
    """Return the cells of the anomaly map that the shown region touches, as a view."""
    if query.anomaly_map is None or query.region is None:
        return query.anomaly_map
    region, size = query.region, query.original_size
    return cut_map(query.anomaly_map, (region.x1, region.y1, region.x2, region.y2), size)


def cut_map(heatmap: Heatmap, corners: tuple[int, int, int, int], size: tuple[int, int]) -> Heatmap:
    """Return the cells of a map over an image of ``size`` = (width, height) that the rectangle touches, as a view."""
    rows, columns = heatmap.shape
    x1, y1, x2, y2 = corners
    across, down = columns / size[0], rows / size[1]
    return heatmap[
        math.floor(y1 * down) : math.ceil(y2 * down),
        math.floor(x1 * across) : math.ceil(x2 * across),
    ]


def _peak(heatmap: Heatmap, size: tuple[int, int]) -> tuple[float, float] | None:
    if float(heatmap.max()) == float(heatmap.min()):
        return None
    rows, columns = heatmap.shape
    row, column = divmod(int(heatmap.argmax()), columns)
    return (column + 0.5) * size[0] / columns, (row + 0.5) * size[1] / rows


def _start(centre: float, length: int) -> int:
    half = max(1, length // 2)
    return min(max(0, round(centre - half / 2)), length - half)
