"""From pixels of the image that a model saw back to pixels of the part's original image."""

from __future__ import annotations

import math

from saec.types import Box, Query


def shown_region(query: Query) -> Box:
    """Return the rectangle of the original that ``query.image`` shows."""
    width, height = query.original_size
    return query.region or Box(0, 0, width, height)


def to_original(
    corners: tuple[float, float, float, float], seen: tuple[int, int], query: Query, *, score: float | None = None
) -> Box:
    """Map (x1, y1, x2, y2) in an image of size ``seen`` = (width, height) to a box in original pixels.

    ``seen`` is the size at which the model saw ``query.image``, after whatever resizing. The box is rounded outwards,
    so that it covers all that was marked, and never leaves the shown region.

    Raises:
        ValueError: corners that are not finite, not in order, or outside the image seen.
    """
    x1, y1, x2, y2 = corners
    width, height = seen
    if not all(math.isfinite(value) for value in corners):
        raise ValueError(f"box {corners} is not finite")
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ValueError(f"box {corners} is not inside an image of {width} x {height} pixels")
    region = shown_region(query)
    across, down = (region.x2 - region.x1) / width, (region.y2 - region.y1) / height
    left = min(region.x1 + math.floor(x1 * across), region.x2 - 1)
    top = min(region.y1 + math.floor(y1 * down), region.y2 - 1)
    # The tolerance keeps an exact 50.0 that floating point made 50.000000001 from growing by a pixel.
    right = min(region.x1 + math.ceil(x2 * across - 1e-6), region.x2)
    bottom = min(region.y1 + math.ceil(y2 * down - 1e-6), region.y2)
    return Box(left, top, max(right, left + 1), max(bottom, top + 1), score)
