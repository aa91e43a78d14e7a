"""The detector learns: confirmed good parts extend the bank, labelled parts of both kinds refit head and thresholds.

Nothing is fitted on a part that also judges the result: a lesson's good part is scored by a bank that grew by the other
half of the lessons alone, a lesson's head score comes from a head fitted without its fold, and old parts keep the
scores that they had when they were held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from saec.calibrate.calibration import MIN_LABELLED, Calibration
from saec.calibrate.fusion import fit_fusion, fit_tau_cloud
from saec.calibrate.metrics import auroc
from saec.config import Settings
from saec.data.hashing import fingerprint_image, group_near_duplicates
from saec.edge.backbone import Features
from saec.edge.detector import MemoryDetector, mean_observation
from saec.edge.fitters import Progress, heat_level
from saec.edge.head import Doubles, fit_edge_head, pool_features
from saec.edge.memory import extend_memory
from saec.edge.replay import Replay
from saec.edge.station import ProductModel
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
class Taught:
    """The new model, and how it does against the old one.

    ``figures``: counts of ``lessons``, ``good``, ``defects``, ``rows`` (bank rows added per pass) and ``replay`` (old
    parts), and ``accuracy_*``, ``auroc_*`` for lessons and replay, before and after; the latter held out as the module
    says, absent where a class is missing.
    """

    model: ProductModel
    figures: dict[str, float]


def teach_product(
    model: ProductModel, lessons: Sequence[Lesson], settings: Settings, progress: Progress | None = None
) -> Taught:
    """Return a product's model after some lessons; the same lessons in any order give the same model.

    Of several labels of one part the surest counts; a part that the model knows is not learnt twice, but its label may
    be corrected. Near-duplicates are held out together. With confirmed good parts of one content, or none, the bank
    stays as it is; with too few defects there is no head, or the threshold comes from the good parts alone. The cloud's
    fusion follows where enough parts carry its opinion, else it stays. ``settings.learn`` bounds the bank.

    Raises:
        BadInput: the model is a classifier, comes from a station without replay, or the lessons teach nothing.
    """
    detector = _memory(model)
    if model.replay is None:
        raise BadInput("this product cannot be taught: its station holds no replay", fix="fit the station again")
    old, fresh = _fresh(lessons, model.replay)
    if not fresh and old is model.replay:
        raise BadInput("nothing to learn", where=f"{len(lessons)} lessons", fix="bring parts that the station lacks")
    looked = _look(fresh, detector, settings, progress)
    taught, seen = _grown(detector, looked, settings)
    both = old if not fresh else old.joined(_rows_of(fresh, looked, seen))
    fitted = fit_edge_head(both.bank, both.pooled.astype(np.float64), both.p_defect, both.group)
    head, score = fitted if fitted is not None else (None, both.bank)
    both = replace(both, score=score)
    calibration = _with_cloud(both.calibrated(settings.calibration, cross_fitted=True), both, model.calibration)
    level = heat_level(both.peak[~both.is_defect])
    result = ProductModel(taught, _noted(calibration, both), level, model.reference, head, both.capped())
    return Taught(result, _figures(model, looked, result, both))


@dataclass(frozen=True, slots=True, eq=False)
class _Looked:
    """The lessons as the backbone sees them."""

    features: list[list[Features]]
    pooled: list[Doubles]
    scene: list[float]
    groups: list[int]
    is_good: list[bool]


def _fresh(lessons: Sequence[Lesson], old: Replay) -> tuple[Replay, list[Lesson]]:
    """Return the replay with the labels that the lessons correct, and the lessons on unknown parts, by hash."""
    surest = {lesson.sha256: lesson for lesson in sorted(lessons, key=lambda one: (one.weight, one.label))}
    rows = {sha256: number for number, sha256 in enumerate(old.hashes)}
    p_defect = old.p_defect.copy()
    for sha256 in surest.keys() & rows.keys():
        row, lesson = rows[sha256], surest[sha256]
        if lesson.weight >= max(p_defect[row], 1 - p_defect[row]):
            p_defect[row] = lesson.p_defect
    if not np.array_equal(p_defect, old.p_defect):
        old = replace(old, p_defect=p_defect)
    return old, [lesson for sha256, lesson in sorted(surest.items()) if sha256 not in rows]


def _rows_of(lessons: Sequence[Lesson], looked: _Looked, seen: Sequence[Observation]) -> Replay:
    return Replay.of(
        [lesson.sha256 for lesson in lessons],
        looked.pooled,
        seen,
        looked.scene,
        [lesson.p_defect for lesson in lessons],
        # A teacher that agrees with itself proves nothing about the cloud.
        [lesson.p_cloud if lesson.p_cloud is not None and lesson.weight == 1 else math.nan for lesson in lessons],
        looked.groups,
    )


def _look(
    lessons: Sequence[Lesson], detector: MemoryDetector, settings: Settings, progress: Progress | None
) -> _Looked:
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
    return _Looked(features, [pool_features(one) for one in features], scene, groups, is_good)


def _grown(detector: MemoryDetector, looked: _Looked, settings: Settings) -> tuple[MemoryDetector, list[Observation]]:
    """Return the detector with the good lessons in its banks, and what banks without the part see in each lesson."""
    good_groups = sorted({group for group, good in zip(looked.groups, looked.is_good, strict=True) if good})
    if len(good_groups) < 2:
        return detector, [detector.compare(features) for features in looked.features]
    halves = set(good_groups[::2]), set(good_groups[1::2])
    judges = [_extended(detector, looked, half, settings) for half in halves]
    seen = []
    for features, group in zip(looked.features, looked.groups, strict=True):
        blind = [judge for judge, half in zip(judges, halves, strict=True) if group not in half]
        seen.append(mean_observation(blind, features))
    return _extended(detector, looked, set(good_groups), settings), seen


def _extended(detector: MemoryDetector, looked: _Looked, groups: set[int], settings: Settings) -> MemoryDetector:
    chosen = [
        features
        for features, group, good in zip(looked.features, looked.groups, looked.is_good, strict=True)
        if good and group in groups
    ]
    learn = settings.learn
    memories = []
    for number, memory in enumerate(detector.memories):
        patches = np.concatenate([features[number].reshape(-1, features[number].shape[-1]) for features in chosen])
        memories.append(extend_memory(memory, patches, rows=learn.bank_rows, most=learn.bank_most, seed=number))
    return MemoryDetector(detector.backbone, detector.sides, tuple(memories))


def _with_cloud(new: Calibration, replay: Replay, old: Calibration) -> Calibration:
    """Return the calibration with fusion and cloud threshold of the parts whose opinions are known, or the old ones."""
    asked = ~np.isnan(replay.p_cloud)
    labels = replay.is_defect[asked]
    if asked.all() and min(labels.sum(), (~labels).sum()) >= MIN_LABELLED:
        return new
    fusion, tau_cloud = old.fusion, old.thresholds.tau_cloud
    if min(labels.sum(), (~labels).sum()) >= MIN_LABELLED:
        p_cloud = replay.p_cloud[asked]
        fusion = fit_fusion(new.score.p_defect(replay.score[asked]), p_cloud, labels)
        tau_cloud = fit_tau_cloud(p_cloud, labels)
    return replace(new, fusion=fusion, thresholds=replace(new.thresholds, tau_cloud=tau_cloud))


def _noted(calibration: Calibration, replay: Replay) -> Calibration:
    """Return the calibration with a word on labels that no human gave."""
    unsure = int(np.sum((replay.p_defect > 0) & (replay.p_defect < 1)))
    if not unsure:
        return calibration
    note = f"{unsure} of {len(replay)} calibration parts carry a teacher's label: bounds hold as far as it is right"
    return replace(calibration, notes=(*calibration.notes, note))


def _figures(model: ProductModel, looked: _Looked, result: ProductModel, both: Replay) -> dict[str, float]:
    """Return what was learnt and how both models do, held out: the first rows of ``both`` are the old replay's."""
    old = model.replay or both
    fresh = np.arange(len(both)) >= len(old)
    observed = [_score(model, *one) for one in zip(looked.features, looked.pooled, strict=True)]
    before, after = np.concatenate([old.score, observed]), both.score
    figures = {
        "lessons": float(fresh.sum()),
        "good": float(sum(looked.is_good)),
        "defects": float(len(looked.is_good) - sum(looked.is_good)),
        "replay": float(len(old)),
        "rows": float(_rows(result) - _rows(model)),
    }
    for name, chosen in (("lessons", fresh), ("replay", ~fresh)):
        truth = both.is_defect[chosen]
        if not truth.size:
            continue  # labels of known parts were corrected, and nothing else
        for when, one, scores in (("before", model, before[chosen]), ("after", result, after[chosen])):
            called = one.calibration.score.p_defect(scores) >= one.calibration.thresholds.tau_edge
            figures[f"accuracy_{name}_{when}"] = float(np.mean(called == truth))
            ranked = auroc(scores, truth)
            if ranked is not None:
                figures[f"auroc_{name}_{when}"] = ranked
    return figures


def _score(model: ProductModel, features: list[Features], pooled: Doubles) -> float:
    bank = _memory(model).compare(features).score
    return bank if model.head is None else model.head.score(bank, pooled)


def _rows(model: ProductModel) -> int:
    return max(len(memory.bank) for memory in _memory(model).memories)


def _memory(model: ProductModel) -> MemoryDetector:
    if not isinstance(model.detector, MemoryDetector):
        raise BadInput("a classifier cannot be taught", fix="fit the station without --classifier")
    return model.detector
