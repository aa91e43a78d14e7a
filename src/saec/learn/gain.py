"""Amplifying a compressed change until the adapter answers as the uncompressed one does.

A sparse update leaves most of the changes out. Each of them matters little, but they pull together: Loupe's adapter,
taught poly cells after mono ones, called 60 % of them right with the most important 2 % of its changes, as without any,
because the logits' mean did not move; with the same 2 % times 2.5, 87 %, and 87 % with all of them. One factor for all
that is sent costs no bytes, and needs no labels: it is the one with which the answers come closest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from saec.learn.delta import Delta
from saec.learn.state import State

GAINS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Factors that are tried, from the smallest on."""

PARTS = 60
"""About as many parts are enough: one number is fitted."""

_WORSE = 2
"""Factors in a row that are worse than the best so far, after which no more are tried: the distance has one minimum."""


def fit_gain(
    base: State,
    new: State,
    make: Callable[[float], Delta],
    p_of: Callable[[State], NDArray[np.float64]],
    *,
    gains: Sequence[float] = GAINS,
) -> tuple[float, Delta]:
    """Return the factor with which the decoded state answers most like ``new``, and the delta.

    Args:
        base: what the device has.
        new: what it should answer like.
        make: compresses the change, times a factor.
        p_of: returns a state's P(defect) of some parts, [n] in [0, 1]; their labels do not matter.
        gains: what is tried, in order.
    """
    wanted = p_of(new)

    def apart(delta: Delta) -> float:
        return float(np.abs(p_of(delta.apply(base)) - wanted).mean())

    best, chosen = gains[0], make(gains[0])
    least, worse = apart(chosen), 0
    for gain in gains[1:]:
        delta = make(gain)
        found = apart(delta)
        if found < least:
            best, chosen, least, worse = gain, delta, found, 0
        else:
            worse += 1
        if worse == _WORSE:
            break
    return best, chosen
