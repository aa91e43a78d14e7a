"""Fitting one product: reading its parts, filling the memory, scoring held-out parts, asking the cloud, calibrating.

Near-duplicates are kept in one fold: a copy in the memory would make the held-out score too good to be true.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import ArrayLike

from saec.calibrate.calibration import ONE_GOOD
from saec.config import Settings
from saec.data.decode import UnreadableImage, read_with_hash
from saec.data.hashing import Fingerprint, fingerprint_image, group_near_duplicates
from saec.edge.backbone import Backbone, Features, working_sides
from saec.edge.classifier import OnnxClassifier, temperature_of
from saec.edge.detector import MemoryDetector, PatchPool, mean_observation
from saec.edge.evidence import relative
from saec.edge.head import Doubles, fit_edge_head, pool_features
from saec.edge.replay import Replay
from saec.edge.station import ProductModel
from saec.errors import BadInput
from saec.scene import scene_complexity
from saec.types import CloudClient, CloudError, Image, Label, Observation, Part, Query

Progress = Callable[[str, int, int], None]
"""``(step, done, total)``."""

HELD_OUT = 200
"""Good parts that are scored in folds at most; more would refine a bound that is fine enough and cost memory."""

COPIES = 8
"""Augmented copies of a single good image, which is all there is to calibrate on."""

REFERENCE_SIDE = 1024
"""Longest side of the good part that is kept to be shown beside a part in question."""

SIZED_ON = 32
"""Good images whose sizes decide how large parts are shown to the backbone."""


@dataclass(frozen=True, slots=True)
class _Read:
    """One image as it was read."""

    part: Part
    sha256: str
    image: Image


Look = Callable[[Image], tuple[Observation, Doubles]]
"""What a detector sees in an image, and its pooled features, none for a classifier."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """A held-out part and what the detector saw in it."""

    part: Part
    print: Fingerprint
    scene: float
    seen: Observation
    pooled: Doubles


@dataclass(slots=True, eq=False, kw_only=True)
class Fitter(ABC):
    """What both kinds of station share: reading, scoring, asking the cloud, calibrating."""

    settings: Settings
    cloud: CloudClient | None
    opinions: Mapping[str, float]
    progress: Progress
    train_sha256: set[str] = field(default_factory=set, init=False)
    calibration_sha256: set[str] = field(default_factory=set, init=False)

    @abstractmethod
    def fit(self, product: str, parts: Sequence[Part]) -> ProductModel:
        """Fit one product to its parts of the splits train, calibration, or none."""

    def read(self, parts: Sequence[Part], step: str) -> Iterator[_Read]:
        """Read images one by one, telling the progress; see :func:`read_to_fit`."""
        for number, part in enumerate(parts):
            yield self._read(part)
            self.progress(step, number + 1, len(parts))

    def _read(self, part: Part) -> _Read:
        return _Read(part, *read_to_fit(part, self.settings))

    def scored(self, parts: Sequence[Part], step: str, look: Look) -> list[_Scored]:
        """Read and score held-out parts."""
        return [
            _Scored(
                read.part,
                fingerprint_image(read.sha256, read.image),
                scene_complexity(read.image).score,
                *look(read.image),
            )
            for read in self.read(parts, step)
        ]

    def replay(self, product: str, good: Sequence[_Scored], defects: Sequence[_Scored], reference: Image) -> Replay:
        """Return the figures of the held-out parts, the cloud's opinions among them where it can be asked."""
        held = [*good, *defects]
        prints = [scored.print for scored in held]
        self.calibration_sha256.update(one.sha256 for one in prints)
        opinions = self._opinions(product, held, reference, heat_threshold([scored.seen for scored in good]))
        groups = np.empty(len(held), dtype=np.int64)
        for number, group in enumerate(group_near_duplicates(prints, bits=self.settings.data.near_duplicate_bits)):
            groups[list(group)] = number
        return Replay.of(
            [one.sha256 for one in prints],
            [scored.pooled for scored in held],
            [scored.seen for scored in held],
            [scored.scene for scored in held],
            [float(number >= len(good)) for number in range(len(held))],
            opinions or [np.nan] * len(held),
            groups.tolist(),
        )

    def _opinions(self, product: str, held: Sequence[_Scored], reference: Image, level: float) -> list[float]:
        """Return the cloud's P(defect) of each part; empty where there is no cloud."""
        if self.cloud is None and not all(scored.print.sha256 in self.opinions for scored in held):
            return []
        with ThreadPoolExecutor(self.settings.cloud.in_flight) as pool:
            answers = pool.map(lambda scored: self._opinion(product, scored, reference, level), held)
            found = []
            for number, answer in enumerate(answers):
                found.append(answer)
                self.progress(f"{product}: asking the cloud", number + 1, len(held))
        return found

    def _opinion(self, product: str, scored: _Scored, reference: Image, level: float) -> float:
        known = self.opinions.get(scored.print.sha256)
        if known is not None or self.cloud is None:
            return 0.5 if known is None else known
        image = self._read(scored.part).image
        query = Query(
            part_id=scored.part.part_id,
            product=product,
            image=image,
            original_size=(image.shape[1], image.shape[0]),
            references=(reference,),
            anomaly_map=None if scored.seen.heatmap is None else relative(scored.seen.heatmap, level),
            evidence=False,
        )
        try:
            return self.cloud.judge(query, deadline_s=self.settings.cloud.timeout_s).p_defect
        except CloudError as error:
            what = f"the cloud gave no opinion on a calibration part ({error})"
            raise BadInput(what, where=scored.part.path, fix="mend the cloud, or fit without --cloud") from None


