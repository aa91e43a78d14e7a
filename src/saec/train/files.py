"""What outlives a kill: folders flushed to the disk, and logs that end where a checkpoint does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from saec.data.manifest import write_atomic


def sync(folder: Path) -> None:
    """Flush a folder's files and their names to the disk."""
    for path in (*(one for one in folder.iterdir() if one.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def append_line(file: Path, entry: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry, allow_nan=False) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a log up to the first torn line; none where there is no file."""
    found: list[dict[str, Any]] = []
    if not file.exists():
        return found
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # a kill tears the last line only; what it told is told again
    return found


def cut_lines(file: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop from a log, where there is one, what a resumed run will write again."""
    if file.exists():
        write_atomic(file, "".join(json.dumps(entry) + "\n" for entry in read_lines(file) if keep(entry)))
