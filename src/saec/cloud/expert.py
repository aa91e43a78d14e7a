"""The embedded expert: what a cloud without any downloaded model can do better than the edge.

The edge's backbone again, but slower and closer: three resolutions up to 640 px, each with its mirror image, memory
banks at all three, and - where labelled defects were given - a supervised head on the pooled features. On solar cells
with 286 labelled defects the head reaches 0.93-0.97 AUROC where the edge has 0.92-0.96, and errs elsewhere.

    EXPERT/expert.json                 products, parameters, the sha256 of every other file and its own
           <product>.safetensors       banks and head
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from saec.calibrate.conformal import overkill_threshold
from saec.calibrate.score import ScoreCalibration
from saec.cloud.images import encode_jpeg, shrink
from saec.config import Settings
from saec.data.dataset import Dataset
from saec.data.decode import decode_image
from saec.data.hashing import sha256_json
from saec.edge.backbone import STRIDE, Backbone, Features, working_sides
from saec.edge.detector import MemoryDetector, PatchPool
from saec.edge.evidence import heatmap_evidence
from saec.edge.fitters import COPIES, Progress, disturbed, heat_threshold, read_to_fit
from saec.edge.folder import read_checked, read_index, write_folder
from saec.edge.head import MIN_DEFECTS, Head, best_ridge, fit_head, pool_features
from saec.edge.station import bank_tensors, detector_of, folder_name
from saec.errors import BadInput
from saec.types import Evidence, Image, Label, Observation, Opinion, Part, Query
from saec.vlm.geometry import to_original
from saec.vlm.view import pixels_of

FORMAT = 1
INDEX = "expert.json"
ZOOMS = (0.7, 1.0, 1.4)
"""Sides of the passes relative to the edge's first."""

LARGEST = 640
MAX_GOOD = 150
"""Good training parts of a product that the expert looks at, drawn by lot: the edge's memory has seen them all."""

ENOUGH = 15
"""Good parts that place the threshold where no calibration split does; a fold holds fewer where there are few parts."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertModel:
    """One product. ``score`` maps the head's score, or without a head the memory's, to P(defect)."""

    detector: MemoryDetector
    head: Head | None
    score: ScoreCalibration
    heat_threshold: float

    def p_defect(self, image: Image) -> tuple[float, NDArray[np.float32]]:
        """Return P(defect) and the heatmap of one image."""
        plain = [self.detector.backbone(image, side) for side in self.detector.sides]
        seen = self.detector.compare(plain)
        heatmap = np.asarray(seen.heatmap, dtype=np.float32)
        raw = seen.score if self.head is None else self.head.score(_pooled(image, plain, self.detector))
        return float(self.score.p_defect(raw)), heatmap


def fit_expert(
    dataset: Dataset, settings: Settings, *, out: Path, progress: Progress | None = None
) -> dict[str, float]:
    """Fit the expert to each product and write its folder.

    Returns:
        P(defect) by sha256 of every calibration part, by a head that was fitted without the part: what the fusion may
        be fitted to. Empty without a head: then the expert has not seen the calibration parts, and can be asked.

    Raises:
        BadInput: an unreadable image, or the folder cannot be written.
    """
    dataset.require_good()
    backbone = Backbone(threads=settings.edge.threads)
    models: dict[str, ExpertModel] = {}
    opinions: dict[str, float] = {}
    for product in dataset.products:
        usable = [part for part in dataset.select(product=product) if part.split in (None, "train", "calibration")]
        if usable:
            models[product], known = _fit_product(product, _thinned(usable), backbone, settings, progress)
            opinions.update(known)
    _save(models, backbone, out)
    return opinions


def _thinned(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with at most :data:`MAX_GOOD` good ones of those that fill the memory."""
    fills = [part for part in parts if part.label is not Label.DEFECT and part.split != "calibration"]
    drawn = {part.part_id for part in random.Random(0).sample(fills, min(len(fills), MAX_GOOD))}
    left_out = {part.part_id for part in fills} - drawn
    return [part for part in parts if part.part_id not in left_out]


