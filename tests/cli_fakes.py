"""Small pictures of parts, and ``saec`` with a detector that needs no weights: ``python cli_fakes.py inspect …``.

The detector compares a part with the mean of the good ones, block by block. All else, calibration included, is real.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from saec.calibrate import Calibration, CalibrationData, Fusion, calibrate, confidences
from saec.calibrate.policy import Policy
from saec.config import RouteSettings, Settings
from saec.data.dataset import Dataset
from saec.data.decode import read_with_hash
from saec.data.manifest import write_atomic
from saec.edge.hot import judge_of
from saec.errors import BadInput
from saec.scene import scene_complexity
from saec.types import Box, CloudClient, EdgeResult, Evidence, Image, Label, Opinion, Query

if TYPE_CHECKING:
    import pytest

SIDE = 64


def cell(number: int, *, product: int = 0, defect: bool = False) -> Image:
    """A part like all others of its product, with grain of its own; a defect has a bright spot somewhere."""
    pattern = np.random.default_rng(product).integers(60, 160, (6, 6, 3), dtype=np.uint8)
    image = cv2.resize(pattern, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    rng = np.random.default_rng([7, product, number])
    image = cv2.add(image, rng.integers(0, 14, image.shape, dtype=np.uint8))
    if defect:
        x, y = rng.integers(4, SIDE - 16, 2)
        image[y : y + 10, x : x + 10] = cv2.add(image[y : y + 10, x : x + 10], int(rng.integers(12, 70)) * np.ones(3))
    return image.astype(np.uint8)


def put(path: Path, image: Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def tree(root: Path, *, products: Sequence[str] = ("bolt",), train: int = 12, other: int = 12) -> Path:
    """``<product>/{train/good,calibration/{good,defect},test/{good,defect}}``, ``other`` images in each but train."""
    for index, product in enumerate(products):
        number = 0
        for folder, count in (
            ("train/good", train),
            *((f"{s}/{k}", other) for s in ("calibration", "test") for k in ("good", "defect")),
        ):
            for i in range(count):
                number += 1
                put(
                    root / product / folder / f"{i:03}.png",
                    cell(number, product=index, defect=folder.endswith("defect")),
                )
    return root


def flat(root: Path, count: int, *, first: int = 5000) -> Path:
    """``count`` images without labels, every third a defect."""
    for i in range(count):
        put(root / f"{i:04}.png", cell(first + i, defect=i % 3 == 0))
    return root


@dataclass(frozen=True)
class Manifest:
    sha256: str
    dataset: str
    version: str
    train_sha256: tuple[str, ...]
    calibration_sha256: tuple[str, ...]


class Station:
    """As saec.edge.station.Station, without weights."""

    def __init__(
        self, means: Mapping[str, list[list[float]]], calibrations: Mapping[str, Calibration], manifest: Manifest
    ) -> None:
        self._means = {name: np.array(mean, np.float32) for name, mean in means.items()}
        self._calibrations = dict(calibrations)
        self.manifest = manifest
        self.products = tuple(means)
        self.models = {"edge": f"blocks@{manifest.sha256[:12]}"}
        self._route = RouteSettings()

    def predict(self, image: Image, product: str) -> EdgeResult:
        time.sleep(float(os.environ.get("FAKE_EDGE_S", "0")))
        heat = np.abs(blocks(image) - self._means[product])
        score = float(heat.max())
        p = float(self._calibrations[product].score.p_defect(score))
        (s_max,), (margin,), (entropy,) = confidences([p])
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        height, width = image.shape[:2]
        box = Box(
            int(column * width // 16),
            int(row * height // 16),
            int((column + 1) * width // 16),
            int((row + 1) * height // 16),
            score,
        )
        evidence = Evidence((box,), None, None, "edge-heatmap")
        return EdgeResult(score, p, float(s_max), float(margin), float(entropy), heat, evidence)

    def policy(self, product: str) -> Policy:
        return Policy.of(self._route, self._calibrations[product].thresholds)

    def fusion(self, product: str) -> Fusion | None:
        return self._calibrations[product].fusion

    def references(self, product: str) -> Sequence[Image]:
        return ()

    def calibration(self, product: str) -> Calibration:
        return self._calibrations[product]

    def with_route(self, route: RouteSettings) -> Station:
        other = Station({}, self._calibrations, self.manifest)
        other._means, other.products, other.models, other._route = self._means, self.products, self.models, route
        return other

    def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        tree = {
            "means": {name: mean.tolist() for name, mean in self._means.items()},
            "calibrations": {name: c.to_json() for name, c in self._calibrations.items()},
            "manifest": self.manifest.__dict__,
        }
        write_atomic(path / "station.json", json.dumps(tree))

    @classmethod
    def load(cls, path: Path, *, settings: Settings) -> Station:
        try:
            tree = json.loads((path / "station.json").read_text())
        except FileNotFoundError:
            raise BadInput("no station", where=path, fix="make one with saec fit") from None
        except ValueError:
            raise BadInput("damaged station", where=path, fix="fit it again") from None
        if tree["manifest"]["version"] != "0.1.0":
            raise BadInput("a station from another version", where=path, fix="fit it again")
        manifest = Manifest(**{k: tuple(v) if isinstance(v, list) else v for k, v in tree["manifest"].items()})
        calibrations = {name: Calibration.from_json(c) for name, c in tree["calibrations"].items()}
        return cls(tree["means"], calibrations, manifest).with_route(settings.route)


def blocks(image: Image) -> np.ndarray:
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    return cv2.resize(grey.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA)


def fit_station(
    dataset: Dataset,
    settings: Settings,
    *,
    cloud: CloudClient | None = None,
    cloud_opinions: Mapping[str, float] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Station:
    """As saec.edge.fit.fit_station."""
    means, calibrations, trained, calibrated = {}, {}, [], []
    for number, product in enumerate(dataset.products):
        of = dataset.select(product=product)
        train = [read_with_hash(p.path) for p in of.select(split="train" if dataset.splits else None, label=Label.GOOD)]
        mean = np.mean([blocks(image) for _, image in train], axis=0)
        held = of.select(split="calibration") if dataset.splits else of
        good = [read_with_hash(p.path) for p in held.select(label=Label.GOOD)]
        bad = [read_with_hash(p.path) for p in held.select(label=Label.DEFECT)]
        scores = {
            k: [float(np.abs(blocks(i) - mean).max()) for _, i in images] for k, images in (("g", good), ("b", bad))
        }

        def ask(found: list[tuple[str, Image]], product: str = product) -> list[float] | None:
            if cloud is None:
                return None
            return [cloud.judge(Query("c", product, i, (SIDE, SIDE)), deadline_s=5).p_defect for _, i in found]

        data = CalibrationData(
            scores["g"],
            [scene_complexity(i).score for _, i in good],
            scores["b"],
            [scene_complexity(i).score for _, i in bad],
            ask(good),
            ask(bad),
        )
        means[product], calibrations[product] = mean.tolist(), calibrate(data, settings.calibration)
        trained += [sha256 for sha256, _ in train]
        calibrated += [sha256 for sha256, _ in good + bad]
        if progress:
            progress("fitting", number + 1, len(dataset.products))
    digest = hashlib.sha256(json.dumps(means).encode()).hexdigest()
    return Station(means, calibrations, Manifest(digest, dataset.name, "0.1.0", tuple(trained), tuple(calibrated)))


class ExpertBackend:
    """As saec.cloud.expert.ExpertBackend: a part's brightest spot against a fixed level."""

    model_id = "expert-fake"

    @classmethod
    def load(cls, path: Path, settings: Settings) -> ExpertBackend:
        return cls()

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        return [Opinion(self._p(query.image), Evidence(source=self.model_id), self.model_id) for query in queries]

    def _p(self, image: Image) -> float:
        spread = float(np.ptp(blocks(image)))
        return float(1 / (1 + np.exp(-(spread - 105) / 10)))


