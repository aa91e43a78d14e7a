"""Fine-tuning rows of small made images: defects have a bright stain."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np


def picture(number: int, *, defect: bool, side: int = 56) -> np.ndarray:
    rng = np.random.default_rng(number)
    image = rng.integers(0, 120, (side // 7, side // 7, 3), dtype=np.uint8)
    image = cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC)
    if defect:
        x, y = rng.integers(0, side // 2, 2)
        image[y : y + side // 3, x : x + side // 3] = 250
    return image


def row(folder: Path, number: int, *, label: int, split: str = "train", **more: Any) -> dict[str, Any]:
    """Write an image and return its row."""
    file = folder / "images" / f"{number}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), picture(number, defect=label == 1))
    return {
        "image": f"images/{file.name}",
        "part_id": f"part/{number}",
        "product": "bolt" if number % 2 else "nut",
        "label": label,
        "answer": str(label),
        "kind": None,
        "split": split,
        "source_split": split,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "group": f"g{number}",
        **more,
    }


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return file


def make_files(folder: Path, *, n_train: int = 24, n_val: int = 12) -> tuple[Path, Path]:
    """train.jsonl and val.jsonl of two products; every fourth training defect has evidence."""
    evidence = json.dumps({"kind": "surface", "bboxes": [[1, 2, 21, 22]], "desc": "stain"})
    train = [row(folder, i, label=i // 2 % 2, **({"evidence": evidence} if i % 8 == 2 else {})) for i in range(n_train)]
    val = [row(folder, 1000 + i, label=i // 2 % 2, split="val") for i in range(n_val)]
    return write_rows(folder / "train.jsonl", train), write_rows(folder / "val.jsonl", val)
