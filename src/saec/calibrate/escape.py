"""The escape bound: how many defects can slip through, proven without assuming any distribution.

With n independent defects and the threshold at the (k + 1)-th smallest score, the escape rate of future defects is at
most e with probability P(Binomial(n, e) >= k + 1) or more (order statistics; Wilks 1941). Zero escapes in n defects
thus prove 1 - (1 - confidence)^(1/n), about 3 / n at 95 % (the rule of three).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from saec.calibrate._numeric import binomial_cdf, bisect, in_unit, vector
from saec.calibrate.conformal import just_below
from saec.calibrate.guarantee import Guarantee, NotEnoughData
from saec.errors import BadInput


def escape_threshold(defect_scores: ArrayLike, escape: float, confidence: float = 0.95) -> Guarantee:
    """Return the highest threshold of *defect iff score >= threshold* with P(escape rate <= escape) >= confidence.

    Args:
        defect_scores: ``[n]`` scores of labelled defects that the detector was not fitted on.
        escape: requested bound on the escape rate, in (0, 1).
        confidence: in (0, 1).

    Raises:
        NotEnoughData: n defects cannot prove it, wherever the threshold is put.
        BadInput: a score is not finite, or a share is outside (0, 1).
    """
    defects = np.sort(vector(defect_scores, "defect scores"))
    in_unit(escape, "escape")
    in_unit(confidence, "confidence")
    n = int(defects.size)
    # How many defects may lie below the threshold: the largest k with P(Binomial(n, escape) <= k) <= 1 - confidence.
    doubt = (1 - confidence) * (1 + 1e-12)  # equality must survive rounding
    allowed = int(np.searchsorted(binomial_cdf(n, escape), doubt, side="right")) - 1
    if n == 0 or allowed < 0:
        raise NotEnoughData(n, best_escape(n, confidence), requested=escape, confidence=confidence)
    threshold = just_below(float(defects[allowed]), defects)
    return Guarantee(
        kind="escape",
        threshold=threshold,
        requested=escape,
        bound=min(escape, clopper_pearson_upper(allowed, n, confidence)),
        confidence=confidence,
        n=n,
        wrong=int(np.sum(defects < threshold)),
        method="order-statistic",
    )


def best_escape(n: int, confidence: float = 0.95) -> float:
    """Return the smallest escape rate that n defects can prove, 1 - (1 - confidence)^(1/n); 1 for n = 0."""
    return 1.0 if n == 0 else float(-np.expm1(np.log1p(-in_unit(confidence, "confidence")) / n))


def clopper_pearson_upper(k: int, n: int, confidence: float = 0.95) -> float:
    """Return the exact one-sided upper confidence bound of a rate after k events in n trials (Clopper, Pearson 1934).

    The bound u solves P(Binomial(n, u) <= k) = 1 - confidence; it is 1 for k = n (and for no trials at all).

    Raises:
        BadInput: not 0 <= k <= n.
    """
    in_unit(confidence, "confidence")
    if not 0 <= k <= n:
        raise BadInput(f"{k} events in {n} trials", fix="pass 0 <= k <= n")
    if k == n:
        return 1.0
    return bisect(lambda p: (1 - confidence) - float(binomial_cdf(n, p)[k]), 0.0, 1.0)
