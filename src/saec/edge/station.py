"""A station: what was fitted for one inspection point, saved as one folder that proves itself whole.

    STATION/station.json                   format, products, data hashes, the sha256 of every other file and its own
            <product>/memory.safetensors   the banks (or classifier.onnx)
            <product>/head.safetensors     the head beside them, where labelled defects made one
            <product>/replay.safetensors   figures of the calibration parts, for further learning
            <product>/model.json           detector parameters, calibration, heatmap threshold
            <product>/reference.png        a good part, shown to the cloud beside the part in question

No pickle: arrays are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import cv2
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from saec.calibrate.calibration import Calibration
from saec.calibrate.fusion import Fusion
from saec.calibrate.policy import Policy
from saec.calibrate.score import confidences
from saec.config import RouteSettings, Settings
from saec.data.decode import UnreadableImage, decode_image
from saec.data.hashing import sha256_json
from saec.edge.backbone import Backbone
from saec.edge.classifier import ClassifierSpec, OnnxClassifier
from saec.edge.detector import MemoryDetector
from saec.edge.evidence import heatmap_evidence, relative
from saec.edge.folder import read_checked, read_index, write_folder
from saec.edge.head import EdgeHead, pool_features
from saec.edge.memory import Floats, Memory
from saec.edge.replay import Replay
from saec.errors import BadInput
from saec.fleet.slots import VERSION_ROLE, Slots, Version, current_folder
from saec.types import EdgeResult, Image, Observation

FORMAT = 2
"""Version of the folder. One of another version is refused, never guessed at, but for :data:`OLDEST`."""

OLDEST = 1
"""Format 1 has neither head nor replay: such a station judges as it did, and cannot be taught."""

INDEX = "station.json"
EXPERT = "expert"
"""The folder inside a station that belongs to the expert's model (:mod:`saec.cloud.expert`)."""

FIT_AGAIN = "fit it again"
_LONGEST_NAME = 80
MODEL = "model.json"
"""The file of a product that holds its detector's parameters and its operating point."""

_REFERENCE, _BANKS, _CLASSIFIER = "reference.png", "memory.safetensors", "classifier.onnx"
_HEAD, _REPLAY = "head.safetensors", "replay.safetensors"


@dataclass(frozen=True, slots=True)
class StationManifest:
    """Where a station comes from. ``*_sha256`` list the content hashes of the images that it was made from."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    version: str
    created: str
    dataset: str
    detector: str
    products: tuple[str, ...]
    train_sha256: tuple[str, ...]
    calibration_sha256: tuple[str, ...]
    files: Mapping[str, str]
    """sha256 of every other file of the folder, by its path inside it."""

    @property
    def sha256(self) -> str:
        """The station's identity: the hash over its files' hashes; dates and versions do not enter."""
        return sha256_json({"detector": self.detector, "files": dict(self.files)})


@dataclass(frozen=True, slots=True, eq=False)
class ProductModel:
    """One product's detector and operating point. Above ``heat_threshold`` a heatmap's cell is marked on the part.

    ``head``, if any, belongs to a :class:`MemoryDetector`; ``replay`` is what further learning starts from.
    """

    detector: MemoryDetector | OnnxClassifier
    calibration: Calibration
    heat_threshold: float
    reference: Image
    head: EdgeHead | None = None
    replay: Replay | None = None

    def observe(self, image: Image) -> Observation:
        """Return raw score and heatmap of one image: with a head the score is its logit, else the detector's own."""
        if self.head is None or isinstance(self.detector, OnnxClassifier):
            return self.detector.observe(image)
        features = self.detector.features(image)
        seen = self.detector.compare(features)
        return replace(seen, score=self.head.score(seen.score, pool_features(features)))


