"""The default detector: memory banks over the shipped backbone, fitted on good images only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from saec.edge.backbone import Backbone, Features
from saec.edge.memory import Floats, Memory, fit_memory, image_score
from saec.types import Heatmap, Image, Observation

MAX_PATCHES = 200_000
"""Patches of good parts that are kept for fitting: 0.13 GB in half precision, whatever the number of images."""


@dataclass(frozen=True, slots=True, eq=False)
class MemoryDetector:
    """One memory bank for each side at which the image is shown to the backbone; implements ``Detector``."""

    backbone: Backbone
    sides: tuple[int, ...]
    memories: tuple[Memory, ...]

    def observe(self, image: Image) -> Observation:
        """Return score and heatmap of one image, [H, W, 3] uint8 BGR of any size."""
        return self.compare(self.features(image))

    def features(self, image: Image) -> list[Features]:
        """Return what the backbone makes of an image at each of :attr:`sides`."""
        return [self.backbone(image, side) for side in self.sides]

    def compare(self, features: Sequence[Features]) -> Observation:
        """Return score and heatmap from features at :attr:`sides`: the means over the passes.

        The heatmap has the first, finest grid.
        """
        maps = [memory.distances(grid) for memory, grid in zip(self.memories, features, strict=True)]
        score = sum(image_score(heat) for heat in maps) / len(maps)
        rows, columns = maps[0].shape
        same_grid = [maps[0], *(cv2.resize(heat, (columns, rows), interpolation=cv2.INTER_LINEAR) for heat in maps[1:])]
        heatmap: Heatmap = np.mean(same_grid, axis=0, dtype=np.float32)
        return Observation(score=score, heatmap=heatmap)


def mean_observation(judges: Sequence[MemoryDetector], features: Sequence[Features]) -> Observation:
    """Return the mean of what several detectors with the same sides see."""
    seen = [judge.compare(features) for judge in judges]
    heats = [one.heatmap for one in seen if one.heatmap is not None]
    return Observation(float(np.mean([one.score for one in seen])), np.mean(heats, axis=0, dtype=np.float32))


class PatchPool:
    """Patches of good images, bounded in memory: each image gives an equal, random share of :data:`MAX_PATCHES`."""

    def __init__(self, images: int, passes: int, *, seed: int = 0) -> None:
        """``images`` is how many are going to be added, ``passes`` how many feature grids each has."""
        self._rng = np.random.default_rng(seed)
        self._share = max(1, MAX_PATCHES // max(1, images))
        self._patches: list[list[np.ndarray[tuple[int, int], np.dtype[np.float16]]]] = [[] for _ in range(passes)]

    def add(self, features: Sequence[Features]) -> None:
        """Take the share of one image."""
        for kept, grid in zip(self._patches, features, strict=True):
            flat = grid.reshape(-1, grid.shape[-1])
            if len(flat) > self._share:
                flat = flat[self._rng.permutation(len(flat))[: self._share]]
            kept.append(flat.astype(np.float16))

    def fit(
        self,
        backbone: Backbone,
        sides: tuple[int, ...],
        *,
        leave_out: Sequence[int] = (),
        progress: Callable[[float], None] | None = None,
    ) -> MemoryDetector:
        """Fit the banks to all images but those at the positions ``leave_out``."""
        out = set(leave_out)
        memories = []
        for kept in self._patches:
            chosen: Floats = np.concatenate([flat for index, flat in enumerate(kept) if index not in out]).astype(
                np.float32
            )
            memories.append(fit_memory(chosen, progress=progress))
        return MemoryDetector(backbone, sides, tuple(memories))
