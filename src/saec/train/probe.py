"""The images on which two ways of asking a model are compared: given fine-tuning rows, or plates made on the spot.

Parity needs no accuracy, only variety: sizes that make prompts of different lengths, so that batches are padded; parts
with and without an anomaly map; plates with and without a scratch.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from saec.data.hashing import sha256_file
from saec.data.manifest import write_atomic
from saec.train.rows import Row, read_rows
from saec.types import Heatmap, Image

SIZES = ((160, 160), (112, 168), (196, 140), (224, 84))
"""(height, width) of the made plates."""


def made_rows(folder: Path, count: int = 16) -> list[Row]:
    """Draw plates into ``folder`` and return them as fine-tuning rows: the same pixels on every machine, each time."""
    lines = []
    for number in range(count):
        scratched = number % 2 == 1
        image, level = _plate(number, scratched=scratched)
        file, heatmap = folder / f"plate-{number:02}.png", folder / f"plate-{number:02}.npy"
        cv2.imwrite(str(file), image)
        np.save(heatmap, level, allow_pickle=False)
        row = {
            "image": file.name,
            "part_id": file.stem,
            "product": "plate" if number % 3 else "steel plate with two bores",
            "label": int(scratched),
            "answer": str(int(scratched)),
            "kind": "scratch" if scratched else None,
            "split": "val",
            "source_split": None,
            "sha256": sha256_file(file),
            "group": file.stem,
        }
        if number % 4 < 2:
            row["anomaly_map"] = heatmap.name
        lines.append(json.dumps(row) + "\n")
    write_atomic(folder / "probe.jsonl", "".join(lines))
    return read_rows(folder / "probe.jsonl")


def _plate(number: int, *, scratched: bool) -> tuple[Image, Heatmap]:
    """Return a brushed plate [H, W, 3], and an anomaly map [12, 12] that peaks at its scratch, if it has one."""
    height, width = SIZES[number // 2 % len(SIZES)]
    rng = np.random.default_rng([2025, number])
    brushed = cv2.blur(rng.normal(0, 30, (height, width)).astype(np.float32), (25, 1))
    grey = 128 + brushed + rng.normal(0, 2, (height, width)).astype(np.float32)
    level = rng.uniform(0.1, 0.4, (12, 12)).astype(np.float32)
    if scratched:
        x, y = (int(rng.uniform(0.2, 0.6) * side) for side in (width, height))
        cv2.line(grey, (x, y), (x + width // 4, y + height // 5), 240.0, 2)
        level[12 * y // height, 12 * x // width] = 2.0
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2), level
