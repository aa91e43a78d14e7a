"""Benchmark of scene complexity: the product's score against a plain transcription of the reference's definition."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from saec.errors import BadInput
from saec.evaluate.table import Cell, Table
from saec.scene import legacy_complexity, scene_complexity
from saec.types import Image, SceneScore

BENCH_SIZES = ((300, 300), (448, 448), (640, 1800), (960, 960))
"""(width, height) of the standard run: a solar cell, an MVTec part, a KolektorSDD strip, a board."""

_TERMS = ("entropy", "edges", "laplacian", "gradient", "jpeg")


def reference_transcription(image: Image) -> float:
    """The peer: the reference's score written down straight from its definition with OpenCV and numpy."""
    small = cv2.resize(image, (192, 192), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
    histogram = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel()
    p = histogram / histogram.sum()
    entropy = -np.sum(p * np.log(p + 1e-12)) / np.log(256)
    edges = cv2.Canny(grey, 64, 128).mean()
    laplacian = np.log(1 + cv2.Laplacian(grey, cv2.CV_64F).var()) / 8
    sobel_x = cv2.Sobel(grey, cv2.CV_64F, 1, 0, ksize=3)
    sobel_y = cv2.Sobel(grey, cv2.CV_64F, 0, 1, ksize=3)
    gradient = np.hypot(sobel_x, sobel_y).mean() / 16
    _, encoded = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 30])
    decoded = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), dtype=np.float32)
    residual = np.abs(small.astype(np.float32) - decoded).mean() / 255
    return float(0.30 * entropy + 0.25 * edges + 0.20 * laplacian + 0.15 * gradient + 0.10 * residual)


def bench_scene(images: Sequence[Image], *, sizes: Sequence[tuple[int, int]] | None = None, rounds: int = 30) -> Table:
    """Time the three scores on the same decoded images, one OpenCV thread, alternating within every round.

    Args:
        images: uint8 ``[H, W, 3]`` BGR images; one row of the table for each distinct size.
        sizes: (width, height) to which every image is brought first, untimed; ``None`` keeps the images' own sizes.
        rounds: passes over the images of a size; the medians of the pooled times are reported.

    Returns:
        A table with the median milliseconds of the peer, our legacy score and the product's score, and the ratio
        peer / product of those medians.

    Raises:
        BadInput: no images, or ``rounds`` below 1.
    """
    if not images or rounds < 1:
        raise BadInput("nothing to time", fix="pass at least one image and one round")
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        rows = [_timed_row(size, group, rounds) for size, group in _by_size(_brought_to(images, sizes)).items()]
    finally:
        cv2.setNumThreads(threads)
    return Table(
        title="Scene complexity, milliseconds an image",
        columns=("size", "images", "transcription_ms", "legacy_ms", "product_ms", "ratio"),
        rows=rows,
        notes=(
            f"Medians over {rounds} rounds, the three scores alternating on each image; 1 OpenCV thread; "
            f"OpenCV {cv2.__version__}, {platform.machine()}. ratio = transcription / product.",
        ),
    )


def scene_agreement(images: Sequence[Image]) -> Table:
    """Return Spearman's rank correlation between the product's and the legacy terms, and between the scores.

    ``score, edges as a fraction`` compares with the legacy sum after repairing its 0-255 edge density.

    Raises:
        BadInput: fewer than three images.
    """
    if len(images) < 3:
        raise BadInput("too few images for a rank correlation", where=len(images), fix="pass at least 3")
    ours = np.array([_values(scene_complexity(image)) for image in images])
    legacy = np.array([_values(legacy_complexity(image)) for image in images])
    repaired = legacy[:, 5] - 0.25 * legacy[:, 1] * (254 / 255)
    rows: list[dict[str, Cell]] = [
        {"term": name, "spearman": spearman(ours[:, i], legacy[:, i])} for i, name in enumerate((*_TERMS, "score"))
    ]
    rows.append({"term": "score, edges as a fraction", "spearman": spearman(ours[:, 5], repaired)})
    return Table(
        title=f"Product against legacy complexity, {len(images)} images", columns=("term", "spearman"), rows=rows
    )


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Return Spearman's rank correlation in [-1, 1], ties at their mean rank; ``None`` where a side is constant."""
    rank_a, rank_b = _mean_ranks(a), _mean_ranks(b)
    spread = float(rank_a.std() * rank_b.std())
    return None if spread == 0 else float(np.mean((rank_a - rank_a.mean()) * (rank_b - rank_b.mean())) / spread)


def _mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group], dtype=np.float64)


def _values(score: SceneScore) -> tuple[float, ...]:
    return (*(float(getattr(score.terms, name)) for name in _TERMS), score.score)


def _brought_to(images: Sequence[Image], sizes: Sequence[tuple[int, int]] | None) -> Iterable[Image]:
    if sizes is None:
        return images
    return (
        cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.uint8) for size in sizes for image in images
    )


def _by_size(images: Iterable[Image]) -> dict[tuple[int, int], list[Image]]:
    groups: dict[tuple[int, int], list[Image]] = {}
    for image in images:
        groups.setdefault((image.shape[1], image.shape[0]), []).append(image)
    return groups


def _timed_row(size: tuple[int, int], images: Sequence[Image], rounds: int) -> dict[str, Cell]:
    arms: tuple[Callable[[Image], object], ...] = (reference_transcription, legacy_complexity, scene_complexity)
    for arm in arms:
        arm(images[0])
    times = np.empty((len(arms), rounds * len(images)))
    for i in range(rounds * len(images)):
        image = images[i % len(images)]
        # The order rotates, so that no arm always finds the image warm in the cache.
        for step in range(len(arms)):
            which = (i + step) % len(arms)
            start = time.perf_counter()
            arms[which](image)
            times[which, i] = time.perf_counter() - start
    peer, legacy, ours = (float(median) * 1e3 for median in np.median(times, axis=1))
    return {
        "size": f"{size[0]}×{size[1]}",
        "images": len(images),
        "transcription_ms": peer,
        "legacy_ms": legacy,
        "product_ms": ours,
        "ratio": peer / ours if ours > 0 else math.inf,
    }
