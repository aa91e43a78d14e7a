"""``summary.json`` of a run folder: every figure of a run under stable keys.

A figure that was not measured is ``null`` and ``status`` says why; it is never 0. How parts enter the rates:

* Rates are over *readable* parts whose truth is known. An unreadable part is neither passed nor rejected: it is left
  out of every rate and counted in ``unreadable``: a broken camera does not move the escape rate.
* ``called`` counts the verdicts themselves, so that a run without known truth has its result in it too.
* ``learnt`` counts the parts that the station was itself fitted or calibrated on: on these every rate flatters it.
* ``explained`` counts the rejects that a model on the edge put into words (``n``), and those that it was asked about in
  vain: too late, or without a usable answer.
* ``drift`` is what the drift watch saw, by product: alarms with their evidence, and a proposal.
* ``auroc`` ranks the final P(defect), after the cloud has had its say.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from saec.calibrate.calibration import ONE_GOOD
from saec.calibrate.metrics import accuracy, auroc, balanced_accuracy, confusion, escape_rate, overkill_rate
from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.evaluate.meter import Reading, mwh_per_correct
from saec.evaluate.metrics import clopper_pearson, percentiles
from saec.types import Explanation, Label, Reason, Verdict, Where

if TYPE_CHECKING:
    from saec.calibrate.calibration import Calibration
    from saec.route.stats import PipelineStats

LOCAL_MS = "local"
"""Key of ``Verdict.timings_ms``: milliseconds from taking the part up to its local verdict."""

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class RunTimes:
    """What the pipeline measured. ``*_s`` are *busy* seconds: the union of the intervals in which at least one worker
    was in that stage; ``None`` where the stage did not run. ``overlap`` in [0, 1] is the part of the shorter of the two
    branches (edge side and cloud) that was hidden behind the longer one. ``deadline_ms`` is the local verdict's."""

    wall_s: float
    decode_s: float | None = None
    scene_s: float | None = None
    edge_s: float | None = None
    cloud_s: float | None = None
    explain_s: float | None = None
    overlap: float | None = None
    deadline_ms: float | None = None

    @classmethod
    def of(cls, stats: PipelineStats) -> Self:
        """Take the times of an undisturbed pipeline run."""
        stages = (stats.decode_s, stats.scene_s, stats.edge_s, stats.cloud_s, stats.explain_s)
        return cls(stats.wall_s, *stages, overlap=stats.overlap, deadline_ms=stats.deadline_ms)


def summarise(
    verdicts: Sequence[Verdict],
    *,
    stats: RunTimes | None = None,
    meter: Reading | None = None,
    models: Mapping[str, str] | None = None,
    calibration: Mapping[str, Any] | None = None,
    drift: Mapping[str, Any] | None = None,
    learnt: Set[str] = frozenset(),
) -> dict[str, Any]:
    """Return the summary of a run as plain JSON types, keys as in the design's contract.

    ``models`` defaults to the union of the verdicts' own; ``drift`` is :func:`saec.evaluate.drift.drift_summary`'s;
    ``learnt`` are the content hashes of the images that the
    station has learnt from. Intervals are Clopper–Pearson at 95 %.
    """
    figures = _figures(verdicts)
    counts = figures["confusion"]
    correct = counts["tp"] + counts["tn"] if figures["labelled"] else None
    by_product: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_product[verdict.product].append(verdict)
    latencies = [ms for v in verdicts if (ms := v.timings_ms.get(LOCAL_MS)) is not None]
    deadline_ms = stats.deadline_ms if stats else None
    late = sum(ms > deadline_ms for ms in latencies) if latencies and deadline_ms is not None else None
    summary: dict[str, Any] = {
        **figures,
        "learnt": sum(v.sha256 in learnt for v in verdicts),
        "per_product": {
            name: _figures(by_product[name]) | {"routing": _routing(by_product[name])} for name in sorted(by_product)
        },
        "routing": _routing(verdicts),
        "time": {
            "wall_s": stats.wall_s if stats else None,
            "decode_s": stats.decode_s if stats else None,
            "scene_s": stats.scene_s if stats else None,
            "edge_s": stats.edge_s if stats else None,
            "cloud_s": stats.cloud_s if stats else None,
            "explain_s": stats.explain_s if stats else None,
            "overlap": stats.overlap if stats else None,
        },
        "latency_ms": percentiles(latencies) or {"p50": None, "p90": None, "p99": None},
        "deadline": {"ms": deadline_ms, "late": late},
        "uplink_bytes": sum(v.uplink_bytes for v in verdicts),
        "explained": _explained(verdicts),
        "energy": _energy(meter, correct),
        "memory": {
            "rss_mean_mb": meter.rss_mean_mb if meter else None,
            "rss_peak_mb": meter.rss_peak_mb if meter else None,
        },
        "machine": {
            "cpu_s": meter.cpu_s if meter else None,
            "gpu_utilisation": meter.gpu_utilisation if meter else None,
            "gpu_w": meter.gpu_w if meter else None,
            "problems": list(meter.problems) if meter else [],
        },
        "models": dict(models if models is not None else _models(verdicts)),
        "calibration": dict(calibration or {}),
        "drift": dict(drift or {}),
    }
    return summary | {"status": _status(summary)}


