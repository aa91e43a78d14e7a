"""The line's side of a round of learning: samples up, opinions and an update down, applied where the probe set agrees.

All that a round has begun lies in the station's folder, so that a killed one goes on where it was: the frames in the
outbox, the request in ``round.json``, what came of it in ``opinions.jsonl``, the probe set's images in ``probe/``.
Where the cloud sends opinions alone, because it has seen tokens or crops only or has no copy of this station, the line
teaches itself from its own images, through the same update, slots and probe set.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saec.cloud.learning import LearnClient
from saec.config import Settings
from saec.data.hashing import sha256_json
from saec.data.manifest import write_atomic
from saec.edge.station import ProductModel, Station, folder_name
from saec.errors import BadInput
from saec.fleet.frame import encode_frame
from saec.fleet.outbox import Outbox
from saec.fleet.slots import Slots
from saec.learn.apply import Applied, apply_update
from saec.learn.probe import keep_for_probe, own_image, probe_of, probe_set, tidy_probe_set
from saec.learn.rulings import OPINIONS, Ruling, append_rulings, open_rulings, parse_rulings
from saec.learn.samples import Sample, choose, encode_sample
from saec.learn.state import station_state
from saec.learn.teacher import Request
from saec.learn.teaching import Without, lessons_of, teach
from saec.learn.update import Refused
from saec.types import Image, Label, Verdict

ROUND, OUTBOX = "round.json", "outbox.sqlite"

DEADLINE_S = 3600.0
"""Longest wait for the cloud, in each step."""

Step = Callable[[str, int, int], None]
"""``(step, done, total)``."""

SampleOf = Callable[[Verdict, Label | None], Sample | None]
"""Reads a verdict's image and makes the sample, with a person's label if there is one; ``None``: the image is gone."""


@dataclass(frozen=True, slots=True)
class Line:
    """One product of a station on a line. ``station`` is its folder, with its slots. Samples go up as
    ``settings.cloud.uplink`` says; ``settings.learn`` says the rest."""

    station: Path
    product: str
    settings: Settings

    @property
    def home(self) -> Path:
        """Where rounds lie: in the station's folder, with which they go when another is fitted in its place."""
        return self.station / "learn" / folder_name(self.product)

    @property
    def key(self) -> bytes | None:
        """What updates are authenticated with: the cloud service's token."""
        token = self.settings.cloud.token
        return None if token is None else token.encode()


@dataclass(frozen=True, slots=True)
class Learnt:
    """What came of a round. ``bytes_*`` are those of this call, ``update_bytes`` of the update, made here or there;
    ``applied`` is ``None`` where nothing was to be taught."""

    samples: int
    rulings: tuple[Ruling, ...] = ()
    taught: str | None = None
    applied: Applied | None = None
    update_bytes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


def learn(
    line: Line,
    verdicts: Sequence[Verdict],
    client: LearnClient,
    sample_of: SampleOf,
    *,
    labels: Mapping[str, Label] | None = None,
    uncertain: bool = True,
    without: Collection[Without] = (),
    seed: int = 0,
    step: Step = lambda name, done, total: None,
) -> Learnt:
    """Run one round, or go on with the one that was cut off, and apply what it brings.

    Args:
        line: who learns.
        verdicts: of the parts since the last round.
        client: of the cloud service.
        sample_of: makes the samples.
        labels: people's, by content hash.
        uncertain: see :func:`saec.learn.samples.choose`.
        without: see :func:`saec.learn.teaching.teach`.
        seed: of the lot.
        step: told how far it is.

    Raises:
        CloudError: the cloud did not do its part; the next call goes on.
        Refused: the update must not be applied here; the round is over.
        BadInput: the station or the round's folder is damaged or in use.
    """
    begun, up, down = time.monotonic(), client.bytes_up, client.bytes_down
    line.home.mkdir(parents=True, exist_ok=True)
    with Outbox(line.home / OUTBOX, most_bytes=line.settings.learn.outbox_bytes) as outbox:
        round_ = _open_round(line)
        if round_ is None:
            round_ = _new_round(
                line, verdicts, outbox, sample_of, labels or {}, uncertain=uncertain, without=without, seed=seed
            )
        if round_ is None:
            return Learnt(0)
        client.send(outbox, deadline_s=DEADLINE_S, progress=lambda done, total: step("sending samples", done, total))
    job = client.start(round_["job"], round_["request"], deadline_s=DEADLINE_S)
    job = client.finish(
        job.id, deadline_s=DEADLINE_S, progress=lambda done, total: step("the cloud teaches", done, total)
    )
    result = job.result or {}
    rulings = parse_rulings(result.get("opinions"), where=round_["job"])
    try:
        taught, data = _update_of(line, round_, result, rulings, client, step)
        applied = None if data is None else _apply(line, round_, data, rulings)
    except Refused:
        _close_round(line, rulings)
        raise
    _close_round(line, rulings)
    return Learnt(
        samples=len(round_["samples"]),
        rulings=tuple(rulings),
        taught=taught,
        applied=applied,
        update_bytes=0 if data is None else len(data),
        bytes_up=client.bytes_up - up,
        bytes_down=client.bytes_down - down,
        seconds=time.monotonic() - begun,
    )