def _fit_product(
    product: str, parts: Sequence[Part], backbone: Backbone, settings: Settings, progress: Progress | None
) -> tuple[ExpertModel, dict[str, float]]:
    read = [_read(part, settings) for part in parts[:1]]
    (first, *_) = working_sides([image.shape[:2] for _, image in read])
    sides = tuple(min(LARGEST, max(3 * STRIDE, STRIDE * round(zoom * first / STRIDE))) for zoom in ZOOMS)
    is_defect = np.array([part.label is Label.DEFECT for part in parts])
    is_memory = ~is_defect & np.array([part.split != "calibration" for part in parts])
    if not is_memory.any():
        is_memory = ~is_defect
    looker = MemoryDetector(backbone, sides, ())
    with_head = int(is_defect.sum()) >= MIN_DEFECTS
    pool = PatchPool(int(is_memory.sum()), len(sides))
    rows, hashes, held = [], [], []
    for number, part in enumerate(parts):
        sha256, image = _read(part, settings)
        plain = [backbone(image, side) for side in sides]
        hashes.append(sha256)
        if is_memory[number]:
            pool.add(plain)
        elif not is_defect[number]:
            held.append(plain)
        if with_head:
            rows.append(_pooled(image, plain, looker))
        if progress is not None:
            progress(f"{product}: the expert looks closely", number + 1, len(parts))
    detector = pool.fit(backbone, sides)
    if held:
        seen = [detector.compare(plain) for plain in held]
    else:
        seen = _seen_in_folds(
            [part for part, used in zip(parts, is_memory, strict=True) if used], detector, pool, settings
        )
    marked_above = heat_threshold(seen)
    if not with_head:
        good = [one.score for one in seen]
        threshold = overkill_threshold(good, settings.calibration.overkill).threshold
        return ExpertModel(detector, None, ScoreCalibration.from_good(good, threshold), marked_above), {}
    x = np.stack(rows)
    ridge, scores = best_ridge(x, is_defect)
    calibrates = is_defect | ~is_memory if (~is_memory & ~is_defect).any() else np.ones(len(parts), dtype=bool)
    score = ScoreCalibration.from_labelled(scores[calibrates & ~is_defect], scores[is_defect])
    known = {hashes[i]: float(score.p_defect(scores[i])) for i in np.flatnonzero(calibrates)}
    return ExpertModel(detector, fit_head(x, is_defect, ridge), score, marked_above), known


def _seen_in_folds(
    good: Sequence[Part], detector: MemoryDetector, pool: PatchPool, settings: Settings
) -> list[Observation]:
    """Return what detectors fitted without a fold see in its parts: of :data:`ENOUGH` parts, or of all.

    A single part is replaced by copies of it, slightly moved and turned.
    """

    def looked_at(image: Image) -> list[Features]:
        return [detector.backbone(image, side) for side in detector.sides]

    if len(good) == 1:
        rng, (_, image) = np.random.default_rng(0), _read(good[0], settings)
        return [detector.compare(looked_at(disturbed(image, rng))) for _ in range(COPIES)]
    seen: list[Observation] = []
    folds = min(settings.calibration.folds, len(good))
    for fold in range(folds):
        if len(seen) >= ENOUGH:
            break
        out = range(fold, len(good), folds)
        judge = pool.fit(detector.backbone, detector.sides, leave_out=out)
        seen += [judge.compare(looked_at(_read(good[index], settings)[1])) for index in out]
    return seen


def _pooled(image: Image, plain: Sequence[Features], detector: MemoryDetector) -> NDArray[np.float64]:
    """Return the pooled features of an image [D], averaged over the image and its mirror image."""
    mirror = np.ascontiguousarray(image[:, ::-1])
    turned = [detector.backbone(mirror, side) for side in detector.sides]
    return np.asarray((pool_features(plain) + pool_features(turned)) / 2)


