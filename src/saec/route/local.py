"""The edge side of one part: from its file to its local verdict and, where the cloud is wanted, the question to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from saec.calibrate.fusion import Fusion
from saec.calibrate.policy import Policy
from saec.calibrate.thresholds import Thresholds
from saec.config import Settings
from saec.route.audit import Audits
from saec.route.budget import SharedBudget
from saec.route.channel import Closed
from saec.route.query import build_query
from saec.route.stats import BusyMeter
from saec.route.verdicts import kept_verdict, local_verdict, unreadable_verdict
from saec.types import EdgeResult, Evidence, Heatmap, Image, Part, Query, Reason, SceneScore, Verdict

Decode = Callable[[Path], tuple[str, Image]]
"""Read a file: (sha256 of its bytes, [H, W, 3] uint8 BGR). Raises for an unreadable one; the error's text is
recorded, and its attribute ``sha256`` where it has one. Called from several threads."""

Scene = Callable[[Image], SceneScore]


class Edge(Protocol):
    """What the pipeline needs of a station. ``predict`` is called from one thread, the rest from several."""

    @property
    def models(self) -> Mapping[str, str]:
        """Names and hashes of what judges: recorded in every verdict, and the identity of a resumable run."""
        ...

    def predict(self, image: Image, product: str) -> EdgeResult:
        """Judge one image. An exception is recorded for this part alone."""
        ...

    def policy(self, product: str) -> Policy:
        """Return how this product is routed."""
        ...

    def fusion(self, product: str) -> Fusion | None:
        """Return how both opinions make one probability; ``None``: the cloud's replaces the edge's."""
        ...

    def references(self, product: str) -> Sequence[Image]:
        """Return images of good parts to show the cloud, the same arrays every time; may be empty."""
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """A file after reading: ``image`` or ``error``, never both."""

    sha256: str
    image: Image | None
    error: str | None
    ms: float
    at: float
    """When it was done, on the run's clock."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A scene score, or why there is none."""

    scene: SceneScore | None
    error: str | None
    ms: float | None


@dataclass(frozen=True, slots=True)
class Ask:
    """A question to the cloud and what is needed to make a final verdict of its answer."""

    query: Query
    thresholds: Thresholds
    fusion: Fusion | None


@dataclass(frozen=True, slots=True)
class Judged:
    """A part after the edge: ``ask`` is set where the cloud is wanted, allowed and within the budget."""

    verdict: Verdict
    heatmap: Heatmap | None = None
    ask: Ask | None = None


def read_part(path: Path, decode: Decode, clock: Callable[[], float], busy: BusyMeter) -> Decoded:
    """Decode a file. Whatever goes wrong is the file's own fault and ends in its verdict, not in the run's end."""
    begun = clock()
    with busy:
        try:
            sha256, image = decode(path)
        except Exception as error:  # noqa: BLE001 - recorded in the part's verdict
            return Decoded(getattr(error, "sha256", None) or "", None, _said(error), _ms(clock, begun), clock())
    return Decoded(sha256, image, None, _ms(clock, begun), clock())


def score_scene(image: Image, scene: Scene, clock: Callable[[], float], busy: BusyMeter) -> Scored:
    """Compute the scene score. Without one, the router escalates."""
    begun = clock()
    with busy:
        try:
            score = scene(image)
        except Exception as error:  # noqa: BLE001 - recorded in the part's verdict
            return Scored(None, f"scene complexity failed: {_said(error)}", _ms(clock, begun))
    return Scored(score, None, _ms(clock, begun))