class Station:
    """Fitted products behind the pipeline's ``Edge`` protocol. Immutable; ``predict`` may be called from any thread."""

    def __init__(
        self, models: Mapping[str, ProductModel], manifest: StationManifest, *, route: RouteSettings | None = None
    ) -> None:
        self._products = dict(models)
        self.manifest = manifest
        self._route = route or RouteSettings()
        self._references = {name: (model.reference,) for name, model in self._products.items()}

    @property
    def models(self) -> Mapping[str, str]:
        """What judges, as it is: see :func:`names_of`."""
        return names_of(self.manifest.detector, self.manifest.sha256, Version())

    @property
    def products(self) -> tuple[str, ...]:
        """Names of the products this station can judge."""
        return self.manifest.products

    def predict(self, image: Image, product: str) -> EdgeResult:
        """Judge one image, [H, W, 3] uint8 BGR of any size.

        Raises:
            BadInput: the product is unknown.
        """
        model = self.model(product)
        seen = model.observe(image)
        p_defect = float(model.calibration.score.p_defect(seen.score))
        s_max, margin, entropy = (float(value) for value in confidences(p_defect))
        result = EdgeResult(seen.score, p_defect, s_max, margin, entropy)
        if seen.heatmap is None:
            return result
        heatmap = relative(seen.heatmap, model.heat_threshold)
        is_defect = p_defect >= model.calibration.thresholds.tau_edge
        size = (image.shape[1], image.shape[0])
        evidence = heatmap_evidence(heatmap, 1.0, size, is_defect=is_defect)
        return replace(result, heatmap=heatmap, evidence=evidence)

    def policy(self, product: str) -> Policy:
        """Return how this product is routed."""
        calibration = self.calibration(product)
        return Policy.of(self._route, calibration.thresholds, calibration.drift)

    def fusion(self, product: str) -> Fusion | None:
        """Return how the edge's and the cloud's probabilities become one; ``None`` where the cloud alone decides."""
        return None if self._route.mode == "cloud_only" else self.calibration(product).fusion

    def references(self, product: str) -> Sequence[Image]:
        """Return images of good parts to show the cloud, the same arrays every time."""
        return self._references[product]

    def calibration(self, product: str) -> Calibration:
        """Return the operating point of a product."""
        return self.model(product).calibration

    def with_route(self, route: RouteSettings) -> Station:
        """Return the same station under other routing settings."""
        return Station(self._products, self.manifest, route=route)

    def model(self, product: str) -> ProductModel:
        """Return what was fitted for a product.

        Raises:
            BadInput: the product is unknown.
        """
        try:
            return self._products[product]
        except KeyError:
            fix = f"it knows {', '.join(self.products)}"
            raise BadInput("the station does not know this product", where=product, fix=fix) from None

    def save(self, path: Path) -> None:
        """Write the folder in one step: it is complete or it is not there. An older station at ``path`` is replaced.

        Raises:
            BadInput: the folder exists and is no station, or it cannot be written.
        """
        tree = _MANIFEST.dump_python(self.manifest, mode="json")
        write_folder(path, station_files(self._products), INDEX, tree, kind="station")

    @classmethod
    def load(cls, path: Path, *, settings: Settings, version: Version | None = None) -> Self:
        """Read a station, of one with slots ``version`` or the one that counts, and check every file against its hash.

        Raises:
            BadInput: it is missing, damaged, or of another version of the format.
        """
        path = current_folder(path) if version is None else Slots(path).folder_of(version)
        manifest = read_manifest(path)
        backbone: Backbone | None = None
        if manifest.detector.startswith("memory"):
            backbone = Backbone(threads=settings.edge.threads)
            if backbone.model_id not in manifest.detector:
                fix = f"fit it again; this version carries {backbone.model_id}"
                raise BadInput(f"the station was fitted with {manifest.detector}", where=path, fix=fix)
        needed = _file_names(manifest.products, (_CLASSIFIER if backbone is None else _BANKS, MODEL, _REFERENCE))
        extra = set(manifest.files) - needed
        if not needed <= set(manifest.files) or not extra <= _file_names(manifest.products, (_HEAD, _REPLAY)):
            raise BadInput("the station is damaged (it lists other files than it has to)", where=path, fix=FIT_AGAIN)
        data = {name: read_checked(path, name, sha256, kind="station") for name, sha256 in manifest.files.items()}
        try:
            models = {
                name: _read_product(folder_name(name), data, backbone, settings.edge.threads)
                for name in manifest.products
            }
        except (KeyError, TypeError, ValueError, OverflowError, SafetensorError, UnreadableImage) as error:
            raise BadInput(f"the station is damaged ({error})", where=path, fix=FIT_AGAIN) from None
        return cls(models, manifest, route=settings.route)


