"""The page about rounds of learning: what it is worth, what each part of it is, and what it costs in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from saec.errors import BadInput
from saec.evaluate import report_learn_charts as charts
from saec.evaluate.bench_uplink import curve
from saec.evaluate.report import flatten, page
from saec.evaluate.report_learn_charts import Tree, bytes_of, edge_of
from saec.evaluate.report_svg import Chart
from saec.evaluate.report_view import Card
from saec.evaluate.report_words import alarm_words, counted, number, percent, size
from saec.evaluate.summary import write_atomically
from saec.evaluate.table import Cell, Table
from saec.learn.rounds import ADAPTED, UNADAPTED
from saec.vlm.trained import read_record


def write_learn_report(tree: Tree, out: Path, *, uplink: Chart | None = None) -> None:
    """Write the page about ``rounds.json``, whole or not at all.

    ``uplink`` is a curve of accuracy against bytes (:func:`read_curve`), shown as well.

    Raises:
        BadInput: the page cannot be written.
    """
    write_atomically(out, render_learn(tree, uplink=uplink))


def render_learn(tree: Tree, *, uplink: Chart | None = None) -> str:
    """Return the page as text. The same figures give the same bytes."""
    plan, arms = tree["plan"], tree["arms"]
    main = arms[0]
    change = plan["then"] or plan["drift"]
    arm_columns, arm_rows = _arm_rows(tree)
    round_columns, round_rows = _round_rows(main)
    drawn = (*charts.accuracies(tree), charts.escalation(tree), charts.traffic(main))
    return page(
        "report_learn.html.j2",
        name=f"{plan['first']} → {change}",
        headline=headline(tree),
        lead=_lead(tree, change),
        cards=_cards(tree),
        attention=_attention(tree),
        charts=[chart for chart in (*drawn, uplink) if chart is not None],
        arm_columns=arm_columns,
        arm_rows=arm_rows,
        arm_note=f"All on the same parts held out; first product: the edge alone on parts of the time before the "
        f"change. To cloud: without audits. Seconds on a link of {plan['link_mbit']:g} Mbit/s.",
        main=main["name"],
        round_columns=round_columns,
        round_rows=round_rows,
        round_note="The round's own parts: before it learnt from them. Probe: parts of earlier and of this round that "
        "are never taught; an update that is worse there is dropped.",
        alarms=_alarms(arms),
        facts=_facts(tree),
    )


def _facts(tree: Tree) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what it takes to make these figures again."""
    plan = {name: value for name, value in tree["plan"].items() if name != "settings"}
    known = tree["plan"].get("settings")
    settings = [] if known is None else flatten(known) or [("all", "the default")]
    return [
        ("Plan", flatten(plan)),
        ("Made of", flatten(tree.get("made", {}))),
        ("Settings that are not the default", settings),
        ("Machine", flatten(tree["environment"])),
    ]


def read_curve(file: Path) -> Chart:
    """Return the curve of accuracy against bytes of what ``saec bench uplink --json`` saved.

    Raises:
        BadInput: it cannot be read, or is something else.
    """
    fix = "pass what saec bench uplink --json saved"
    if not file.is_file():
        raise BadInput("no such file", where=file, fix=fix)
    try:
        return curve(Table(**read_record(file)["tables"][0]))
    except (KeyError, IndexError, StopIteration, TypeError, ValueError) as error:
        raise BadInput(f"not the tables of saec bench uplink ({error!r})", where=file, fix=fix) from None


def rounds_table(tree: Tree) -> Table:
    """Return one row for each arm, for a terminal."""
    groups, rows = _arm_rows(tree)
    rounds = len(groups[0][1])
    columns = [f"round {name}" for name in groups[0][1]] + [name for _, names in groups[1:] for name in names]
    named: list[Mapping[str, Cell]] = [
        {"arm": name, **dict(zip(columns, cells, strict=True))} for name, _, cells in rows
    ]
    notes = (
        "round: accuracy of the edge alone on parts of the last kind that are in no round, after that round",
        f"cascade, cloud alone, to cloud, first product: after round {rounds}; bytes and seconds: of all rounds",
    )
    return Table("Learning", ("arm", *columns), named, notes)


def headline(tree: Tree) -> str:
    """Return the outcome in one sentence: edge and cascade, and what share of the parts the cascade asks about."""
    arms = {arm["name"]: arm["rounds"][-1] for arm in tree["arms"]}
    name, last = next(iter(arms.items()))
    held_out, rounds = last["held_out"], counted(len(tree["arms"][0]["rounds"]), "round")
    text = f"After {rounds} the {_edge(name)} alone is right in {percent(edge_of(last))} of the cases"
    if UNADAPTED in arms and name != UNADAPTED:
        text += f", without adaptation in {percent(edge_of(arms[UNADAPTED]))}"
    return f"{text}; with the cloud, asked about {percent(held_out['escalated'], 0)}, in {percent(held_out['final'])}."


def _edge(arm: str) -> str:
    return "adapted edge" if arm == ADAPTED else f"edge ({arm})"


def _lead(tree: Tree, change: str) -> str:
    plan, start = tree["plan"], tree["start"]
    alone = tree["arms"][0]["rounds"][-1].get("cloud_alone")
    cloud = "" if alone is None else f"The cloud alone, asked about every part, is right in {percent(alone)}. "
    who = (
        "people label its samples"
        if plan["teacher"] == "labels"
        else f"the cloud's model ({plan['backend']}) teaches it"
    )
    goes_up = {"image": "its image goes", "crop": "the crop around its anomaly goes", "tokens": "its tokens go"}
    return (
        f"{cloud}A station fitted to {plan['first']} meets {change} under the same name; {who}; of a part "
        f"{goes_up[plan['uplink']]} up. Measured on {start['held_out']['n']} parts that are in no round, and that "
        "neither the station nor the cloud's model has learnt from."
    )


