"""The report's plain words: numbers with their uncertainty, reasons, and the terms of the page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from saec.evaluate.run_record import ASK_ALWAYS
from saec.types import Label, Reason, Verdict, Where

DASH = "–"
SUSPICIOUS = 10
"""Parts all of which were called defect before a report asks whether they belong to the station."""

THIN = "\N{NARROW NO-BREAK SPACE}"

REASONS: Mapping[Reason, tuple[str, str]] = {
    Reason.EDGE_CONFIDENT: ("Edge was sure", "The edge detector was certain enough; nothing was sent."),
    Reason.EDGE_ONLY: ("Edge only", "The run was set to use no cloud."),
    Reason.EDGE_BUDGET: ("Cloud budget spent", "The cloud was wanted, but its budget was used up."),
    Reason.EDGE_RANDOM: ("Random draw: edge", "Random routing, a comparison mode, kept this part at the edge."),
    Reason.UNREADABLE: (
        "Image unreadable",
        "The image could not be decoded, or the detector failed on it: nobody judged it.",
    ),
    Reason.SCENE_COMPLEX: ("Complex scene", "The image is busier than the scene threshold allows for the edge alone."),
    Reason.LOW_SMAX: ("Edge unsure: low confidence", "The edge's strongest class was too weak."),
    Reason.LOW_MARGIN: ("Edge unsure: small margin", "Good and defect were too close to each other."),
    Reason.HIGH_ENTROPY: ("Edge unsure: high entropy", "The edge's probabilities were spread too evenly."),
    Reason.IN_BAND: ("Close to the threshold", "P(defect) fell into the band around the threshold."),
    Reason.CLOUD_ONLY: ("Cloud only", "The run was set to ask the cloud about every part."),
    Reason.AUDIT: ("Audit", "The edge was sure; the cloud looked at it by lot, to find sure mistakes."),
    Reason.CLOUD_RANDOM: ("Random draw: cloud", "Random routing, a comparison mode, sent this part up."),
    Reason.CLOUD_TIMEOUT: ("Cloud too late", "No answer within the deadline; the edge's verdict stands."),
    Reason.CLOUD_REFUSED: ("Cloud refused", "The service was overloaded or refused; the edge's verdict stands."),
    Reason.CLOUD_UNREACHABLE: ("Cloud unreachable", "No connection; the edge's verdict stands."),
    Reason.CLOUD_BAD_ANSWER: ("Cloud answer unusable", "The answer could not be read; the edge's verdict stands."),
    Reason.CIRCUIT_OPEN: (
        "Cloud paused",
        "After repeated failures the cloud was not asked; the edge's verdict stands.",
    ),
}

WHERE: Mapping[Where, str] = {
    Where.EDGE: "decided at the edge",
    Where.CLOUD: "decided by the cloud",
    Where.FALLBACK: "edge verdict stands",
}

TERMS: Sequence[tuple[str, str]] = (
    ("Escape", "A defect that was called good: it slipped through. The escape rate is its share of all true defects."),
    ("Overkill", "A good part that was called defect. The overkill rate is its share of all truly good parts."),
    ("Escalation", "Sending a part to the cloud model because the edge detector was not sure enough."),
    ("Fallback", "The cloud was asked but gave no usable answer in time; the edge's own verdict stands."),
    (
        "Explanation",
        "A model on the edge's own computer says of a reject what is wrong. It speaks after the verdict and changes "
        "neither label nor P(defect); the boxes are the edge detector's.",
    ),
    ("Unreadable", "The image could not be decoded or judged. It is never called good and enters no rate."),
    ("P(defect)", "The probability, after calibration, that the part is a defect. At or above the threshold: defect."),
    (
        f"95{THIN}% CI",
        f"Confidence interval: the true rate lies in it with 95{THIN}% confidence (Clopper–Pearson). Few parts make it "
        "wide.",
    ),
    (
        "AUROC",
        "How well scores rank defects above good parts, whatever the threshold: 0.5 is chance, 1 is perfect.",
    ),
    ("Balanced accuracy", "The mean of the share of defects caught and the share of good parts passed."),
    (
        "Overlap",
        f"The edge side and the cloud work side by side. 100{THIN}%: the shorter of the two cost no time of its own; "
        f"0{THIN}%: one always waited for the other.",
    ),
)


def percent(rate: float | None, digits: int = 1) -> str:
    """``0.0213`` → ``2.1 %``; not measured → a dash."""
    return DASH if rate is None else f"{rate * 100:.{digits}f}{THIN}%"


def interval(bounds: Sequence[float] | None, digits: int = 1) -> str:
    """``[0.008, 0.053]`` → ``0.8–5.3 %``."""
    if bounds is None:
        return DASH
    # Word joiners keep a range on one line.
    return f"{bounds[0] * 100:.{digits}f}\N{WORD JOINER}–\N{WORD JOINER}{bounds[1] * 100:.{digits}f}{THIN}%"


def number(value: float | None, unit: str = "", digits: int | None = None) -> str:
    """A figure with three significant digits, or ``digits`` decimals, and its unit; not measured → a dash."""
    if value is None:
        return DASH
    if digits is None:
        whole = not value or (float(value).is_integer() and abs(value) >= 10)
        digits = 0 if whole else min(6, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{digits}f}{THIN + unit if unit else ''}"


def size(count: float | None) -> str:
    """Bytes in decimal units."""
    if count is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return number(count / scale, unit, 1)
    return number(count, "B", 0)


def counted(n: int, noun: str, plural: str = "") -> str:
    """``1 part``, ``3 parts``, ``no parts``."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}" if n else f"no {plural or noun + 's'}"


