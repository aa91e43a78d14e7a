"""A fake line: parts without files, an edge and a cloud that take a stated time and say what the part's name says.

A part is named ``<number>-<kind>``: ``good`` and ``bad`` are clear at the edge, ``hard`` goes to the cloud.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from saec.calibrate.fusion import Fusion
from saec.calibrate.policy import Mode, Policy
from saec.calibrate.thresholds import Thresholds
from saec.config import Settings
from saec.fleet.ledger import Ledger
from saec.route.pipeline import OnVerdict, inspect_stream
from saec.route.stats import PipelineStats
from saec.types import (
    Box,
    EdgeResult,
    Evidence,
    Image,
    Label,
    Opinion,
    Part,
    Query,
    SceneScore,
    SceneTerms,
)

THRESHOLDS = Thresholds(tau_edge=0.5, tau_cloud=0.5, tau_scene=0.9, band_low=0.3, band_high=0.7)
P_EDGE = {"good": 0.05, "bad": 0.95, "hard": 0.45}
TERMS = SceneTerms(0.1, 0.1, 0.1, 0.1, 0.1)


class Unreadable(Exception):
    def __init__(self, message: str) -> None:
        self.sha256 = ""
        super().__init__(message)


def make_part(number: int, kind: str) -> Part:
    return Part(f"{number:05d}-{kind}", "widget", Path(f"{number:05d}-{kind}.png"), Label.GOOD)


def make_parts(count: int, *, hard_every: int = 3) -> list[Part]:
    return [
        make_part(i, "hard" if i % hard_every == 0 else "bad" if i % 7 == 0 else "good") for i in range(1, count + 1)
    ]


def fake_decode(path: Path) -> tuple[str, Image]:
    number, _, kind = path.stem.partition("-")
    if kind == "broken":
        raise Unreadable("truncated file")
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[0, 0] = [int(number) % 251, int(number) // 251 % 251, sorted(("good", "bad", "hard", "crash")).index(kind)]
    return hashlib.sha256(path.name.encode()).hexdigest(), image


def fake_scene(image: Image) -> SceneScore:
    return SceneScore(0.2, TERMS)


def kind_of(image: Image) -> str:
    return sorted(("good", "bad", "hard", "crash"))[int(image[0, 0, 2])]


class FakeEdge:
    """``models``, ``policy``, ``fusion`` and ``references`` as the protocol wants them; ``predict`` sleeps."""

    def __init__(self, seconds: float = 0.0, *, mode: Mode = "cascade", fusion: Fusion | None = None) -> None:
        self.seconds = seconds
        self.calls = 0
        self.mode: Mode = mode
        self._fusion = fusion
        self.on_predict: Callable[[Image], None] | None = None

    @property
    def models(self) -> Mapping[str, str]:
        return {"edge": "fake-edge-1"}

    def predict(self, image: Image, product: str) -> EdgeResult:
        self.calls += 1
        if self.on_predict is not None:
            self.on_predict(image)
        if self.seconds:
            time.sleep(self.seconds)
        kind = kind_of(image)
        if kind == "crash":
            raise RuntimeError("shape mismatch")
        p = P_EDGE[kind]
        heatmap = np.full((2, 2), p, dtype=np.float32)
        return EdgeResult(p * 10, p, max(p, 1 - p), abs(1 - 2 * p), 0.0, heatmap, Evidence((Box(0, 0, 4, 4),)))

    def policy(self, product: str) -> Policy:
        return Policy(self.mode, THRESHOLDS)

    def fusion(self, product: str) -> Fusion | None:
        return self._fusion

    def references(self, product: str) -> Sequence[Image]:
        return ()


class FakeCloud:
    """Calls every hard part a defect; ``fails`` may raise instead, given the number of the call."""

    model_id = "fake-cloud-1"

    def __init__(self, seconds: float = 0.0, *, fails: Callable[[int], None] | None = None, uplink: int = 100) -> None:
        self.seconds = seconds
        self.fails = fails
        self.uplink = uplink
        self.asked: list[str] = []
        self.queries: list[Query] = []
        self.inside = 0
        self.most_inside = 0
        self._lock = threading.Lock()

    def judge(self, query: Query, *, deadline_s: float) -> Opinion:
        with self._lock:
            self.asked.append(query.part_id)
            self.queries.append(query)
            number = len(self.asked)
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        try:
            if self.seconds:
                time.sleep(self.seconds)
            if self.fails is not None:
                self.fails(number)
            return Opinion(0.8, Evidence((), "scratch", "a scratch", self.model_id), self.model_id, {}, self.uplink)
        finally:
            with self._lock:
                self.inside -= 1

    def close(self) -> None:
        return


class FakeExplainer:
    """Says of every part which one it is; ``before`` may wait or raise instead, given the number of the call."""

    model_id = "fake-vlm-1"

    def __init__(self, *, before: Callable[[int], None] | None = None, in_time: bool = True) -> None:
        self.before = before
        self.in_time = in_time
        self.queries: list[Query] = []

    def explain(self, query: Query, *, deadline: float) -> Evidence | None:
        self.queries.append(query)
        if self.before is not None:
            self.before(len(self.queries))
        box = Box(1, 1, 2, 2)  # the model's own idea of where: not asked for
        return Evidence((box,), "surface", f"a scratch on {query.part_id}", self.model_id) if self.in_time else None

    def close(self) -> None:
        return


def make_settings(
    *,
    route: dict[str, object] | None = None,
    cloud: dict[str, object] | None = None,
    explain: dict[str, object] | None = None,
) -> Settings:
    return Settings.model_validate({"route": route or {}, "cloud": cloud or {}, "explain": explain or {}})


def run_line(
    folder: Path,
    parts: Iterable[Part],
    edge: FakeEdge,
    cloud: FakeCloud | None,
    settings: Settings | None = None,
    *,
    decode: Callable[[Path], tuple[str, Image]] = fake_decode,
    scene: Callable[[Image], SceneScore] = fake_scene,
    explainer: FakeExplainer | None = None,
    on_verdict: OnVerdict | None = None,
) -> PipelineStats:
    with Ledger(folder / "ledger.sqlite") as ledger:
        return inspect_stream(
            parts,
            edge,
            decode=decode,
            scene=scene,
            cloud=cloud,
            settings=settings or make_settings(),
            ledger=ledger,
            explainer=explainer,
            on_verdict=on_verdict,
        )
