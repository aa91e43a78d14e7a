"""From a heatmap to boxes: where on the part the detector saw something that good parts do not have."""

from __future__ import annotations

import cv2
import numpy as np

from saec.types import Box, Evidence, Heatmap

SOURCE = "edge-heatmap"
MAX_BOXES = 8
CORE = 0.7
"""A box holds the part of its region that reaches this share of the region's peak: a strong defect's halo, which the
backbone's field of view draws around it, is no defect."""

_FINE = 8  # the heatmap is enlarged this many times before it is cut, so that boxes do not snap to its cells


def relative(heatmap: Heatmap, level: float) -> Heatmap:
    """Return a detector's map in units of the level above which a cell is marked."""
    return np.asarray(heatmap / np.float32(level), dtype=np.float32)


def heatmap_evidence(heatmap: Heatmap, threshold: float, size: tuple[int, int], *, is_defect: bool) -> Evidence:
    """Return boxes around the regions above ``threshold``, worst first.

    Args:
        heatmap: [rows, columns] float32 over the whole image.
        threshold: in the heatmap's units: good parts hardly ever reach it.
        size: (width, height) of the original image.
        is_defect: whether the part is called defect. Then there is at least one box, around the worst cell, so that
            nobody is left to search; a part called good has none.
    """
    if not is_defect:
        return Evidence()
    rows, columns = heatmap.shape
    fine = cv2.resize(heatmap, (columns * _FINE, rows * _FINE), interpolation=cv2.INTER_CUBIC)
    fine = np.minimum(fine, heatmap.max())  # a cubic overshoots beside a step
    cut = min(threshold, float(fine.max()))  # of the enlarged map: interpolation takes the top off a peak
    count, marks, stats, _ = cv2.connectedComponentsWithStats((fine >= cut).astype(np.uint8), connectivity=8)
    across, down = size[0] / fine.shape[1], size[1] / fine.shape[0]
    boxes = []
    for mark in range(1, count):
        left, top, width, height = (int(value) for value in stats[mark, :4])
        region = fine[top : top + height, left : left + width]
        region = np.where(marks[top : top + height, left : left + width] == mark, region, -np.inf)
        peak = float(region.max())
        rows_in, columns_in = np.nonzero(region >= CORE * peak)
        left, width = left + int(columns_in.min()), int(np.ptp(columns_in)) + 1
        top, height = top + int(rows_in.min()), int(np.ptp(rows_in)) + 1
        x1, y1 = int(left * across), int(top * down)
        x2, y2 = int(np.ceil((left + width) * across)), int(np.ceil((top + height) * down))
        boxes.append(Box(x1, y1, min(max(x2, x1 + 1), size[0]), min(max(y2, y1 + 1), size[1]), score=peak))
    boxes.sort(key=lambda box: -(box.score or 0))
    return Evidence(boxes=tuple(boxes[:MAX_BOXES]), source=SOURCE)
