"""The router: who has the last word on a part, and why. Pure functions of values, no clock and no state.

The rule is SAEC's (arXiv 2509.17136, acceptance rule of the edge branch) plus the calibrated escalation band: a part
goes to the cloud when at least one of these holds, tested in this order, the first one being the reason:

1. scene score  S >= tau_scene
2. s_max        < tau_smax
3. margin       < tau_margin
4. entropy      > tau_entropy
5. band_low <= p_defect <= band_high

Of the parts that none of them sends, ``policy.audit_share`` go all the same, as audits, drawn by content.

The label plays no part in it: a confident *good* and a confident *defect* are both kept at the edge. (In the reference
code the two label rules shared their thresholds, so that no defect was ever kept.)

Every test is written as "not (surely inside)", so that a NaN escalates instead of passing as confident.
"""

from __future__ import annotations

import hashlib
import math

from saec.calibrate.fusion import FINAL_TAU, Fusion
from saec.calibrate.policy import Policy
from saec.calibrate.thresholds import Thresholds
from saec.types import EdgeResult, Label, Reason, Route, SceneScore, Where


def decide(scene: SceneScore | None, edge: EdgeResult, policy: Policy, *, sha256: str = "") -> Route:
    """Return the one route of a part: ``where`` is ``EDGE`` or ``CLOUD``, ``reason`` says why.

    ``scene`` may be ``None`` where it was not computed, as in the modes that do not look at it; a cascade escalates
    such a part. ``sha256`` (hex digest of the file) draws the lot in random mode and for audits, so that a part takes
    the same route in every run with the same seed. The modes other than cascade are baselines: they follow their rule
    even for a NaN.
    """
    match policy.mode:
        case "edge_only":
            return Route(Where.EDGE, Reason.EDGE_ONLY)
        case "cloud_only":
            return Route(Where.CLOUD, Reason.CLOUD_ONLY)
        case "random":
            if lot(policy.seed, sha256) < policy.random_ratio:
                return Route(Where.CLOUD, Reason.CLOUD_RANDOM)
            return Route(Where.EDGE, Reason.EDGE_RANDOM)
        case "cascade":
            doubt = _doubt(scene, edge, policy.thresholds)
            if doubt is None and lot(policy.seed, f"audit:{sha256}") < policy.audit_share:
                doubt = Reason.AUDIT
            return Route(Where.EDGE, Reason.EDGE_CONFIDENT) if doubt is None else Route(Where.CLOUD, doubt)


def _doubt(scene: SceneScore | None, edge: EdgeResult, tau: Thresholds) -> Reason | None:
    if scene is None or not scene.score < tau.tau_scene:
        return Reason.SCENE_COMPLEX
    if not edge.s_max >= tau.tau_smax:
        return Reason.LOW_SMAX
    if not edge.margin >= tau.tau_margin:
        return Reason.LOW_MARGIN
    if not edge.entropy <= tau.tau_entropy:
        return Reason.HIGH_ENTROPY
    outside = edge.p_defect < tau.band_low or edge.p_defect > tau.band_high
    if not outside or math.isnan(edge.score):
        return Reason.IN_BAND
    return None


def lot(seed: int, content: str) -> float:
    """Return a number in [0, 1) that depends on nothing but its arguments and is uniform over contents."""
    digest = hashlib.blake2b(f"{seed}:{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def edge_label(p_defect: float, thresholds: Thresholds) -> Label:
    """Return what the edge calls a part: good iff P(defect) < tau_edge. A NaN is never good."""
    return Label.GOOD if p_defect < thresholds.tau_edge else Label.DEFECT


def final_label(p_edge: float, p_cloud: float, thresholds: Thresholds, fusion: Fusion | None) -> tuple[Label, float]:
    """Return the label and P(defect) after the cloud has spoken.

    With the station's fusion both opinions count: defect iff the fused probability is at least 0.5. Without one, as in
    cloud-only operation, or where the edge's own probability is not a number, the cloud alone decides: defect iff
    p_cloud >= tau_cloud. ``p_cloud`` is in [0, 1]; the pipeline refuses any other answer before it comes here.
    """
    if fusion is not None and not math.isnan(p_edge):
        fused = float(fusion.p_defect(p_edge, p_cloud))
        return (Label.GOOD if fused < FINAL_TAU else Label.DEFECT), fused
    return (Label.GOOD if p_cloud < thresholds.tau_cloud else Label.DEFECT), p_cloud
