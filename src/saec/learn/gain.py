"""Amplifying a compressed change until the adapter answers as the uncompressed one does.

A sparse update leaves most of the changes out. Each of them matters little, but they pull together: Loupe's adapter,
taught poly cells after mono ones, is right about 86.2 % of 268 cells, before that about 67.5 %; with the most important
2 % of its changes 73.1 %, and with the same ones times 2.5 again 86.6 %. One factor for all that is sent costs no bytes
and needs no labels: it is the one with which the answers come closest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from saec.learn.delta import Delta
from saec.learn.state import State

GAINS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Factors that are tried: all of them, for the distance may have several minima."""

PARTS = 60
"""About as many parts are enough: one number is fitted."""


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
        gains: what is tried; of two that are as good the first is taken.
    """
    wanted = p_of(new)

    def apart(delta: Delta) -> float:
        return float(np.abs(p_of(delta.apply(base)) - wanted).mean())

    tried = [(gain, make(gain)) for gain in gains]
    return min(tried, key=lambda one: apart(one[1]))
