"""Folders that appear whole or not at all, and logs that end where a checkpoint does."""

from __future__ import annotations

import json
import os
import shutil
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


def replace_folder(new: Path, place: Path) -> None:
    """Move a finished folder to its place; one that is there goes. A reader never sees half of either.

    Between the two renames there is no folder at ``place``: whoever resumes writes it again.
    """
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.replace(old)
    new.replace(place)
    shutil.rmtree(old, ignore_errors=True)


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


def cut_lines(file: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop from a log what a resumed run will write again, and return the rest."""
    kept = [entry for entry in read_lines(file) if keep(entry)]
    if file.exists():
        write_atomic(file, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept
