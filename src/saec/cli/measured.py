"""What benchmarks measure on, and how their tables leave: shared by the commands of :mod:`saec.cli.bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.evaluate.table import Table
    from saec.types import Image


def finish(file: Path | None, *tables: Table) -> None:
    """Print the tables, and save ``{"tables": [...], "environment": {...}}`` to ``file``; ``-`` prints that instead.

    Raises:
        BadInput: the file cannot be written.
    """
    import json

    from saec.cli.console import print_json, print_tables, say_path
    from saec.evaluate.run_record import environment
    from saec.evaluate.summary import write_atomically

    tree = {"tables": [table.to_json() for table in tables], "environment": environment()}
    if file is not None and str(file) == "-":
        print_json(tree)
        return
    print_tables(*tables)
    if file is not None:
        write_atomically(file, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
        say_path("Saved", file)


def images_of(folder: Path | None, limit: int) -> list[Image]:
    """Return the first readable images of a folder, or made-up ones of several sizes."""
    if limit < 1:
        raise BadInput("nothing to measure with", where=f"--limit {limit}", fix="at least 1")
    if folder is None:
        return _made_up(limit)
    from saec.data.decode import UnreadableImage, read_image
    from saec.data.readers import read_dataset

    found = []
    for part in read_dataset(folder).parts[:limit]:
        try:
            found.append(read_image(part.path))
        except UnreadableImage as error:
            raise BadInput(f"unreadable image ({error.why})", where=error.path, fix="leave it out") from None
    return found


def _made_up(count: int) -> list[Image]:
    """Return smooth textures with some noise, 448 pixels square: neither flat nor white noise, as parts are."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(2025)
    images = []
    for _ in range(count):
        coarse = rng.integers(40, 215, (28, 28, 3), dtype=np.uint8)
        smooth = np.asarray(cv2.resize(coarse, (448, 448), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
        grain = rng.integers(0, 12, smooth.shape, dtype=np.uint8)
        images.append(np.asarray(cv2.add(smooth, grain), dtype=np.uint8))
    return images


def levels_of(text: str) -> list[int]:
    """Read sizes of batches, or numbers of questions at once, such as ``1,2,4``.

    Raises:
        BadInput: anything else.
    """
    try:
        levels = [int(step) for step in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise BadInput("not a list of sizes", where=text, fix="whole numbers from 1 on, such as 1,2,4")
    return levels
