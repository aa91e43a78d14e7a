"""Files of lines that only grow: what is appended is on the disk, and what a killed process left unfinished goes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from saec.data.manifest import write_atomic


def open_lines(file: Path) -> list[str]:
    """Return the whole lines of a file that is to be appended to, none where there is no file; a line without an end is
    cut off on the disk, too."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_atomic(file, whole)
    return whole.split("\n")[:-1]


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Append lines; they are on the disk when this returns.

    Raises:
        OSError: the disk refuses.
    """
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())
