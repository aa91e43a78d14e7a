"""The one table type: a terminal shows whole figures, and an empty table too."""

from __future__ import annotations

from saec.evaluate.table import Table


def test_a_table_without_rows_has_its_columns():
    table = Table("None", ("a", "b"), [])
    assert [column.header for column in table.to_rich().columns] == ["a", "b"]
    assert "| a | b |" in table.to_markdown()


def test_a_percentage_stays_whole_whether_its_sign_stands_apart_or_not():
    for cell in ("100.0%", "≤ 1.2%", "100.0\N{NARROW NO-BREAK SPACE}%", "100.0\N{THIN SPACE}%"):
        (column,) = Table("One", ("a",), [{"a": cell}]).to_rich().columns
        assert (column.justify, column.no_wrap) == ("right", True)
