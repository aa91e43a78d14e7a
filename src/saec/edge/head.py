"""A supervised head: ridge regression on pooled features, its ridge chosen by held-out scores.

The memory bank knows good parts only. Where labelled defects are known too, a linear head on the same features, which
cost nothing more, knows what defects look like; :class:`EdgeHead` adds both scores up to one logit. The embedded expert
(:mod:`saec.cloud.expert`) has a head of its own, on more features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saec.calibrate.fusion import fit_fusion
from saec.calibrate.score import ScoreCalibration
from saec.edge.backbone import Features

Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]

MIN_DEFECTS = 20
"""Fewer labelled defects than this, or fewer good parts, do not make a supervised head."""

RIDGES = (0.03, 0.1, 0.3, 1.0)
FOLDS = 5
WORST = 0.05
"""Share of the largest and of the smallest activations that are pooled beside mean and spread."""


def pool_features(passes: Sequence[Features]) -> Doubles:
    """Return mean, spread, and the means of the largest and smallest activations of each channel, [passes x 4 x C]."""
    return np.concatenate([_pool(grid) for grid in passes])


def _pool(grid: Features) -> Doubles:
    channels = np.ascontiguousarray(grid.reshape(-1, grid.shape[-1]).T)  # a channel in one piece: half the time
    size = channels.shape[1]
    count = max(1, round(WORST * size))
    ordered = np.sort(channels, axis=1)  # vectorised for float32: faster than a partition
    top, bottom = ordered[:, size - count :], ordered[:, :count]
    pooled = [channels.mean(axis=1), channels.std(axis=1), top.mean(axis=1), bottom.mean(axis=1)]
    return np.concatenate(pooled).astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A ridge classifier on standardised pooled features [D]: score = ((x - mean) * scale) @ weights + bias."""

    mean: Doubles
    scale: Doubles
    weights: Doubles
    bias: float

    def score(self, pooled: Doubles) -> float:
        """Return the raw score of one image; positive leans to defect."""
        return float((pooled - self.mean) * self.scale @ self.weights + self.bias)


def fit_head(x: Doubles, p_defect: ArrayLike, ridge: float) -> Head:
    """Fit the head by class-balanced ridge regression to -1 and +1, solved in the dual: there are fewer parts than D.

    Args:
        x: [n, D] pooled features.
        p_defect: [n] in [0, 1]: 1 for a defect, between for a teacher that is not sure; the targets are 2 p - 1.
        ridge: relative to a kernel of unit diagonal.
    """
    return _fit_heads(x, np.asarray(p_defect, dtype=np.float64), (ridge,))[0]


def _fit_heads(x: Doubles, p_defect: Doubles, ridges: Sequence[float]) -> list[Head]:
    """Return one head for each ridge; the kernel, which costs most, is the same for all."""
    is_defect = p_defect >= 0.5
    mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    scale = 1 / (spread * np.sqrt(x.shape[1]))
    z = np.concatenate([(x - mean) * scale, np.ones((len(x), 1))], axis=1)
    kernel = z @ z.T
    weight = np.where(is_defect, 0.5 / max(is_defect.sum(), 1), 0.5 / max((~is_defect).sum(), 1)) * len(x)
    heads = []
    for ridge in ridges:
        solution = z.T @ np.linalg.solve(kernel + ridge * np.diag(1 / weight), 2 * p_defect - 1)
        heads.append(Head(mean, scale, solution[:-1], float(solution[-1])))
    return heads


def best_ridge(x: Doubles, p_defect: ArrayLike, groups: ArrayLike | None = None) -> tuple[float, Doubles]:
    """Return the ridge whose held-out scores fit the labels best (log loss after Platt's sigmoid), and those scores.

    ``groups`` [n] numbers near-duplicates alike: they are held out together.
    """
    p = np.asarray(p_defect, dtype=np.float64)
    _, group = np.unique(np.arange(len(x)) if groups is None else np.asarray(groups), return_inverse=True)
    fold = (np.random.default_rng(0).permutation(int(group.max()) + 1) % FOLDS)[group]
    held_out = np.empty((len(RIDGES), len(x)))
    for out in (fold == number for number in range(FOLDS)):
        for scores, head in zip(held_out, _fit_heads(x[~out], p[~out], RIDGES), strict=True):
            scores[out] = [head.score(row) for row in x[out]]
    losses = [log_losses(_platt(scores, p >= 0.5).p_defect(scores), p).mean() for scores in held_out]
    best = int(np.argmin(losses))
    return RIDGES[best], held_out[best]


