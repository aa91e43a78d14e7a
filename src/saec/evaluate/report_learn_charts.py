"""Charts of the page about rounds of learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saec.evaluate.report_svg import Axis, Bars, Chart, Line, draw
from saec.evaluate.report_words import percent, size
from saec.learn.rounds import ADAPTED, UNADAPTED

Tree = Mapping[str, Any]
"""``rounds.json``, or a part of it."""

PSEUDO = "pseudo-labels only"
PARTS_OFF = (ADAPTED, "random samples", "bank off", "head off")
OTHER_WAYS = (ADAPTED, "dense update", "human labels")
"""What is drawn together: a chart tells four lines apart."""


def edge_of(record: Tree) -> float:
    """Return the accuracy of the edge alone on the parts held out."""
    found: float = record["held_out"]["edge"]
    return found


def bytes_of(record: Tree) -> tuple[int, int, int]:
    """Return the bytes of a round: questions up, learning up, learning down."""
    learnt = record.get("learnt") or {}
    return record["stream"]["uplink_bytes"], learnt.get("bytes_up", 0), learnt.get("bytes_down", 0)


def _rounds_axis(rounds: int) -> Axis:
    return Axis("Round", 0, rounds, tuple(range(rounds + 1)))


def _accuracy_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max((high - low) / 2, 0.02)
    return Axis.nice("Accuracy", max(0.0, middle - half), min(1.0, middle + half), lambda value: percent(value, 0))


def _line(tree: Tree, name: str, style: int) -> Line | None:
    records = next((arm["rounds"] for arm in tree["arms"] if arm["name"] == name), None)
    if records is None:
        return None
    values = [edge_of(tree["start"]), *map(edge_of, records)]
    return Line(name, list(enumerate(values)), style)


def accuracies(tree: Tree) -> list[Chart]:
    """Return accuracy by round, of all arms, a chart for each question, on one scale."""
    asked: tuple[tuple[str, Sequence[str], list[Line]], ...] = (
        ("Accuracy of the edge alone", (ADAPTED, UNADAPTED, PSEUDO), _cloud_alone(tree)),
        ("With a part of it switched off", PARTS_OFF, []),
        ("Updates sent whole, and people as teachers", OTHER_WAYS, []),
    )
    drawn = []
    for title, names, extra in asked:
        found = (_line(tree, name, style) for style, name in enumerate(names))
        drawn.append((title, [line for line in found if line is not None] + extra))
    axis = _accuracy_axis([value for _, lines in drawn for line in lines for _, value in line.points])
    return [_accuracy(tree, title, axis, lines) for title, lines in drawn if len(lines) > 1]


def _accuracy(tree: Tree, title: str, axis: Axis, lines: Sequence[Line]) -> Chart:
    said = "; ".join(f"{line.name} {percent(line.points[-1][1])}" for line in lines)
    rounds = len(tree["arms"][0]["rounds"])
    return draw(title, _rounds_axis(rounds), axis, lines=lines, alt=f"At the end: {said}.")


def _cloud_alone(tree: Tree) -> list[Line]:
    main = tree["arms"][0]["rounds"]
    alone = [(at + 1.0, record["cloud_alone"]) for at, record in enumerate(main) if "cloud_alone" in record]
    points = [(0.0, tree["start"]["cloud_alone"]), *alone]
    return [Line("cloud alone, with the adapted edge's maps", points, 3)] if alone else []


def escalation(tree: Tree) -> Chart:
    """Share of each round's parts that the cloud was asked about."""
    lines = []
    for style, name in enumerate((ADAPTED, UNADAPTED, PSEUDO)):
        records = next((arm["rounds"] for arm in tree["arms"] if arm["name"] == name), None)
        if records is not None:
            lines.append(Line(name, [(at + 1, r["stream"]["escalated"]) for at, r in enumerate(records)], style))
    first = tree["arms"][0]
    held = [(at + 1, record["held_out"]["escalated"]) for at, record in enumerate(first["rounds"])]
    lines.append(Line(f"{first['name']}, parts held out, without audits", held, 3))
    rounds = len(first["rounds"])
    top = max(value for line in lines for _, value in line.points)
    return draw(
        "Put to the cloud, audits included",
        Axis("Round", 1, rounds, tuple(range(1, rounds + 1))),
        Axis.nice("Share of the round's parts", 0, max(top, 0.1), lambda value: percent(value, 0)),
        lines=lines,
        alt="; ".join(f"{line.name}: {', '.join(percent(v, 0) for _, v in line.points)}" for line in lines) + ".",
    )


def traffic(arm: Tree) -> Chart:
    """Megabytes of each round, by what they were."""
    found = [bytes_of(record) for record in arm["rounds"]]
    names = ("questions, up", "samples, up", "update, down")
    bars = []
    for style, name in enumerate(names):
        edges, heights = [], []
        for at, each in enumerate(found):
            left = at + 0.6 + 0.27 * style
            edges += [left, left + 0.27]
            heights += [each[style] / 1e6, 0.0]
        bars.append(Bars(name, [*edges, edges[-1]], heights, style))
    rounds = len(found)
    return draw(
        "Megabytes in each round",
        Axis("Round", 0.5, rounds + 0.5, tuple(range(1, rounds + 1))),
        Axis.nice("MB", 0, max(max(each) for each in found) / 1e6 or 1.0),
        bars=bars,
        alt="; ".join(f"round {at + 1}: {', '.join(map(size, each))}" for at, each in enumerate(found)) + ".",
    )
