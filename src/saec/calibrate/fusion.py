"""One P(defect) from two calibrated ones, the edge's and the cloud's.

Raw scores of different products or models live on different scales and must never be pooled; probabilities may.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ConfigDict

from saec.calibrate._numeric import Floats, fit_logistic, log_loss, logit, sigmoid, vector
from saec.errors import BadInput

FINAL_TAU = 0.5
"""An amended part is a defect iff its fused P(defect) is at least this. Other operating points shift the bias."""

_RIDGE = 1.0


@dataclass(frozen=True, slots=True)
class Fusion:
    """p = sigmoid(w_edge logit(p_edge) + w_cloud logit(p_cloud) + bias). The default: the cloud replaces the edge."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    w_edge: float = 0.0
    w_cloud: float = 1.0
    bias: float = 0.0

    def __post_init__(self) -> None:
        if not (self.w_edge >= 0 and self.w_cloud >= 0 and math.isfinite(self.w_edge + self.w_cloud + self.bias)):
            raise BadInput("fusion weights must be finite and not negative", where=repr(self))

    def p_defect(self, p_edge: ArrayLike, p_cloud: ArrayLike) -> Floats:
        """Return the fused P(defect); both inputs are first confined to [1e-6, 1 - 1e-6]."""
        return sigmoid(self.w_edge * logit(p_edge) + self.w_cloud * logit(p_cloud) + self.bias)

    @classmethod
    def replace_at(cls, tau_cloud: float) -> Fusion:
        """The cloud replaces the edge, and its operating point ``tau_cloud`` becomes :data:`FINAL_TAU`."""
        return cls(0.0, 1.0, -float(logit(tau_cloud)))


def fit_fusion(p_edge: ArrayLike, p_cloud: ArrayLike, labels: ArrayLike) -> Fusion:
    """Fit the weights by penalised logistic regression, neither of them negative.

    The penalty (one part's weight) pulls towards the plain average of the two logits: with few labels neither arm is
    trusted more than the other. The result is never worse in NLL on the given parts than either arm on its own.

    Args:
        p_edge: ``[n]`` calibrated P(defect) of the edge.
        p_cloud: ``[n]`` calibrated P(defect) of the cloud.
        labels: ``[n]``, 1 = defect.

    Raises:
        BadInput: different lengths, no parts, or values outside [0, 1].
    """
    edge, cloud = vector(p_edge, "p_edge", low=0, high=1), vector(p_cloud, "p_cloud", low=0, high=1)
    truth = vector(labels, "labels", low=0, high=1)
    if not edge.size == cloud.size == truth.size or edge.size == 0:
        raise BadInput("edge, cloud and labels differ in length", where=f"{edge.size}, {cloud.size}, {truth.size}")
    logits = np.stack([logit(edge), logit(cloud), np.ones_like(edge)], axis=1)
    fits = []
    # The objective is convex, so a negative weight belongs at zero: the best of the sign-feasible faces is the optimum.
    for use_edge, use_cloud in product((True, False), repeat=2):
        used = np.array([use_edge, use_cloud, True])
        centre = np.array([0.5, 0.5, 0.0])
        weights, value = fit_logistic(logits[:, used], truth, ridge=np.full(used.sum(), _RIDGE), centre=centre[used])
        full = np.zeros(3)
        full[used] = weights
        if (full[:2] >= 0).all():
            fits.append((value + 0.5 * _RIDGE * float(np.sum(centre[~used] ** 2)), full))
    fitted = min(fits, key=lambda fit: fit[0])[1]
    arms = [fitted, np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])]
    w_edge, w_cloud, bias = min(arms, key=lambda weights: log_loss(logits @ weights, truth))
    return Fusion(float(w_edge), float(w_cloud), float(bias))


def fit_tau_cloud(p_cloud: ArrayLike, labels: ArrayLike) -> float:
    """Return the cloud's own threshold: where a logistic curve over logit(p_cloud) crosses one half.

    A curve of two parameters instead of the best cut of the sample: the latter chases single parts. 0.5 when the
    cloud's opinion does not rise with the truth.

    Raises:
        BadInput: different lengths, no parts, or values outside [0, 1].
    """
    fusion = fit_fusion(np.full(np.shape(p_cloud), 0.5), p_cloud, labels)
    return 0.5 if fusion.w_cloud <= 1e-3 else float(sigmoid(np.clip(-fusion.bias / fusion.w_cloud, -13.0, 13.0)))
