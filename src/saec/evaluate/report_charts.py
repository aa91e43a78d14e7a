"""The report's charts, from run folders to :mod:`saec.evaluate.report_svg`. A chart without data is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from saec.calibrate.sweep import SweepPoint
from saec.evaluate.metrics import percentiles, risk_coverage, threshold_sweep
from saec.evaluate.report_run import RunFolder
from saec.evaluate.report_svg import Axis, Bars, Chart, Dot, Line, Rule, draw
from saec.evaluate.report_words import counted, number, percent
from saec.evaluate.summary import LOCAL_MS
from saec.types import Label, Verdict

MAX_LINES = 4
MAX_HISTOGRAMS = 6
BINS = 24
KNOBS = {"share": "Escalated share turned", "tau_scene": "Scene threshold turned"}

_whole = partial(percent, digits=0)


def threshold_chart(run: RunFolder) -> Chart | None:
    """Escape and overkill if every threshold were moved together; 0.5 is the run as it was."""
    scores, labels = _scored(run)
    sweep = threshold_sweep(scores, labels)
    if sweep is None:
        return None
    x = np.concatenate([[0.0], sweep.thresholds, [1.0]])
    escape, overkill = (np.concatenate([[a[0]], a, [a[-1]]]).tolist() for a in (sweep.escape, sweep.overkill))
    s = run.summary
    dots = [Dot(0.5, s["escape_rate"], style=1), Dot(0.5, s["overkill_rate"], style=0)]
    names = (f"Escape, {percent(s['escape_rate'])} as run", f"Overkill, {percent(s['overkill_rate'])} as run")
    return draw(
        "Threshold sweep",
        Axis("Threshold on suspicion (0.5 = as run)", 0, 1, (0, 0.25, 0.5, 0.75, 1)),
        _rate_axis("Rate"),
        lines=[
            Line(names[0], list(zip(x.tolist(), escape, strict=True)), 1, steps=True),
            Line(names[1], list(zip(x.tolist(), overkill, strict=True)), 0, steps=True),
        ],
        dots=dots,
        rules=[Rule(0.5, "as run")],
        alt=f"At the run's threshold escape is {percent(s['escape_rate'])} and overkill {percent(s['overkill_rate'])}.",
        note="Stricter to the left: fewer escapes, more overkill. Moving the threshold here does not reroute parts.",
    )


def risk_coverage_chart(runs: Sequence[RunFolder]) -> Chart | None:
    """Error rate among the parts that the system was most certain about."""
    lines, said, worst = [], [], 0.0
    for style, run in enumerate(runs[:MAX_LINES]):
        known = [(abs(s - 0.5), v.truth is v.label) for v, s in _judged(run)]
        curve = risk_coverage([c for c, _ in known], [ok for _, ok in known])
        if curve is None:
            continue
        points = list(zip(curve.coverage.tolist(), curve.risk.tolist(), strict=True))
        # The first few parts make a ragged start that says nothing; begin once 2 % are in.
        points = [p for p in points if p[0] >= 0.02] or points[-1:]
        worst = max(worst, *(risk for _, risk in points))
        lines.append(Line(run.name, points, style))
        said.append(f"{run.name}: {percent(points[-1][1])} errors when all parts are accepted")
    if not lines:
        return None
    return draw(
        "Risk against coverage",
        Axis("Share of parts accepted, most certain first", 0, 1, (0, 0.25, 0.5, 0.75, 1), _whole),
        Axis.nice("Errors among accepted parts", 0, max(worst, 0.02), _fine(worst)),
        lines=lines,
        alt="; ".join(said) + ".",
        note="Lower is better. Where a curve leaves zero, certainty stops being trustworthy.",
    )


def escalation_chart(runs: Sequence[RunFolder], sweep: Sequence[SweepPoint] | None) -> Chart | None:
    """Accuracy against the share of parts sent to the cloud: a point for each run, a line for a sweep."""
    dots: list[Dot] = []
    curves = {knob: sorted((p.escalation, p.accuracy) for p in sweep or () if p.knob == knob) for knob in KNOBS}
    points = [point for curve in curves.values() for point in curve]
    for run in runs:
        if run.escalation is not None and run.summary["accuracy"] is not None:
            dots.append(Dot(run.escalation, run.summary["accuracy"], run.name, len(dots) % MAX_LINES))
    if len(dots) + len(points) < 2:
        return None
    levels = [d.y for d in dots] + [y for _, y in points]
    lines = [Line(KNOBS[knob], curve, 2 * i) for i, (knob, curve) in enumerate(curves.items()) if curve]
    ends = (min(dots, key=lambda d: d.x), max(dots, key=lambda d: d.x)) if dots else None
    chance = ends is not None and ends[0].x < 0.02 and ends[1].x > 0.98
    if ends and chance:
        lines.append(Line("Sending parts up at random (expected)", [(d.x, d.y) for d in ends], 3))
    low, high = max(0.0, min(levels) - 0.03), min(1.0, max(levels) + 0.02)
    return draw(
        "Accuracy against escalation",
        Axis("Share of parts sent to the cloud", 0, 1, (0, 0.25, 0.5, 0.75, 1), _whole),
        Axis.nice("Accuracy", low, high, _fine(high - low)),
        lines=lines,
        dots=dots,
        alt="; ".join(f"{d.label}: {percent(d.y)} at {percent(d.x)} escalation" for d in dots) + ".",
        note="A router earns its keep above the line of chance: the same cloud share, chosen instead of drawn."
        * chance,
    )


def score_charts(run: RunFolder) -> tuple[list[Chart], int]:
    """A two-sided histogram for each product, most mistakes first; also returns how many products were left out."""
    groups: dict[str, list[tuple[bool, bool, float]]] = {}
    for verdict, suspicion in _judged(run):
        row = (verdict.truth is Label.DEFECT, verdict.truth is verdict.label, suspicion)
        groups.setdefault(verdict.product, []).append(row)
    ranked = sorted(groups.items(), key=lambda item: (sum(ok for _, ok, _ in item[1]) - len(item[1]), item[0]))
    return [_score_chart(*item) for item in ranked[:MAX_HISTOGRAMS]], max(0, len(ranked) - MAX_HISTOGRAMS)


def _score_chart(product: str, rows: list[tuple[bool, bool, float]]) -> Chart:
    edges = np.linspace(0, 1, BINS + 1)
    good = np.histogram([s for bad, _, s in rows if not bad], edges)[0]
    bad = np.histogram([s for bad, _, s in rows if bad], edges)[0]
    escapes = sum(not ok and bad for bad, ok, _ in rows)
    overkills = sum(not ok and not bad for bad, ok, _ in rows)
    return draw(
        product,
        Axis("Suspicion (0.5 = threshold)", 0, 1, (0, 0.25, 0.5, 0.75, 1)),
        Axis.nice("Parts", -max(1.0, float(bad.max())), max(1.0, float(good.max())), lambda v: f"{abs(v):g}"),
        bars=[
            Bars(f"Truly good ({int(good.sum()):,}), upwards", edges.tolist(), good.tolist(), 0),
            Bars(f"Truly defect ({int(bad.sum()):,}), downwards", edges.tolist(), (-bad).tolist(), 1),
        ],
        rules=[Rule(0.5, "good | defect")],
        alt=f"{counted(escapes, 'defect')} left of the threshold, {counted(overkills, 'good part')} right of it.",
    )


def latency_chart(run: RunFolder) -> Chart | None:
    """Milliseconds to the local verdict, with percentiles and the deadline."""
    values = [ms for v in run.verdicts if (ms := v.timings_ms.get(LOCAL_MS)) is not None]
    marks = percentiles(values)
    if marks is None:
        return None
    deadline = run.summary["deadline"]["ms"]
    # One stray second must not squeeze everything else into the first bar: what lies beyond goes into the last one.
    top = 1.35 * marks["p99"] if max(values) > 1.35 * marks["p99"] else max(values) * 1.05
    if deadline is not None and deadline < 2.5 * top:
        top = max(top, deadline * 1.08)
    x = Axis.nice("Milliseconds to the local verdict", 0, max(top, 1e-3))
    edges = np.linspace(0, x.high, BINS + 1)
    heights = np.histogram(np.minimum(values, x.high), edges)[0]
    rules = [Rule(value, name, strong=False) for name, value in marks.items()]
    said = " · ".join(f"{name} {number(value, 'ms')}" for name, value in marks.items())
    notes = [f"{said}." if deadline is None else f"{said} · deadline {number(deadline, 'ms')}."]
    if deadline is not None and deadline <= x.high:
        rules.append(Rule(deadline, "deadline"))
    if beyond := sum(v > x.high for v in values):
        notes.append(f"The last bar holds {counted(beyond, 'part')} from beyond the axis.")
    return draw(
        "Time to the local verdict",
        x,
        Axis.nice("Parts", 0, max(1.0, float(heights.max()))),
        bars=[Bars("", edges.tolist(), heights.tolist(), 0)],
        rules=rules,
        alt=f"{said}.",
        note=" ".join(notes),
    )


def _judged(run: RunFolder) -> list[tuple[Verdict, float]]:
    """Readable verdicts with known truth and their suspicion."""
    return [
        (run.verdicts[i], suspicion)
        for i, suspicion in run.suspicion.items()
        if run.verdicts[i].truth in (Label.GOOD, Label.DEFECT)
    ]


def _scored(run: RunFolder) -> tuple[list[float], list[bool]]:
    judged = _judged(run)
    return [s for _, s in judged], [v.truth is Label.DEFECT for v, _ in judged]


def _rate_axis(label: str) -> Axis:
    return Axis(label, 0, 1, (0, 0.25, 0.5, 0.75, 1), _whole)


def _fine(span: float) -> Callable[[float], str]:
    """Percent with as many decimals as ticks over ``span`` need to differ."""
    return partial(percent, digits=0 if span > 0.04 else 1)
