"""Conformal p-values and the overkill bound, from scores of good parts alone.

Inductive conformal prediction (Vovk, Gammerman, Shafer 2005): if the good calibration parts and the next good part are
exchangeable, P(next score > k-th smallest of n) <= (n + 1 - k) / (n + 1). Ties only make the left side smaller.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from saec.calibrate._numeric import Floats, in_unit, vector
from saec.calibrate.guarantee import Guarantee
from saec.errors import BadInput


def p_value(good_scores: ArrayLike, score: ArrayLike) -> Floats:
    """Return the conformal p-value (1 + #{good >= score}) / (n + 1) for each score, in [1 / (n + 1), 1].

    For a good part P(p-value <= a) <= a for every a; ``n = 0`` gives 1, no evidence at all.

    Raises:
        BadInput: a score is not finite.
    """
    good = np.sort(vector(good_scores, "good scores"))
    asked = vector(np.atleast_1d(np.asarray(score, dtype=np.float64)), "score")
    at_least = good.size - np.searchsorted(good, asked, side="left")
    return np.asarray((1 + at_least) / (good.size + 1), dtype=np.float64)


def overkill_threshold(good_scores: ArrayLike, overkill: float, *, cross_fitted: bool = False) -> Guarantee:
    """Return the lowest threshold whose overkill rate is proven to be at most ``overkill``.

    The convention of the whole product is *defect iff score >= threshold*. The threshold therefore lies a hair above
    the order statistic, so that a part that ties with it stays good, also after rounding in P(defect).

    With too few parts (n < 1 / overkill - 1) no threshold proves the request. The result is then the best there is,
    just above the largest good score, with ``bound = 1 / (n + 1)`` and ``achieved`` false.

    Args:
        good_scores: ``[n]`` scores of good parts that the detector was not fitted on.
        overkill: requested rate in (0, 1).
        cross_fitted: the scores come from folds, each part scored by a detector fitted on the others. The final
            detector has seen more parts than any fold's, which makes the bound conservative in practice, but the
            exchangeability argument is then only approximate; the guarantee says so by its method's name.

    Raises:
        BadInput: no scores, or one that is not finite.
    """
    good = np.sort(vector(good_scores, "good scores"))
    in_unit(overkill, "overkill")
    if good.size == 0:
        raise BadInput("no good parts to calibrate on", fix="hold out at least one good image")
    n = int(good.size)
    # The 1e-9 keeps (n + 1)(1 - overkill) that is an integer but for rounding from being pushed to the next rank.
    rank = min(n, math.ceil((n + 1) * (1 - overkill) - 1e-9))
    threshold = just_above(float(good[rank - 1]), good)
    return Guarantee(
        kind="overkill",
        threshold=threshold,
        requested=overkill,
        bound=(n + 1 - rank) / (n + 1),
        confidence=None,
        n=n,
        wrong=int(np.sum(good >= threshold)),
        method="cross-conformal" if cross_fitted else "conformal",
    )


def just_above(value: float, scores: Floats) -> float:
    """Return a threshold above ``value`` by a billionth of the scores' spread, and more than rounding could undo.

    A distance of one unit in the last place would be lost when the score becomes a probability.
    """
    return value + max(1e-9 * float(np.ptp(scores)), 8 * math.ulp(float(np.abs(scores).max())), 1e-20)


def just_below(value: float, scores: Floats) -> float:
    """Mirror image of :func:`just_above`."""
    return -just_above(-value, -scores)