class LocalJudge:
    """Makes local verdicts, one part after the other in part order."""

    def __init__(
        self, edge: Edge, settings: Settings, budget: SharedBudget | None, *, clock: Callable[[], float]
    ) -> None:
        """``budget`` is ``None`` where there is no cloud."""
        self._edge = edge
        self._settings = settings
        self._budget = budget
        self._clock = clock
        self._audits = Audits(settings.learn)
        self.busy = BusyMeter(clock)

    @property
    def models(self) -> dict[str, str]:
        """Who judges: right after a part's ``predict`` it is who judged it."""
        return dict(self._edge.models)

    def remember(self, verdicts: Callable[[], Iterable[Verdict]]) -> None:
        """Let the drift watches see what an interrupted run of this very version of the station has seen."""
        if self._audits.wanted:
            for verdict in verdicts():
                if verdict.edge_score is not None and self.models.items() <= verdict.models.items():
                    self._audits.saw(verdict, self._edge.policy(verdict.product))

    def judge(self, part: Part, decoded: Decoded, scored: Callable[[], Scored]) -> Judged:
        """Return the local verdict. ``scored`` waits for the scene score, which is computed beside the detector.

        A detector that fails on a part leaves it ``UNREADABLE``: nobody has looked at it, and it must not pass as good.

        Raises:
            Closed: from ``scored``, when the run is over.
        """
        if self._budget is not None:
            self._budget.part()
        timings = {"decode": decoded.ms}
        if decoded.image is None:
            verdict = unreadable_verdict(part, decoded.sha256, self.models, decoded.error or "unreadable")
            return Judged(replace(verdict, timings_ms=timings))
        begun = self._clock()
        try:
            return self._judge_image(part, decoded.sha256, decoded.image, scored, timings)
        except Closed:
            raise  # the run is over while the scene score was waited for: no fault of this part
        except Exception as error:  # noqa: BLE001 - recorded in the part's verdict
            verdict = unreadable_verdict(part, decoded.sha256, self.models, f"the edge failed: {_said(error)}")
            return Judged(replace(verdict, timings_ms={**timings, "edge": _ms(self._clock, begun)}))

    def _judge_image(
        self, part: Part, sha256: str, image: Image, scored: Callable[[], Scored], timings: dict[str, float]
    ) -> Judged:
        begun = self._clock()
        with self.busy:
            result = self._edge.predict(image, part.product)
        timings["edge"] = _ms(self._clock, begun)
        policy = self._edge.policy(part.product)  # after the judging: a station may take up a new version before it
        scene = scored()
        if scene.ms is not None:
            timings["scene"] = scene.ms
        audited = self._audits.policy(part.product, policy)
        verdict, wanted = local_verdict(part, sha256, scene.scene, result, audited, self.models, error=scene.error)
        self._audits.saw(verdict, policy)
        verdict = replace(verdict, timings_ms=timings)
        if not wanted:
            return Judged(verdict, result.heatmap)
        if self._budget is None:
            return Judged(kept_verdict(verdict, Reason.EDGE_ONLY), result.heatmap)
        ask = self.ask(part, image, result.heatmap, result.evidence, verdict.edge_p_defect)
        expected_bytes = _sent_pixels(ask.query.image, self._settings.cloud.max_side)
        if not self._budget.take(expected_bytes=expected_bytes, expected_s=self._settings.cloud.timeout_s):
            return Judged(kept_verdict(verdict, Reason.EDGE_BUDGET), result.heatmap)
        return Judged(verdict, result.heatmap, ask)

    def ask(self, part: Part, image: Image, heatmap: Heatmap | None, evidence: Evidence, p_defect: float | None) -> Ask:
        """Return the question about a part, the same for a part that an interrupted run has left pending."""
        policy = self._edge.policy(part.product)
        query = build_query(
            part.part_id,
            part.product,
            image,
            heatmap=heatmap,
            evidence=evidence,
            p_defect=p_defect,
            uplink=self._settings.cloud.uplink,
            references=self._edge.references(part.product),
        )
        # Cloud-only is the baseline in which the edge has no say.
        fusion = None if policy.mode == "cloud_only" else self._edge.fusion(part.product)
        return Ask(query, policy.thresholds, fusion)

    def wants_scene(self, product: str) -> bool:
        """Return whether the scene score can matter for this product."""
        try:
            return self._edge.policy(product).mode == "cascade"
        except Exception:  # noqa: BLE001 - the edge stage meets the same error and records it
            return False


def _sent_pixels(image: Image | None, max_side: int) -> int:
    """Pixels that go up after shrinking: with one byte a pixel, a cautious guess at the size of a JPEG."""
    if image is None:
        return 0
    height, width = image.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    return int(height * width * scale * scale)


def _said(error: Exception) -> str:
    """An unreadable image explains itself (it carries a ``sha256``); any other error needs its type's name."""
    text = str(error)
    return text if hasattr(error, "sha256") else f"{type(error).__name__}: {text}"


def _ms(clock: Callable[[], float], since: float) -> float:
    return (clock() - since) * 1000
