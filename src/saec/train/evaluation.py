"""How good an adapter is on rows it has not learned from: the label question as it is asked when serving."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from saec.calibrate.metrics import accuracy, auroc, balanced_accuracy, confusion
from saec.config import PromptSettings
from saec.train.ahead import ahead, chunks
from saec.train.rows import Example, Row, pose
from saec.vlm.decide import p_defect
from saec.vlm.encode import Encoded, Encoder
from saec.vlm.load import Vlm
from saec.vlm.prompt import Ask

TAU = 0.5
"""P(defect) from which on accuracy counts a part as called defect."""


def p_defects(vlm: Vlm, rows: Sequence[Row], prompt: PromptSettings, batch: int) -> list[float]:
    """Return P(defect) of every row, in order; the model is left in evaluation mode."""
    vlm.model.eval()
    jobs = (partial(_questions, vlm.encoder, chunk, prompt) for chunk in chunks(rows, batch))
    return [decision.p_defect for questions in ahead(jobs) for decision in p_defect(vlm, questions)]


def _questions(encoder: Encoder, rows: Sequence[Row], prompt: PromptSettings) -> list[Encoded]:
    return [encoder.prepare(pose(Example(row, Ask.LABEL, row.label), prompt)[0]) for row in rows]


def figures(rows: Sequence[Row], p: Sequence[float]) -> dict[str, Any]:
    """Return n, AUROC, accuracy and balanced accuracy, over all rows and per product; ``None``: not measurable."""
    products = sorted({row.product for row in rows})
    per = {
        name: _figures([(q, r.label) for q, r in zip(p, rows, strict=True) if r.product == name]) for name in products
    }
    return {**_figures([(q, row.label) for q, row in zip(p, rows, strict=True)]), "per_product": per}


def _figures(scored: Sequence[tuple[float, int]]) -> dict[str, Any]:
    scores, truth = [p for p, _ in scored], [label == 1 for _, label in scored]
    counts = confusion([p >= TAU for p in scores], truth)
    return {
        "n": len(scored),
        "auroc": auroc(scores, truth),
        "accuracy": accuracy(counts),
        "balanced_accuracy": balanced_accuracy(counts),
    }
