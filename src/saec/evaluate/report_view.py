"""What the template prints: cards, tables and gallery items as plain values, all figures already in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saec.data.decode import UnreadableImage, read_with_hash
from saec.evaluate.report_images import overlay, read_heatmap, thumbnail
from saec.evaluate.report_run import RunFolder
from saec.evaluate.report_words import (
    DASH,
    REASONS,
    THIN,
    WHERE,
    alarm_words,
    counted,
    interval,
    number,
    outcome,
    percent,
    proposed,
    size,
)
from saec.types import Box, Explanation, Label, Verdict, Where

GALLERY_LIMIT = 120


@dataclass(frozen=True, slots=True)
class Card:
    """One key figure: name, value, and what stands under it."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """One part of the gallery. ``image`` and ``heat`` are data URIs or ``None``; ``missing`` says why there is no
    image; ``boxes`` are in pixels of an image of ``width × height``; ``fill`` is the
    suspicion in percent, 50 being the threshold; ``source`` says whose the
    words and the boxes are."""

    part_id: str
    product: str
    path: str
    kind: str
    tag: str
    said: str
    flags: str
    p: str
    fill: str
    reason: str
    explained: str
    evidence: tuple[str, ...]
    source: str
    image: str | None
    heat: str | None
    missing: str
    width: int
    height: int
    boxes: tuple[Box, ...]
    alt: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """The items shown, out of ``total`` parts, and the filters that have something to show as (key, name, count)."""

    items: tuple[Item, ...]
    total: int
    statement: str
    filters: tuple[tuple[str, str, int], ...]
    products: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a comparison: the figure, its 95 % interval if it has one, and whether it is its column's best."""

    text: str
    bounds: str = ""
    best: bool = False


def main_cards(s: Mapping[str, Any]) -> list[Card]:
    """The four figures that matter first: rates where truth is known, else what the parts were called."""
    c, bounds, n = s["confusion"], s["intervals"], s["n"]

    def detail(key: str, part: int | None, whole: int | None) -> str:
        if s[key] is None or not whole:
            return str(s.get("status", {}).get(key, "not measured"))
        return f"{part:,} of {whole:,} · 95{THIN}% CI {interval(bounds[key])}"

    known = c["tp"] is not None
    defects, goods = (c["tp"] + c["fn"], c["tn"] + c["fp"]) if known else (None, None)
    kept = s["routing"]["edge"] / n if n else None
    edge = Card(
        "Decided at the edge",
        percent(kept),
        f"{s['routing']['cloud']:,} sent to the cloud · {counted(s['routing']['fallback'], 'fallback')}",
    )
    if n and not s["labelled"]:
        judged = n - s["unreadable"]
        of = f"of {judged:,} judged"
        return [
            Card("Called defect", f"{s['called']['defect']:,}", of),
            Card("Called good", f"{s['called']['good']:,}", of),
            Card("Unreadable", f"{s['unreadable']:,}", f"of {counted(n, 'part')}"),
            edge,
        ]
    return [
        Card("Escape rate", percent(s["escape_rate"]), detail("escape_rate", c["fn"], defects)),
        Card("Overkill rate", percent(s["overkill_rate"]), detail("overkill_rate", c["fp"], goods)),
        Card(
            "Accuracy",
            percent(s["accuracy"]),
            detail("accuracy", c["tp"] + c["tn"] if known else None, s["labelled"]),
        ),
        edge,
    ]


def more_cards(s: Mapping[str, Any]) -> list[Card]:
    """Ranking quality and what the run cost."""
    time, latency, deadline, energy, memory = (s[k] for k in ("time", "latency_ms", "deadline", "energy", "memory"))
    wall, n = time["wall_s"], s["n"]
    late = f"{counted(deadline['late'], 'part')} past the {number(deadline['ms'], 'ms')} deadline"
    rate = f"{number(n / wall, 'parts/s', 1)}" if wall else "not recorded"
    shared = f" · overlap {percent(time['overlap'], 0)}" if time["overlap"] is not None else ""
    ranking = Card("AUROC", number(s["auroc"], digits=4), f"balanced accuracy {percent(s['balanced_accuracy'])}")
    return [
        *([ranking] if s["labelled"] else []),
        Card(
            "Local verdict, p99",
            number(latency["p99"], "ms"),
            f"p50 {number(latency['p50'], 'ms')}" + (f" · {late}" if deadline["late"] is not None else ""),
        ),
        Card("Wall time", number(wall, "s", 1), rate + shared),
        Card("Uplink", size(s["uplink_bytes"]), f"{size(s['uplink_bytes'] / n) if n else DASH} a part"),
        Card("Memory, peak", number(memory["rss_peak_mb"], "MB", 0), f"mean {number(memory['rss_mean_mb'], 'MB', 0)}"),
        Card("Energy per correct part", number(energy["mwh_per_correct"], "mWh"), _energy(energy)),
    ]


