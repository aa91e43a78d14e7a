"""What the user sees: tables and lines on stdout, progress on stderr, one JSON object where a machine reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

if TYPE_CHECKING:
    from rich.progress import Progress

    from saec.evaluate.table import Table

WIDE = 200
"""Columns when the output is no terminal: a log file has no edge at which a table should break."""


def console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr that neither guesses at numbers nor interprets file names as markup."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else WIDE)


def say(text: RenderableType = "", *, style: str | None = None) -> None:
    """Print a line or a renderable to stdout; long lines are wrapped at the terminal's edge, words whole."""
    console().print(text, style=style)


def say_path(label: str, path: Path) -> None:
    """Print where something is, never broken over two lines, so that it can be copied."""
    console().print(f"{label} {path}", soft_wrap=True)


def print_json(tree: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout."""
    print(json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False))


def print_tables(*tables: Table) -> None:
    """Print tables to stdout, their notes below as lines of their own: a caption would be as narrow as its table."""
    for table in tables:
        shown, drawn = console(), replace(table, notes=()).to_rich()
        # Where even its figures do not fit, lines longer than the terminal are better than figures cut short.
        shown.width = max(shown.width, shown.measure(drawn, options=shown.options.update(width=WIDE)).minimum)
        shown.print(drawn, "")
        for note in table.notes:
            console().print(note, style="dim")


@contextmanager
def steps() -> Iterator[Progress]:
    """Show the progress of named steps on stderr while the block runs; silent where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    error = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=error, disable=not error.is_terminal, transient=True) as progress:
        yield progress
