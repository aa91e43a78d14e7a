"""Whether the tokens that go up carry the defect: held against masks, and against choosing by lot or by length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from saec.config import Settings
from saec.data.dataset import Dataset
from saec.errors import BadInput
from saec.evaluate.bench_uplink import CHOICES, RATIOS, Glance, Stages, glance
from saec.evaluate.question import image_of
from saec.evaluate.table import Cell, Table
from saec.types import Image, Label, Part
from saec.vlm.edge.pixels import fitted
from saec.vlm.tokens.tower import TowerTokeniser
from saec.vlm.tokens.uncertainty import most_uncertain


def with_masks(dataset: Dataset) -> list[Part]:
    """Return the parts of a data set that have masks.

    Raises:
        BadInput: none has one. Where kinds of defects were merged into one folder, masks no longer lie under the name
            of their part's kind, and which is whose cannot be told.
    """
    found = [part for part in dataset if part.mask is not None]
    if not found:
        kinds = ", ".join(sorted({part.kind for part in dataset if part.kind and part.label is Label.DEFECT}))
        merged = (dataset.root / "ground_truth").is_dir() and kinds
        what = f"ground_truth/ has no masks of these parts' kinds ({kinds})" if merged else "no part has a mask"
        fix = "masks lie in ground_truth/KIND/NAME_mask.png beside test/KIND/NAME.png, or pass a CSV of path,label,mask"
        raise BadInput(what, where=dataset.root, fix=fix)
    return found


def bench_masks(
    tower: TowerTokeniser,
    parts: Sequence[Part],
    settings: Settings,
    *,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Table:
    """Look at the parts that have masks, at least one; see :func:`touching`.

    Raises:
        BadInput: a file that cannot be read.
    """
    found, stages = [], Stages()
    masked = [(part, part.mask) for part in parts if part.mask is not None]
    for at, (part, mask) in enumerate(masked):
        progress("looking at parts with masks", at, len(masked))
        image, drawn = (image_of(path, max_pixels=settings.data.max_pixels) for path in (part.path, mask))
        found.append((_cells(drawn, tower), glance(tower, image, settings.tokens, stages)))
    return touching(found)


def _cells(mask: Image, tower: TowerTokeniser) -> NDArray[np.bool_]:
    """Return which tokens [L] a mask [H, W, 3] touches; what is not black is defect."""
    how, side = tower.record.preprocess, round(int(tower.record.tokens.shape[1]) ** 0.5)
    fine = 16 * side  # fine enough that hardly a speck falls between
    across, down = fitted(mask.shape[1], mask.shape[0], fine)
    left, top = (0, 0) if how.place == "corner" else ((fine - across) // 2, (fine - down) // 2)
    square = np.zeros((fine, fine), np.float32)
    defect = (mask.max(axis=2) > 0).astype(np.float32)
    square[top : top + down, left : left + across] = cv2.resize(defect, (across, down), interpolation=cv2.INTER_AREA)
    return np.asarray(square.reshape(side, 16, side, 16).max(axis=(1, 3)).reshape(-1) > 0)


def touching(found: Sequence[tuple[NDArray[np.bool_], Glance]]) -> Table:
    """Return how many times as often as tokens drawn by lot the chosen ones touch a defect, by choice and ratio.

    ``found`` holds, for each defective part, which of its tokens the mask touches, and what the tower saw.
    """
    rows: list[Mapping[str, Cell]] = []
    base = float(np.mean([cells.mean() for cells, _ in found]))
    for choice in CHOICES:
        row: dict[str, Cell] = {"chosen by": choice}
        for ratio in RATIOS[1:]:
            shares = [float(cells[most_uncertain(seen.ranks[choice], ratio)].mean()) for cells, seen in found]
            row[f"times by lot, {ratio:g}"] = float(np.mean(shares)) / base
        row["rank correlation with length"] = float(
            np.mean([rank_correlation(seen.ranks[choice], seen.ranks["length"]) for _, seen in found])
        )
        rows.append(row)
    notes = (f"{len(found)} parts with masks, which touch {base:.1%} of their tokens",)
    return Table("Tokens that touch the defect", tuple(rows[0]), rows, notes)


def rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return Spearman's rank correlation of two arrays [n] without ties to speak of."""
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
