"""Which tokens a model is least sure of. Pure functions on arrays.

Monte-Carlo dropout (Gal and Ghahramani, ICML 2016) inside the tower: what a token is varies from pass to pass where its
meaning hangs on few units. Dropout on a finished token would only measure its length (collaborative_learning.md), so
lengths are taken out: what counts is how far the passes' directions disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_GREYS = 32
"""Levels of grey whose entropy counts: finer ones would count the camera's noise."""


def dropout_masks(shape: tuple[int, ...], p: float, seed: bytes) -> Array:
    """Return a mask: 0 with probability ``p``, else 1 / (1 - p), the same for the same seed."""
    rng = np.random.default_rng(int.from_bytes(seed, "big"))
    return (rng.random(shape, dtype=np.float32) >= p).astype(np.float32) / np.float32(1 - p)


def dispersion(passes: Iterable[Array]) -> NDArray[np.float64]:
    """Return 1 - |mean unit vector|^2 of each token [L] over passes [L, W]: exactly 0 where all agree, at most 1."""
    directions = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in map(np.float64, passes))
    first = next(directions)
    count, total, squares = 1, np.zeros_like(first), np.zeros(len(first))
    for each in directions:
        # The same as the mean of |unit vector - mean|^2, from differences to the first pass: no digits cancel.
        apart = each - first
        count, total, squares = count + 1, total + apart, squares + (apart**2).sum(axis=1)
    return np.asarray(np.maximum(squares / count - ((total / count) ** 2).sum(axis=1), 0))


def grey_entropy(grey: NDArray[np.floating[Any]], side: int) -> NDArray[np.float64]:
    """Return the entropy in nats of the grey levels under each of ``side`` x ``side`` tokens, row by row.

    ``grey`` [S, S], from 0 to 1, is what the tower's square shows; S is a multiple of ``side``.
    """
    size = len(grey) // side
    levels = np.clip(grey * _GREYS, 0, _GREYS - 1).astype(np.int64)
    under = levels.reshape(side, size, side, size).transpose(0, 2, 1, 3).reshape(side * side, -1)
    shares = np.stack([np.bincount(cells, minlength=_GREYS) for cells in under]) / size**2
    return np.asarray(-(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=1))


def most_uncertain(uncertainty: NDArray[np.float64], ratio: float) -> NDArray[np.int32]:
    """Return the indices, ascending, of exactly ceil(ratio L) tokens; among equals the first ones go."""
    count = max(1, math.ceil(ratio * len(uncertainty) - 1e-9))  # 0.07 x 100 is a little more than 7 in floating point
    return np.sort(np.argsort(-uncertainty, kind="stable")[:count]).astype(np.int32)