def _open_round(line: Line) -> dict[str, Any] | None:
    """Return the round that was cut off, ``None`` where there is none."""
    try:
        found: dict[str, Any] = json.loads((line.home / ROUND).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BadInput(f"the round is damaged ({error})", where=line.home / ROUND, fix="remove the file") from None
    return found


def _new_round(
    line: Line,
    verdicts: Sequence[Verdict],
    outbox: Outbox,
    sample_of: SampleOf,
    labels: Mapping[str, Label],
    *,
    uncertain: bool,
    without: Collection[Without],
    seed: int,
) -> dict[str, Any] | None:
    """Choose samples and put them into the outbox; return the round once it is on the disk, ``None`` without any."""
    # What a model has ruled on goes up once more when a person says what it is.
    rulings = open_rulings(line.home / OPINIONS)
    known = {ruling.sha256 for ruling in rulings if ruling.who == "human" or ruling.sha256 not in labels}
    of_product = [verdict for verdict in verdicts if verdict.product == line.product]
    most = line.settings.learn.samples
    chosen = choose(of_product, most=most, known=known, labelled=labels.keys(), uncertain=uncertain, seed=seed)
    samples: dict[str, dict[str, str]] = {}
    for verdict in chosen:
        sample = sample_of(verdict, labels.get(verdict.sha256))
        if sample is None:
            continue
        name = outbox.put(encode_frame(encode_sample(sample, line.settings.cloud)))
        samples[name] = {"sha256": verdict.sha256, "path": verdict.path}
        keep_for_probe(line.home, verdict)
    if not samples:
        return None
    pointer = Slots(line.station).pointer
    folder = Slots(line.station).current()
    model = Station.load(folder, settings=line.settings).model(line.product)
    request = Request(
        product=line.product,
        frames=tuple(samples),
        state=station_state(folder, line.product).sha256 if line.settings.cloud.uplink == "image" else None,
        version=pointer.highest + 1,
        previous=pointer.current.version,
        background=usual_background(model),
        learn=line.settings.learn,
        without=tuple(sorted(without)),
    ).model_dump(mode="json")
    round_ = {"job": sha256_json(request), "request": request, "samples": samples}
    write_atomic(line.home / ROUND, json.dumps(round_))
    return round_


def usual_background(model: ProductModel) -> tuple[float, float] | None:
    """Return the median cell of good parts' maps, in the map's own units: usually, and at most (19 of 20 parts have
    less); ``None`` without maps."""
    if model.replay is None:
        return None
    levels = model.replay.background[~model.replay.is_defect] / model.heat_threshold
    levels = levels[np.isfinite(levels) & (levels > 0)]
    return (float(np.median(levels)), float(np.quantile(levels, 0.95))) if len(levels) else None


def _update_of(
    line: Line,
    round_: Mapping[str, Any],
    result: Mapping[str, Any],
    rulings: Sequence[Ruling],
    client: LearnClient,
    step: Step,
) -> tuple[str | None, bytes | None]:
    """Return who taught, and the encoded update: from the cloud, or made here from the opinions."""
    name = result.get("update")
    if name is not None:
        file = line.home / "update"
        client.download(str(name), file, most=line.settings.learn.max_frame_bytes, deadline_s=DEADLINE_S)
        return "cloud", file.read_bytes()
    request, samples = round_["request"], round_["samples"]

    def image_of(ruling: Ruling) -> Image | None:
        return own_image(Path(samples[ruling.frame]["path"]), ruling.sha256, line.settings)

    lessons = lessons_of(rulings, image_of, line.settings.learn)
    if not lessons:
        return None, None
    data, _ = teach(
        Slots(line.station).current(),
        line.product,
        lessons,
        line.settings,
        version=request["version"],
        previous=request["previous"],
        key=line.key,
        without=request["without"],
        provenance={"teachers": sorted({each.model_id or each.who for each in rulings}), "taught": "line"},
        progress=step,
    )
    return "line", data


def _apply(line: Line, round_: Mapping[str, Any], data: bytes, rulings: Sequence[Ruling]) -> Applied:
    slots, version = Slots(line.station), round_["request"]["version"]
    pointer = slots.pointer
    if pointer.highest >= version:  # applied or refused before this round was cut off
        notes = [note for note in pointer.history if note["version"] == version and note["what"] != "taken back"]
        note: Mapping[str, Any] = notes[-1] if notes else {}
        kept = note.get("what") == "applied"
        return Applied(version, slots.current(), note.get("before"), note.get("after"), kept=kept)
    probes = probe_set(line.home, rulings, line.settings)
    settings = line.settings.learn
    return apply_update(
        line.station,
        data,
        key=line.key,
        most=settings.max_frame_bytes,
        probe=probe_of(line.home, line.product, probes, line.settings) if probes else None,
        # One part more or less is chance, however few there are.
        tolerance=max(settings.probe_loss, 1 / max(1, len(probes))),
    )


def _close_round(line: Line, rulings: Sequence[Ruling]) -> None:
    append_rulings(line.home / OPINIONS, rulings)
    (line.home / "update").unlink(missing_ok=True)
    (line.home / ROUND).unlink()
    tidy_probe_set(line.home, line.settings)
