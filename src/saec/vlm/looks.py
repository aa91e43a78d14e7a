"""Which looks at a part are taken, and the decision from the two labels' log-probabilities of each. No torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from saec.config import MllmSettings
from saec.types import Heatmap, Image
from saec.vlm.answers import Decision
from saec.vlm.prompt import Question
from saec.vlm.view import cut_map


def views(question: Question, settings: MllmSettings) -> tuple[Question, ...]:
    """Return the looks that the settings ask for."""
    if settings.ranking:
        return five_crops(question, settings.crop_side)
    return mirrored(question, settings.mirrors)


def way(settings: MllmSettings) -> str:
    """Return what stands in the model id where not one look decides: another P(defect) to who calibrated on it."""
    if settings.ranking:
        return "+rank"
    return f"+mirrors{settings.mirrors}" if settings.mirrors > 1 else ""


def five_crops(question: Question, side: int) -> tuple[Question, ...]:
    """Return the question about the four corners and the centre of the part, at most ``side`` pixels wide and high."""
    width, height = question.seen
    across, down = min(side, width), min(side, height)
    right, bottom = width - across, height - down
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)]
    return tuple(_cropped(question, (x, y, x + across, y + down)) for x, y in corners)


def mirrored(question: Question, count: int) -> tuple[Question, ...]:
    """Return the question about the part and its mirror images: 2 adds the part turned by half, 4 both mirrors too."""
    axes: tuple[tuple[int, ...], ...] = ((), (0, 1), (1,), (0,))
    return tuple(_flipped(question, each) for each in axes[:count])


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the log-probabilities [V] of all tokens."""
    below = logits.astype(np.float64) - logits.max()
    return np.asarray(below - np.log(np.exp(below).sum()))


def decisions(log_probabilities: NDArray[np.float64]) -> list[Decision]:
    """Return the decisions from the log-probabilities [views, B, 2] of the labels 0 and 1 among all tokens."""
    mass = np.minimum(np.exp(log_probabilities).sum(axis=2).mean(axis=0), 1.0)
    good, defect = log_probabilities.mean(axis=0).T
    with np.errstate(invalid="ignore"):  # both labels impossible: no number, which whoever asked refuses
        p = np.exp(defect - np.logaddexp(good, defect))
    return [Decision(*values) for values in zip(p.tolist(), mass.tolist(), strict=True)]


def _flipped(question: Question, axes: tuple[int, ...]) -> Question:
    part = np.ascontiguousarray(np.flip(question.part, axes))
    heatmap = None if question.anomaly_map is None else np.ascontiguousarray(np.flip(question.anomaly_map, axes))
    return _showing(question, part, heatmap)


def _cropped(question: Question, corners: tuple[int, int, int, int]) -> Question:
    x1, y1, x2, y2 = corners
    part = question.part[y1:y2, x1:x2]
    heatmap = None if question.anomaly_map is None else cut_map(question.anomaly_map, corners, question.seen)
    return _showing(question, part, heatmap)


def _showing(question: Question, part: Image, heatmap: Heatmap | None) -> Question:
    content = (*question.content[:-2], part, question.content[-1])
    seen = (part.shape[1], part.shape[0])
    return replace(question, content=content, part=part, seen=seen, anomaly_map=heatmap)
