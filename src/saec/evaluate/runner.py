"""One run, from parts to a finished run folder that the report can read; an interrupted one is taken up again.

A run folder holds, in the order in which they come about::

    ledger.sqlite      every verdict, durable before it is acknowledged
    heatmaps/          the edge's anomaly maps, <first 16 hex digits of the image's sha256>.png
    predictions.jsonl  one verdict a line
    summary.json       every figure of the run
    manifest.json      how the run was made; written last, so a folder without it is an unfinished run
    report.html        the page about it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import cv2

from saec.calibrate import Calibration, Fusion
from saec.calibrate.policy import Policy
from saec.config import RouteSettings, Settings
from saec.data.decode import read_with_hash
from saec.data.hashing import sha256_file
from saec.edge.hot import judge_of
from saec.errors import BadInput
from saec.evaluate.drift import drift_summary
from saec.evaluate.meter import Meter, Reading
from saec.evaluate.report import RunFolder, write_report
from saec.evaluate.report_images import encode_heatmap
from saec.evaluate.run_record import StationRecord, manifest, now
from saec.evaluate.summary import RunTimes, calibration_summary, summarise, write_atomically, write_summary
from saec.fleet.ledger import Ledger
from saec.route.local import Decode, Edge, Scene
from saec.route.pipeline import OnVerdict, inspect_stream
from saec.route.stats import PipelineStats
from saec.route.verdicts import printable
from saec.scene import scene_complexity
from saec.types import CloudClient, EdgeResult, Explainer, Heatmap, Image, Part, Verdict

LEDGER, HEATMAPS = "ledger.sqlite", "heatmaps"
PREDICTIONS, SUMMARY, MANIFEST, REPORT = "predictions.jsonl", "summary.json", "manifest.json", "report.html"


class Station(Edge, Protocol):
    """What a run needs of a station beyond judging parts."""

    @property
    def products(self) -> Sequence[str]:
        """Products that it knows."""
        ...

    @property
    def manifest(self) -> StationRecord:
        """What it says about itself."""
        ...

    def calibration(self, product: str) -> Calibration:
        """Return a product's operating point."""
        ...

    def with_route(self, route: RouteSettings) -> Self:
        """Return the same station under other routing settings."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of :func:`run_parts`.

    ``summary`` is ``None`` for a run that was interrupted before its parts were through: the folder is resumable.
    ``before`` is how many verdicts the folder held already.
    """

    folder: Path
    summary: dict[str, Any] | None
    stats: PipelineStats
    before: int


