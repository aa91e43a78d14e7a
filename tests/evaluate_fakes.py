"""Small made-up runs for the report's tests: real files, tiny images, every kind of outcome."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from saec.evaluate.meter import Energy, Reading
from saec.evaluate.report import RunFolder
from saec.evaluate.report_images import encode_heatmap
from saec.evaluate.summary import RunTimes, summarise, write_summary
from saec.fleet.verdict_json import verdict_to_json
from saec.types import Box, Evidence, Label, Reason, Verdict, Where

GOOD, BAD = Label.GOOD, Label.DEFECT
UNMETERED = Reading(2.0, 3.0, 210.0, 250.0, Energy("unavailable", None, "rapl: no RAPL counters"), None, None, 11)


def picture(folder: Path, name: str, seed: int, shape: tuple[int, int] = (40, 60)) -> tuple[Path, str]:
    """Write a noise image and return its path and hash."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.png"
    noise = np.random.default_rng(seed).integers(0, 255, (*shape, 3), dtype=np.uint8)
    assert cv2.imwrite(str(file), noise)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


def verdicts(images: Path, product: str = "cell") -> list[Verdict]:
    """Thirty parts: 2 escapes, 1 overkill, 1 unreadable, 1 fallback, 6 judged by the cloud."""
    found = []
    for i in range(30):
        file, sha256 = picture(images, f"part{i:02d}", i)
        truth = BAD if i % 3 == 0 else GOOD
        p = (0.85 if truth is BAD else 0.1) + 0.002 * i
        where, reason, more = Where.EDGE, Reason.EDGE_CONFIDENT, {}
        if i in (0, 3):
            p = 0.30 + 0.01 * i  # escapes
        elif i == 1:
            p = 0.8  # overkill
        elif i == 4:
            where, reason = Where.FALLBACK, Reason.CLOUD_TIMEOUT
            more = {"error": "no answer within 10 s", "escalated_for": Reason.IN_BAND}
        elif i % 5 == 0:
            where, reason = Where.CLOUD, Reason.IN_BAND
            more = {"cloud_p_defect": p, "edge_p_defect": 0.5, "uplink_bytes": 900}
        label = BAD if p >= 0.5 else GOOD
        boxes = (Box(5, 5, 20, 20, 0.9),) if label is BAD else ()
        found.append(
            Verdict(
                part_id=f"part{i:02d}",
                sha256=sha256,
                product=product,
                path=str(file),
                label=label,
                p_defect=p,
                where=where,
                reason=reason,
                evidence=Evidence(boxes, "scratch" if boxes else None, None, "edge-heatmap"),
                models={"edge": "bank@1"},
                timings_ms={"local": 10.0 + i},
                truth=truth,
                **more,
            )
        )
    Path(found[7].path).write_bytes(b"\x89PNG\r\n\x1a\n cut")
    found[7] = replace(
        found[7],
        label=Label.UNREADABLE,
        p_defect=None,
        reason=Reason.UNREADABLE,
        error="truncated",
        evidence=Evidence(),
    )
    return found


def write_run(folder: Path, found: list[Verdict], *, manifest: dict[str, Any] | None = None, **more: Any) -> RunFolder:
    """Write a run folder as the runner does and load it."""
    (folder / "heatmaps").mkdir(parents=True)
    heat = encode_heatmap(np.linspace(0, 2, 64, dtype=np.float32).reshape(8, 8))
    for v in found:
        cv2.imwrite(str(folder / "heatmaps" / f"{v.sha256[:16]}.png"), heat)
    (folder / "predictions.jsonl").write_text("".join(verdict_to_json(v) + "\n" for v in found), encoding="utf-8")
    arguments = {"stats": RunTimes(2.0, 0.5, 0.2, 1.5, 1.2, overlap=0.6, deadline_ms=35.0), "meter": UNMETERED} | more
    write_summary(summarise(found, **arguments), folder / "summary.json")
    (folder / "manifest.json").write_text(json.dumps(manifest if manifest is not None else {"mode": "cascade"}))
    return RunFolder.load(folder)
