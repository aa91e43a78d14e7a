"""Figures of a binary inspection run. Positive class = defect; scores are larger for more suspicious parts.

A rate whose denominator is empty is ``None``: it was not measured, which is not the same as 0. Unreadable parts never
enter here: they are neither good nor defect, so they are left out of every rate and counted on their own
(:mod:`saec.evaluate.summary`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saec.calibrate.escape import clopper_pearson_upper
from saec.errors import BadInput

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of parts: ``tp`` defects caught, ``fp`` overkills, ``tn`` good parts passed, ``fn`` escapes."""

    tp: int
    fp: int
    tn: int
    fn: int

    @property
    def n(self) -> int:
        """All parts counted."""
        return self.tp + self.fp + self.tn + self.fn

    @property
    def defects(self) -> int:
        """Parts that truly are defects."""
        return self.tp + self.fn

    @property
    def goods(self) -> int:
        """Parts that truly are good."""
        return self.tn + self.fp

    @property
    def correct(self) -> int:
        """Parts that were called what they are."""
        return self.tp + self.tn


def confusion(predicted: ArrayLike, truth: ArrayLike) -> Confusion:
    """Count the four outcomes of ``predicted`` [n] against ``truth`` [n], both boolean with True = defect."""
    values, t = _pair(predicted, truth)
    p = values > 0
    return Confusion(tp=int((p & t).sum()), fp=int((p & ~t).sum()), tn=int((~p & ~t).sum()), fn=int((~p & t).sum()))


def accuracy(c: Confusion) -> float | None:
    """Share of parts called what they are."""
    return _ratio(c.correct, c.n)


def balanced_accuracy(c: Confusion) -> float | None:
    """Mean of the two classes' accuracies; ``None`` unless both classes are there."""
    escape, overkill = escape_rate(c), overkill_rate(c)
    return None if escape is None or overkill is None else 1.0 - (escape + overkill) / 2.0


def escape_rate(c: Confusion) -> float | None:
    """Share of the defects that were called good (miss rate)."""
    return _ratio(c.fn, c.defects)


def overkill_rate(c: Confusion) -> float | None:
    """Share of the good parts that were called defect (false alarm rate)."""
    return _ratio(c.fp, c.goods)


def auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Probability that a random defect scores above a random good part, ties counting one half.

    Exact (Mann–Whitney U from pair counts of the distinct scores), ``None`` when one class is missing.

    Args:
        scores: [n] finite floats, larger is more suspicious.
        labels: [n] booleans, True = defect.
    """
    values, t = _pair(scores, labels)
    positives, negatives = int(t.sum()), int((~t).sum())
    if positives == 0 or negatives == 0:
        return None
    pos, neg = _counts_by_score(values, t)
    below = np.cumsum(neg) - neg
    wins_twice = int((pos * (2 * below + neg)).sum())  # integers: no rounding before the one division
    return wins_twice / (2 * positives * negatives)


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
    values, t = _pair(scores, labels)
    if t.all() or not t.any():
        return None
    pos, neg = _counts_by_score(values, t)
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
    values, ok = _pair(certainty, correct)
    if not values.size:
        return None
    right, wrong = (counts[::-1] for counts in _counts_by_score(values, ok))
    accepted = np.cumsum(right + wrong)
    return RiskCoverage(accepted / values.size, np.cumsum(wrong) / accepted)


def _counts_by_score(values: Floats, flags: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of True and False flags at each distinct value, values ascending."""
    distinct, inverse = np.unique(values, return_inverse=True)
    true = np.bincount(inverse, weights=flags, minlength=distinct.size).astype(np.int64)
    return true, np.bincount(inverse, minlength=distinct.size).astype(np.int64) - true


def _pair(scores: ArrayLike, flags: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(flags, dtype=np.bool_)
    if x.ndim != 1 or x.shape != y.shape:
        raise BadInput("expected two vectors of one length", where=f"{x.shape} and {y.shape}")
    if not np.isfinite(x).all():
        raise BadInput("scores must be finite numbers", where=f"index {int(np.argmin(np.isfinite(x)))}")
    return x, y


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
