"""The figures that every room above counts in. Positive class = defect; larger scores are more suspicious.

A rate whose denominator is empty is ``None``: it was not measured, which is not the same as 0. Unreadable parts never
enter here: they are neither good nor defect.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saec.errors import BadInput

Floats = NDArray[np.float64]


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
    values, t = scored(predicted, truth)
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
    values, t = scored(scores, labels)
    positives, negatives = int(t.sum()), int((~t).sum())
    if positives == 0 or negatives == 0:
        return None
    pos, neg = counts_by_score(values, t)
    below = np.cumsum(neg) - neg
    wins_twice = int((pos * (2 * below + neg)).sum())  # integers: no rounding before the one division
    return wins_twice / (2 * positives * negatives)


def counts_by_score(values: Floats, flags: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of True and False flags at each distinct value, values ascending."""
    distinct, inverse = np.unique(values, return_inverse=True)
    true = np.bincount(inverse, weights=flags, minlength=distinct.size).astype(np.int64)
    return true, np.bincount(inverse, minlength=distinct.size).astype(np.int64) - true


def scored(scores: ArrayLike, flags: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """Return both as vectors of one length; raise :class:`BadInput` unless they are that and the scores are finite."""
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(flags, dtype=np.bool_)
    if x.ndim != 1 or x.shape != y.shape:
        raise BadInput("expected two vectors of one length", where=f"{x.shape} and {y.shape}")
    if not np.isfinite(x).all():
        raise BadInput("scores must be finite numbers", where=f"index {int(np.argmin(np.isfinite(x)))}")
    return x, y


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