def calibration_summary(calibrations: Mapping[str, Calibration]) -> dict[str, Any]:
    """The ``calibration`` entry: for each product what is guaranteed in words, and all that was fitted.

    ``{"products": {name: {"statement": str, "thresholds": {…}, "overkill": {…}, "n_good": int, …}}}``
    """
    return {
        "products": {name: {"statement": _statement(c)} | _without_drift(c) for name, c in calibrations.items()},
    }


def _without_drift(calibration: Calibration) -> dict[str, Any]:
    """What was fitted, less the quantiles that the drift watch needs: nobody reads 260 numbers."""
    return {name: value for name, value in calibration.to_json().items() if name != "drift"}


def _statement(c: Calibration) -> str:
    escape = c.escape.statement if c.escape else "no bound was asked for, so none is stated"
    notes = "".join(f" {note[0].upper()}{note[1:].rstrip('.')}." for note in c.notes if note)
    # The bound of a single good part counts its own shifted copies as parts; it would read as a proof.
    overkill = "nothing can be proven from one good part" if ONE_GOOD in c.notes else c.overkill.statement
    return f"Overkill: {overkill}. Escape: {escape}.{notes}"


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write ``summary.json``: whole or not at all.

    Raises:
        BadInput: the folder cannot be written, for example because the disk is full.
    """
    write_atomically(path, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` (UTF-8): after a power cut there is the old file or the new one, nothing between.

    Raises:
        BadInput: the folder cannot be written.
    """
    try:
        write_atomic(path, text)
    except OSError as error:
        raise BadInput(f"cannot write ({error.strerror})", where=path, fix="check the folder and free space") from None


def _figures(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    readable = [v for v in verdicts if v.label is not Label.UNREADABLE]
    labelled = [v for v in readable if v.truth in (Label.GOOD, Label.DEFECT)]
    ranked = [(v.p_defect, v.truth is Label.DEFECT) for v in labelled if v.p_defect is not None]
    c = confusion([v.label is Label.DEFECT for v in labelled], [v.truth is Label.DEFECT for v in labelled])
    return {
        "n": len(verdicts),
        "labelled": len(labelled),
        "unreadable": len(verdicts) - len(readable),
        "called": {label.value: sum(v.label is label for v in readable) for label in (Label.GOOD, Label.DEFECT)},
        "accuracy": accuracy(c),
        "balanced_accuracy": balanced_accuracy(c),
        "auroc": auroc([p for p, _ in ranked], [t for _, t in ranked]),
        "escape_rate": escape_rate(c),
        "overkill_rate": overkill_rate(c),
        "confusion": asdict(c) if c.n else dict.fromkeys(("tp", "fp", "tn", "fn")),
        "intervals": {
            "method": "Clopper-Pearson",
            "confidence": CONFIDENCE,
            "accuracy": _interval(c.correct, c.n),
            "escape_rate": _interval(c.fn, c.defects),
            "overkill_rate": _interval(c.fp, c.goods),
        },
    }


def _interval(k: int, n: int) -> list[float] | None:
    bounds = clopper_pearson(k, n, CONFIDENCE)
    return None if bounds is None else list(bounds)


def _routing(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    where, reasons = Counter(v.where for v in verdicts), Counter(v.reason for v in verdicts)
    return {w.value: where[w] for w in Where} | {"reasons": {r.value: reasons[r] for r in Reason if reasons[r]}}


def _explained(verdicts: Sequence[Verdict]) -> dict[str, int]:
    asked = Counter(v.explanation for v in verdicts)
    return {"n": asked[Explanation.GIVEN], "late": asked[Explanation.LATE], "failed": asked[Explanation.FAILED]}


def _energy(meter: Reading | None, correct: int | None) -> dict[str, Any]:
    if meter is None:
        return {"status": "unavailable", "joules": None, "mwh_per_correct": None, "detail": "no meter was running"}
    return {
        "status": meter.energy.status,
        "joules": meter.energy.joules,
        "mwh_per_correct": mwh_per_correct(meter.energy.joules, correct),
        "detail": meter.energy.detail,
    }


def _models(verdicts: Sequence[Verdict]) -> dict[str, str]:
    seen: dict[str, set[str]] = defaultdict(set)
    for verdict in verdicts:
        for role, model in verdict.models.items():
            seen[role].add(model)
    return {role: ", ".join(sorted(models)) for role, models in sorted(seen.items())}


def _status(summary: Mapping[str, Any]) -> dict[str, str]:
    """Why each figure is null; figures that were measured have no entry."""
    why: dict[str, str] = {}
    for key in ("accuracy", "balanced_accuracy", "auroc", "escape_rate", "overkill_rate"):
        if summary[key] is None:
            why[key] = "no part with known truth" if not summary["labelled"] else "one class is missing"
    if summary["time"]["wall_s"] is None:
        why["time"] = "the pipeline's times were not recorded"
    if summary["latency_ms"]["p50"] is None:
        why["latency_ms"] = "no part carries a local latency"
    if summary["memory"]["rss_mean_mb"] is None:
        why["memory"] = "no meter was running"
    if summary["energy"]["joules"] is None:
        why["energy"] = summary["energy"]["detail"]
    return why
