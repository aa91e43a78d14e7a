"""A round begins: which parts are its samples, and their frames into the outbox."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from saec.edge.station import ProductModel, Station
from saec.errors import BadInput
from saec.fleet.frame import encode_frame
from saec.fleet.outbox import Outbox, OutboxFull
from saec.fleet.slots import Slots
from saec.learn.past import known_parts, learnt_by, past_samples
from saec.learn.probe import keep_for_probe
from saec.learn.round import Line, Round, RoundOver, Taken, given_by
from saec.learn.rulings import OPINIONS, open_rulings
from saec.learn.samples import Sample, choose, encode_sample
from saec.learn.state import station_state
from saec.learn.teacher import Request
from saec.learn.teaching import Without
from saec.types import Label, Verdict

SampleOf = Callable[[Verdict, Label | None], Sample | None]
"""Reads a verdict's image and makes the sample, with a person's label if there is one; ``None``: the image is gone."""


@dataclass(frozen=True, slots=True)
class Passed:
    """Parts that a call brought and that are no samples: nobody wanted the cloud for ``unwanted`` of them, ``known``
    were learnt from before, the images of ``gone`` are not what was inspected, and ``left`` wait for the next round."""

    unwanted: int = 0
    known: int = 0
    gone: int = 0
    left: int = 0


def begin(
    line: Line,
    verdicts: Sequence[Verdict],
    outbox: Outbox,
    sample_of: SampleOf,
    labels: Mapping[str, Label],
    *,
    uncertain: bool,
    without: Collection[Without],
    seed: int,
) -> tuple[Round | None, Passed]:
    """Choose samples among the verdicts and those of earlier rounds that are not learnt yet, and put them into the
    outbox, emptied before; return the round once it is on the disk, ``None`` without samples, and what passed.

    Raises:
        BadInput: the station cannot be taught, it or the line's records are damaged, or not even one sample fits into
            the outbox.
    """
    outbox.keep_only(())  # what a round left there that never came to be must not go up with this one
    station = Station.load(Slots(line.station).current(), settings=line.settings)
    if station.model(line.product).replay is None:  # said before anything has gone up
        fix = "fit the station again, without --classifier"
        raise BadInput("this product cannot be taught: its station holds no replay", where=line.product, fix=fix)
    past = past_samples(line.home)
    own = {verdict.sha256: verdict for verdict in verdicts if verdict.product == line.product}
    people = {each.taken.sha256: each.taken.human for each in past if each.taken.human is not None} | dict(labels)
    learnt = learnt_by(station, line.product)
    known = known_parts(learnt, open_rulings(line.home / OPINIONS), people, past, line.settings.learn)
    parts = {each.taken.sha256: each.taken.as_verdict() for each in past} | own
    chosen = choose(
        list(parts.values()), most=len(parts), known=known, labelled=people.keys(), uncertain=uncertain, seed=seed
    )
    takes = [Taken.of(_absolute(verdict), people.get(verdict.sha256)) for verdict in chosen]
    samples, gone = _filled(line, takes, outbox, sample_of)
    wanted = {v.sha256 for v in own.values() if v.escalated_for is not None or v.sha256 in people}
    fresh = own.keys() & {verdict.sha256 for verdict in chosen}
    taken = {each.sha256 for each in samples.values()}
    passed = Passed(
        unwanted=len(own.keys() - wanted),
        known=len(wanted & known),
        gone=len(gone & own.keys()),
        left=len(fresh - gone - taken),
    )
    if not samples:
        return None, passed
    return _saved(line, samples, given_by(verdicts, labels), tuple(sorted(without))), passed


def anew(line: Line, old: Round, outbox: Outbox, sample_of: SampleOf) -> Round:
    """Begin a round once more with the same parts, as the settings and the station are now; nothing that was made for
    it before goes up.

    Raises:
        RoundOver: none of its images is there any more.
    """
    outbox.keep_only(())
    samples, _ = _filled(line, old.samples.values(), outbox, sample_of)
    if not samples:
        raise RoundOver("the images of its samples are gone or have changed")
    return _saved(line, samples, old.given, old.asked.without)


def _filled(
    line: Line, takes: Iterable[Taken], outbox: Outbox, sample_of: SampleOf
) -> tuple[dict[str, Taken], set[str]]:
    """Put samples into the outbox, at most ``learn.samples`` and as many as fit; return them by frame, and the content
    hashes of those whose images are gone."""
    samples: dict[str, Taken] = {}
    gone: set[str] = set()
    for taken in takes:
        if len(samples) == line.settings.learn.samples:
            break
        verdict = taken.as_verdict()
        sample = sample_of(verdict, taken.human)
        if sample is None:
            gone.add(taken.sha256)
            continue
        try:
            name = outbox.put(_frame(line, sample))
        except OutboxFull:
            if not samples:
                raise
            break
        samples[name] = taken
        keep_for_probe(line.home, verdict)
    return samples, gone


def _frame(line: Line, sample: Sample) -> bytes:
    """Return a sample's frame; never one with an image where tokens are to go up."""
    if line.settings.cloud.uplink == "tokens" and sample.query.tokens is None:
        fix = "choose another --uplink, or a tokeniser that works"
        raise BadInput("no tokens of this part, and no image may go up", where=sample.query.part_id, fix=fix)
    return encode_frame(encode_sample(sample, line.settings.cloud))


def _saved(line: Line, samples: dict[str, Taken], given: str, without: Sequence[Without]) -> Round:
    request = _request(line, samples, without)
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    round_ = Round(begun=begun, given=given, uplink=line.settings.cloud.uplink, request=request, samples=samples)
    round_.save(line.home)
    return round_


def _request(line: Line, frames: Iterable[str], without: Sequence[Without]) -> dict[str, Any]:
    slots = Slots(line.station)
    pointer, folder = slots.pointer, slots.current()
    return Request(
        product=line.product,
        frames=tuple(frames),
        state=station_state(folder, line.product).sha256 if line.settings.cloud.uplink == "image" else None,
        version=pointer.highest + 1,
        previous=pointer.current.version,
        background=usual_background(Station.load(folder, settings=line.settings).model(line.product)),
        learn=line.settings.learn,
        without=tuple(without),
    ).model_dump(mode="json")


def usual_background(model: ProductModel) -> tuple[float, float] | None:
    """Return the median cell of good parts' maps, in the map's own units: usually, and at most (19 of 20 parts have
    less); ``None`` without maps."""
    if model.replay is None:
        return None
    levels = model.replay.background[~model.replay.is_defect] / model.heat_threshold
    levels = levels[np.isfinite(levels) & (levels > 0)]
    return (float(np.median(levels)), float(np.quantile(levels, 0.95))) if len(levels) else None


def _absolute(verdict: Verdict) -> Verdict:
    """Return the verdict with a path that later calls find from any folder."""
    return replace(verdict, path=str(Path(verdict.path).absolute()))
