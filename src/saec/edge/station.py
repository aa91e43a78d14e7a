"""A station: what was fitted for one inspection point, saved as one folder that proves itself whole.

    STATION/station.json                   format, products, data hashes, and the sha256 of every other file
            <product>/memory.safetensors   the banks (or classifier.onnx)
            <product>/model.json           detector parameters, calibration, heatmap threshold
            <product>/reference.png        a good part, shown to the cloud beside the part in question

No pickle: arrays are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import cv2
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from saec.calibrate.calibration import Calibration
from saec.calibrate.fusion import Fusion
from saec.calibrate.policy import Policy
from saec.calibrate.score import confidences
from saec.config import RouteSettings, Settings
from saec.data.decode import UnreadableImage, decode_image
from saec.edge.backbone import Backbone
from saec.edge.classifier import ClassifierSpec, OnnxClassifier
from saec.edge.detector import MemoryDetector
from saec.edge.evidence import heatmap_evidence
from saec.edge.memory import Floats, Memory
from saec.errors import BadInput
from saec.types import EdgeResult, Image

FORMAT = 1
"""Version of the folder. A station of another version is refused, never guessed at."""

INDEX = "station.json"
_REFERENCE, _MODEL, _BANKS, _CLASSIFIER = "reference.png", "model.json", "memory.safetensors", "classifier.onnx"


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
        text = json.dumps({"detector": self.detector, "files": dict(self.files)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class ProductModel:
    """One product's detector and operating point. Above ``heat_threshold`` a heatmap's cell is marked on the part."""

    detector: MemoryDetector | OnnxClassifier
    calibration: Calibration
    heat_threshold: float
    reference: Image


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
        """The detector and the station's hash: what judges, recorded in every verdict."""
        return {"edge": f"{self.manifest.detector} station:{self.manifest.sha256[:12]}"}

    @property
    def products(self) -> tuple[str, ...]:
        """Names of the products this station can judge."""
        return self.manifest.products

    def predict(self, image: Image, product: str) -> EdgeResult:
        """Judge one image, [H, W, 3] uint8 BGR of any size.

        Raises:
            BadInput: the product is unknown.
        """
        model = self._model(product)
        seen = model.detector.observe(image)
        p_defect = float(model.calibration.score.p_defect(seen.score))
        s_max, margin, entropy = seen.confidences or (float(value) for value in confidences(p_defect))
        result = EdgeResult(seen.score, p_defect, s_max, margin, entropy, seen.heatmap)
        if seen.heatmap is None:
            return result
        is_defect = p_defect >= model.calibration.thresholds.tau_edge
        size = (image.shape[1], image.shape[0])
        evidence = heatmap_evidence(seen.heatmap, model.heat_threshold, size, is_defect=is_defect)
        return replace(result, evidence=evidence)

    def policy(self, product: str) -> Policy:
        """Return how this product is routed."""
        return Policy.of(self._route, self.calibration(product).thresholds)

    def fusion(self, product: str) -> Fusion | None:
        """Return how the edge's and the cloud's probabilities become one; ``None`` where the cloud alone decides."""
        return None if self._route.mode == "cloud_only" else self.calibration(product).fusion

    def references(self, product: str) -> Sequence[Image]:
        """Return images of good parts to show the cloud, the same arrays every time."""
        return self._references[product]

    def calibration(self, product: str) -> Calibration:
        """Return the operating point of a product."""
        return self._model(product).calibration

    def threshold(self, product: str) -> float:
        """Return the level of the heatmap above which good parts hardly ever reach."""
        return self._model(product).heat_threshold

    def with_route(self, route: RouteSettings) -> Station:
        """Return the same station under other routing settings."""
        return Station(self._products, self.manifest, route=route)

    def _model(self, product: str) -> ProductModel:
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
        if path.exists() and not (path / INDEX).is_file() and not _is_empty_folder(path):
            raise BadInput("this exists and is not a station", where=path, fix="choose another --out")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
                new = Path(scratch) / "new"
                new.mkdir()
                for name, data in station_files(self._products).items():
                    (new / name).parent.mkdir(exist_ok=True)
                    (new / name).write_bytes(data)
                (new / INDEX).write_bytes(_MANIFEST.dump_json(self.manifest, indent=1))
                if path.exists():
                    path.rename(Path(scratch) / "old")
                new.rename(path)
        except OSError as error:
            raise BadInput("cannot write the station", where=path, fix=error.strerror or "check the disk") from None

    @classmethod
    def load(cls, path: Path, *, settings: Settings) -> Self:
        """Read a station and check every file against its hash.

        Raises:
            BadInput: it is missing, damaged, or of another version.
        """
        manifest = read_manifest(path)
        backbone: Backbone | None = None
        if manifest.detector.startswith("memory"):
            backbone = Backbone(threads=settings.edge.threads)
            if backbone.model_id not in manifest.detector:
                fix = f"fit it again; this version carries {backbone.model_id}"
                raise BadInput(f"the station was fitted with {manifest.detector}", where=path, fix=fix)
        data = {name: read_checked(path, name, sha256) for name, sha256 in manifest.files.items()}
        try:
            models = {
                name: _read_product(path, folder_name(name), data, backbone, settings.edge.threads)
                for name in manifest.products
            }
        except (KeyError, ValueError, UnreadableImage) as error:
            raise BadInput(f"the station is damaged ({error})", where=path, fix="fit it again") from None
        return cls(models, manifest, route=settings.route)