def headline(summary: Mapping[str, Any]) -> str:
    """The run in one sentence that a person without statistics can act on."""
    n, labelled = summary["n"], summary["labelled"]
    if not n:
        return "No parts were inspected."
    if not labelled:
        judged = n - summary["unreadable"]
        if not judged:
            return f"{'The image' if n == 1 else f'None of {n:,} images'} could {'not ' if n == 1 else ''}be read."
        called = summary["called"]["defect"]
        return f"{_none(called).capitalize()} of {counted(judged, 'part')} {_was(called)} called defect."
    c = summary["confusion"]
    defects, goods = c["tp"] + c["fn"], c["tn"] + c["fp"]
    said = []
    if defects:
        said.append(f"{_none(c['fn'])} of {counted(defects, 'defect')} slipped through")
    if goods:
        said.append(f"{_none(c['fp'])} of {counted(goods, 'good part')} {_was(c['fp'])} rejected")
    text = " and ".join(said)
    known = "" if labelled == n - summary["unreadable"] else f" Truth is known for {labelled:,} of {n:,} parts."
    return f"{text[0].upper()}{text[1:]}.{known}"


def uncertainty(summary: Mapping[str, Any]) -> str:
    """What the headline's rates are worth with this many parts, and who decided."""
    bounds, said = summary["intervals"], []
    for key, name in (("escape_rate", "escape rate"), ("overkill_rate", "overkill rate")):
        if summary[key] is not None:
            said.append(f"{name} {percent(summary[key])}, 95{THIN}% CI {interval(bounds[key])}")
    rates = "; ".join(said)
    if summary["n"] and not summary["labelled"]:
        rates = "Their truth is unknown, so mistakes cannot be counted"
    sent = summary["routing"]["cloud"] + summary["routing"]["fallback"]
    asked = f"The cloud was asked about {_none(sent)} of {counted(summary['n'], 'part')}." if summary["n"] else ""
    return f"{rates[0].upper()}{rates[1:]}. {asked}" if rates else asked


