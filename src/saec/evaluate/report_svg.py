"""Small charts as inline SVG: axes, ticks, lines, bars. No library, no script, colours from the page's style sheet.

Series are told apart by colour *and* dash or position, so that a chart also reads in print and for colour-blind eyes.
All text is escaped here; the result is safe markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 256
LEFT, RIGHT, TOP, BOTTOM = 54, 22, 22, 46
MAX_POINTS = 300

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: ``low < high`` in data units, tick positions, and how a tick is written."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    write: Callable[[float], str] = "{:g}".format

    @classmethod
    def nice(cls, label: str, low: float, high: float, write: Callable[[float], str] = "{:g}".format) -> Axis:
        """Cover ``low … high`` with about five round ticks."""
        ticks = nice_ticks(low, high)
        return cls(label, min(low, ticks[0]), max(high, ticks[-1]), ticks, write)


@dataclass(frozen=True, slots=True)
class Line:
    """A named line; ``style`` picks colour and dash; ``steps`` draws a staircase that jumps at the next point."""

    name: str
    points: Sequence[Point]
    style: int = 0
    steps: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """A marked point with an optional label beside it."""

    x: float
    y: float
    label: str = ""
    style: int = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """A vertical line at ``x`` with a label at its top."""

    x: float
    label: str
    strong: bool = True


@dataclass(frozen=True, slots=True)
class Bars:
    """A named histogram: ``heights[i]`` over ``edges[i] … edges[i+1]``; negative heights hang from the zero line."""

    name: str
    edges: Sequence[float]
    heights: Sequence[float]
    style: int = 0


@dataclass(frozen=True, slots=True)
class Chart:
    """A finished chart: ``svg`` to inline, ``names`` for the legend as (mark, style, text)."""

    title: str
    svg: Markup
    names: tuple[tuple[str, int, str], ...]
    note: str = ""


def nice_ticks(low: float, high: float, about: int = 5) -> tuple[float, ...]:
    """Round tick positions (1, 2 or 5 × a power of ten) that cover ``low … high``."""
    if not high > low:
        high = low + 1.0
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if raw <= m * power * 1.0001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(i * step, 12) for i in range(first, last + 1))


def draw(
    title: str,
    x: Axis,
    y: Axis,
    *,
    lines: Sequence[Line] = (),
    bars: Sequence[Bars] = (),
    dots: Sequence[Dot] = (),
    rules: Sequence[Rule] = (),
    alt: str,
    note: str = "",
) -> Chart:
    """Draw one chart. ``alt`` says in words what a sighted reader takes from it."""
    px, py = _scale(x, LEFT, WIDTH - RIGHT), _scale(y, HEIGHT - BOTTOM, TOP)
    body = [
        *_axes(x, y, px, py),
        *(_bars(b, px, py) for b in bars),
        *_rules(rules, px),
        *(_line(line, px, py) for line in lines),
        *_dots(dots, px, py),
    ]
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{title}. {alt}", Markup("").join(body)
    )
    series = [("line", line.style, line.name) for line in lines] + [("bars", b.style, b.name) for b in bars]
    return Chart(title, svg, tuple(entry for entry in series if entry[2]), note)


def alone(chart: Chart) -> str:
    """Return a chart as a file of its own: with its legend, and the page's style sheet inside."""
    style = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    legend = [
        Markup('<g class="{} s{}"><path d="M {} {} h 22"/></g>').format(kind, number, LEFT, HEIGHT + 10 + 16 * row)
        + _text(LEFT + 28, HEIGHT + 14 + 16 * row, name, "start", "label")
        for row, (kind, number, name) in enumerate(chart.names)
    ]
    head = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}"').format(
        WIDTH, HEIGHT + 16 * (len(chart.names) + 1)
    )
    body = chart.svg.partition("role=")[2].removesuffix("</svg>")
    opened, _, rest = body.partition(">")
    return f"{head} role={opened}><style>{style}</style>{rest}{Markup().join(legend)}</svg>\n"


def _scale(axis: Axis, at_low: float, at_high: float) -> Callable[[float], float]:
    span = (axis.high - axis.low) or 1.0
    return lambda v: round(at_low + (min(max(v, axis.low), axis.high) - axis.low) / span * (at_high - at_low), 1)