def read_manifest(path: Path) -> StationManifest:
    """Read ``station.json`` alone.

    Raises:
        BadInput: it is missing, damaged, or of another version.
    """
    try:
        tree = json.loads((path / INDEX).read_bytes())
    except FileNotFoundError:
        raise BadInput("no station here", where=path, fix="saec fit DATA --out STATION makes one") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"the station is damaged ({error})", where=path / INDEX, fix="fit it again") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise BadInput(f"station of format {found}, this version reads {FORMAT}", where=path, fix="fit it again")
    try:
        return _MANIFEST.validate_python(tree)
    except ValidationError as error:
        what = f"the station is damaged ({error.errors()[0]['msg']})"
        raise BadInput(what, where=path / INDEX, fix="fit it again") from None


def folder_name(product: str) -> str:
    """Return a folder name for any product name: readable, safe, and different for different products."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", product).strip("._") or "product"
    return plain if plain == product else f"{plain}-{hashlib.sha256(product.encode()).hexdigest()[:8]}"


def station_files(models: Mapping[str, ProductModel]) -> dict[str, bytes]:
    """Return the content of every file but the index, by its path inside the station."""
    files: dict[str, bytes] = {}
    for product, model in models.items():
        folder = folder_name(product)
        tree: dict[str, Any] = {"heat_threshold": model.heat_threshold, "calibration": model.calibration.to_json()}
        if isinstance(model.detector, MemoryDetector):
            tree["sides"] = list(model.detector.sides)
            files[f"{folder}/{_BANKS}"] = dump_tensors(bank_tensors(model.detector))
        else:
            tree["classifier"] = _SPEC.dump_python(model.detector.spec, mode="json")
            files[f"{folder}/{_CLASSIFIER}"] = model.detector.model.read_bytes()
        files[f"{folder}/{_MODEL}"] = json.dumps(tree, indent=1).encode()
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


def _read_product(
    path: Path, folder: str, data: Mapping[str, bytes], backbone: Backbone | None, threads: int
) -> ProductModel:
    tree = json.loads(data[f"{folder}/{_MODEL}"])
    detector: MemoryDetector | OnnxClassifier
    if backbone is not None:
        detector = detector_of(load_tensors(data[f"{folder}/{_BANKS}"]), tree["sides"], backbone)
    else:
        spec = _SPEC.validate_python(tree["classifier"])
        detector = OnnxClassifier(path / folder / _CLASSIFIER, spec, threads=threads)
    reference = decode_image(data[f"{folder}/{_REFERENCE}"], name=f"{folder}/{_REFERENCE}")
    return ProductModel(detector, Calibration.from_json(tree["calibration"]), float(tree["heat_threshold"]), reference)


def read_checked(path: Path, name: str, sha256: str) -> bytes:
    """Return the bytes of a station's file after comparing their hash.

    Raises:
        BadInput: the file is missing or is not the one that was saved.
    """
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        raise BadInput("the station is damaged (a file cannot be read)", where=path / name, fix=str(error)) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        what = "the station is damaged (the file is not the one that was saved)"
        raise BadInput(what, where=path / name, fix="fit it again or restore the file")
    return data


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


_MANIFEST = TypeAdapter(StationManifest)
_SPEC = TypeAdapter(ClassifierSpec)
