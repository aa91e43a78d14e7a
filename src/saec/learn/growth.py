"""Lessons, and a memory bank that grows by their good parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saec.config import Settings
from saec.data.hashing import fingerprint_image, group_near_duplicates
from saec.edge.backbone import Features
from saec.edge.detector import MemoryDetector, mean_observation
from saec.edge.fitters import Progress
from saec.edge.head import Doubles, pool_features
from saec.edge.memory import extend_memory
from saec.edge.replay import Replay
from saec.errors import BadInput
from saec.scene import scene_complexity
from saec.types import Image, Label, Observation


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A part whose label somebody knows. ``weight`` in (0.5, 1] is the probability that ``label`` is right: 1 for a
    human's, max(P, 1 - P) for a teacher's. ``p_cloud`` is the cloud's P(defect) where it was asked; it counts beside a
    human's label only.

    Raises:
        BadInput: the label is neither good nor defect, or the weight out of range.
    """

    sha256: str
    image: Image
    label: Label
    weight: float = 1.0
    p_cloud: float | None = None

    def __post_init__(self) -> None:
        if self.label is Label.UNREADABLE or not 0.5 < self.weight <= 1:
            raise BadInput("no lesson", where=f"label {self.label}, weight {self.weight}")

    @property
    def p_defect(self) -> float:
        """What the head learns: 1 for a sure defect, 0 for a sure good part."""
        return self.weight if self.label is Label.DEFECT else 1 - self.weight


@dataclass(frozen=True, slots=True, eq=False)
class Looked:
    """The lessons as the backbone sees them, one entry each; near-duplicates have the same number in ``groups``."""

    features: list[list[Features]]
    pooled: list[Doubles]
    scene: list[float]
    groups: list[int]
    is_good: list[bool]


def look_at(
    lessons: Sequence[Lesson], detector: MemoryDetector, settings: Settings, progress: Progress | None
) -> Looked:
    """Run the backbone over lessons."""
    features, scene, prints = [], [], []
    for number, lesson in enumerate(lessons):
        features.append(detector.features(lesson.image))
        scene.append(scene_complexity(lesson.image).score)
        prints.append(fingerprint_image(lesson.sha256, lesson.image))
        if progress is not None:
            progress("looking at lessons", number + 1, len(lessons))
    groups = [0] * len(lessons)
    for number, members in enumerate(group_near_duplicates(prints, bits=settings.data.near_duplicate_bits)):
        for member in members:
            groups[member] = number
    is_good = [lesson.label is Label.GOOD for lesson in lessons]
    return Looked(features, [pool_features(one) for one in features], scene, groups, is_good)


def grown(
    detector: MemoryDetector, looked: Looked, old: Replay, settings: Settings
) -> tuple[MemoryDetector, list[Observation]]:
    """Return the detector with the good lessons in its banks, and what banks without the part see in each lesson.

    Where the fit knew no defects, the bank decides on the first kind, and all kinds share its threshold: the new rows
    are weighted so that the good lessons score as the old good parts do. Where it did, a head sets the kinds apart, and
    such weights would cost it: they cool the maps of the new kind's defects too (ELPV mono, then poly: 4 points).
    """
    groups = sorted({group for group, good in zip(looked.groups, looked.is_good, strict=True) if good})
    if len(groups) < 2:
        return detector, [detector.compare(features) for features in looked.features]
    halves = set(groups[::2]), set(groups[1::2])

    def seen_at(scale: float) -> list[Observation]:
        judges = [_extended(detector, looked, half, settings, scale) for half in halves]
        return [
            mean_observation([j for j, half in zip(judges, halves, strict=True) if group not in half], features)
            for features, group in zip(looked.features, looked.groups, strict=True)
        ]

    seen = seen_at(1.0)
    if old.fit_knew_defects:
        return _extended(detector, looked, set(groups), settings, 1.0), seen
    usual = np.median(old.bank[~old.is_defect])
    good = [one.score for one, is_good in zip(seen, looked.is_good, strict=True) if is_good]
    scale = float(usual / max(np.median(good), 1e-6))
    return _extended(detector, looked, set(groups), settings, scale), seen_at(scale)


def _extended(
    detector: MemoryDetector, looked: Looked, groups: set[int], settings: Settings, scale: float
) -> MemoryDetector:
    chosen = [
        features
        for features, group, good in zip(looked.features, looked.groups, looked.is_good, strict=True)
        if good and group in groups
    ]
    rows, most = settings.learn.bank_rows, settings.learn.bank_most
    memories = []
    for number, memory in enumerate(detector.memories):
        patches = np.concatenate([features[number].reshape(-1, features[number].shape[-1]) for features in chosen])
        memories.append(extend_memory(memory, patches, rows=rows, most=most, seed=number, scale=scale))
    return MemoryDetector(detector.backbone, detector.sides, tuple(memories))