def _read(part: Part, settings: Settings) -> tuple[str, Image]:
    """Return the file's sha256 and the image as the uplink will bring it: what JPEG does to it is learnt, not met."""
    sha256, image = read_to_fit(part, settings)
    sent = encode_jpeg(shrink(image, settings.cloud.max_side), settings.cloud.jpeg_quality)
    return sha256, decode_image(sent, name=str(part.path))


class ExpertBackend:
    """The expert behind the cloud's ``Backend`` protocol."""

    def __init__(self, models: Mapping[str, ExpertModel], model_id: str) -> None:
        self._models = dict(models)
        self.model_id = model_id

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        """Judge each query; a product that the expert was not fitted to fails alone."""
        return [self._judge(query) for query in queries]

    def _judge(self, query: Query) -> Opinion | Exception:
        model = self._models.get(query.product)
        if model is None:
            return BadInput("the expert does not know this product", where=query.product)
        try:
            image = pixels_of(query)
        except BadInput as error:
            return error
        p_defect, heatmap = model.p_defect(image)
        size = (image.shape[1], image.shape[0])
        evidence = heatmap_evidence(heatmap, model.heat_threshold, size, is_defect=p_defect >= 0.5)
        boxes = tuple(
            to_original((box.x1, box.y1, box.x2, box.y2), size, query, score=box.score) for box in evidence.boxes
        )
        return Opinion(p_defect, Evidence(boxes=boxes, source=self.model_id), self.model_id)

    @classmethod
    def load(cls, path: Path, settings: Settings) -> Self:
        """Read the folder that :func:`fit_expert` wrote.

        Raises:
            BadInput: missing, damaged, or of another version.
        """
        tree = read_index(path, INDEX, kind="expert model", version=FORMAT)
        backbone = Backbone(threads=settings.edge.threads)
        if tree.get("backbone") != backbone.model_id:
            fix = f"fit it again; this version carries {backbone.model_id}"
            raise BadInput(f"the expert was fitted with {tree.get('backbone')}", where=path, fix=fix)
        try:
            models = {
                product: _read_model(
                    read_checked(path, entry["file"], entry["sha256"], kind="expert model"), entry, backbone
                )
                for product, entry in tree["products"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise BadInput(f"the expert is damaged ({error})", where=path, fix="fit it again") from None
        return cls(models, f"expert@{sha256_json(tree)[:12]}")


def _save(models: Mapping[str, ExpertModel], backbone: Backbone, out: Path) -> None:
    files: dict[str, bytes] = {}
    products: dict[str, Any] = {}
    for product, model in models.items():
        tensors: dict[str, NDArray[Any]] = dict(bank_tensors(model.detector))
        if model.head is not None:
            head = model.head
            tensors |= {"head.mean": head.mean, "head.scale": head.scale, "head.weights": head.weights}
            tensors["head.bias"] = np.array([head.bias])
        name = f"{folder_name(product)}.safetensors"
        files[name] = dump_tensors(tensors)
        products[product] = {
            "file": name,
            "sha256": hashlib.sha256(files[name]).hexdigest(),
            "sides": list(model.detector.sides),
            "score": _SCORE.dump_python(model.score, mode="json"),
            "heat_threshold": model.heat_threshold,
            "head": model.head is not None,
        }
    tree = {"format": FORMAT, "backbone": backbone.model_id, "products": products}
    write_folder(out, files, INDEX, tree, kind="expert model")


def _read_model(data: bytes, entry: Mapping[str, Any], backbone: Backbone) -> ExpertModel:
    tensors = load_tensors(data)
    head = None
    if entry["head"]:
        bias = float(tensors["head.bias"][0])
        head = Head(tensors["head.mean"], tensors["head.scale"], tensors["head.weights"], bias)
    detector = detector_of(tensors, entry["sides"], backbone)
    return ExpertModel(detector, head, _SCORE.validate_python(entry["score"]), float(entry["heat_threshold"]))


_SCORE = TypeAdapter(ScoreCalibration)