def _energy(energy: Mapping[str, Any]) -> str:
    detail = energy.get("detail", "")
    if energy["status"] == "unavailable":
        return "unavailable: no energy counter on this machine"
    return f"{energy['status']}, {detail}" if detail else str(energy["status"])


COMPARED: Sequence[tuple[str, Callable[[RunFolder], float | None], Callable[[float | None], str], int]] = (
    ("Accuracy", lambda r: r.summary["accuracy"], percent, +1),
    ("Balanced accuracy", lambda r: r.summary["balanced_accuracy"], percent, +1),
    ("AUROC", lambda r: r.summary["auroc"], lambda v: number(v, digits=4), +1),
    ("Escape", lambda r: r.summary["escape_rate"], percent, -1),
    ("Overkill", lambda r: r.summary["overkill_rate"], percent, -1),
    ("To the cloud", lambda r: r.escalation, percent, 0),
    ("Wall time", lambda r: r.summary["time"]["wall_s"], lambda v: number(v, "s", 1), -1),
    ("Local p99", lambda r: r.summary["latency_ms"]["p99"], lambda v: number(v, "ms"), -1),
    ("Uplink", lambda r: r.summary["uplink_bytes"], size, 0),
    ("mWh / correct", lambda r: r.summary["energy"]["mwh_per_correct"], number, -1),
)
"""Column, value, how it is written, and whether more (+1) or less (-1) is better; 0 is a dial, not a merit."""


def comparison(runs: Sequence[RunFolder]) -> tuple[list[str], list[tuple[str, list[Cell]]]]:
    """Return column names and one row of cells for each run, the best of each column marked as printed."""
    columns = []
    for name, value, write, sense in COMPARED:
        values = [value(run) for run in runs]
        known = [v for v in values if v is not None]
        top = write(max(known, key=lambda v: v * sense)) if len(known) > 1 and sense else None
        texts = [write(v) for v in values]
        bounds = [_bounds(run, name) for run in runs]
        marked = [t == top and len(set(texts)) > 1 for t in texts]
        columns.append([Cell(*cell) for cell in zip(texts, bounds, marked, strict=True)])
    return [name for name, *_ in COMPARED], [(run.name, [c[i] for c in columns]) for i, run in enumerate(runs)]


def _bounds(run: RunFolder, column: str) -> str:
    key = {"Accuracy": "accuracy", "Escape": "escape_rate", "Overkill": "overkill_rate"}.get(column)
    found = run.summary["intervals"][key] if key else None
    return interval(found) if found else ""


