"""How a verdict comes about and what may still happen to it. Pure: values in, values out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from saec.calibrate.fusion import Fusion
from saec.calibrate.policy import Policy
from saec.calibrate.thresholds import Thresholds
from saec.route.decide import decide, edge_label, final_label
from saec.types import EdgeResult, Evidence, Explanation, Label, Opinion, Part, Reason, SceneScore, Verdict, Where


def local_verdict(
    part: Part,
    sha256: str,
    scene: SceneScore | None,
    result: EdgeResult,
    policy: Policy,
    models: Mapping[str, str],
    *,
    error: str | None = None,
) -> tuple[Verdict, bool]:
    """Return the edge's own verdict and whether the router wants the cloud's opinion on it.

    ``where`` is ``EDGE`` either way: until the cloud has spoken, the edge has the last word. ``error`` is a remark of
    an earlier stage. A figure that is not finite is recorded as "not measured", with a remark.

    Raises:
        ValueError: the edge's evidence or heatmap cannot be recorded.
    """
    if not _finite_boxes(result.evidence):
        raise ValueError("a box has a score that is not finite")
    if result.heatmap is not None and result.heatmap.ndim != 2:
        raise ValueError(f"the heatmap has {result.heatmap.ndim} axes, not 2")
    route = decide(scene, result, policy, sha256=sha256)
    escalates = route.where is Where.CLOUD
    if not (math.isfinite(result.p_defect) and math.isfinite(result.score)):
        error = f"{error}; the edge gave no finite score" if error else "the edge gave no finite score"
    label = edge_label(result.p_defect, policy.thresholds)
    verdict = Verdict(
        part_id=printable(part.part_id),
        sha256=sha256,
        product=printable(part.product),
        path=printable(str(part.path)),
        label=label,
        p_defect=_finite(result.p_defect),
        where=Where.EDGE,
        reason=route.reason,
        scene_score=None if scene is None else _finite(scene.score),
        edge_score=_finite(result.score),
        edge_label=label,
        edge_p_defect=_finite(result.p_defect),
        evidence=result.evidence,
        models=models,
        error=error,
        truth=part.label,
        escalated_for=route.reason if escalates else None,
    )
    return verdict, escalates


def unreadable_verdict(part: Part, sha256: str, models: Mapping[str, str], error: str) -> Verdict:
    """Return the verdict on a part that could not be judged: neither good nor defect, with the error's text.

    It stands for an image that cannot be decoded and for a detector that failed on it: in both cases nobody has looked
    at the part, so it must be looked at by hand.
    """
    return Verdict(
        part_id=printable(part.part_id),
        sha256=sha256,
        product=printable(part.product),
        path=printable(str(part.path)),
        label=Label.UNREADABLE,
        p_defect=None,
        where=Where.EDGE,
        reason=Reason.UNREADABLE,
        models=models,
        error=printable(error),
        truth=part.label,
    )


def kept_verdict(local: Verdict, reason: Reason) -> Verdict:
    """Return the verdict on a part that was wanted by the cloud but may not go there (no budget, no cloud)."""
    return replace(local, reason=reason)


def amended_verdict(
    local: Verdict, opinion: Opinion, thresholds: Thresholds, fusion: Fusion | None, timings_ms: Mapping[str, float]
) -> Verdict:
    """Return the final verdict after the cloud's opinion.

    The cloud's evidence replaces the edge's where it has any. ``timings_ms`` are added to the local ones.
    """
    p_edge = math.nan if local.edge_p_defect is None else local.edge_p_defect
    label, p_defect = final_label(p_edge, opinion.p_defect, thresholds, fusion)
    says_something = opinion.evidence.boxes or opinion.evidence.kind or opinion.evidence.text
    return replace(
        local,
        label=label,
        p_defect=p_defect,
        where=Where.CLOUD,
        cloud_p_defect=opinion.p_defect,
        evidence=opinion.evidence if says_something else local.evidence,
        models={**local.models, "cloud": opinion.model_id},
        timings_ms={**local.timings_ms, **timings_ms},
        uplink_bytes=opinion.uplink_bytes,
        amended_by=opinion.model_id,
    )


def fallback_verdict(
    local: Verdict, reason: Reason, error: str, timings_ms: Mapping[str, float], *, uplink_bytes: int = 0
) -> Verdict:
    """Return the verdict of a part whose question came to nothing: the edge's, with the reason and the error's text."""
    return replace(
        local,
        where=Where.FALLBACK,
        reason=reason,
        timings_ms={**local.timings_ms, **timings_ms},
        uplink_bytes=uplink_bytes,
        error=printable(f"{local.error}; {error}" if local.error else error),
    )


def is_wordless(verdict: Verdict) -> bool:
    """Return whether a final verdict rejects a part and nobody has said in words why."""
    return verdict.label is Label.DEFECT and not (verdict.evidence.kind or verdict.evidence.text)


def explained_verdict(final: Verdict, said: Evidence, model_id: str, ms: float) -> Verdict:
    """Return the verdict with a model's kind and text beside the boxes that it has; nothing else changes."""
    evidence = replace(
        final.evidence,
        kind=None if said.kind is None else printable(said.kind),
        text=None if said.text is None else printable(said.text),
        source="+".join(filter(None, (final.evidence.source, model_id))),
    )
    return replace(_asked_to_explain(final, Explanation.GIVEN, model_id, ms), evidence=evidence)


def unexplained_verdict(final: Verdict, what: Explanation, why: str, model_id: str, ms: float) -> Verdict:
    """Return the verdict of a part that was not put into words: its boxes stand alone, and the error says why."""
    error = f"no explanation: {why}"
    return replace(
        _asked_to_explain(final, what, model_id, ms),
        error=printable(f"{final.error}; {error}" if final.error else error),
    )


def _asked_to_explain(final: Verdict, what: Explanation, model_id: str, ms: float) -> Verdict:
    models, timings_ms = {**final.models, "explain": model_id}, {**final.timings_ms, "explain": ms}
    return replace(final, explanation=what, models=models, timings_ms=timings_ms)


def flaw(opinion: object) -> str | None:
    """Return what is wrong with a cloud's answer, or ``None``."""
    if not isinstance(opinion, Opinion):
        return f"the answer is {type(opinion).__name__}, not an opinion"
    if not 0 <= opinion.p_defect <= 1:
        return f"P(defect) is {opinion.p_defect}"
    if not _finite_boxes(opinion.evidence):
        return "a box has a score that is not finite"
    return None


def _finite_boxes(evidence: Evidence) -> bool:
    return all(box.score is None or math.isfinite(box.score) for box in evidence.boxes)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def printable(text: str) -> str:
    """Return a file name that is not UTF-8 with its odd bytes written out: JSON and SQLite hold nothing else."""
    return text.encode("utf-8", "backslashreplace").decode()
