"""Fitting a station: good parts make the memory, held-out parts place the thresholds.

Where the data set has a ``calibration`` split, its parts are the held-out ones. Otherwise the good parts are scored in
folds, each by a detector fitted without it (cross-conformal), and the labelled defects calibrate. The work on one
product is in :mod:`saec.edge.fitters`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import saec
from saec.config import Settings
from saec.data.dataset import Dataset
from saec.edge.backbone import Backbone
from saec.edge.classifier import ClassifierSpec, OnnxClassifier
from saec.edge.fitters import ClassifierFitter, Fitter, MemoryFitter, Progress
from saec.edge.station import FORMAT, ProductModel, Station, StationManifest, station_files
from saec.types import CloudClient


def fit_station(
    dataset: Dataset,
    settings: Settings,
    *,
    cloud: CloudClient | None = None,
    cloud_opinions: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Station:
    """Fit the default detector to every product of ``dataset`` and calibrate it.

    Args:
        dataset: parts of the splits train and calibration, or parts without a split; test parts are not looked at.
        settings: overkill, escape, escalation and so on.
        cloud: asked about the calibration parts, so that its threshold and the fusion can be fitted.
        cloud_opinions: P(defect) by the image's sha256, where the cloud's model was itself fitted to the calibration
            parts and its held-out opinions are known; they are taken before ``cloud`` is asked.
        progress: called with step, done and total.

    Raises:
        BadInput: a product without good images, an unreadable image, or not enough data for the escape rate asked for.
    """
    backbone = Backbone(threads=settings.edge.threads)
    fitter = MemoryFitter(
        backbone=backbone,
        settings=settings,
        cloud=cloud,
        opinions=cloud_opinions or {},
        progress=progress or _silent,
    )
    return _station(dataset, settings, f"memory {backbone.model_id}", fitter)


def fit_classifier_station(
    dataset: Dataset,
    settings: Settings,
    model: Path,
    spec: ClassifierSpec,
    *,
    cloud: CloudClient | None = None,
    progress: Progress | None = None,
) -> Station:
    """Make a station of an ONNX classifier: only its temperature and thresholds are fitted. See :func:`fit_station`."""
    classifier = OnnxClassifier.load(model, spec, threads=settings.edge.threads)
    fitter = ClassifierFitter(
        classifier=classifier, settings=settings, cloud=cloud, opinions={}, progress=progress or _silent
    )
    return _station(dataset, settings, f"classifier {classifier.model_id}", fitter)


def _silent(step: str, done: int, total: int) -> None:
    """Progress for callers who do not watch."""


def _station(dataset: Dataset, settings: Settings, detector: str, fitter: Fitter) -> Station:
    dataset.require_good()
    models: dict[str, ProductModel] = {}
    for product in dataset.products:
        usable = [part for part in dataset.select(product=product) if part.split in (None, "train", "calibration")]
        if usable:  # a product with test parts only is not this station's
            models[product] = fitter.fit(product, usable)
    manifest = StationManifest(
        format=FORMAT,
        version=saec.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dataset=dataset.name,
        detector=detector,
        products=tuple(models),
        train_sha256=tuple(sorted(fitter.train_sha256)),
        calibration_sha256=tuple(sorted(fitter.calibration_sha256)),
        files={name: hashlib.sha256(data).hexdigest() for name, data in station_files(models).items()},
    )
    return Station(models, manifest, route=settings.route)
