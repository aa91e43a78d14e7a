"""What a terminal of 80 columns shows: whole words, whole names, one line of progress."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from saec.cli import console as console_module
from saec.cli import live as live_module
from saec.cli.console import print_tables
from saec.cli.live import live
from saec.evaluate.table import Table
from saec.types import Label, Reason, Verdict, Where

COLUMNS = ("product", "parts", "good", "defect", "cloud", "accuracy", "escape", "overkill", "AUROC")
ROW = dict(zip(COLUMNS, ("circuit_board", 40, 26, 14, 3, "65.0%", "50.0%", "20.0%", "0.7425"), strict=True))


def shown(table: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(table.to_rich())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_labelled_run_of_one_product_fits_a_terminal_of_80_columns() -> None:
    lines = shown(Table("Verdicts", COLUMNS, [ROW]), 80)
    assert sum("circuit_board" in line for line in lines) == 1
    assert len(lines) == 4


def test_in_a_narrow_terminal_names_give_way_and_figures_and_headings_stay_whole() -> None:
    lines = shown(Table("Verdicts", (*COLUMNS, "unread"), [{**ROW, "unread": 3}]), 80)
    assert lines[1].split("  ")[-1] == "unread"
    assert all(str(cell) in lines[3] for name, cell in ROW.items() if name != "product")


def test_where_not_even_the_figures_fit_the_lines_are_longer_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(console_module.sys.stdout, "isatty", lambda: True)
    print_tables(Table("Verdicts", COLUMNS, [ROW]))
    lines = capsys.readouterr().out.splitlines()
    assert all(str(cell) in lines[3] for name, cell in ROW.items() if name != "product")


def test_a_bound_is_a_figure_and_stands_on_the_right() -> None:
    column = shown(Table("Calibration", ("overkill",), [{"overkill": "≤ 5.0%"}, {"overkill": None}]), 80)
    assert [line.rstrip() for line in column[-2:]] == ["  ≤ 5.0%", "       –"]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_progress_stays_on_one_line(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    file = io.StringIO()
    terminal = Console(file=file, width=width, force_terminal=True, highlight=False)
    monkeypatch.setattr(live_module, "console", lambda *, stderr: terminal)
    one = Verdict("p", "", "cell", "p.png", Label.DEFECT, 0.9, Where.EDGE, Reason.IN_BAND)
    with live("inspecting", 4000) as progress:
        for _ in range(1200):
            progress(one, False)
        lines = terminal.render_lines(progress.progress.get_renderable())
    assert len(lines) == 1