def _axes(x: Axis, y: Axis, px: Callable[[float], float], py: Callable[[float], float]) -> list[Markup]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y.ticks:
        parts.append(Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(LEFT, right, py(tick)))
        parts.append(_text(LEFT - 8, py(tick) + 4, y.write(tick), "end"))
    for tick in x.ticks:
        parts.append(
            Markup('<line class="tick" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(px(tick), bottom, bottom + 5)
        )
        parts.append(_text(px(tick), bottom + 18, x.write(tick), "middle"))
    zero = py(min(max(0.0, y.low), y.high))
    parts.append(Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(LEFT, right, zero))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 8, x.label, "middle", "label"))
    middle = (TOP + bottom) / 2
    parts.append(
        Markup('<text class="label" text-anchor="middle" transform="translate(13 {}) rotate(-90)">{}</text>').format(
            middle, y.label
        )
    )
    return parts


def _line(line: Line, px: Callable[[float], float], py: Callable[[float], float]) -> Markup:
    points = thin([(px(a), py(b)) for a, b in line.points])
    if not points:
        return Markup("")
    steps = [f"M{points[0][0]} {points[0][1]}"]
    for a, b in points[1:]:
        steps.append(f"V{b}H{a}" if line.steps else f"L{a} {b}")
    return Markup('<path class="line s{}" d="{}"/>').format(line.style, "".join(steps))


def thin(points: Sequence[Point]) -> list[Point]:
    """Drop points that the eye cannot tell apart, keeping first and last."""
    if len(points) <= MAX_POINTS:
        return list(points)
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(i * step)] for i in range(MAX_POINTS)]


def _bars(bars: Bars, px: Callable[[float], float], py: Callable[[float], float]) -> Markup:
    zero, parts = py(0.0), []
    for left, right, height in zip(bars.edges, bars.edges[1:], bars.heights, strict=False):
        if height:
            y, x = py(height), px(left)
            parts.append(
                Markup('<rect x="{}" y="{}" width="{}" height="{}"/>').format(
                    x + 0.5, min(y, zero), round(max(px(right) - x - 1, 0.8), 1), round(abs(y - zero), 1)
                )
            )
    return Markup('<g class="bars s{}">{}</g>').format(bars.style, Markup("").join(parts))


def _rules(rules: Sequence[Rule], px: Callable[[float], float]) -> list[Markup]:
    parts, busy_until = [], [-1e9, -1e9]
    for rule in sorted(rules, key=lambda r: r.x):
        at, width = px(rule.x), 6.4 * len(rule.label)
        anchor = "start" if at + 4 + width < WIDTH else "end"
        begin = at + 4 if anchor == "start" else at - 4 - width
        # Labels that would run into each other take the second row.
        row = 0 if begin > busy_until[0] else 1
        busy_until[row] = begin + width
        parts.append(
            Markup('<line class="rule{0}" x1="{1}" x2="{1}" y1="{2}" y2="{3}"/>').format(
                "" if rule.strong else " faint", at, TOP - 8, HEIGHT - BOTTOM
            )
        )
        parts.append(_text(at + (4 if anchor == "start" else -4), TOP - 10 + 13 * row, rule.label, anchor, "mark"))
    return parts


def _dots(dots: Sequence[Dot], px: Callable[[float], float], py: Callable[[float], float]) -> list[Markup]:
    parts, taken = [], list[Point]()
    for dot in dots:
        x, y = px(dot.x), py(dot.y)
        parts.append(Markup('<circle class="dot s{}" cx="{}" cy="{}" r="4.5"/>').format(dot.style, x, y))
        if dot.label:
            anchor = "start" if x + 10 + 6.4 * len(dot.label) < WIDTH else "end"
            below = any(abs(x - a) < 90 and abs(y - 8 - b) < 13 for a, b in taken)
            level = y + 17 if below or y - 8 < TOP else y - 8
            taken.append((x, level))
            parts.append(_text(x + (7 if anchor == "start" else -7), level, dot.label, anchor, "mark"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind or "num", round(x, 1), round(y, 1), anchor, escape(text)
    )
