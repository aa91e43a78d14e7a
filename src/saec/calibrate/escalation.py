"""Which share of the parts is worth the cloud: a band of P(defect) around the operating point, and complex scenes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from saec.calibrate._numeric import Floats, logit, sigmoid
from saec.calibrate.score import confidences
from saec.calibrate.thresholds import Thresholds, escalation_mask

_CLIP = 1e-12
_SCENE_FRACTIONS = (0.0, 0.1, 0.25, 0.5)
_TILTS = (1.0, 0.5, 2.0, 0.25, 4.0)
_MIN_PARTS = 100
GOOD_ONLY_SCENE_FRACTION = 0.1
_FEW_PARTS_BAND = math.log(3.0)


@dataclass(frozen=True, slots=True)
class EscalationPlan:
    """Thresholds with their escalation rule filled in, the share of the given parts it escalates, and remarks."""

    thresholds: Thresholds
    share: float
    notes: tuple[str, ...] = ()


def uncertainty(p_defect: Floats, tau_edge: float, *, tilt: float = 1.0) -> Floats:
    """Return the distance of each P(defect) from the operating point in logits; small is uncertain.

    ``tilt`` > 1 makes parts below the operating point count as nearer, and those above as farther.
    """
    distance = logit(p_defect, clip=_CLIP) - float(logit(tau_edge, clip=_CLIP))
    return np.asarray(np.where(distance < 0, -distance / tilt, distance * tilt), dtype=np.float64)


def place(
    base: Thresholds, scene: Floats, p_defect: Floats, share: float, *, scene_fraction: float, tilt: float = 1.0
) -> Thresholds:
    """Return ``base`` with an escalation rule that takes at most ``share`` of the given parts.

    ``scene_fraction`` of the share goes to the most complex scenes, the rest to the most uncertain of the others. Parts
    that tie at a limit stay at the edge together.
    """
    budget = math.floor(share * p_defect.size + 1e-9)
    # All of them: the lowest score rather than -inf, which no threshold may be.
    tau_scene = max(-_cut(-scene, math.floor(scene_fraction * budget + 1e-9)), float(scene.min(initial=math.inf)))
    complex_ = scene >= tau_scene
    radius = _cut(uncertainty(p_defect, base.tau_edge, tilt=tilt)[~complex_], budget - int(complex_.sum()))
    return _with_band(replace(base, tau_scene=tau_scene), radius, tilt)


def from_good(base: Thresholds, scene: Floats, p_good: Floats, share: float) -> EscalationPlan:
    """Plan from good parts alone: a small part of the share for complex scenes, the rest for the band.

    With so few parts that the share is less than one of them, the band is P(defect) at odds within 3 of the operating
    point's, and no scene threshold.
    """
    if share > 0 and share * p_good.size < 1:
        plan = _with_band(base, _FEW_PARTS_BAND, 1.0)
        note = f"too few good parts ({p_good.size}) to place the band: a fixed one of odds 3 is used"
        return EscalationPlan(plan, float(escalation_mask(plan, scene, p_good).mean()), (note,))
    plan = place(base, scene, p_good, share, scene_fraction=GOOD_ONLY_SCENE_FRACTION)
    return EscalationPlan(plan, float(escalation_mask(plan, scene, p_good).mean()), _tie_note(plan, share))


def from_gain(base: Thresholds, scene: Floats, p_defect: Floats, share: float, gain: Floats) -> EscalationPlan:
    """Plan from labelled parts: the rule within ``share`` that gains most.

    Candidates split the share between scene and band, and lean the band to either side. The plain symmetric band is
    kept unless a candidate beats it by two standard errors of their paired difference, on at least 100 parts: the
    best of many candidates always looks good on the parts that chose it.

    Args:
        base: with ``tau_edge`` set.
        scene: ``[n]`` scene scores.
        p_defect: ``[n]`` calibrated P(defect) of the edge.
        share: of the parts that may be escalated, in [0, 1].
        gain: ``[n]`` what escalating a part is worth: +1 a mistake repaired, -1 one made, 0 no change.
    """
    best = place(base, scene, p_defect, share, scene_fraction=0.0)
    plain = escalation_mask(best, scene, p_defect)
    if p_defect.size >= _MIN_PARTS:
        best_lead = 0.0
        for fraction in _SCENE_FRACTIONS:
            for tilt in _TILTS:
                candidate = place(base, scene, p_defect, share, scene_fraction=fraction, tilt=tilt)
                change = (escalation_mask(candidate, scene, p_defect).astype(np.float64) - plain) * gain
                lead = float(change.sum())
                if lead > best_lead and lead > 2 * math.sqrt(float(np.sum(change**2))):
                    best, best_lead = candidate, lead
    mask = escalation_mask(best, scene, p_defect)
    notes = _tie_note(best, share)
    if float(gain[mask].sum()) < 0:
        notes += ("on the calibration parts the cloud repairs fewer edge mistakes than it adds",)
    return EscalationPlan(best, float(mask.mean()), notes)


def with_confidences(thresholds: Thresholds) -> Thresholds:
    """Fill in SAEC's s_max, margin and entropy thresholds: the widest that escalate nothing outside the band.

    They are symmetric around P = 0.5. Where the band is too, they say the same as the band; where it does not contain
    0.5 they stay disabled.
    """
    top = min(1 - thresholds.band_low, thresholds.band_high)
    if not thresholds.has_band or top <= 0.5:
        return thresholds
    (s_max,), (margin,), (entropy,) = confidences(np.array([top]))
    # A hair inside, so that rounding in 1 - p cannot reach past the band.
    return replace(
        thresholds,
        tau_smax=float(s_max) * (1 - 1e-9),
        tau_margin=max(0.0, float(margin) - 1e-9),
        tau_entropy=min(1.0, float(entropy) + 1e-9),
    )


def _with_band(base: Thresholds, radius: float, tilt: float) -> Thresholds:
    if radius == -math.inf:
        return base
    centre = float(logit(base.tau_edge, clip=_CLIP))
    low, high = sigmoid(np.array([centre - radius * tilt, centre + radius / tilt]))
    return with_confidences(replace(base, band_low=float(low), band_high=float(high)))


def _cut(values: Floats, count: int) -> float:
    """Return a limit with at most ``count`` values at or below it, as many as ties allow; -inf for none."""
    ordered = np.sort(values)
    if count <= 0 or ordered.size == 0:
        return -math.inf
    if count >= ordered.size:
        return math.inf
    gaps = np.flatnonzero(ordered[1:] > ordered[:-1])
    gaps = gaps[gaps < count]
    # Half-way into the gap: rounding must not decide about the part at the limit.
    return float((ordered[gaps[-1]] + ordered[gaps[-1] + 1]) / 2) if gaps.size else -math.inf


def _tie_note(thresholds: Thresholds, share: float) -> tuple[str, ...]:
    if share > 0 and not thresholds.has_band:
        return ("too many parts tie at the operating point: no band fits the escalation share",)
    return ()


def edge_mistakes(p_defect: Floats, truth: NDArray[np.bool_], tau_edge: float) -> Floats:
    """Return 1 for every part that the edge alone would get wrong: the gain of a cloud that is always right."""
    return np.asarray((p_defect >= tau_edge) != truth, dtype=np.float64)
