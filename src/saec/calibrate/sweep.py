"""What other thresholds would have done, from the recorded answers of both arms: no image is looked at again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saec.calibrate._numeric import Floats, in_unit, vector
from saec.calibrate.escalation import place
from saec.calibrate.fusion import FINAL_TAU, Fusion
from saec.calibrate.thresholds import Thresholds, escalation_mask
from saec.errors import BadInput

SCENE_QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Arms:
    """What was recorded about n parts: vectors ``[n]``.

    ``p_cloud`` is NaN where the cloud gave no opinion; such a part keeps the edge's verdict also when it is escalated.
    ``cloud_seconds`` is the measured cloud time of one part, or ``None`` when there is none.
    """

    scene: ArrayLike
    p_edge: ArrayLike
    p_cloud: ArrayLike
    truth: ArrayLike
    cloud_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """The cascade's figures at one setting of one knob. Rates are ``None`` when their class is empty.

    ``escalation`` is the share of the parts that is sent to the cloud; ``cloud_s`` an estimate, escalated parts x
    measured seconds each.
    """

    knob: Literal["tau_scene", "share"]
    value: float
    n: int
    accuracy: float
    balanced_accuracy: float | None
    escape_rate: float | None
    overkill_rate: float | None
    escalation: float
    cloud_s: float | None


def threshold_sweep(
    arms: Arms,
    thresholds: Thresholds,
    fusion: Fusion,
    *,
    scene_quantiles: Sequence[float] = SCENE_QUANTILES,
    shares: Sequence[float] = SHARES,
) -> tuple[SweepPoint, ...]:
    """Return the cascade's figures for a range of scene thresholds and a range of escalation shares.

    * ``tau_scene``: the given quantiles of the recorded scene scores, all other thresholds as they are.
    * ``share``: the plain band around ``tau_edge`` that takes at most this share of the parts, nothing else.

    Quantiles of the evaluated parts themselves describe a run; they are no way to choose a threshold.

    Raises:
        BadInput: no parts, vectors of different lengths, or values out of range.
    """
    checked = _Checked.of(arms)
    points = []
    for quantile in scene_quantiles:
        rule = replace(thresholds, tau_scene=float(np.quantile(checked.scene, in_unit(quantile, "scene quantile"))))
        points.append(checked.point("tau_scene", rule.tau_scene, rule, fusion))
    plain = Thresholds(tau_edge=thresholds.tau_edge, tau_cloud=thresholds.tau_cloud)
    for share in shares:
        in_unit(share, "share", closed=True)
        rule = place(plain, checked.scene, checked.p_edge, share, scene_fraction=0.0)
        points.append(checked.point("share", float(share), rule, fusion))
    return tuple(points)


@dataclass(frozen=True, slots=True, eq=False)
class _Checked:
    scene: Floats
    p_edge: Floats
    p_cloud: Floats
    truth: NDArray[np.bool_]
    cloud_seconds: float | None

    @classmethod
    def of(cls, arms: Arms) -> _Checked:
        scene = vector(arms.scene, "scene")
        p_edge = vector(arms.p_edge, "p_edge", low=0, high=1)
        truth = vector(arms.truth, "truth", low=0, high=1) >= 0.5
        p_cloud = np.asarray(arms.p_cloud, dtype=np.float64)
        vector(p_cloud[~np.isnan(p_cloud)], "p_cloud", low=0, high=1)
        if scene.size == 0 or not scene.size == p_edge.size == p_cloud.size == truth.size:
            raise BadInput(
                "the arms differ in length", where=f"{scene.size}, {p_edge.size}, {p_cloud.size}, {truth.size}"
            )
        return cls(scene, p_edge, p_cloud, truth, arms.cloud_seconds)

    def point(self, knob: Literal["tau_scene", "share"], value: float, rule: Thresholds, fusion: Fusion) -> SweepPoint:
        sent = escalation_mask(rule, self.scene, self.p_edge)
        answered = sent & ~np.isnan(self.p_cloud)
        called = self.p_edge >= rule.tau_edge
        called[answered] = fusion.p_defect(self.p_edge[answered], self.p_cloud[answered]) >= FINAL_TAU
        escape = _rate(~called[self.truth])
        overkill = _rate(called[~self.truth])
        return SweepPoint(
            knob=knob,
            value=value,
            n=int(self.truth.size),
            accuracy=float(np.mean(called == self.truth)),
            balanced_accuracy=None if escape is None or overkill is None else 1 - (escape + overkill) / 2,
            escape_rate=escape,
            overkill_rate=overkill,
            escalation=float(sent.mean()),
            cloud_s=None if self.cloud_seconds is None else self.cloud_seconds * int(sent.sum()),
        )


def _rate(wrong: NDArray[np.bool_]) -> float | None:
    return float(wrong.mean()) if wrong.size else None