def read_manifest(path: Path) -> StationManifest:
    """Read ``station.json`` alone.

    Raises:
        BadInput: it is missing, damaged, or of another version.
    """
    tree = read_index(path, INDEX, kind="station", version=FORMAT, oldest=OLDEST)
    try:
        return _MANIFEST.validate_python(tree)
    except ValidationError as error:
        what = f"the station is damaged ({error.errors()[0]['msg']})"
        raise BadInput(what, where=path / INDEX, fix=FIT_AGAIN) from None


def names_of(detector: str, identity: str, version: Version) -> dict[str, str]:
    """Return what a verdict's ``models`` call a version of a station: the detector with the hash of what was fitted,
    and the version, such as ``3-1a2b3c4d``, unless it is 0."""
    named = {VERSION_ROLE: version.name} if version.version else {}
    return {"edge": f"{detector} station:{identity[:12]}", **named}


def folder_name(product: str) -> str:
    """Return a folder name for any product name: readable, safe, and different for different products."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", product).strip("._")[:_LONGEST_NAME] or "product"
    if plain == product and plain not in (INDEX, EXPERT):
        return plain
    return f"{plain}-{hashlib.sha256(product.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _file_names(products: Sequence[str], names: Sequence[str]) -> set[str]:
    return {f"{folder_name(product)}/{name}" for product in products for name in names}


def station_files(models: Mapping[str, ProductModel]) -> dict[str, bytes]:
    """Return the content of every file but the index, by its path inside the station."""
    files: dict[str, bytes] = {}
    for product, model in models.items():
        folder = folder_name(product)
        tree: dict[str, Any] = {"heat_threshold": model.heat_threshold, "calibration": model.calibration.to_json()}
        if isinstance(model.detector, MemoryDetector):
            tree["sides"] = list(model.detector.sides)
            files[f"{folder}/{_BANKS}"] = dump_tensors(bank_tensors(model.detector))
            if model.head is not None:
                files[f"{folder}/{_HEAD}"] = dump_tensors(dict(model.head.tensors()))
            if model.replay is not None:
                files[f"{folder}/{_REPLAY}"] = dump_tensors(model.replay.tensors())
        else:
            tree["classifier"] = _SPEC.dump_python(model.detector.spec, mode="json")
            files[f"{folder}/{_CLASSIFIER}"] = model.detector.content
        files[f"{folder}/{MODEL}"] = json.dumps(tree, indent=1).encode()
        files[f"{folder}/{_REFERENCE}"] = cv2.imencode(".png", model.reference)[1].tobytes()
    return files


def bank_tensors(detector: MemoryDetector) -> dict[str, Floats]:
    """Return the arrays of a memory detector by name."""
    banks = [memory.tensors() for memory in detector.memories]
    return {f"{number}.{name}": value for number, bank in enumerate(banks) for name, value in bank.items()}


def detector_of(tensors: Mapping[str, Floats], sides: Sequence[int], backbone: Backbone) -> MemoryDetector:
    """Return the detector that :func:`bank_tensors` came from.

    Raises:
        KeyError: an array is missing.
    """
    names = ("mean", "projection", "bank", "weight")
    memories = [Memory(**{name: tensors[f"{number}.{name}"] for name in names}) for number in range(len(sides))]
    return MemoryDetector(backbone, tuple(sides), tuple(memories))


def _read_product(folder: str, data: Mapping[str, bytes], backbone: Backbone | None, threads: int) -> ProductModel:
    tree = json.loads(data[f"{folder}/{MODEL}"])
    detector: MemoryDetector | OnnxClassifier
    head, replay = data.get(f"{folder}/{_HEAD}"), data.get(f"{folder}/{_REPLAY}")
    if backbone is not None:
        detector = detector_of(load_tensors(data[f"{folder}/{_BANKS}"]), tree["sides"], backbone)
    else:
        spec = _SPEC.validate_python(tree["classifier"])
        detector = OnnxClassifier(data[f"{folder}/{_CLASSIFIER}"], folder, spec, threads=threads)
    reference = decode_image(data[f"{folder}/{_REFERENCE}"], name=f"{folder}/{_REFERENCE}")
    return ProductModel(
        detector,
        Calibration.from_json(tree["calibration"]),
        float(tree["heat_threshold"]),
        reference,
        None if head is None else EdgeHead.from_tensors(load_tensors(head)),
        None if replay is None else Replay.from_tensors(load_tensors(replay)),
    )


_MANIFEST = TypeAdapter(StationManifest)
_SPEC = TypeAdapter(ClassifierSpec)