def _cards(tree: Tree) -> list[Card]:
    arms = {arm["name"]: arm["rounds"] for arm in tree["arms"]}
    main = tree["arms"][0]["rounds"]
    learnt = [record["learnt"] for record in main if "learnt" in record]
    gain = None if UNADAPTED not in arms else edge_of(main[-1]) - edge_of(arms[UNADAPTED][-1])
    shares = [record["stream"]["escalated"] for record in main]
    versions = sum((each["applied"] or {}).get("kept", False) for each in learnt)
    return [
        Card(
            f"Edge alone, {tree['arms'][0]['name']}",
            percent(edge_of(main[-1])),
            f"as fitted {percent(edge_of(tree['start']))}; with the cloud {percent(main[-1]['held_out']['final'])}",
        ),
        Card(
            "Gain over no adaptation",
            "–" if gain is None else f"{100 * gain:+.1f} points",
            f"first product {percent(main[-1]['before']['edge'])}, was {percent(tree['start']['before']['edge'])}",
        ),
        Card(
            "To the cloud, last round's stream",
            percent(shares[-1], 0),
            "audits included; round by round " + ", ".join(percent(share, 0) for share in shares),
        ),
        Card(
            "Learning, up and down",
            size(sum(each["bytes_up"] + each["bytes_down"] for each in learnt)),
            f"{counted(sum(each['samples'] for each in learnt), 'sample')}, {counted(versions, 'update')}",
        ),
    ]


def _attention(tree: Tree) -> list[str]:
    n = tree["start"]["held_out"]["n"]
    found = [
        f"{arm['name']}, round {at + 1}: {lost} questions came to nothing."
        for arm in tree["arms"]
        for at, record in enumerate(arm["rounds"])
        if (lost := record["stream"]["fallbacks"] + record["held_out"]["fallbacks"])
    ]
    dropped = [
        f"{arm['name']}, round {at + 1}: worse on the probe set, so the update was dropped."
        for arm in tree["arms"]
        for at, record in enumerate(arm["rounds"])
        if (applied := record.get("learnt", {}).get("applied")) and not applied["kept"]
    ]
    half = 98 * (0.9 * 0.1 / n) ** 0.5 * 2
    chance = f"{n} parts: arms less than about {half:.0f} points apart may differ by chance; one stream, one order."
    return [chance, *found, *dropped]


Groups = list[tuple[str, list[str]]]
"""Columns with what they have in common."""


def _arm_rows(tree: Tree) -> tuple[Groups, list[tuple[str, str, list[str]]]]:
    link, rows = tree["plan"]["link_mbit"], []
    for arm in tree["arms"]:
        records = arm["rounds"]
        last = records[-1]
        up, learnt_up, down = (sum(each) for each in zip(*map(bytes_of, records), strict=True))
        seconds = 8 * (up + learnt_up + down) / 1e6 / link
        cells = [percent(edge_of(record)) for record in records]
        cells += [percent(last["held_out"]["final"]), percent(last["held_out"]["escalated"], 0)]
        cells += [percent(last.get("cloud_alone")), percent(last["before"]["edge"])]
        cells += [size(up), size(learnt_up), size(down), number(seconds, "s", 1)]
        rows.append((arm["name"], arm["what"], cells))
    rounds = len(tree["arms"][0]["rounds"])
    groups = [
        ("Edge alone, after round", [str(at + 1) for at in range(rounds)]),
        (f"After round {rounds}", ["cascade", "to cloud", "cloud alone", "first product"]),
        ("All rounds together", ["asked", "learnt up", "down", "on the link"]),
    ]
    return groups, rows


def _round_rows(arm: Tree) -> tuple[Groups, list[tuple[str, list[str]]]]:
    rows = []
    for at, record in enumerate(arm["rounds"]):
        learnt, stream = record.get("learnt") or {}, record["stream"]
        applied = learnt.get("applied") or {}
        up, learnt_up, down = bytes_of(record)
        cells = [percent(stream["edge"]), percent(stream["final"]), percent(stream["escalated"], 0)]
        cells += [str(stream["reasons"].get("audit", 0)), str(learnt.get("samples", "–"))]
        cells += [percent(learnt.get("teacher_right")), percent(applied.get("before")), percent(applied.get("after"))]
        cells += [percent(edge_of(record)), percent(record["held_out"]["final"]), percent(record.get("cloud_alone"))]
        rows.append((str(at + 1), [*cells, size(up), size(learnt_up), size(down)]))
    groups = [
        ("The round's own parts", ["edge", "cascade", "to cloud", "audits"]),
        ("What was learnt", ["samples", "teacher right", "probe before", "after"]),
        ("Parts held out, after it", ["edge", "cascade", "cloud alone"]),
        ("Bytes", ["asked", "learnt up", "down"]),
    ]
    return groups, rows


def _alarms(arms: Sequence[Tree]) -> list[tuple[str, list[str]]]:
    """Return (arm and round, what the watch saw in it) wherever it saw something."""
    return [
        (
            f"{arm['name']}, round {at + 1}",
            [alarm_words(alarm) for alarm in record["alarms"]],
        )
        for arm in arms
        if arm["name"] in (ADAPTED, UNADAPTED)
        for at, record in enumerate(arm["rounds"])
        if record["alarms"]
    ]
