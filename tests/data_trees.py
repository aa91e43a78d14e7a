"""Small image trees for the tests of saec.data: every picture has its own content unless a test asks for copies."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np


def picture(number: int, size: tuple[int, int] = (48, 40)) -> np.ndarray:
    """A BGR picture [H, W, 3] whose content is unlike that of any other number."""
    coarse = np.random.default_rng([99, number]).integers(30, 220, (7, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def put(path: Path, image: np.ndarray | int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture(image) if isinstance(image, int) else image)
    return path


def mvtec(root: Path, products: tuple[str, ...] = ("bolt", "nut"), train: int = 6, good: int = 4, bad: int = 4) -> Path:
    number = 0
    for product in products:
        kinds = {"train/good": train, "test/good": good, "test/crack": bad, "test/stain": bad}
        for folder, count in kinds.items():
            for i in range(count):
                number += 1
                put(root / product / folder / f"{i:03}.png", number)
                if folder in ("test/crack", "test/stain"):
                    put(root / product / "ground_truth" / folder[5:] / f"{i:03}_mask.png", np.eye(40, dtype=np.uint8))
    return root


def ksdd(root: Path, items: int = 8, parts: int = 4) -> Path:
    for item in range(1, items + 1):
        for part in range(parts):
            folder = root / f"kos{item:02}"
            put(folder / f"Part{part}.jpg", 1000 + item * 10 + part)
            mask = np.zeros((48, 40), np.uint8)
            if part == item % parts:
                mask[10:14, 5:9] = 255
            put(folder / f"Part{part}_label.bmp", mask)
    return root


def ksdd2(root: Path, train: int = 14, test: int = 8, defects: int = 2) -> Path:
    for split, count, first in (("train", train, 10000), ("test", test, 20000)):
        for i in range(count):
            put(root / split / f"{first + i}.png", first + i)
            mask = np.zeros((48, 40), np.uint8)
            mask[3, 3] = 255 * (i < defects)
            put(root / split / f"{first + i}_GT.png", mask)
    return root


def elpv(root: Path, cells: int = 30) -> Path:
    """The files of the elpv_dataset package: probabilities 0, 1/3, 2/3, 1 in turn, both products."""
    (root / "images").mkdir(parents=True)
    lines = []
    for i in range(cells * 2):
        put(root / "images" / f"cell{i:04}.png", 5000 + i)
        probability = (0.0, 0.0, 1.0, 0.3333333333333333, 0.6666666666666666, 0.0)[i % 6]
        lines.append(f"images/cell{i:04}.png  {probability}  {'mono' if i < cells else 'poly'}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root
