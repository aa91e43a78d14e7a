"""A data set: named parts below one root, in a stable order."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath

from saec.data.decode import IMAGE_SUFFIXES
from saec.errors import BadInput
from saec.types import Label, Part

SPLITS = ("train", "calibration", "test")
"""The splits a part may belong to; ``None`` stands for a source that does not say."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Parts below ``root``, in natural order of their ids (``2.png`` before ``10.png``).

    ``part_id`` is the POSIX path relative to ``root`` and unique. Iterable, sized, and sliceable like its ``parts``.
    """

    name: str
    root: Path
    parts: tuple[Part, ...]

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Part:
        return self.parts[index]

    @property
    def products(self) -> tuple[str, ...]:
        """Product names in natural order."""
        return tuple(sorted({part.product for part in self.parts}, key=natural_key))

    @property
    def splits(self) -> tuple[str, ...]:
        """The named splits that occur, in the order train, calibration, test."""
        return tuple(split for split in SPLITS if any(part.split == split for part in self.parts))

    def select(self, *, split: str | None = None, label: Label | None = None, product: str | None = None) -> Dataset:
        """Return the parts that match every given condition; ``None`` asks for nothing. May be empty."""
        kept = tuple(
            part
            for part in self.parts
            if (split is None or part.split == split)
            and (label is None or part.label == label)
            and (product is None or part.product == product)
        )
        return Dataset(self.name, self.root, kept)

    def require_good(self) -> None:
        """Check that every product has parts to be fitted on.

        Those are the good parts of its train split, or its good parts of any kind when the source names no splits.

        Raises:
            BadInput: naming the first product that has none.
        """
        split = "train" if self.splits else None
        for product in self.products:
            if not len(self.select(split=split, label=Label.GOOD, product=product)):
                raise BadInput(
                    f"product {product!r} has no good images" + (" in its train split" if split else ""),
                    where=self.root,
                    fix=f"put images of good parts into {product}/train/good",
                )


def make_dataset(name: str, root: Path, parts: Iterable[Part]) -> Dataset:
    """Build a data set from parts in any order.

    Raises:
        BadInput: there are no parts, or two have the same id.
    """
    ordered = tuple(sorted(parts, key=lambda part: natural_key(part.part_id)))
    if not ordered:
        raise BadInput("no images found", where=root, fix="pass a folder of images, or a layout that saec data names")
    for one, other in pairwise(ordered):
        if one.part_id == other.part_id:
            raise BadInput(f"the image {one.part_id!r} is listed twice", where=root)
    return Dataset(name, root, ordered)


def natural_key(text: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Return a sort key that orders the numbers inside names by value: ``x2`` before ``x10``."""
    steps = (step for step in re.split(r"(\d+)", text) if step)
    return tuple((0, int(step), "") if step.isdecimal() else (1, 0, step) for step in steps), text


def list_images(root: Path) -> Iterator[PurePosixPath]:
    """Yield the image files below ``root``, relative to it; each real folder is entered once, so links cannot loop."""
    entered: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise BadInput("cannot list a folder", where=error.filename, fix=error.strerror or "check its permissions")

    for folder, below, files in os.walk(root, followlinks=True, onerror=refuse):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in entered:
            below.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        inside = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield inside / name
