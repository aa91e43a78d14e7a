"""From raw scores to P(defect) and to SAEC's three confidences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict

from saec.calibrate._numeric import Floats, bisect, fit_logistic, sigmoid, vector
from saec.errors import BadInput

_MEDIAN_LOGIT = math.log(19.0)  # the median good part gets P(defect) = 0.05
_RIDGE = 0.01


@dataclass(frozen=True, slots=True)
class ScoreCalibration:
    """P(defect) = sigmoid((score - location) / scale), strictly increasing in the score: ``scale > 0``."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    location: float
    scale: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.location) and math.isfinite(self.scale) and self.scale > 0):
            raise BadInput("not a calibration", where=f"location={self.location}, scale={self.scale}")

    def p_defect(self, score: ArrayLike) -> Floats:
        """Return P(defect) in [0, 1] for scores of any shape."""
        return sigmoid((np.asarray(score, dtype=np.float64) - self.location) / self.scale)

    @classmethod
    def from_good(cls, good_scores: ArrayLike, threshold: float) -> Self:
        """Fit from good parts alone: P = 0.5 at ``threshold`` and P = 0.05 at the median good score.

        Without defects this is no calibrated probability but the score's place between a typical good part and the
        threshold. The median stands for the spread because the upper tail of a few good scores is not to be trusted.

        Raises:
            BadInput: no scores, or one that is not finite.
        """
        good = vector(good_scores, "good scores")
        if good.size == 0:
            raise BadInput("no good parts to calibrate on", fix="hold out at least one good image")
        # With under 8 parts, or all equal, the spread says nothing: 2 % of the score keeps P(defect) from being a step.
        floor = (0.02 if good.size < 8 or np.ptp(good) == 0 else 1e-6) * abs(threshold)
        scale = max((threshold - float(np.median(good))) / _MEDIAN_LOGIT, floor, 1e-9)
        return cls(location=threshold, scale=scale)

    @classmethod
    def from_labelled(cls, good_scores: ArrayLike, defect_scores: ArrayLike) -> Self:
        """Fit Platt's sigmoid (Platt 1999) with his smoothed targets, (N+ + 1)/(N+ + 2) and 1/(N- + 2).

        Where defects do not score higher than good parts the best increasing sigmoid is nearly flat; that is what is
        returned, never a decreasing one.

        Raises:
            BadInput: one class is empty, or a score is not finite.
        """
        good, defect = vector(good_scores, "good scores"), vector(defect_scores, "defect scores")
        if good.size == 0 or defect.size == 0:
            raise BadInput("both good and defect scores are needed", where=f"{good.size} good, {defect.size} defect")
        scores = np.concatenate([good, defect])
        targets = np.repeat([1 / (good.size + 2), (defect.size + 1) / (defect.size + 2)], [good.size, defect.size])
        centre, spread = float(np.median(scores)), _spread(scores)
        features = np.stack([(scores - centre) / spread, np.ones_like(scores)], axis=1)
        # The ridge is a hundredth of one part's weight: it only decides where the data leave the sigmoid undecided.
        ridge = np.array([_RIDGE, _RIDGE])
        (slope, bias), _ = fit_logistic(features, targets, ridge=ridge, centre=np.zeros(2))
        if slope < _RIDGE:
            slope = _RIDGE
            flat = features[:, :1] * slope
            bias = bisect(lambda b: float(np.sum(sigmoid(flat[:, 0] + b) - targets)), -50.0, 50.0)
        return cls(location=centre - spread * float(bias / slope), scale=spread / float(slope))


def confidences(p_defect: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Return SAEC's (s_max, margin, entropy) of the two-class distribution (1 - p, p), each of p's shape.

    s_max is in [0.5, 1], margin and entropy (normalised by ln 2) in [0, 1].
    """
    p = np.asarray(p_defect, dtype=np.float64)
    return class_confidences(np.stack([1 - p, p], axis=-1))


def class_confidences(probabilities: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Return SAEC's (s_max, margin, entropy) of class distributions ``[..., K]``, K >= 2.

    s_max = max p, margin = p(1) - p(2) of the two largest, entropy = -sum p ln p / ln K in [0, 1].

    Raises:
        BadInput: fewer than two classes, or rows that are not probabilities (to 1e-3).
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim == 0 or p.shape[-1] < 2:
        raise BadInput("at least two classes are needed", where=f"shape {list(p.shape)}")
    if not (np.all(p >= -1e-6) and np.all(np.abs(p.sum(axis=-1) - 1) <= 1e-3)):
        raise BadInput("not class probabilities", fix="pass non-negative rows that sum to 1")
    ordered = np.sort(p, axis=-1)
    inside = np.clip(p, np.finfo(np.float64).tiny, 1.0)
    entropy = np.clip(-np.sum(inside * np.log(inside), axis=-1) / math.log(p.shape[-1]), 0.0, 1.0)
    return ordered[..., -1], ordered[..., -1] - ordered[..., -2], np.asarray(entropy, dtype=np.float64)


def fit_temperature(logits: ArrayLike, labels: NDArray[np.integer]) -> float:
    """Return the temperature T in [0.05, 20] that minimises the NLL of softmax(logits / T) (Guo et al. 2017).

    The NLL is convex in 1 / T, so bisection on its slope finds the minimum; it is never worse than at T = 1.

    Args:
        logits: ``[n, K]``.
        labels: ``[n]`` class indices in [0, K).

    Raises:
        BadInput: wrong shapes, logits that are not finite, or labels out of range.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if z.ndim != 2 or z.shape[0] == 0 or z.shape[1] < 2 or y.shape != z.shape[:1]:
        raise BadInput("logits must be [n, K] and labels [n]", where=f"{list(z.shape)} and {list(y.shape)}")
    if not np.isfinite(z).all() or y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= z.shape[1]:
        raise BadInput("logits must be finite and labels class indices below K")
    z = z - z.max(axis=1, keepdims=True)
    rows = np.arange(len(y))

    def slope(inverse: float) -> float:
        p = np.exp(inverse * z)
        p /= p.sum(axis=1, keepdims=True)
        return float(np.sum(p * z) - z[rows, y].sum())

    def nll(inverse: float) -> float:
        return float(np.sum(np.log(np.exp(inverse * z).sum(axis=1)) - inverse * z[rows, y]))

    inverse = bisect(slope, 1 / 20, 20.0)
    return 1 / inverse if nll(inverse) < nll(1.0) else 1.0


def _spread(scores: Floats) -> float:
    """Interquartile range; the standard deviation, then 1, where ties leave nothing of it.

    Never under a thousandth of the standard deviation: far scores in units of a spread that ties made tiny overflow.
    """
    low, high = np.quantile(scores, [0.25, 0.75])
    deviation = float(scores.std())
    return max(float(high - low), 1e-3 * deviation) if high > low else deviation or 1.0