@dataclass(slots=True, eq=False, kw_only=True)
class MemoryFitter(Fitter):
    """Fits the default detector: a memory of good parts."""

    backbone: Backbone

    def fit(self, product: str, parts: Sequence[Part]) -> ProductModel:
        """See :meth:`Fitter.fit`."""
        train, held_out, defects = _by_use(parts)
        looking = f"{product}: looking at good parts"
        sides = working_sides([self._read(part).image.shape[:2] for part in train[:SIZED_ON]])
        pool = PatchPool(len(train), len(sides))
        keep = frozenset(np.linspace(0, len(train) - 1, min(len(train), HELD_OUT)).astype(int).tolist())
        kept: dict[int, _Kept] = {}
        prints: list[Fingerprint] = []
        reference: Image | None = None
        for number, read in enumerate(self.read(train, looking)):
            features = [self.backbone(read.image, side) for side in sides]
            pool.add(features)
            self.train_sha256.add(read.sha256)
            reference = _shrunk(read.image) if reference is None else reference
            if not held_out:
                prints.append(fingerprint_image(read.sha256, read.image))
                if number in keep:
                    kept[number] = _Kept(read.part, prints[-1], scene_complexity(read.image).score, features)
        assert reference is not None  # noqa: S101 - require_good has seen to it
        self.progress(f"{product}: filling the memory", 0, 1)
        detector = pool.fit(
            self.backbone,
            sides,
            progress=lambda share: self.progress(f"{product}: filling the memory", round(100 * share), 100),
        )
        judges = [detector]

        def look(image: Image) -> tuple[Observation, Doubles]:
            """The mean of the detectors: the station's, or those of the folds, as the good parts were scored."""
            features = detector.features(image)
            return mean_observation(judges, features), pool_features(features)

        notes: tuple[str, ...] = ()
        if held_out:
            good = self.scored(held_out, f"{product}: scoring held-out good parts", look)
        elif len(train) == 1:
            good, notes = self._copies(train[0], look), (ONE_GOOD,)
        else:
            good, judges = self._folds(product, kept, prints, pool, sides)
        defective = self.scored(defects, f"{product}: scoring defects", look)
        replay = self.replay(product, good, defective, reference)
        head = None
        fitted = fit_edge_head(replay.bank, replay.pooled.astype(np.float64), replay.p_defect, replay.group)
        if fitted is not None:
            head, replay = fitted[0], replace(replay, score=fitted[1])
        cross_fitted = not held_out or head is not None
        calibration = replay.calibrated(self.settings.calibration, cross_fitted=cross_fitted)
        calibration = replace(calibration, notes=calibration.notes + notes)
        level = heat_threshold([scored.seen for scored in good])
        return ProductModel(detector, calibration, level, reference, head, None if notes else replay.capped())

    def _folds(
        self,
        product: str,
        kept: Mapping[int, _Kept],
        prints: Sequence[Fingerprint],
        pool: PatchPool,
        sides: tuple[int, ...],
    ) -> tuple[list[_Scored], list[MemoryDetector]]:
        """Score each kept part by a detector fitted without it and without its near-duplicates, kept or not."""
        every = group_near_duplicates(prints, bits=self.settings.data.near_duplicate_bits)
        groups = [group for group in every if not kept.keys().isdisjoint(group)]
        count = min(self.settings.calibration.folds, len(groups))
        if count < 2:
            raise BadInput("all good images are copies of one", where=product, fix="add images of other good parts")
        scored: list[_Scored] = []
        judges: list[MemoryDetector] = []
        for fold in range(count):
            self.progress(f"{product}: scoring good parts in folds", fold, count)
            out = [member for group in groups[fold::count] for member in group]
            judge = pool.fit(self.backbone, sides, leave_out=out)
            judges.append(judge)
            some = [kept[number] for number in out if number in kept]
            scored += [
                _Scored(one.part, one.print, one.scene, judge.compare(one.features), pool_features(one.features))
                for one in some
            ]
        self.progress(f"{product}: scoring good parts in folds", count, count)
        return scored, judges

    def _copies(self, part: Part, look: Look) -> list[_Scored]:
        """Score small shifts, turns and brightness changes of the only good part in place of others."""
        read = self._read(part)
        rng = np.random.default_rng(0)
        copies = [disturbed(read.image, rng) for _ in range(COPIES)]
        return [
            _Scored(part, fingerprint_image(read.sha256, copy), scene_complexity(copy).score, *look(copy))
            for copy in copies
        ]


