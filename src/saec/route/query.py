"""What the cloud is shown of a part: the whole image, or the crop around the anomaly. The client compresses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from saec.types import Box, Evidence, Heatmap, Image, Query

CROP_MARGIN = 0.5
"""The crop reaches this share of the anomaly's longer side beyond it on every side: context to judge it by."""

CROP_MIN_SHARE = 0.25
"""No side of a crop is shorter than this share of the image's: an MLLM cannot place a crop without surroundings."""


def build_query(
    part_id: str,
    product: str,
    image: Image,
    *,
    heatmap: Heatmap | None,
    evidence: Evidence,
    p_defect: float | None,
    uplink: Literal["image", "crop", "tokens"],
    references: Sequence[Image] = (),
) -> Query:
    """Return the question about one part.

    ``image`` is [H, W, 3] uint8 BGR; ``heatmap`` [h, w] float32 over the whole image, and it goes along whole also
    with a crop (``Query.region`` says where the crop lies). With nothing to crop around, the whole image goes; for
    ``tokens`` it is there for the client, which makes them of it just before it sends.
    """
    height, width = image.shape[:2]
    region = crop_region(heatmap, evidence, (width, height)) if uplink == "crop" else None
    if region is not None:
        # A copy: a view would keep the whole image alive as long as the question waits.
        image = image[region.y1 : region.y2, region.x1 : region.x2].copy()
    return Query(
        part_id=part_id,
        product=product,
        image=image,
        original_size=(width, height),
        region=region,
        references=tuple(references),
        anomaly_map=heatmap,
        edge_p_defect=p_defect,
    )


def crop_region(heatmap: Heatmap | None, evidence: Evidence, size: tuple[int, int]) -> Box | None:
    """Return the rectangle of an image of ``size`` = (width, height) to show, or ``None`` for all of it.

    Its centre is the anomaly: the edge's boxes where there are any, else the heatmap's maximum cell.
    """
    width, height = size
    anomaly = _hull(evidence.boxes) or _hottest_cell(heatmap, size)
    if anomaly is None:
        return None
    margin = CROP_MARGIN * max(anomaly.x2 - anomaly.x1, anomaly.y2 - anomaly.y1)
    x1, x2 = _span(anomaly.x1, anomaly.x2, margin, width)
    y1, y2 = _span(anomaly.y1, anomaly.y2, margin, height)
    return None if (x2 - x1, y2 - y1) == (width, height) else Box(x1, y1, x2, y2)


def _hull(boxes: Sequence[Box]) -> Box | None:
    if not boxes:
        return None
    return Box(min(b.x1 for b in boxes), min(b.y1 for b in boxes), max(b.x2 for b in boxes), max(b.y2 for b in boxes))


def _hottest_cell(heatmap: Heatmap | None, size: tuple[int, int]) -> Box | None:
    if heatmap is None or heatmap.size == 0 or not np.isfinite(heatmap).all():
        return None
    rows, columns = heatmap.shape
    row, column = divmod(int(heatmap.argmax()), columns)
    width, height = size
    return Box(
        column * width // columns,
        row * height // rows,
        -(-(column + 1) * width // columns),
        -(-(row + 1) * height // rows),
    )


def _span(low: int, high: int, margin: float, length: int) -> tuple[int, int]:
    """Widen [low, high) by the margin and to the least size, then shift it back into [0, length)."""
    size = min(length, max(round(high - low + 2 * margin), round(CROP_MIN_SHARE * length), 1))
    start = min(max(0, (low + high - size) // 2), length - size)
    return start, start + size
