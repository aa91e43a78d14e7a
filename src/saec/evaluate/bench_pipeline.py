"""Does the pipeline really overlap? Wall time of a cascade against each of its branches alone, all three measured.

The reference implementation's T_total = T_cpx + max(T_edge, T_cloud) is arithmetic over phases that ran one after the
other. Here the edge-side branch (decode, scene, edge, ledger) and the cloud-side branch (the same questions, as many in
flight) are each run on their own, then together.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saec.calibrate.fusion import Fusion
from saec.calibrate.policy import Policy
from saec.calibrate.thresholds import Thresholds
from saec.config import Settings
from saec.errors import BadInput
from saec.evaluate.table import Table
from saec.fleet.ledger import Ledger
from saec.route.local import Decode, Edge, Scene
from saec.route.pipeline import inspect_stream
from saec.route.stats import PipelineStats
from saec.types import CloudClient, EdgeResult, Evidence, Image, Opinion, Part, Query, SceneScore, SceneTerms

TARGET = 1.10
"""The wall time of a cascade is at most this times its longer branch."""


@dataclass(frozen=True, slots=True)
class Line:
    """What to run: parts and all that looks at them."""

    parts: Sequence[Part]
    edge: Edge
    cloud: CloudClient
    decode: Decode
    scene: Scene


@dataclass(frozen=True, slots=True)
class _Round:
    edge_s: float
    """Wall time of the edge side alone."""
    cloud_s: float
    """Wall time of the cloud side alone."""
    stats: PipelineStats
    """Both together."""


def bench_pipeline(line: Line, settings: Settings, *, repeats: int = 3) -> Table:
    """Measure both branches alone and the cascade; every figure is the median of ``repeats`` rounds.

    Images of the escalated parts are held in memory for the run of the cloud branch alone.

    Raises:
        BadInput: no part is escalated, so there is nothing to overlap.
    """
    rounds = [_round(line, settings) for _ in range(repeats)]
    edge_s = statistics.median(each.edge_s for each in rounds)
    cloud_s = statistics.median(each.cloud_s for each in rounds)
    wall_s = statistics.median(each.stats.wall_s for each in rounds)
    percent = statistics.median(100 * each.stats.wall_s / max(each.edge_s, each.cloud_s) for each in rounds)
    stats = rounds[-1].stats
    count = len(line.parts)

    def row(name: str, seconds: float, parts: int, **more: float | None) -> dict[str, str | int | float | None]:
        return {"run": name, "parts": parts, "wall_s": seconds, "ms_per_part": seconds * 1000 / parts, **more}

    return Table(
        title=f"Pipeline: {count} parts, {stats.escalated / count:.0%} escalated, "
        f"{settings.cloud.in_flight} questions in flight",
        columns=("run", "parts", "wall_s", "ms_per_part", "percent_of_longer", "overlap"),
        rows=(
            row("edge side alone", edge_s, count),
            row("cloud side alone", cloud_s, stats.escalated),
            row("one after the other", edge_s + cloud_s, count),
            row("cascade", wall_s, count, percent_of_longer=percent, overlap=stats.overlap),
        ),
        notes=(
            f"percent_of_longer: wall time of the cascade in percent of its longer branch's (target <= {TARGET:.0%}); "
            "overlap: share of the shorter branch's busy time that lay inside the longer one's",
            f"median of {repeats} rounds; 'one after the other' is the sum of both, not a run",
        ),
    )


def _round(line: Line, settings: Settings) -> _Round:
    recording = _Recording(line.cloud)
    alone = _inspect(line, None, settings)
    together = _inspect(line, recording, settings)
    if not recording.queries:
        raise BadInput("no part is escalated", fix="pass other parts, or a station with an escalation band")
    with ThreadPoolExecutor(settings.cloud.in_flight) as pool:
        begun = time.monotonic()
        list(pool.map(lambda query: line.cloud.judge(query, deadline_s=settings.cloud.timeout_s), recording.queries))
        cloud_s = time.monotonic() - begun
    return _Round(alone.wall_s, cloud_s, together)


def _inspect(line: Line, cloud: CloudClient | None, settings: Settings) -> PipelineStats:
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.sqlite") as ledger:
        return inspect_stream(
            line.parts,
            line.edge,
            decode=line.decode,
            scene=line.scene,
            cloud=cloud,
            settings=settings,
            ledger=ledger,
        )


class _Recording:
    """Keeps the questions, so that the cloud branch alone answers the same ones."""

    def __init__(self, cloud: CloudClient) -> None:
        self._cloud = cloud
        self.model_id = cloud.model_id
        self.queries: list[Query] = []

    def judge(self, query: Query, *, deadline_s: float) -> Opinion:
        self.queries.append(query)
        return self._cloud.judge(query, deadline_s=deadline_s)

    def close(self) -> None:
        return


def sleeping_line(
    parts: int = 300, *, escalation: float = 0.3, edge_ms: float = 3.0, cloud_ms: float = 10.0, side: int = 64
) -> Line:
    """Return a line whose edge and cloud do nothing but take a stated time: what is left is the pipeline's own cost.

    ``escalation`` is the share of escalated parts, evenly spread; images are ``side`` x ``side`` pixels.
    """
    escalated = frozenset(i for i in range(parts) if int((i + 1) * escalation) > int(i * escalation))

    def decode(path: Path) -> tuple[str, Image]:
        image = np.zeros((side, side, 3), dtype=np.uint8)
        image[0, 0, 0] = int(path.stem) in escalated
        return hashlib.sha256(path.name.encode()).hexdigest(), image

    return Line(
        [Part(f"{i:06d}", "part", Path(f"{i:06d}.png")) for i in range(parts)],
        _SleepingEdge(edge_ms / 1000),
        _SleepingCloud(cloud_ms / 1000),
        decode,
        lambda image: SceneScore(0.0, SceneTerms(0.0, 0.0, 0.0, 0.0, 0.0)),
    )


@dataclass(frozen=True, slots=True)
class _SleepingEdge:
    seconds: float

    @property
    def models(self) -> Mapping[str, str]:
        return {"edge": "sleeping"}

    def predict(self, image: Image, product: str) -> EdgeResult:
        time.sleep(self.seconds)
        p = 0.5 if image[0, 0, 0] else 0.0
        return EdgeResult(p, p, max(p, 1 - p), abs(1 - 2 * p), 0.0)

    def policy(self, product: str) -> Policy:
        return Policy("cascade", Thresholds(band_low=0.4, band_high=0.6))

    def fusion(self, product: str) -> Fusion | None:
        return None

    def references(self, product: str) -> Sequence[Image]:
        return ()


@dataclass(slots=True)
class _SleepingCloud:
    seconds: float
    model_id: str = "sleeping"

    def judge(self, query: Query, *, deadline_s: float) -> Opinion:
        time.sleep(self.seconds)
        return Opinion(0.5, Evidence(), self.model_id)

    def close(self) -> None:
        return