@dataclass(frozen=True, slots=True, eq=False)
class EdgeHead:
    """Head and bank in one logit: score = pooled @ weights + bank x bank_score + bias.

    ``weights`` [D] float32, in the units of the pooled features.
    """

    weights: NDArray[np.float32]
    bank: float
    bias: float

    def score(self, bank_score: float, pooled: Doubles) -> float:
        """Return the raw score of one part, a logit, from its bank score and its pooled features [D]."""
        return float(pooled @ self.weights.astype(np.float64) + self.bank * bank_score + self.bias)

    def tensors(self) -> dict[str, NDArray[np.float32] | Doubles]:
        """Return the arrays by name, for saving."""
        return {"weights": self.weights, "scalars": np.array([self.bank, self.bias])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild from :meth:`tensors`.

        Raises:
            KeyError: an array is missing.
            ValueError: there are not two scalars.
        """
        bank, bias = (float(value) for value in tensors["scalars"])
        return cls(tensors["weights"], bank, bias)


def fit_edge_head(
    bank_scores: Doubles, x: Doubles, p_defect: ArrayLike, groups: ArrayLike | None = None
) -> tuple[EdgeHead, Doubles] | None:
    """Fit a head and its sum with the bank's score.

    Both are brought to logits by Platt's sigmoid and added by penalised logistic regression
    (:func:`saec.calibrate.fusion.fit_fusion`), the head's by its held-out scores.

    Args:
        bank_scores: [n] of parts that are not in the bank.
        x: [n, D] their pooled features.
        p_defect: [n] see :func:`fit_head`.
        groups: [n] see :func:`best_ridge`.

    Returns:
        The head and the fused scores [n], each by a head fitted without the part; ``None`` where there are fewer than
        :data:`MIN_DEFECTS` of a class, or where the head does not lower the held-out log loss by a standard error, and
        by more than two free parameters do anyway (Akaike): then it would only add noise to the bank.
    """
    p = np.asarray(p_defect, dtype=np.float64)
    is_defect = p >= 0.5
    if min(is_defect.sum(), (~is_defect).sum()) < MIN_DEFECTS:
        return None
    ridge, held_out = best_ridge(x, p, groups)
    bank, own = _platt(bank_scores, is_defect), _platt(held_out, is_defect)
    fusion = fit_fusion(bank.p_defect(bank_scores), own.p_defect(held_out), p)
    of_bank, of_head = fusion.w_edge / bank.scale, fusion.w_cloud / own.scale
    bias = fusion.bias - of_bank * bank.location - of_head * own.location
    fused = of_bank * bank_scores + of_head * held_out + bias
    gain = log_losses(bank.p_defect(bank_scores), p) - log_losses(_platt(fused, is_defect).p_defect(fused), p)
    if gain.mean() < max(gain.std() / np.sqrt(len(gain)), 2 / len(gain)):
        return None
    head = fit_head(x, p, ridge)
    weights = of_head * head.scale * head.weights
    bias += of_head * (head.bias - float(head.mean * head.scale @ head.weights))
    return EdgeHead(weights.astype(np.float32), of_bank, bias), fused


def _platt(scores: Doubles, is_defect: Bools) -> ScoreCalibration:
    return ScoreCalibration.from_labelled(scores[~is_defect], scores[is_defect])


def log_losses(p: Doubles, target: Doubles) -> Doubles:
    """Return the log loss of each probability [n] against a target [n] in [0, 1]."""
    inside = np.clip(p, 1e-9, 1 - 1e-9)
    return np.asarray(-target * np.log(inside) - (1 - target) * np.log1p(-inside))
