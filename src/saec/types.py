"""Value types shared by all rooms. Imports nothing of ours.

One polarity everywhere: the positive class is *defect*. Probabilities are P(defect) in [0, 1].
Images are ``uint8`` arrays of shape ``[height, width, 3]`` in BGR order (OpenCV's), decoded once by :mod:`saec.data`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""[H, W, 3] uint8, BGR."""

Heatmap = NDArray[np.float32]
"""[h, w] float32 at the detector's own grid; larger means more anomalous."""


class Label(StrEnum):
    """What a part is called. ``UNREADABLE`` is a verdict of its own: it never counts as good."""

    GOOD = "good"
    DEFECT = "defect"
    UNREADABLE = "unreadable"


class Where(StrEnum):
    """Who has the last word on a part."""

    EDGE = "edge"
    CLOUD = "cloud"
    FALLBACK = "fallback"
    """The cloud was asked but did not answer usefully: the edge's verdict stands."""


class Reason(StrEnum):
    """Why a part took its route. Every verdict carries exactly one."""

    # kept at the edge
    EDGE_CONFIDENT = "edge_confident"
    EDGE_ONLY = "edge_only"
    EDGE_BUDGET = "edge_budget"
    EDGE_RANDOM = "edge_random"
    UNREADABLE = "unreadable"
    # escalated
    SCENE_COMPLEX = "scene_complex"
    LOW_SMAX = "low_smax"
    LOW_MARGIN = "low_margin"
    HIGH_ENTROPY = "high_entropy"
    IN_BAND = "in_band"
    CLOUD_ONLY = "cloud_only"
    CLOUD_RANDOM = "cloud_random"
    AUDIT = "audit"
    # escalated, but the edge's verdict had to stand
    CLOUD_TIMEOUT = "cloud_timeout"
    CLOUD_REFUSED = "cloud_refused"
    CLOUD_UNREACHABLE = "cloud_unreachable"
    CLOUD_BAD_ANSWER = "cloud_bad_answer"
    CIRCUIT_OPEN = "circuit_open"


class Explanation(StrEnum):
    """What became of putting a reject into words on the edge, after its verdict."""

    GIVEN = "given"
    LATE = "late"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of the *original* image: ``x1 <= x < x2``, ``y1 <= y < y2``."""

    x1: int
    y1: int
    x2: int
    y2: int
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where a defect was seen and what it is. ``source`` names who says so: ``edge-heatmap``, a model id, or both
    joined by ``+`` where the edge's boxes were put into words by a model."""

    boxes: tuple[Box, ...] = ()
    kind: str | None = None
    text: str | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """One image to inspect. ``label`` is the ground truth where it is known; ``split`` is ``train``, ``calibration``,
    ``test`` or ``None`` when the source does not say; ``kind`` is the folder's own defect name where there is one."""

    part_id: str
    product: str
    path: Path
    label: Label | None = None
    split: str | None = None
    kind: str | None = None
    mask: Path | None = None


@dataclass(frozen=True, slots=True)
class SceneTerms:
    """The five complexity terms of SAEC, each in [0, 1] in the product's own definition."""

    entropy: float
    edges: float
    laplacian: float
    gradient: float
    jpeg: float


@dataclass(frozen=True, slots=True)
class SceneScore:
    """Weighted sum of the terms, S = 0.30 H + 0.25 E + 0.20 L + 0.15 G + 0.10 R."""

    score: float
    terms: SceneTerms


@dataclass(frozen=True, slots=True)
class EdgeResult:
    """The edge's own verdict material for one image.

    ``score`` is the raw anomaly score (unbounded, larger is worse); ``p_defect`` its calibrated probability.
    ``s_max``, ``margin`` and ``entropy`` are SAEC's three confidences of (1 - p, p) (entropy normalised to
    [0, 1]). ``heatmap`` is relative: 1 is the level above which a cell is marked, which the worst cell of good parts
    hardly reaches; ``None`` for a plain classifier.
    """

    score: float
    p_defect: float
    s_max: float
    margin: float
    entropy: float
    heatmap: Heatmap | None = None
    evidence: Evidence = Evidence()


