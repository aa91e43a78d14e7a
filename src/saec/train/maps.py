"""What the edge would have said of the parts that a model is trained on: anomaly maps, and evidence to learn from.

A good part that is in the memory looks better than any new one. So each training part is seen by a memory that was
fitted without it, as the parts will be that a station escalates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np

from saec.data.decode import read_image
from saec.data.splitting import GroupedPart
from saec.edge.backbone import Backbone, Features, working_sides
from saec.edge.detector import MemoryDetector, PatchPool
from saec.edge.evidence import heatmap_evidence, relative
from saec.edge.fitters import heat_threshold
from saec.errors import BadInput
from saec.types import Box, Heatmap, Image, Label, Observation

FOLDS = 4
_MAX_BOXES = 3
_TONE = 6.0  # grey levels of 255 by which a region must differ from the rest to be called dark or bright
_LONG = 2.0  # longer side over shorter side of what is called a streak


class MapWriter:
    """Writes ``maps/<sha256>.npy`` beside fine-tuning files; the ``extras`` of :func:`saec.data.sft.write_sft`.

    A map is float32 [rows, columns], in units of the level above which the station marks a cell.

    Raises:
        BadInput: when called, a product with fewer than two good training parts that differ.
    """

    def __init__(self, out: Path, *, threads: int = 2, seed: int = 2025) -> None:
        self._folder = out / "maps"
        self._backbone = Backbone(threads=threads)
        self._seed = seed

    def __call__(self, train: Sequence[GroupedPart], held_out: Sequence[GroupedPart]) -> dict[str, dict[str, str]]:
        """Return ``anomaly_map`` of every part, and ``evidence`` of the parts that train as defects, sure or not."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows: dict[str, dict[str, str]] = {}
        parts = sorted([*train, *held_out], key=lambda one: one.part.product)
        for _, members in groupby(parts, key=lambda one: one.part.product):
            rows |= self._product(list(members), {one.print.sha256 for one in train})
        return rows

    def _product(self, parts: Sequence[GroupedPart], training: set[str]) -> dict[str, dict[str, str]]:
        shapes = [read_image(one.part.path).shape for one in parts[:32]]
        sides = working_sides([(height, width) for height, width, _ in shapes])
        images = (read_image(one.part.path) for one in parts)
        features = [[self._backbone(image, side) for side in sides] for image in images]
        good = [at for at, one in enumerate(parts) if one.part.label is Label.GOOD and one.print.sha256 in training]
        seen = self._cross_fitted(parts, features, good, sides)
        level = heat_threshold([seen[at] for at in good])
        rows = {}
        for at, one in enumerate(parts):
            heatmap = relative(np.asarray(seen[at].heatmap, dtype=np.float32), level)
            name = f"{one.print.sha256[:16]}.npy"
            np.save(self._folder / name, heatmap, allow_pickle=False)
            rows[one.print.sha256] = {"anomaly_map": f"{self._folder.name}/{name}"}
            if one.part.label is Label.DEFECT and one.print.sha256 in training:
                rows[one.print.sha256]["evidence"] = _evidence(read_image(one.part.path), heatmap)
        return rows

    def _cross_fitted(
        self,
        parts: Sequence[GroupedPart],
        features: Sequence[list[Features]],
        good: Sequence[int],
        sides: tuple[int, ...],
    ) -> list[Observation]:
        """Look at every part by a memory of the other good parts; near-duplicates share a fold."""
        pool = PatchPool(len(good), len(sides))
        for at in good:
            pool.add(features[at])
        groups = sorted({parts[at].group for at in good})
        if len(groups) < 2:
            what = "a memory without the part takes two good training parts that differ"
            raise BadInput(what, where=f"product {parts[0].part.product}", fix="add good parts")
        shuffled = np.random.default_rng(self._seed).permutation(len(groups))
        fold = {groups[number]: place % FOLDS for place, number in enumerate(shuffled)}
        judges: dict[int, MemoryDetector] = {-1: pool.fit(self._backbone, sides)}
        for number in set(fold.values()):
            out = [place for place, at in enumerate(good) if fold[parts[at].group] == number]
            judges[number] = pool.fit(self._backbone, sides, leave_out=out)
        # A defect that resembles a good part is kept from that part's fold as well.
        return [judges[fold.get(one.group, -1)].compare(features[at]) for at, one in enumerate(parts)]


def _evidence(image: Image, heatmap: Heatmap) -> str:
    """Return what can be said of a defect without knowing its name: where the edge saw it, its tone and its shape.

    The sentence names no side of the image, so that it stays true when the image is flipped.
    """
    size = (image.shape[1], image.shape[0])
    boxes = heatmap_evidence(heatmap, 1.0, size, is_defect=True).boxes[:_MAX_BOXES]
    corners = [[box.x1, box.y1, box.x2, box.y2] for box in boxes]
    others = f" and {len(boxes) - 1} more" if len(boxes) > 1 else ""
    text = f"{_tone(image, boxes[0])} {_shape(boxes[0], size)}{others} where good parts are even."
    return json.dumps({"kind": "other", "bboxes": corners, "desc": text})


def _tone(image: Image, box: Box) -> str:
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(np.float32)
    inside = grey[box.y1 : box.y2, box.x1 : box.x2]
    difference = float(inside.mean()) - float(np.median(grey))
    return "Dark" if difference < -_TONE else "Bright" if difference > _TONE else "Uneven"


def _shape(box: Box, size: tuple[int, int]) -> str:
    across, down = (box.x2 - box.x1) / size[0], (box.y2 - box.y1) / size[1]
    if across > _LONG * down:
        return "horizontal streak"
    if down > _LONG * across:
        return "vertical streak"
    return "spot" if max(across, down) < 0.25 else "area"