class OnnxVlmBackend(ExpertBackend):
    """As saec.cloud.onnx_vlm.OnnxVlmBackend, but for the weights; the prompt's tau stands in the name."""

    def __init__(self, settings: Settings) -> None:
        self.model_id = f"{settings.mllm.model}-fake-{settings.mllm.tau}"


def fit_expert(dataset: Dataset, settings: Settings, *, out: Path, progress: object) -> dict[str, float]:
    out.mkdir(parents=True)
    (out / "expert.json").write_text("{}")
    return {}


def modules() -> dict[str, types.ModuleType]:
    """The fakes under the names of the rooms that need weights."""
    found = {}
    for name, members in (
        ("saec.edge.station", {"Station": Station}),
        (
            "saec.edge.hot",
            {"HotStation": lambda path, settings: Station.load(path, settings=settings), "judge_of": judge_of},
        ),
        ("saec.edge.fit", {"fit_station": fit_station}),
        ("saec.cloud.expert", {"ExpertBackend": ExpertBackend, "fit_expert": fit_expert}),
    ):
        found[name] = types.ModuleType(name)
        found[name].__dict__.update(members)
    return found


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the fakes in their places for the length of a test."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)


if __name__ == "__main__":
    made = types.ModuleType("saec.cloud.onnx_vlm")
    made.__dict__["OnnxVlmBackend"] = OnnxVlmBackend
    sys.modules.update({**modules(), made.__name__: made})
    from saec.cli import main

    main()
