"""Figures of a run beyond the rates of :mod:`saec.calibrate.metrics`: percentiles, intervals, and the report's curves.

Unreadable parts never enter here: they are left out and counted on their own (:mod:`saec.evaluate.summary`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saec.calibrate.escape import clopper_pearson_upper
from saec.calibrate.metrics import counts_by_score, scored
from saec.errors import BadInput

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def percentiles(values: ArrayLike, at: Sequence[float] = (50, 90, 99)) -> dict[str, float] | None:
    """Linear-interpolated percentiles as ``{"p50": …}``; ``None`` when there are no values."""
    v = np.asarray(values, dtype=np.float64)
    return {f"p{q:g}": float(x) for q, x in zip(at, np.percentile(v, at), strict=True)} if v.size else None


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Interval | None:
    """Exact two-sided interval for a rate ``k / n`` (Clopper & Pearson 1934); ``None`` when n is 0.

    It covers the true rate with at least the stated confidence for every n, which is why the report uses it.
    """
    if not 0 <= k <= n or not 0 < confidence < 1:
        raise BadInput("a rate needs 0 <= k <= n and 0 < confidence < 1", where=f"k={k}, n={n}, {confidence}")
    if n == 0:
        return None
    one_sided = (1 + confidence) / 2
    # The lower end is what the upper end of the opposite event leaves.
    return 1 - clopper_pearson_upper(n - k, n, one_sided), clopper_pearson_upper(k, n, one_sided)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Rates when every part with ``score >= thresholds[i]`` is called defect. All arrays are [k], float64."""

    thresholds: Floats
    escape: Floats
    overkill: Floats


def threshold_sweep(scores: ArrayLike, labels: ArrayLike) -> Sweep | None:
    """Escape and overkill rate at every distinct score and just above the largest; ``None`` if a class is missing."""
    values, t = scored(scores, labels)
    if t.all() or not t.any():
        return None
    pos, neg = counts_by_score(values, t)
    thresholds = np.append(np.unique(values), np.nextafter(values.max(), np.inf))
    missed = np.concatenate([[0], np.cumsum(pos)])
    passed = np.concatenate([[0], np.cumsum(neg)])
    return Sweep(thresholds, missed / pos.sum(), 1.0 - passed / neg.sum())


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Error rate among the most certain share of the parts. ``coverage`` rises to 1; both arrays are [k], float64."""

    coverage: Floats
    risk: Floats

    @property
    def area(self) -> float:
        """Area under the curve (AURC): smaller is better, 0 when every part is right."""
        return float((np.diff(self.coverage, prepend=0.0) * self.risk).sum())


def risk_coverage(certainty: ArrayLike, correct: ArrayLike) -> RiskCoverage | None:
    """Selective-prediction curve (El-Yaniv & Wiener 2010): accept the most certain parts first; ``None`` when empty.

    Args:
        certainty: [n] floats; equal values are accepted together.
        correct: [n] booleans.
    """
    values, ok = scored(certainty, correct)
    if not values.size:
        return None
    right, wrong = (counts[::-1] for counts in counts_by_score(values, ok))
    accepted = np.cumsum(right + wrong)
    return RiskCoverage(accepted / values.size, np.cumsum(wrong) / accepted)
