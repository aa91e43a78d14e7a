"""The little mathematics of this room: stable logistic functions, penalised logistic regression, binomial tails."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saec.errors import BadInput

Floats = NDArray[np.float64]

P_CLIP = 1e-6
"""Probabilities are confined to [P_CLIP, 1 - P_CLIP] before they become logits in a fit."""


def vector(values: ArrayLike, name: str, *, low: float = -math.inf, high: float = math.inf) -> Floats:
    """Return ``values`` as a float64 vector; raise :class:`BadInput` unless all are finite and within [low, high]."""
    out = np.asarray(values, dtype=np.float64)
    if out.ndim != 1:
        raise BadInput("not a list of numbers", where=name, fix=f"shape is {list(out.shape)}, expected [n]")
    if not np.isfinite(out).all():
        raise BadInput("not a finite number", where=f"{name}[{int(np.argmin(np.isfinite(out)))}]")
    if out.size and (out.min() < low or out.max() > high):
        raise BadInput(f"outside [{low:g}, {high:g}]", where=name)
    return out


def in_unit(value: float, name: str, *, closed: bool = False) -> float:
    """Return ``value`` if it lies in (0, 1), or [0, 1] when ``closed``; raise :class:`BadInput` otherwise."""
    if not (0 <= value <= 1 if closed else 0 < value < 1):
        raise BadInput(f"not a share between 0 and 1: {value}", where=name)
    return value


def sigmoid(x: ArrayLike) -> Floats:
    """1 / (1 + exp(-x)) without overflow, with full relative precision for small results."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -np.asarray(x, dtype=np.float64))), dtype=np.float64)


def logit(p: ArrayLike, *, clip: float = P_CLIP) -> Floats:
    """ln(p / (1 - p)), p first confined to [clip, 1 - clip]."""
    inside = np.clip(np.asarray(p, dtype=np.float64), clip, 1 - clip)
    return np.asarray(np.log(inside) - np.log1p(-inside), dtype=np.float64)


def log_loss(logits: Floats, targets: Floats) -> float:
    """Mean negative log-likelihood of (possibly soft) targets."""
    return float(np.mean(np.logaddexp(0.0, logits) - targets * logits))


def fit_logistic(features: Floats, targets: Floats, *, ridge: Floats, centre: Floats) -> tuple[Floats, float]:
    """Minimise sum(softplus(Xw) - t Xw) + sum(ridge (w - centre)^2) / 2 by damped Newton steps.

    Args:
        features: ``[n, d]``, a column of ones included where a bias is wanted.
        targets: ``[n]`` in [0, 1].
        ridge: ``[d]``, positive: makes the problem strictly convex, so separable data stay finite.
        centre: ``[d]``, the weights that the penalty pulls towards and the starting point.

    Returns:
        The weights ``[d]`` and the penalised objective there.
    """

    def objective(w: Floats) -> float:
        eta = features @ w
        return float(np.sum(np.logaddexp(0.0, eta) - targets * eta) + 0.5 * np.sum(ridge * (w - centre) ** 2))

    weights, best = centre.copy(), objective(centre)
    for _ in range(100):
        p = sigmoid(features @ weights)
        gradient = features.T @ (p - targets) + ridge * (weights - centre)
        hessian = (features * (p * (1 - p))[:, None]).T @ features + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-10 and (value := objective(weights - size * step)) > best:
            size /= 2
        if size <= 1e-10 or best - value < 1e-12 * (1 + abs(best)):
            break
        weights, best = weights - size * step, value
    return weights, best


def bisect(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Return the root of an increasing function on [low, high]; an end of the interval when there is none inside."""
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if increasing(middle) < 0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def binomial_cdf(n: int, p: float) -> Floats:
    """Return P(X <= k) for k = 0..n, X ~ Binomial(n, p), 0 < p < 1; ``[n + 1]``, summed in log space."""
    k = np.arange(n, dtype=np.float64)
    choose = np.concatenate(([0.0], np.cumsum(np.log(n - k) - np.log(k + 1))))
    i = np.arange(n + 1, dtype=np.float64)
    log_mass = choose + i * math.log(p) + (n - i) * math.log1p(-p)
    return np.asarray(np.minimum(np.exp(np.logaddexp.accumulate(log_mass)), 1.0), dtype=np.float64)