def run_parts(
    parts: Iterable[Part],
    station: Station,
    settings: Settings,
    *,
    cloud: CloudClient | None,
    out: Path,
    explainer: Explainer | None = None,
    command: Sequence[str] = (),
    name: str | None = None,
    progress: OnVerdict | None = None,
    decode: Decode | None = None,
    scene: Scene = scene_complexity,
    meter: Callable[[], Meter] = Meter,
    report: bool = True,
) -> Outcome:
    """Inspect parts into the run folder ``out`` and finish it, taking up what an interrupted run has left.

    ``parts`` may be a collection, whose parts are checked before the first one is judged, or an iterator, which may be
    endless: Ctrl-C then finishes its run instead of interrupting it. Repeating a finished run changes nothing. Times,
    memory and energy of a run that was resumed are ``null``: nobody measured all of it.

    Args:
        parts: what to inspect; recorded parts are skipped.
        station: who judges; ``settings.route`` decides how.
        settings: the whole tree.
        cloud: who is asked about escalated parts, or ``None``.
        out: a new folder, or that of an earlier run with the same station and settings.
        explainer: who puts rejects into words that the cloud says nothing about, or ``None``.
        command: what was called, for the record.
        name: how comparisons call the run; the folder's name by default.
        progress: called with each verdict once it is durable.
        decode: how files are read; by default strictly, within ``settings.data.max_pixels``.
        scene: how complexity is scored.
        meter: makes the meter of time, memory and energy.
        report: write ``report.html``.

    Raises:
        BadInput: a folder that is no run, a run of another station, other settings or other images, a product that the
            station does not know, a damaged ledger, or a full disk; what was acknowledged stays intact.
    """
    endless = isinstance(parts, Iterator)
    known = () if endless else tuple(parts)
    started = now()
    _check_folder(out)
    decode = decode or partial(read_with_hash, max_pixels=settings.data.max_pixels)
    station = station.with_route(settings.route)
    check_products(known, station)
    try:
        (out / HEATMAPS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput("cannot make the run folder", where=out, fix=error.strerror or "check the path") from None
    with Ledger(out / LEDGER) as ledger:
        earlier = list(ledger.verdicts())
        _check_contents(known, contents(earlier), out)
        before = len(earlier)
        finished = (out / MANIFEST).is_file()
        line = _KeepsHeatmaps(station, decode, out / HEATMAPS)
        with meter() as metered:
            stats = inspect_stream(
                parts if endless else known,
                line,
                decode=line.decode,
                scene=scene,
                cloud=cloud,
                settings=settings,
                ledger=ledger,
                explainer=explainer,
                on_verdict=partial(_reopened, out / MANIFEST, progress),
            )
        if finished and not (stats.parts or stats.requeued or stats.explained):
            return Outcome(out, json.loads((out / SUMMARY).read_text(encoding="utf-8")), stats, before)
        ledger.export_jsonl(out / PREDICTIONS)
        if stats.interrupted and not endless:
            return Outcome(out, None, stats, before)
        verdicts = list(ledger.verdicts())
    summary = _summary(verdicts, station, stats, metered.reading(), settings, resumed=before > 0)
    write_summary(summary, out / SUMMARY)
    record = manifest(
        name=name or out.resolve().name,
        command=command,
        started=started,
        resumed=before > 0,
        station=station.manifest,
        cloud=None if cloud is None else cloud.model_id,
        settings=settings,
        verdicts=verdicts,
        pending=stats.left_pending,
        unexplained=stats.left_unexplained,
        heatmaps_failed=line.failed,
    )
    write_atomically(out / MANIFEST, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if report:
        write_report([RunFolder.load(out)], out / REPORT)
    return Outcome(out, summary, stats, before)


def check_products(parts: Iterable[Part], station: Station) -> None:
    """Refuse parts of a product that the station was not fitted for.

    Raises:
        BadInput: naming the first such product and those that the station knows.
    """
    known = frozenset(station.products)
    stranger = next((part for part in parts if part.product not in known), None)
    if stranger is not None:
        raise BadInput(
            f"the station does not know the product {stranger.product!r}",
            where=stranger.path,
            fix=f"it knows {', '.join(station.products)}; say which with --product",
        )


def recorded(out: Path) -> list[Verdict]:
    """Return the verdicts that a run folder has already, in the order of the parts; none where there is no run yet.

    Raises:
        BadInput: a damaged ledger, or one that another process is writing.
    """
    if not (out / LEDGER).is_file():
        return []
    with Ledger(
        out / LEDGER
    ) as ledger:  # as a writer: a run killed in its first moments has left a file without tables
        return list(ledger.verdicts())


def contents(verdicts: Iterable[Verdict]) -> dict[str, set[str]]:
    """Return the content hashes of each part: more than one where a name came again with other content.

    A file that could not be read has the hash ``""``.
    """
    found: dict[str, set[str]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.part_id, set()).add(verdict.sha256)
    return found


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BadInput("the run folder is a file", where=out, fix="pass another --out")
    ours = (HEATMAPS, LEDGER)  # a run killed in its first moments has left no more than the ledger's lock
    if out.is_dir() and not (out / LEDGER).is_file() and any(not e.name.startswith(ours) for e in out.iterdir()):
        raise BadInput("the folder is neither empty nor a run", where=out, fix="pass another --out")


def _check_contents(parts: Sequence[Part], of_parts: Mapping[str, set[str]], out: Path) -> None:
    """Refuse to skip an image as done because another one of that name was: it would never be judged."""
    for part in parts:
        hashes = of_parts.get(printable(part.part_id), set()) - {""}
        if hashes and (sha256 := _sha256(part.path)) is not None and sha256 not in hashes:
            raise BadInput(
                f"the run {out} has recorded another image under this name",
                where=part.path,
                fix="pass another --out",
            )


def _sha256(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except OSError:
        return None  # gone since: its verdict stands


def _reopened(manifest: Path, progress: OnVerdict | None, verdict: Verdict, final: bool) -> None:
    """Pass a new verdict on; the folder is unfinished again from the first one on."""
    manifest.unlink(missing_ok=True)
    if progress is not None:
        progress(verdict, final)


def _summary(
    verdicts: Sequence[Verdict],
    station: Station,
    stats: PipelineStats,
    reading: Reading,
    settings: Settings,
    *,
    resumed: bool,
) -> dict[str, Any]:
    seen = {verdict.product for verdict in verdicts}
    calibrations = {product: station.calibration(product) for product in station.products if product in seen}
    # Verdicts of another version of the station have nothing to do with what this one was calibrated on.
    own = [verdict for verdict in verdicts if judge_of(verdict.models) == judge_of(station.models)]
    summary = summarise(
        verdicts,
        stats=None if resumed else RunTimes.of(stats),
        meter=None if resumed else reading,
        calibration=calibration_summary(calibrations),
        drift=drift_summary(own, calibrations, settings),
        learnt=frozenset(station.manifest.train_sha256) | frozenset(station.manifest.calibration_sha256),
    )
    if resumed:
        why = "the run was resumed: nobody measured all of it"
        summary["status"] |= dict.fromkeys(("time", "memory", "energy"), why)
        summary["energy"]["detail"] = why
    return summary


class _KeepsHeatmaps:
    """The station as the pipeline sees it; each anomaly map is on its way to the disk before its verdict is recorded.

    That order is why ``kill -9`` loses no map of a recorded part. Encoding and writing a map takes about 0.1 ms, less
    than a hand-over to another thread and the fsync that would be needed to keep the same promise there. A map that
    cannot be written is counted and never costs a verdict.
    """

    def __init__(self, station: Station, decode: Decode, folder: Path) -> None:
        self._station = station
        self._decode = decode
        self._folder = folder
        self._hashes: dict[int, str] = {}
        self.failed = 0

    @property
    def models(self) -> Mapping[str, str]:
        return self._station.models

    def decode(self, path: Path) -> tuple[str, Image]:
        """Read a file and remember under which hash its map belongs."""
        sha256, image = self._decode(path)
        # An id comes again only after its array is gone, and then from here: the entry is always the newest.
        self._hashes[id(image)] = sha256
        return sha256, image

    def predict(self, image: Image, product: str) -> EdgeResult:
        sha256 = self._hashes.pop(id(image), None)
        result = self._station.predict(image, product)
        if result.heatmap is not None and sha256 is not None:
            self._write(sha256, result.heatmap)
        return result

    def policy(self, product: str) -> Policy:
        return self._station.policy(product)

    def fusion(self, product: str) -> Fusion | None:
        return self._station.fusion(product)

    def references(self, product: str) -> Sequence[Image]:
        return self._station.references(product)

    def _write(self, sha256: str, heatmap: Heatmap) -> None:
        try:
            if heatmap.ndim != 2:
                raise ValueError("no map that could be drawn")
            encoded, data = cv2.imencode(".png", encode_heatmap(heatmap))
            if not encoded:
                raise ValueError("the map cannot be encoded")
            (self._folder / f"{sha256[:16]}.png").write_bytes(data.tobytes())
        except (OSError, ValueError, cv2.error):
            self.failed += 1
