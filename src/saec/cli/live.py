"""The live progress of a run: parts, speed, what was called, what went to the cloud, and how long it still takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from saec.cli.console import console
from saec.types import Label, Verdict, Where


@dataclass(slots=True)
class Live:
    """Counts verdicts as they become durable and shows them. Called from the thread that runs the pipeline."""

    progress: Progress
    task: TaskID
    parts: int = 0
    defects: int = 0
    unreadable: int = 0
    escalated: int = 0
    fallbacks: int = 0
    skipped: int = 0

    def __call__(self, verdict: Verdict, final: bool) -> None:
        """Take one verdict: a local one, or an amendment of an earlier one."""
        amendment = verdict.where in (Where.CLOUD, Where.FALLBACK)
        if amendment:
            self.fallbacks += verdict.where is Where.FALLBACK
            self.defects += (verdict.label is Label.DEFECT) - (verdict.edge_label is Label.DEFECT)
        else:
            self.parts += 1
            self.defects += verdict.label is Label.DEFECT
            self.unreadable += verdict.label is Label.UNREADABLE
            self.escalated += not final
        self.progress.update(self.task, advance=0 if amendment else 1, counts=self.counts)

    def skip(self) -> None:
        """Count a file that will not be inspected."""
        self.skipped += 1
        self.progress.update(self.task, counts=self.counts)

    @property
    def counts(self) -> str:
        """What was counted, in words; what is zero and rare is left out."""
        rare = (("fallback", self.fallbacks), ("unreadable", self.unreadable), ("skipped", self.skipped))
        shown = [f"{self.defects} defect", f"{self.escalated} to cloud", *(f"{n} {name}" for name, n in rare if n)]
        return " · ".join(shown)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("– parts/s" if speed is None else f"{speed:.1f} parts/s")


@contextmanager
def live(name: str, total: int | None, *, before: int = 0) -> Iterator[Live]:
    """Show a run of ``total`` parts (``None``: endless), ``before`` of which are recorded already.

    Silent where stderr is no terminal, so that a log has no half-drawn bars.
    """
    error = console(stderr=True)
    name_and_bar = (TextColumn("{task.description}"), BarColumn(bar_width=20))
    if total is None:
        columns: tuple[ProgressColumn, ...] = (
            name_and_bar[0],
            TextColumn("{task.completed} parts"),
            _Speed(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
        )
    else:
        columns = (
            *name_and_bar,
            TextColumn("{task.completed}/{task.total}"),
            _Speed(),
            TextColumn("{task.fields[counts]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
    with Progress(*columns, console=error, disable=not error.is_terminal) as progress:
        task = progress.add_task(name, total=total, completed=before, counts="")
        yield Live(progress, task)