@dataclass(frozen=True, slots=True)
class Route:
    """Where a part goes and why."""

    where: Where
    reason: Reason


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Visual tokens of one image, for models that take them in place of its pixels.

    ``levels`` [k, D] int8 times ``scale`` are the tokens' coordinates in a basis; ``indices`` [k] int32, ascending, say
    which of the image's ``total`` tokens (row by row) they are. ``model_id`` names the tower and the basis, without
    which the numbers mean nothing.
    """

    levels: NDArray[np.int8]
    scale: float
    indices: NDArray[np.int32]
    total: int
    model_id: str


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked of the cloud about one part. ``image`` is what the cloud sees; ``region`` is the rectangle of the
    original image that it shows (``None``: all of it, possibly smaller) and ``original_size`` is (width, height) of the
    original, so that boxes can be mapped back. ``anomaly_map`` is the edge's heatmap
    (:attr:`EdgeResult.heatmap`) of the whole original, also when ``image`` is a crop of it. Without
    ``evidence`` only P(defect) is wanted, as for calibration: a model may leave out its second answer. ``tokens`` stand
    in place of the image, which is then ``None``: it has not left the line."""

    part_id: str
    product: str
    image: Image | None
    original_size: tuple[int, int]
    region: Box | None = None
    references: tuple[Image, ...] = ()
    anomaly_map: Heatmap | None = None
    edge_p_defect: float | None = None
    evidence: bool = True
    tokens: Tokens | None = None


@dataclass(frozen=True, slots=True)
class Opinion:
    """The cloud's answer. Boxes in ``evidence`` are in original pixels. ``timing_ms`` holds the service's own stages;
    ``uplink_bytes`` is filled in by the client with the bytes of the request bodies. ``diagnostics`` are figures about
    how the answer came about, such as ``label_mass``: the probability that an LLM put on the two label tokens."""

    p_defect: float
    evidence: Evidence
    model_id: str
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    uplink_bytes: int = 0
    diagnostics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The record of one part: one line of ``predictions.jsonl``.

    ``label`` and ``p_defect`` are final; ``edge_*`` and ``cloud_*`` keep what each arm said. ``amended_by`` is the
    model id that changed or confirmed the local verdict, or ``None``. ``error`` says why an image was unreadable or why
    the cloud fell back. ``truth`` is the ground-truth label when it is known. ``escalated_for`` keeps why the cloud was
    wanted where ``reason`` had to say something else (a fallback, a spent budget, no cloud); ``None``: not wanted.
    ``explanation`` is what became of asking a model on the edge for a sentence; ``None``: it was not asked.
    """

    part_id: str
    sha256: str
    product: str
    path: str
    label: Label
    p_defect: float | None
    where: Where
    reason: Reason
    scene_score: float | None = None
    edge_score: float | None = None
    edge_label: Label | None = None
    edge_p_defect: float | None = None
    cloud_p_defect: float | None = None
    evidence: Evidence = Evidence()
    models: Mapping[str, str] = field(default_factory=dict)
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    uplink_bytes: int = 0
    amended_by: str | None = None
    error: str | None = None
    truth: Label | None = None
    escalated_for: Reason | None = None
    explanation: Explanation | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """What a detector sees in one image, before calibration.

    ``score`` is the raw anomaly score, unbounded, larger is worse; the heatmap is in its units.
    """

    score: float
    heatmap: Heatmap | None = None


class Detector(Protocol):
    """An edge model of one product, not yet calibrated."""

    def observe(self, image: Image) -> Observation:
        """Look at one image of any size."""
        ...


class Backend(Protocol):
    """A cloud model. Called from one worker thread at a time with a whole batch."""

    model_id: str

    def judge(self, queries: Sequence[Query]) -> list[Opinion | Exception]:
        """Return one opinion per query in order; an exception in a place fails that query only."""
        ...


class CloudClient(Protocol):
    """How the pipeline reaches a cloud. Thread-safe: called from several worker threads."""

    model_id: str

    def judge(self, query: Query, *, deadline_s: float) -> Opinion:
        """Return the opinion within ``deadline_s`` seconds or raise :class:`CloudError`."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...


class Tokeniser(Protocol):
    """A model on the edge that makes visual tokens of images. Thread-safe."""

    model_id: str

    def tokens(self, image: Image) -> Tokens:
        """Return those of an image's tokens that go up."""
        ...


class Explainer(Protocol):
    """A model on the edge that puts rejects into words, after their verdicts. Called from one thread."""

    model_id: str

    def explain(self, query: Query, *, deadline: float) -> Evidence | None:
        """Return kind and text, or ``None`` when it is ``deadline`` (monotonic seconds) before they are there.

        Any exception says why there are none.
        """
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...


class CloudError(Exception):
    """The cloud gave no usable opinion.

    ``reason`` is one of the fallback reasons; ``retry_after_s`` is the wait that the service asked for;
    ``uplink_bytes`` is what went up in vain.
    """

    def __init__(
        self, reason: Reason, message: str, *, retry_after_s: float | None = None, uplink_bytes: int = 0
    ) -> None:
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.uplink_bytes = uplink_bytes
        super().__init__(message)