def attention(summary: Mapping[str, Any]) -> list[str]:
    """What a careful reader should know before trusting the page; the thresholds are SAEC's failure signatures."""
    notes, routing, n = [], summary["routing"], summary["n"]
    counts, bounds = summary["confusion"], summary["intervals"]
    defects = (counts["tp"] + counts["fn"]) if counts["tp"] is not None else 0
    if summary["learnt"] and summary["labelled"]:
        notes.append(
            f"{counted(summary['learnt'], 'part')} {_was(summary['learnt'])} among those that the station was fitted "
            "or calibrated on: the rates flatter it. Evaluate on parts that it has never seen."
        )
    if all_defect(summary):
        notes.append(
            "Every part was called defect. Are these parts, camera and light the ones that the station was fitted on?"
        )
    if summary["labelled"] and not defects:
        notes.append("There is no defect among the parts with known truth: this run says nothing about escapes.")
    elif defects and bounds["escape_rate"][1] - summary["escape_rate"] > 0.02:
        notes.append(
            f"With {counted(defects, 'defect')} the true escape rate may be as high as "
            f"{percent(bounds['escape_rate'][1])}. More labelled defects narrow this."
        )
    if summary["unreadable"]:
        k = summary["unreadable"]
        notes.append(f"{counted(k, 'image')} could not be read. {'It counts' if k == 1 else 'They count'} in no rate.")
    if routing["fallback"]:
        notes.append(f"For {counted(routing['fallback'], 'part')} the cloud did not answer; the edge's verdict stands.")
    swept = summary["models"].get("router") == ASK_ALWAYS
    by_choice = swept or routing["reasons"].get(Reason.CLOUD_ONLY)
    if swept:
        notes.append("This run asked the cloud about every part, for a sweep: its routing is not that of the line.")
    if n and (routing["cloud"] + routing["fallback"]) / n > 0.8 and not by_choice:
        notes.append(
            f"More than 80{THIN}% of the parts were escalated: the edge no longer fits these parts. Recalibrate."
        )
    explained = summary.get("explained", {})
    if in_vain := explained.get("late", 0) + explained.get("failed", 0):
        notes.append(
            f"{counted(in_vain, 'reject')} of {in_vain + explained['n']:,} could not be put into words "
            f"({explained['late']:,} too late, {explained['failed']:,} without a usable answer); the boxes stand."
        )
    if summary["deadline"]["late"]:
        notes.append(
            f"{counted(summary['deadline']['late'], 'local verdict')} came after the deadline of "
            f"{number(summary['deadline']['ms'], 'ms')}."
        )
    return notes


def drifted(summary: Mapping[str, Any]) -> list[str]:
    """What the drift watch has to say before a run is relied on: what stands at its end with its figures then, and what
    to do; of what is over, only that it was there."""
    notes = []
    for product, seen in summary.get("drift", {}).items():
        standing = [alarm_words(alarm) for alarm in seen["standing"]]
        if standing:
            notes.append(f"{product} has drifted: {'; '.join(standing)}. {proposed(seen['proposal'])}")
        elif seen["raised"]:
            over = ", ".join(alarm["kind"] for alarm in seen["raised"])
            notes.append(f"{product}: alarms of the drift watch came up and were over at the end ({over}).")
    return notes


def alarm_words(alarm: Mapping[str, Any]) -> str:
    """An alarm of the drift watch with its figures and since when, as text without a full stop."""
    return f"{minus(alarm['statement'])} (from part {alarm['since']:,} on)"


def proposed(proposal: Mapping[str, Any] | None) -> str:
    """What the drift watch proposes, as a sentence; nothing where it proposes nothing."""
    return f"Proposal: {proposal['action']}: {proposal['why']}." if proposal else ""


def minus(text: str) -> str:
    """The text with signs that do not read as dashes."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)


def all_defect(summary: Mapping[str, Any]) -> bool:
    """Whether so many parts were all called defect that another product or another light is the likelier cause."""
    judged = summary["n"] - summary["unreadable"]
    known = summary["confusion"]["tp"] is not None and summary["labelled"] == judged
    goods = summary["confusion"]["fp"] + summary["confusion"]["tn"] if known else judged
    return bool(judged >= SUSPICIOUS and goods and summary["called"]["defect"] == judged)


def outcome(verdict: Verdict) -> tuple[str, str, str]:
    """Return (css class, tag, sentence) of one verdict."""
    if verdict.label is Label.UNREADABLE:
        return "unreadable", "Unreadable", "Could not be read; not judged."
    called = f"Called {verdict.label.value}"
    if verdict.truth not in (Label.GOOD, Label.DEFECT):
        return "unknown", verdict.label.value.capitalize(), f"{called}."
    if verdict.truth is verdict.label:
        return "right", f"{verdict.label.value.capitalize()} ✓", f"{called}, and it is {verdict.label.value}."
    if verdict.truth is Label.DEFECT:
        return "escape", "Escape", "Called good, but it is a defect."
    return "overkill", "Overkill", "Called defect, but it is good."


def _none(n: int) -> str:
    return f"{n:,}" if n else "none"


def _was(n: int) -> str:
    return "was" if n == 1 else "were"
