"""SAEC's table as people and programs read it. A figure that was not measured is a dash with its reason in a footnote,
and ``null`` with the same reason in the JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saec.evaluate.arms import escalated_share
from saec.evaluate.bench_table import Row
from saec.evaluate.table import Cell, Table

FORMAT = "saec-table/1"

_MARKS = "¹²³⁴⁵⁶⁷⁸⁹"


@dataclass(frozen=True, slots=True)
class _Figure:
    """A column: its key in the JSON, its head and form in the table, its value, and why it may be missing."""

    key: str
    head: str
    form: str
    value: Callable[[Mapping[str, Any]], float | None]
    why: Callable[[Mapping[str, Any]], str]


def _status(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda s: str(s["status"].get(name, "not measured"))


def _per_part(s: Mapping[str, Any]) -> float | None:
    return s["time"]["wall_s"] / s["n"] if s["time"]["wall_s"] is not None and s["n"] else None


def _power(s: Mapping[str, Any]) -> float | None:
    joules, wall_s = s["energy"]["joules"], s["time"]["wall_s"]
    return joules / wall_s if joules is not None and wall_s else None


def _why_no_gpu(s: Mapping[str, Any]) -> str:
    if "memory" in s["status"]:
        return str(s["status"]["memory"])
    said = next((text for text in s["machine"]["problems"] if text.startswith("nvml")), None)
    return said or "the GPU does not report its utilisation"


def _percent(rate: float | None) -> float | None:
    return None if rate is None else 100 * rate


_FIGURES = (
    _Figure("accuracy_percent", "acc. %", ".1f", lambda s: _percent(s["accuracy"]), _status("accuracy")),
    _Figure("wall_s", "s", ".1f", lambda s: s["time"]["wall_s"], _status("time")),
    _Figure("s_per_image", "s/img", ".3f", _per_part, _status("time")),
    _Figure("gpu_utilisation_percent", "GPU %", ".0f", lambda s: s["machine"]["gpu_utilisation"], _why_no_gpu),
    _Figure("power_w", "W", ".1f", _power, _status("energy")),
    _Figure(
        "mwh_per_correct",
        "mWh",
        ".2f",
        lambda s: s["energy"]["mwh_per_correct"],
        lambda s: str(s["status"].get("energy", "no part was judged correctly")),
    ),
    _Figure(
        "memory_gb",
        "GB",
        ".2f",
        lambda s: None if s["memory"]["rss_peak_mb"] is None else s["memory"]["rss_peak_mb"] / 1000,
        _status("memory"),
    ),
    _Figure("escalated_percent", "cloud %", ".1f", lambda s: _percent(escalated_share(s)), lambda s: "no parts"),
)

_ALSO = ("n", "labelled", "unreadable", "balanced_accuracy", "auroc", "escape_rate", "overkill_rate", "models")


def saec_table(rows: Sequence[Row], *, title: str, notes: Sequence[str] = ()) -> Table:
    """Return the table for a terminal and for Markdown. Footnotes are numbered in the order of their first use."""
    footnotes: dict[str, str] = {}

    def dash(why: str) -> str:
        return "–" + footnotes.setdefault(why, _MARKS[len(footnotes)] if len(footnotes) < len(_MARKS) else "*")

    found: list[Mapping[str, Cell]] = []
    for row in rows:
        cells: dict[str, Cell] = {"arm": row.arm}
        for figure in _FIGURES:
            if row.summary is None:
                cells[figure.head] = dash(f"not at hand: {row.absent}") if figure is _FIGURES[0] else None
                continue
            value = figure.value(row.summary)
            cells[figure.head] = dash(figure.why(row.summary)) if value is None else format(value, figure.form)
        found.append(cells)
    legend = [
        "s: wall time; W, mWh: mean power, energy per correct verdict; cloud %: share of the parts put to the cloud",
        "GB: peak resident memory of this process and its children; what earlier arms have left behind is in it",
        *_asked(rows),
        *_counted(rows),
        *notes,
    ]
    return Table(title, tuple(found[0]), found, [*(f"{mark} {why}" for why, mark in footnotes.items()), *legend])


def _asked(rows: Sequence[Row]) -> list[str]:
    """Which model answered in which arms."""
    arms: dict[str, list[str]] = {}
    for row in rows:
        if row.summary is not None and "cloud" in row.summary["models"]:
            arms.setdefault(str(row.summary["models"]["cloud"]), []).append(row.arm)
    return [f"{model}: {', '.join(names)}" for model, names in arms.items()]


def _counted(rows: Sequence[Row]) -> list[str]:
    """What was metered, and what became of questions without an answer."""
    ran = [(row.arm, row.summary) for row in rows if row.summary is not None]
    covers = {s["energy"]["detail"] for _, s in ran if s["energy"]["joules"] is not None}
    lines = [f"power and energy of: {'; '.join(sorted(covers))}"] if covers else []
    lines += [
        f"{row.arm}: the figures of {row.same_as}, for calibration found no use for the scene score"
        for row in rows
        if row.same_as is not None
    ]
    for name, s in ran:
        unanswered, fallbacks = s.get("unanswered", 0), s["routing"]["fallback"]
        if unanswered:
            lines.append(f"{name}: {unanswered} parts without a usable answer, counted as wrong")
        elif fallbacks:
            lines.append(f"{name}: for {fallbacks} parts the cloud gave no answer and the edge's verdict stands")
    return lines


def saec_json(rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """Return plain JSON types: for each arm its figures, and under ``status`` why one is ``null``."""
    return {"format": FORMAT, "arms": [_row_json(row) for row in rows], **more}


def _row_json(row: Row) -> dict[str, Any]:
    if row.summary is None:
        nothing = dict.fromkeys(figure.key for figure in _FIGURES)
        return {"arm": row.arm, "state": "not at hand", **nothing, "status": {"arm": str(row.absent)}}
    s = row.summary
    figures = {figure.key: figure.value(s) for figure in _FIGURES}
    return {
        "arm": row.arm,
        "state": "measured" if row.same_as is None else f"same as {row.same_as}",
        **figures,
        "gpu_w": s["machine"]["gpu_w"],
        "energy": s["energy"],
        "unanswered": s.get("unanswered"),
        "fallbacks": s["routing"]["fallback"],
        **{name: s[name] for name in _ALSO},
        "status": {figure.key: figure.why(s) for figure in _FIGURES if figures[figure.key] is None},
    }


_PUBLISHED_HEADS = ("data", "model", "acc. %", "s", "s/img", "GPU %", "W", "mWh", "GB")
_PUBLISHED: Sequence[tuple[str | None, ...]] = (
    ("MVTec AD", "YOLO11s-cls", "51.47", None, None, None, None, None, None),
    ("MVTec AD", "Qwen2.5-VL-7B", "70.04", "222.7", "0.230", "42.6", "111.8", "13.64", "1.53"),
    ("MVTec AD", "LLaVA-1.5-7B", "51.80", "200.3", "0.207", "59.1", "164.0", "23.19", "1.59"),
    ("MVTec AD", "SAEC", "85.11", "172.8", "0.179", "31.0", "108.5", "6.09", "1.30"),
    ("KSDD2", "YOLO11s-cls", "45.79", None, None, None, None, None, None),
    ("KSDD2", "Qwen2.5-VL-7B", "61.94", "173.6", "0.244", "26.74", "75.2", "15.74", "1.59"),
    ("KSDD2", "LLaVA-1.5-7B", "51.12", "157.0", "0.221", "50.96", "140.7", "11.34", "1.53"),
    ("KSDD2", "SAEC", "82.72", "154.2", "0.217", "22.87", "65.4", "9.42", "1.27"),
)


def published() -> Table:
    """Return the figures that the SAEC paper prints (arXiv 2509.17136), for reference only."""
    rows: list[Mapping[str, Cell]] = [dict(zip(_PUBLISHED_HEADS, row, strict=True)) for row in _PUBLISHED]
    notes = (
        "published in arXiv 2509.17136: other hardware (A100-40GB cloud, 8-core Xeon edge) and other data (holdouts of "
        "967 and 712 images); nothing of it was measured here",
        "MVTec AD, Qwen2.5-VL-7B: 70.04 in the paper's table, 63.04 in its text; –: not published",
    )
    return Table("Published, other hardware and data", _PUBLISHED_HEADS, rows, notes)
