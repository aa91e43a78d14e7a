"""What the drift watch says about a run, and what to do about it: the ``drift`` entry of ``summary.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from saec.calibrate.calibration import MIN_LABELLED, Calibration
from saec.calibrate.conformal import overkill_threshold
from saec.calibrate.drift import WINDOW, DriftWatch
from saec.calibrate.metrics import auroc
from saec.calibrate.score import ScoreCalibration
from saec.config import Settings
from saec.types import Label, Verdict

SEPARATES = 0.75
"""AUROC from which on new thresholds are worth while; below, the detector itself does not see the difference."""


def drift_summary(
    verdicts: Sequence[Verdict],
    calibrations: Mapping[str, Calibration],
    settings: Settings,
    labels: Mapping[str, Label] | None = None,
) -> dict[str, Any]:
    """Return what the watch saw, product by product, as plain JSON types.

    ``{name: {"n", "window", "standing": [alarm, …], "raised": [alarm, …], "proposal": {…} | null}}``; an alarm is
    ``{"kind", "value", "limit", "n", "since", "statement"}``. ``standing`` stood at the end, ``raised`` are the
    first of each kind. Products whose calibration has no reference (stations of older versions) are left out.

    Args:
        verdicts: of a run, in order.
        calibrations: by product.
        settings: ``cloud.timeout_s`` says what is slow, ``calibration.overkill`` what new thresholds may cost.
        labels: what people say, by content hash; by default the known truth.
    """
    found: dict[str, Any] = {}
    for product, calibration in calibrations.items():
        if calibration.drift is None:
            continue
        own = [verdict for verdict in verdicts if verdict.product == product]
        watch = DriftWatch(calibration.drift, calibration.thresholds, slow_ms=settings.cloud.timeout_s * 1000)
        for verdict in own:
            watch.saw(verdict, _human(verdict, labels))
        found[product] = {
            "n": watch.n,
            "window": WINDOW,
            "standing": [asdict(alarm) for alarm in watch.alarms()],
            "raised": [asdict(alarm) for alarm in watch.raised.values()],
            "proposal": _proposal(own, calibration, settings, labels) if watch.raised else None,
        }
    return found


def _human(verdict: Verdict, labels: Mapping[str, Label] | None) -> Label | None:
    return verdict.truth if labels is None else labels.get(verdict.sha256)


def _proposal(
    verdicts: Sequence[Verdict], calibration: Calibration, settings: Settings, labels: Mapping[str, Label] | None
) -> dict[str, Any]:
    """Return new thresholds with their evidence, or what is needed first.

    Labels (``by_people`` or, of a data set, ``by_truth``) count before the cloud's word. Escalated parts are labelled
    more often than others: the expected rates are those of the labelled parts, not of the line.
    """
    known = []
    for verdict in verdicts:
        label, human = _human(verdict, labels), True
        if label is None and verdict.cloud_p_defect is not None:
            cloud_says_good = verdict.cloud_p_defect < calibration.thresholds.tau_cloud
            label, human = (Label.GOOD if cloud_says_good else Label.DEFECT), False
        if label is not None and verdict.edge_score is not None:
            known.append((verdict.edge_score, label is Label.DEFECT, human))
    scores = np.array([score for score, _, _ in known])
    bad = np.array([is_defect for _, is_defect, _ in known], dtype=bool)
    of = {"by_people": labels is not None, "by_truth": labels is None}
    evidence = {
        "n_good": int((~bad).sum()),
        "n_defect": int(bad.sum()),
        **{name: sum(human for _, _, human in known) if said else 0 for name, said in of.items()},
    }
    if evidence["n_good"] < MIN_LABELLED:
        why = f"{MIN_LABELLED} labelled good parts are needed: audit (learn.audit_share) or pass --labels"
        return {"action": "label", "why": why, **evidence}
    ranked = auroc(scores, bad)
    old = calibration.overkill.threshold
    if ranked is not None and ranked < SEPARATES:
        why = f"AUROC {ranked:.2f} on the labelled parts: no threshold helps; saec learn, or fit again on such parts"
        return {"action": "re-fit", "why": why, **evidence}
    if evidence["n_defect"] >= MIN_LABELLED:
        new = ScoreCalibration.from_labelled(scores[~bad], scores[bad]).location
    else:
        new = overkill_threshold(scores[~bad], settings.calibration.overkill).threshold
    rates = {name: _rates(scores, bad, threshold) for name, threshold in (("old", old), ("new", new))}
    why = "the scores still tell good from bad: new thresholds are enough"
    return {"action": "re-calibrate", "why": why, **evidence, "auroc": ranked, **rates}


def _rates(scores: np.ndarray[Any, Any], bad: np.ndarray[Any, Any], threshold: float) -> dict[str, float | None]:
    called = scores >= threshold
    return {
        "threshold": float(threshold),
        "overkill": float(called[~bad].mean()),
        "escape": float((~called[bad]).mean()) if bad.any() else None,
    }
