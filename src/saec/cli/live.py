"""The live progress of a run: parts, speed, what was called, what went to the cloud, and how long it still takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
)
from rich.table import Column
from rich.text import Text

from saec.cli.console import console
from saec.types import Explanation, Label, Verdict, Where


@dataclass(slots=True)
class Live:
    """Counts verdicts as they become durable and shows them. Called from the thread that runs the pipeline."""

    progress: Progress
    task: TaskID
    parts: int = 0
    defects: int = 0
    unreadable: int = 0
    escalated: int = 0
    waiting: int = 0
    """Questions to the cloud that are not answered yet."""
    fallbacks: int = 0
    explained: int = 0
    skipped: int = 0

    def __call__(self, verdict: Verdict, final: bool) -> None:
        """Take one verdict: a local one, or an amendment or explanation of an earlier one."""
        amendment = verdict.where in (Where.CLOUD, Where.FALLBACK) or verdict.explanation is not None
        if verdict.explanation is not None:
            self.explained += verdict.explanation is Explanation.GIVEN
        elif amendment:
            self.waiting -= 1
            self.fallbacks += verdict.where is Where.FALLBACK
            self.defects += (verdict.label is Label.DEFECT) - (verdict.edge_label is Label.DEFECT)
        else:
            self.parts += 1
            self.defects += verdict.label is Label.DEFECT
            self.unreadable += verdict.label is Label.UNREADABLE
            self.escalated += not final
            self.waiting += not final
        self.progress.update(self.task, advance=0 if amendment else 1, counts=self.counts)

    def recall(self, verdicts: Iterable[Verdict]) -> None:
        """Count what an interrupted run has recorded."""
        for v in verdicts:
            self.parts += 1
            self.defects += v.label is Label.DEFECT
            self.unreadable += v.label is Label.UNREADABLE
            # With an open question the edge still has the last word, and the reason is why the cloud was wanted.
            is_open = v.where is Where.EDGE and v.escalated_for is v.reason
            self.waiting += is_open
            self.escalated += is_open or v.where is not Where.EDGE
            self.fallbacks += v.where is Where.FALLBACK
            self.explained += v.explanation is Explanation.GIVEN
        self.progress.update(self.task, completed=self.parts, counts=self.counts if self.parts else "")

    def skip(self) -> None:
        """Count a file that will not be inspected."""
        self.skipped += 1
        self.progress.update(self.task, counts=self.counts)

    @property
    def counts(self) -> str:
        """What was counted, in words; what is zero and rare is left out."""
        rare = (
            ("explained", self.explained),
            ("fallback", self.fallbacks),
            ("unreadable", self.unreadable),
            ("skipped", self.skipped),
        )
        sent = f"{self.escalated} to cloud" + (f" ({self.waiting} open)" if self.waiting else "")
        return " · ".join([f"{self.defects} defect", sent, *(f"{n} {name}" for name, n in rare if n)])


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("–/s" if speed is None else f"{speed:.1f}/s")


class _Left(ProgressColumn):
    """How long it still takes; once done, how long it took."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"in {_clock(task.finished_time or 0.0)}")
        return Text("" if task.time_remaining is None else f"{_clock(task.time_remaining)} left")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def live(name: str, total: int | None, *, done: Sequence[Verdict] = ()) -> Iterator[Live]:
    """Show a run of ``total`` parts (``None``: endless), of which ``done`` are recorded already.

    Silent where stderr is no terminal, so that a log has no half-drawn bars.
    """
    error = console(stderr=True)
    # What is said stays on one line; where the terminal is narrow, the bar gives way.
    whole = Column(no_wrap=True)
    name_and_bar = (TextColumn("{task.description}", table_column=whole), BarColumn(bar_width=20))
    if total is None:
        columns: tuple[ProgressColumn, ...] = (
            name_and_bar[0],
            TextColumn("{task.completed} parts", table_column=whole),
            _Speed(whole),
            TextColumn("{task.fields[counts]}", table_column=whole),
            TimeElapsedColumn(whole),
        )
    else:
        columns = (
            *name_and_bar,
            TextColumn("{task.completed}/{task.total}", table_column=whole),
            _Speed(whole),
            TextColumn("{task.fields[counts]}", table_column=whole),
            _Left(whole),
        )
    with Progress(*columns, console=error, disable=not error.is_terminal) as progress:
        shown = Live(progress, progress.add_task(name, total=total, counts=""))
        shown.recall(done)
        yield shown
