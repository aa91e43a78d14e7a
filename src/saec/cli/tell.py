"""What a finished run is worth saying about: counts, quality with its uncertainty, speed, and where the report is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import typer

from saec.cli.codes import INTERRUPTED
from saec.cli.console import console, print_json, print_tables, say, say_path
from saec.errors import BadInput
from saec.evaluate.report_words import REASONS, all_defect
from saec.evaluate.runner import LEDGER, PREDICTIONS, REPORT, Outcome
from saec.evaluate.table import Cell, Table
from saec.fleet.ledger import read_verdicts
from saec.route.stats import PipelineStats
from saec.types import Explanation, Label, Verdict, Where

FEW = 3
"""Reasons that a terminal shows of each kind."""


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
    print_tables(run_table(outcome.summary))
    if not outcome.stats.parts and not outcome.stats.requeued:
        say("Every part was recorded already; nothing was inspected again.")
    verdicts = list(read_verdicts(outcome.folder / LEDGER))
    for line in remarks(outcome.summary, verdicts, skipped, outcome.stats):
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
            "the image cannot be read" if summary["n"] == 1 else f"none of the {summary['n']} images could be read",
            where=", ".join(map(str, images)),
            fix=f"each one's reason is in {out / PREDICTIONS}",
        )


def run_table(summary: Mapping[str, Any]) -> Table:
    """Return one row for each product, and one for all where there are several."""
    groups: list[tuple[str, Mapping[str, Any]]] = list(summary["per_product"].items())
    if len(groups) > 1:
        groups.append(("all", summary))
    rows = [_row(name, figures) for name, figures in groups]
    columns = ["product", "parts", "good", "defect"]
    columns += [*(["unread"] if summary["unreadable"] else []), "cloud"]
    columns += ["accuracy", "escape", "overkill", "AUROC"] if summary["labelled"] else []
    return Table("Verdicts", columns, rows)


def _row(name: str, figures: Mapping[str, Any]) -> dict[str, Cell]:
    routing = figures["routing"]
    return {
        "product": name,
        "parts": figures["n"],
        "good": figures["called"]["good"],
        "defect": figures["called"]["defect"],
        "unread": figures["unreadable"],
        "cloud": routing["cloud"] + routing["fallback"],
        "accuracy": percent(figures["accuracy"]),
        "escape": percent(figures["escape_rate"]),
        "overkill": percent(figures["overkill_rate"]),
        "AUROC": None if figures["auroc"] is None else f"{figures['auroc']:.4f}",
    }


def remarks(
    summary: Mapping[str, Any], verdicts: Sequence[Verdict], skipped: Mapping[str, int], stats: PipelineStats
) -> list[str]:
    """Return what else a user should know, most important first."""
    unreadable, fallbacks, learnt = summary["unreadable"], summary["routing"]["fallback"], summary["learnt"]
    lines = [_bounds(summary)] if summary["labelled"] else []
    if learnt and summary["labelled"]:
        lines.append(
            f"{learnt} of these parts are among those that the station was fitted or calibrated on: the rates flatter "
            "it. saec evaluate refuses such parts."
        )
    if all_defect(summary):
        lines.append(
            "Every part was called defect. Are these parts, camera and light the ones that the station was fitted on?"
        )
    if unreadable:
        lines.append(f"{unreadable} unreadable: nobody has looked at {'it' if unreadable == 1 else 'these parts'}.")
        lines += _few([v.error or v.path for v in verdicts if v.label is Label.UNREADABLE])
    if fallbacks:
        failed = [v for v in verdicts if v.where is Where.FALLBACK]
        times = "Once" if fallbacks == 1 else f"{fallbacks} times"
        lines.append(f"{times} the cloud gave no opinion and the edge's verdict stood:")
        lines += _few([f"{REASONS[v.reason][0].lower()} ({v.error})" for v in failed])
    if pending := stats.left_pending:
        are = "question to the cloud is" if pending == 1 else "questions to the cloud are"
        lines.append(f"{pending} {are} still open; the same command asks again.")
    lines += _explanations(verdicts, stats.left_unexplained)
    if skipped:
        lines.append("Skipped: " + ", ".join(f"{n} {why}" for why, n in skipped.items()) + ".")
    return [line for line in (*lines, _speed(summary)) if line]


def _explanations(verdicts: Sequence[Verdict], left: int) -> list[str]:
    asked = [v for v in verdicts if v.explanation is not None]
    if not asked and not left:
        return []
    in_vain = [v for v in asked if v.explanation is not Explanation.GIVEN]
    models = ", ".join(sorted({v.models["explain"] for v in asked})) or "a model on the edge"
    later = f"; {left} still open, the same command goes on" if left else ""
    each = f", {median(v.timings_ms['explain'] for v in asked) / 1000:.1f} s each" if asked else ""
    line = f"{len(asked) - len(in_vain)} of {len(asked) + left} rejects put into words by {models}{each}{later}."
    return [line, *_few([v.error or "" for v in in_vain])]


def _few(reasons: Sequence[str]) -> list[str]:
    """The commonest reasons, one a line."""
    found = Counter(reasons).most_common()
    lines = [f"  {f'{n} x ' if n > 1 else ''}{why}" for why, n in found[:FEW]]
    return [*lines, f"  and {len(found) - FEW} more in {PREDICTIONS}"] if len(found) > FEW else lines


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
    if wall_s and summary["n"] > summary["unreadable"]:
        said.append(f"{wall_s:.1f} s, {summary['n'] / wall_s:.1f} parts/s")
    if latency["p50"] is not None and summary["n"] > summary["unreadable"]:
        said.append(f"local verdict after {latency['p50']:.0f} ms (p50), {latency['p99']:.0f} ms (p99)")
    if deadline["late"]:
        said.append(f"{deadline['late']} later than the deadline of {deadline['ms']:.0f} ms")
    return "; ".join(said) + "." if said else ""


def percent(rate: float | None) -> str | None:
    """Return a rate as text, ``None`` where it was not measured."""
    return None if rate is None else f"{rate:.1%}"
