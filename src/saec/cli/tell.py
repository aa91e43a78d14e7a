"""What a finished run is worth saying about: counts, quality with its uncertainty, speed, and where the report is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from saec.cli.codes import INTERRUPTED
from saec.cli.console import console, print_json, print_tables, say, say_path
from saec.errors import BadInput
from saec.evaluate.runner import LEDGER, PREDICTIONS, REPORT, Outcome
from saec.evaluate.table import Cell, Table
from saec.fleet.ledger import read_verdicts
from saec.route.ask import FALLBACK_REASONS
from saec.types import Label


def tell_run(outcome: Outcome, *, total: int | None, json_: bool, skipped: Mapping[str, int]) -> None:
    """Print the summary of a run, or how to go on with an interrupted one.

    Raises:
        typer.Exit: with code 130, for an interrupted run.
    """
    if outcome.summary is None:
        done = outcome.before + outcome.stats.parts
        of = "" if total is None else f" of {total}"
        if json_:
            print_json({"run": str(outcome.folder), "interrupted": True, "parts": done})
        console(stderr=True).print(
            f"interrupted: {done}{of} parts are recorded in {outcome.folder}; the same command goes on from there",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED)
    if json_:
        print_json({"run": str(outcome.folder), "interrupted": False, "skipped": dict(skipped), **outcome.summary})
        return
    called = _called(outcome)
    print_tables(run_table(outcome.summary, called))
    if not outcome.stats.parts and not outcome.stats.requeued:
        say("Every part was recorded already; nothing was inspected again.")
    for line in remarks(outcome.summary, skipped, outcome.stats.left_pending):
        say(line)
    say_path("Verdicts:", outcome.folder / PREDICTIONS)
    if (outcome.folder / REPORT).is_file():
        say_path("Report:  ", outcome.folder / REPORT)


def refuse_unreadable(summary: Mapping[str, Any], images: Sequence[Path], out: Path) -> None:
    """Refuse a run in which nothing could be looked at; its folder says of each part why.

    Raises:
        BadInput: every single part was unreadable.
    """
    if summary["n"] and summary["unreadable"] == summary["n"]:
        raise BadInput(
            f"none of the {summary['n']} images could be read",
            where=", ".join(map(str, images)),
            fix=f"each one's reason is in {out / PREDICTIONS}",
        )


def run_table(summary: Mapping[str, Any], called: Mapping[str, Counter[Label]]) -> Table:
    """Return one row for each product, and one for all where there are several."""
    groups: list[tuple[str, Mapping[str, Any], Counter[Label]]] = [
        (name, figures, called.get(name, Counter())) for name, figures in summary["per_product"].items()
    ]
    if len(groups) > 1:
        groups.append(("all", summary, sum(called.values(), Counter())))
    rows = [_row(name, figures, counts) for name, figures, counts in groups]
    columns = ["product", "parts", "good", "defect"]
    columns += ["unreadable"] if summary["unreadable"] else []
    columns += ["to cloud"] + (["fallback"] if summary["routing"]["fallback"] else [])
    columns += ["accuracy", "escape", "overkill", "AUROC"] if summary["labelled"] else []
    return Table("Verdicts", columns, rows)


def _row(name: str, figures: Mapping[str, Any], called: Counter[Label]) -> dict[str, Cell]:
    routing = figures["routing"]
    return {
        "product": name,
        "parts": figures["n"],
        "good": called[Label.GOOD],
        "defect": called[Label.DEFECT],
        "unreadable": figures["unreadable"],
        "to cloud": routing["cloud"] + routing["fallback"],
        "fallback": routing["fallback"],
        "accuracy": percent(figures["accuracy"]),
        "escape": percent(figures["escape_rate"]),
        "overkill": percent(figures["overkill_rate"]),
        "AUROC": None if figures["auroc"] is None else f"{figures['auroc']:.4f}",
    }


def remarks(summary: Mapping[str, Any], skipped: Mapping[str, int], pending: int) -> list[str]:
    """Return what else a user should know, most important first."""
    unreadable, fallbacks = summary["unreadable"], summary["routing"]["fallback"]
    lines = [_bounds(summary)] if summary["labelled"] else []
    if unreadable:
        lines.append(f"{unreadable} unreadable: nobody has looked at these parts; the verdicts say why.")
    if fallbacks:
        why = ", ".join(f"{n} {name}" for name, n in summary["routing"]["reasons"].items() if name in FALLBACK_REASONS)
        lines.append(f"{fallbacks} times the cloud gave no opinion and the edge's verdict stood: {why}.")
    if pending:
        lines.append(f"{pending} questions to the cloud are still open; the same command asks them again.")
    if skipped:
        lines.append("Skipped: " + ", ".join(f"{n} {why}" for why, n in skipped.items()) + ".")
    return [*lines, _speed(summary)]


def _bounds(summary: Mapping[str, Any]) -> str:
    """The rates with their 95 % intervals: a rate of 0 out of 5 is not a rate of 0."""
    names = {"accuracy": "accuracy", "escape_rate": "escape", "overkill_rate": "overkill"}
    known = {key: name for key, name in names.items() if summary[key] is not None}
    found = [
        f"{name} {summary[key]:.1%} ({summary['intervals'][key][0]:.1%} to {summary['intervals'][key][1]:.1%})"
        for key, name in known.items()
    ]
    return "All, with 95 % intervals: " + ", ".join(found) + "."


def _speed(summary: Mapping[str, Any]) -> str:
    latency, deadline, wall_s = summary["latency_ms"], summary["deadline"], summary["time"]["wall_s"]
    said = []
    if wall_s:
        said.append(f"{wall_s:.1f} s, {summary['n'] / wall_s:.1f} parts/s")
    if latency["p50"] is not None:
        said.append(f"local verdict after {latency['p50']:.0f} ms (p50), {latency['p99']:.0f} ms (p99)")
    if deadline["late"]:
        said.append(f"{deadline['late']} later than the deadline of {deadline['ms']:.0f} ms")
    return "; ".join(said) + "." if said else ""


def percent(rate: float | None) -> str | None:
    """Return a rate as text, ``None`` where it was not measured."""
    return None if rate is None else f"{rate:.1%}"


def _called(outcome: Outcome) -> dict[str, Counter[Label]]:
    called: dict[str, Counter[Label]] = {}
    for verdict in read_verdicts(outcome.folder / LEDGER):
        called.setdefault(verdict.product, Counter())[verdict.label] += 1
    return called
