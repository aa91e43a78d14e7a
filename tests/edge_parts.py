"""Small synthetic parts for the tests of the edge: a textured plate, and the same with a blot on it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from saec.config import Settings
from saec.data.dataset import Dataset, make_dataset
from saec.edge.fit import fit_station
from saec.edge.station import Station
from saec.types import Box, Label, Part

SETTINGS = Settings.model_validate({"edge": {"threads": 1}})
SIZE = (160, 160)
"""(height, width): small, so that a pass of the backbone takes two milliseconds."""


STRENGTH = 30  # grey levels of a blot


def plate(number: int, *, blot: Box | None = None, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A BGR picture of a ribbed plate, no two numbers alike; ``blot`` is where something lies on it."""
    rng = np.random.default_rng([7, number])
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    ribs = 24 * np.sin((x + rng.uniform(0, 16)) * 2 * np.pi / 16) + 12 * np.sin((y + rng.uniform(0, 24)) * np.pi / 12)
    shade = cv2.resize(rng.normal(0, 14, (4, 4)).astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)
    grey = 120 + ribs + shade + rng.normal(0, 3, size)
    if blot is not None:
        dots = rng.integers(0, 2, ((blot.y2 - blot.y1) // 4, (blot.x2 - blot.x1) // 4)).astype(np.float32)
        spots = cv2.resize(dots, (blot.x2 - blot.x1, blot.y2 - blot.y1), interpolation=cv2.INTER_NEAREST)
        grey[blot.y1 : blot.y2, blot.x1 : blot.x2] += STRENGTH * (spots - 0.5)
    return np.stack([grey * 0.9, grey, grey * 0.95], axis=-1).clip(0, 255).astype(np.uint8)


def blot_of(number: int, size: tuple[int, int] = SIZE) -> Box:
    """Where the blot of the defect ``number`` lies: 48 px wide and high, inside the picture."""
    rng = np.random.default_rng([8, number])
    x, y = int(rng.integers(4, size[1] - 52)), int(rng.integers(4, size[0] - 52))
    return Box(x, y, x + 48, y + 48)


def blotted(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The defect ``number``."""
    return plate(10_000 + number, blot=blot_of(number, size), size=size)


def put(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def parts(
    root: Path, images: Sequence[np.ndarray], *, label: Label, split: str | None = None, product: str = "plate"
) -> list[Part]:
    """Write pictures and return their parts."""
    found = []
    for number, image in enumerate(images):
        part_id = f"{product}/{split}/{label}/{number:03}.png"
        found.append(Part(part_id, product, put(root / part_id, image), label=label, split=split))
    return found


def good_parts(
    root: Path, count: int, *, first: int = 0, split: str | None = None, product: str = "plate"
) -> list[Part]:
    images = [plate(first + number) for number in range(count)]
    return parts(root, images, label=Label.GOOD, split=split, product=product)


def defects(root: Path, count: int, *, first: int = 0, split: str | None = None, product: str = "plate") -> list[Part]:
    images = [blotted(first + number) for number in range(count)]
    return parts(root, images, label=Label.DEFECT, split=split, product=product)


def dataset(root: Path, *some: Sequence[Part]) -> Dataset:
    return make_dataset("plates", root, [part for group in some for part in group])


@cache
def station() -> Station:
    """A station fitted to twelve good plates, its threshold from good parts alone."""
    with tempfile.TemporaryDirectory() as folder:
        return fit_station(dataset(Path(folder), good_parts(Path(folder), 12)), SETTINGS)
