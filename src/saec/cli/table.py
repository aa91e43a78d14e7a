"""Running SAEC's table and showing it: what stands behind ``saec bench table``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.edge.station import Station
    from saec.evaluate.bench_table import Arm
    from saec.types import Part

JSON, MARKDOWN = "table.json", "table.md"


def run_and_tell(
    arms: Sequence[Arm],
    parts: Sequence[Part],
    station: Station,
    settings: Settings,
    out: Path,
    *,
    published: bool,
    json_: bool,
) -> None:
    """Run the arms that are not done, then print the table and write it into ``out`` as JSON and Markdown.

    Raises:
        BadInput: as :func:`saec.evaluate.bench_table.run_table`, or the files cannot be written.
        typer.Exit: with code 130, interrupted; the same command goes on from there.
    """
    from saec.cli.console import print_json, print_tables, say_path
    from saec.cli.live import live
    from saec.cli.tell import tell_run
    from saec.evaluate import table_view
    from saec.evaluate.bench_table import run_table
    from saec.evaluate.run_record import environment
    from saec.evaluate.summary import write_atomically

    run = run_table(
        arms,
        parts,
        station,
        settings,
        out,
        shown=lambda name, total, done: live(f"{name:<14}", total, done=done),
        command=sys.argv[1:],
    )
    if run.interrupted is not None:
        tell_run(run.interrupted, total=len(parts), json_=json_, skipped={})
        return
    products = sorted({part.product for part in parts})
    title = f"{len(parts)} parts of {', '.join(products)}"
    services = [arm for arm in arms if arm.asked is not None and arm.absent is None and not arm.asked.embedded]
    notes = (
        ["the cloud service is in no figure of GPU, power and energy unless it runs here, and never in memory"]
        if services
        else []
    )
    tables = [
        table_view.saec_table(run.rows, title=title, notes=notes),
        *([table_view.published()] if published else []),
    ]
    tree = table_view.saec_json(
        run.rows,
        parts=len(parts),
        products=products,
        station=station.manifest.sha256,
        environment=environment(),
        published=table_view.published().to_json() if published else None,
    )
    write_atomically(out / JSON, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    listed = [replace(table, notes=[f"- {note}" for note in table.notes]) for table in tables]
    write_atomically(out / MARKDOWN, "\n\n".join(f"## {t.title}\n\n{t.to_markdown()}" for t in listed) + "\n")
    if json_:
        print_json(tree)
        return
    print_tables(*tables)
    say_path("Saved", out / MARKDOWN)
    say_path("     ", out / JSON)