@dataclass(slots=True, eq=False, kw_only=True)
class ClassifierFitter(Fitter):
    """Fits the temperature and the thresholds of a given classifier."""

    classifier: OnnxClassifier

    def fit(self, product: str, parts: Sequence[Part]) -> ProductModel:
        """See :meth:`Fitter.fit`."""
        train, held_out, defects = _by_use(parts)
        good_parts = held_out or train
        classifier = self.classifier
        if classifier.spec.rule == "binary" and defects:
            reads = self.read([*good_parts, *defects], f"{product}: fitting the temperature")
            labels = [False] * len(good_parts) + [True] * len(defects)
            classifier = classifier.at_temperature(temperature_of(classifier, (read.image for read in reads), labels))
        reference = _shrunk(self._read(good_parts[0]).image)

        def look(image: Image) -> tuple[Observation, Doubles]:
            return classifier.observe(image), np.empty(0)

        good = self.scored(good_parts, f"{product}: scoring good parts", look)
        scored = self.scored(defects, f"{product}: scoring defects", look)
        replay = self.replay(product, good, scored, reference)
        calibration = replay.calibrated(self.settings.calibration, cross_fitted=False)
        return ProductModel(classifier, calibration, 1.0, reference)


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """A good training part that is going to be scored in a fold."""

    part: Part
    print: Fingerprint
    scene: float
    features: list[Features]


def _by_use(parts: Sequence[Part]) -> tuple[list[Part], list[Part], list[Part]]:
    """Return (good parts to learn from, held-out good parts, defects). An unlabelled part to fit on counts as good.

    Defects of a train split calibrate nothing: they are what models with labels learn from, which then know them.
    """
    good = [part for part in parts if part.label is not Label.DEFECT]
    train = [part for part in good if part.split != "calibration"]
    held_out = [part for part in good if part.split == "calibration"]
    defects = [part for part in parts if part.label is Label.DEFECT and part.split != "train"]
    return (train, held_out, defects) if train else (held_out, [], defects)


def read_to_fit(part: Part, settings: Settings) -> tuple[str, Image]:
    """Return the sha256 and the image of a part to be fitted on.

    Raises:
        BadInput: it cannot be read: a model fitted on what was left over would be a surprise.
    """
    try:
        return read_with_hash(part.path, max_pixels=settings.data.max_pixels)
    except UnreadableImage as error:
        raise BadInput("cannot fit on an image that cannot be read", where=error, fix="remove or replace it") from None


def heat_threshold(good: Sequence[Observation]) -> float:
    """Return :func:`heat_level` of the worst cells of good parts."""
    return heat_level([float(seen.heatmap.max()) for seen in good if seen.heatmap is not None])


def heat_level(peaks: ArrayLike) -> float:
    """Return the level that the worst cells of 95 % of the good parts stay below; 1 where there are no maps."""
    worst = np.asarray(peaks, dtype=np.float64)
    return max(float(np.quantile(worst, 0.95)), 1e-6) if worst.size else 1.0


def _shrunk(image: Image) -> Image:
    scale = REFERENCE_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    return np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def disturbed(image: Image, rng: np.random.Generator) -> Image:
    """Return a copy that is shifted, turned, scaled and brightened a little, as another good part might be."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), float(rng.uniform(-2, 2)), float(rng.uniform(0.98, 1.02)))
    matrix[:, 2] += rng.uniform(-0.02, 0.02, 2) * np.array([width, height])
    moved = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
    return np.asarray(cv2.convertScaleAbs(moved, alpha=float(rng.uniform(0.95, 1.05))), dtype=np.uint8)
