"""The expert's supervised head: ridge regression on pooled features, its ridge chosen by held-out scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saec.calibrate.score import ScoreCalibration
from saec.edge.backbone import Features
from saec.edge.detector import MemoryDetector
from saec.types import Image

Doubles = NDArray[np.float64]

RIDGES = (0.03, 0.1, 0.3, 1.0)
FOLDS = 5
WORST = 0.05
"""Share of the largest and of the smallest activations that are pooled beside mean and spread."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A ridge classifier on standardised pooled features [D]: score = ((x - mean) * scale) @ weights + bias."""

    mean: Doubles
    scale: Doubles
    weights: Doubles
    bias: float

    def score(self, pooled: Doubles) -> float:
        """Return the raw score of one image; positive leans to defect."""
        return float((pooled - self.mean) * self.scale @ self.weights + self.bias)


def pooled(image: Image, plain: Sequence[Features], detector: MemoryDetector) -> Doubles:
    """Return the pooled features of an image [D]: of each pass, averaged over the image and its mirror image."""
    mirror = np.ascontiguousarray(image[:, ::-1])
    views = [plain, [detector.backbone(mirror, side) for side in detector.sides]]
    return np.asarray(np.mean([np.concatenate([_pool(grid) for grid in view]) for view in views], axis=0))


def _pool(grid: Features) -> Doubles:
    """Return mean, spread, and the means of the largest and smallest activations of each channel, [4 C]."""
    flat = np.sort(grid.reshape(-1, grid.shape[-1]).astype(np.float64), axis=0)
    count = max(1, round(WORST * len(flat)))
    return np.concatenate([flat.mean(axis=0), flat.std(axis=0), flat[-count:].mean(axis=0), flat[:count].mean(axis=0)])


def fit_head(x: Doubles, is_defect: NDArray[np.bool_], ridge: float) -> Head:
    """Fit the head by class-balanced ridge regression to -1 and +1, solved in the dual: there are fewer parts than D.

    Args:
        x: [n, D] pooled features.
        is_defect: [n].
        ridge: relative to a kernel of unit diagonal.
    """
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    scale = 1 / (spread * np.sqrt(x.shape[1]))
    z = np.concatenate([(x - mean) * scale, np.ones((len(x), 1))], axis=1)
    target = np.where(is_defect, 1.0, -1.0)
    weight = np.where(is_defect, 0.5 / max(is_defect.sum(), 1), 0.5 / max((~is_defect).sum(), 1)) * len(x)
    solution = z.T @ np.linalg.solve(z @ z.T + ridge * np.diag(1 / weight), target)
    return Head(mean, scale, solution[:-1], float(solution[-1]))


def _held_out_scores(x: Doubles, is_defect: NDArray[np.bool_], ridge: float) -> Doubles:
    """Return for each part [n] the score of a head that was fitted without its fold."""
    fold = np.random.default_rng(0).permutation(len(x)) % FOLDS
    scores = np.empty(len(x))
    for number in range(FOLDS):
        out = fold == number
        head = fit_head(x[~out], is_defect[~out], ridge)
        scores[out] = [head.score(row) for row in x[out]]
    return scores


def best_ridge(x: Doubles, is_defect: NDArray[np.bool_]) -> tuple[float, Doubles]:
    """Return the ridge whose held-out scores fit the labels best (log loss after Platt's sigmoid), and those scores."""
    best: tuple[float, float, Doubles] | None = None
    for ridge in RIDGES:
        scores = _held_out_scores(x, is_defect, ridge)
        p = ScoreCalibration.from_labelled(scores[~is_defect], scores[is_defect]).p_defect(scores)
        loss = -float(np.mean(np.log(np.clip(np.where(is_defect, p, 1 - p), 1e-9, 1))))
        if best is None or loss < best[0]:
            best = loss, ridge, scores
    assert best is not None  # noqa: S101 - RIDGES is not empty
    return best[1], best[2]
