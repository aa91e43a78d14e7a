"""One table type for every benchmark and every comparison: printed, saved as JSON, pasted into the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich import box
from rich.table import Table as RichTable

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of named cells. A cell that was not measured is ``None`` and prints as ``–``, never as 0."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Cell]]
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, object]:
        """Return plain JSON types."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Return a GitHub-flavoured Markdown table followed by the notes."""
        lines = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(_text(row.get(name)) for name in self.columns) + " |" for row in self.rows]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines)

    def to_rich(self) -> RichTable:
        """Return the table for a terminal."""
        table = RichTable(
            title=self.title,
            title_justify="left",
            caption="\n".join(self.notes) or None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            show_edge=False,
        )
        for name in self.columns:
            cells = [row.get(name) for row in self.rows]
            numeric = any(map(_is_figure, cells)) or all(cell is None for cell in cells)
            if numeric:
                # In a narrow terminal the names give way: a figure with its end missing is a wrong figure.
                whole = max(len(name), *(len(_text(cell)) for cell in cells)) if cells else len(name)
                table.add_column(name, justify="right", no_wrap=True, min_width=whole)
            else:
                table.add_column(name, overflow="fold", min_width=len(name))
        for row in self.rows:
            table.add_row(*(_text(row.get(name)) for name in self.columns))
        return table


def _is_figure(cell: Cell) -> bool:
    if isinstance(cell, str):
        return cell.removeprefix("≤ ").removesuffix("%").rstrip().replace(".", "", 1).isdecimal()
    return cell is not None


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1 else f"{cell:,.1f}" if abs(cell) < 1000 else f"{cell:,.0f}"
    return str(cell)