def product_rows(s: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """One row for each product: parts, defects, rates with their intervals, escalation."""
    rows = []
    for name, p in s["per_product"].items():
        c, bounds, n = p["confusion"], p["intervals"], p["n"]
        defects = f"{c['tp'] + c['fn']:,}" if c["tp"] is not None else DASH
        sent = p["routing"]["cloud"] + p["routing"]["fallback"]
        cells = [f"{n:,}", defects, percent(p["accuracy"]), number(p["auroc"], digits=3)]
        for key in ("escape_rate", "overkill_rate"):
            cells += [percent(p[key]), interval(bounds[key])]
        rows.append((name, [*cells, percent(sent / n if n else None), f"{p['unreadable']:,}"]))
    return rows


def drift_rows(s: Mapping[str, Any]) -> list[tuple[str, list[str], str]]:
    """(product, alarms in words, proposal) for each product that was watched: an alarm that stands with its figures at
    the end, one that is over with its first."""
    rows = []
    for name, seen in s.get("drift", {}).items():
        standing = {alarm["kind"]: alarm for alarm in seen["standing"]}
        alarms = []
        for first in seen["raised"]:
            alarm, now = standing.get(first["kind"], first), first["kind"] in standing
            said = f"{first['kind']}: {alarm_words(alarm)}; over {counted(alarm['n'], 'part')}"
            alarms.append(f"{said}, {'stands at the end' if now else 'over at the end'}")
        rows.append((name, alarms, proposed(seen["proposal"])))
    return rows


def reason_rows(s: Mapping[str, Any]) -> list[tuple[str, str, int, float, str]]:
    """(short name, explanation, parts, share of the longest bar, where) for each reason, most frequent first."""
    reasons = sorted(s["routing"]["reasons"].items(), key=lambda item: -item[1])
    most = max((count for _, count in reasons), default=1)
    known = {reason.value: text for reason, text in REASONS.items()}
    rows = []
    for key, count in reasons:
        short, long = known.get(key, (key, "A reason that this version does not know."))
        rows.append((short, long, count, count / most, _arm(key)))
    return rows


def _arm(key: str) -> str:
    if key in ("cloud_timeout", "cloud_refused", "cloud_unreachable", "cloud_bad_answer", "circuit_open"):
        return "fallback"
    return "none" if key == "unreadable" else "edge" if key.startswith("edge") else "cloud"


def gallery(run: RunFolder, limit: int = GALLERY_LIMIT) -> Gallery:
    """Pick and prepare the parts to show: mistakes first, then what went wrong, then the least certain."""
    order = sorted(range(len(run.verdicts)), key=lambda i: _rank(run.verdicts[i], run.suspicion.get(i)))
    shown = [_item(run, run.verdicts[i], run.suspicion.get(i)) for i in order[:limit]]
    total = len(run.verdicts)
    counts = {key: sum(key in item.flags.split() for item in shown) for key, _ in FILTERS}
    first = "mistakes first" if run.summary["labelled"] else "those called defect first"
    rest = "" if total <= limit else " The rest are in predictions.jsonl."
    statement = f"{counted(len(shown), 'part')} of {total:,}, {first}, then the least certain.{rest}"
    return Gallery(
        tuple(shown),
        total,
        statement,
        tuple((key, name, counts[key]) for key, name in FILTERS if counts[key]),
        tuple(sorted({item.product for item in shown})),
    )


FILTERS = (
    ("escape", "Escapes"),
    ("overkill", "Overkills"),
    ("escalated", "Escalated"),
    ("fallback", "Fallback"),
    ("unreadable", "Unreadable"),
    ("called-defect", "Called defect"),
)
_ORDER = {"escape": 0, "overkill": 1, "unreadable": 2, "right": 4, "unknown": 4}


def _rank(verdict: Verdict, suspicion: float | None) -> tuple[int, float, str]:
    kind = outcome(verdict)[0]
    far = abs((suspicion if suspicion is not None else 0.5) - 0.5)
    place = 3 if verdict.where is Where.FALLBACK and _ORDER[kind] == 4 else _ORDER[kind]
    if kind == "unknown" and verdict.label is Label.DEFECT:
        place = 3  # without truth these are what the inspector came for
    # A mistake made with certainty is the worst kind; among right verdicts the doubtful ones are worth a look.
    return place, -far if place < 2 else far, verdict.part_id


def _item(run: RunFolder, v: Verdict, suspicion: float | None) -> Item:
    kind, tag, said = outcome(v)
    image, missing, width, height = _picture(run, v)
    heat = read_heatmap(run.heatmap(v)) if image else None
    flags = [kind, {Where.CLOUD: "escalated", Where.FALLBACK: "escalated fallback", Where.EDGE: ""}[v.where]]
    flags += ["called-defect"] if v.label is Label.DEFECT else []
    short, long = REASONS[v.reason]
    wanted = f" The cloud was wanted because: {REASONS[v.escalated_for][0].lower()}." if v.escalated_for else ""
    return Item(
        part_id=v.part_id,
        product=v.product,
        path=v.path,
        kind=kind,
        tag=tag,
        said=said,
        flags=" ".join(filter(None, flags)),
        p=number(v.p_defect, digits=3),
        fill="" if suspicion is None else f"{100 * suspicion:.1f}",
        reason=short if v.label is Label.UNREADABLE else f"{short} · {WHERE[v.where]}",
        explained=f"{long}{wanted}",
        evidence=tuple(_evidence(v)),
        source=_source(v),
        image=image,
        heat=overlay(heat) if heat is not None else None,
        missing=missing,
        width=width,
        height=height,
        boxes=v.evidence.boxes if image else (),
        alt=f"Part {v.part_id} of product {v.product}. {said} {counted(len(v.evidence.boxes), 'marked region')}.",
    )


def _picture(run: RunFolder, v: Verdict) -> tuple[str | None, str, int, int]:
    path = run.image(v)
    lost = v.error if v.label is Label.UNREADABLE else None  # what the run itself found wrong says it best
    try:
        sha256, image = read_with_hash(path) if path else ("", None)
    except UnreadableImage as error:
        return None, lost or error.why, 1, 1
    if image is None:
        return None, lost or "the image is no longer at its place", 1, 1
    if sha256 != v.sha256:
        return None, "another image is at this place now", 1, 1
    return thumbnail(image), "", image.shape[1], image.shape[0]


def _source(v: Verdict) -> str:
    evidence = v.evidence
    if v.explanation is Explanation.GIVEN:
        model = v.models["explain"]
        marked = evidence.source.removesuffix(model).rstrip("+")
        return f"Words by {model}" + (f", boxes by {marked}" if marked and evidence.boxes else "")
    return f"Evidence by {evidence.source}" if evidence.boxes or evidence.kind or evidence.text else ""


def _evidence(v: Verdict) -> Iterable[str]:
    if v.evidence.kind:
        yield f"Kind: {v.evidence.kind}"
    if v.evidence.text:
        yield v.evidence.text
    if v.edge_p_defect is not None and v.cloud_p_defect is not None:
        yield f"Edge said {number(v.edge_p_defect, digits=3)}, cloud said {number(v.cloud_p_defect, digits=3)}"
    if v.error:
        yield f"Error: {v.error}"
