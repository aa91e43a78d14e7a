"""What a line has asked about before, and which of it need not be asked again.

Known is what the version at work has really learnt, not what was once asked: the samples of an update that was dropped,
refused or taken back come again with the next round, wherever its own parts come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from saec.cloud.desk import Name
from saec.config import LearnSettings
from saec.edge.station import Station
from saec.errors import BadInput, first_problem
from saec.learn.journal import append_lines, open_lines
from saec.learn.round import Round, Taken
from saec.learn.rulings import Ruling
from saec.learn.samples import for_probe
from saec.learn.teaching import counts
from saec.types import Label

SAMPLES = "samples.jsonl"
"""Every sample of the rounds that are over, and what became of it."""

DROPS = 2
"""A part that only a model has labelled rests after so many dropped updates: else one wrong opinion, taught again each
time, would have every later update dropped as well. What people say comes again until it is learnt."""

End = Literal["learnt", "dropped", "over"]
"""How a round ended for its samples: an update was applied, was worse on the probe set, or there was none."""


class Past(BaseModel):
    """A sample of a round that is over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: Name
    end: End
    taken: Taken


def add_past(home: Path, round_: Round, end: End) -> None:
    """Note what became of a round's samples.

    Raises:
        OSError: the disk refuses.
    """
    ended = (Past(job=round_.job, end=end, taken=taken) for taken in round_.samples.values())
    append_lines(home / SAMPLES, (past.model_dump_json() for past in ended))


def past_samples(home: Path) -> list[Past]:
    """Return the samples of the rounds that are over; a line that a killed process left unfinished goes.

    Raises:
        BadInput: the file cannot be read.
    """
    file = home / SAMPLES
    try:
        return [Past.model_validate_json(line) for line in open_lines(file)]
    except ValidationError as error:
        fix = "restore or remove the file"
        raise BadInput(f"not samples ({first_problem(error)})", where=file, fix=fix) from None


def learnt_by(station: Station, product: str) -> dict[str, float | None]:
    """Return the content hashes that a version was fitted on or has learnt, with P(defect) as it learnt it, ``None``
    where it keeps none."""
    found: dict[str, float | None] = dict.fromkeys(station.manifest.train_sha256)
    replay = station.model(product).replay
    return found if replay is None else found | dict(zip(replay.hashes, replay.p_defect.tolist(), strict=True))


def known_parts(
    learnt: Mapping[str, float | None],
    rulings: Iterable[Ruling],
    people: Mapping[str, Label],
    past: Sequence[Past],
    settings: LearnSettings,
) -> set[str]:
    """Return the content hashes of the parts about which nothing new can be learnt.

    Without a person's label those are: what is learnt, what is held out for the probe set, what the teacher is not sure
    of, and what rests (:data:`DROPS`). With one: what is learnt, or held out, with that very label.

    Args:
        learnt: see :func:`learnt_by`.
        rulings: all so far, the latest last.
        people: their labels, those of earlier rounds too.
        past: samples of earlier rounds.
        settings: say from when on an opinion counts.
    """
    latest = {ruling.sha256: ruling for ruling in rulings}
    drops = Counter(sha256 for sha256, _ in {(p.taken.sha256, p.job) for p in past if p.end == "dropped"})
    resting = {sha256 for sha256, times in drops.items() if times >= DROPS}

    def is_known(sha256: str) -> bool:
        ruling, label = latest.get(sha256), people.get(sha256)
        if label is None:
            return sha256 in learnt or (ruling is not None and _done_with(ruling, resting, settings))
        p = learnt.get(sha256)
        if p is not None and p in (0, 1):
            return (p == 1) is (label is Label.DEFECT)
        said = ruling is not None and ruling.who == "human" and ruling.label is label
        return said and (for_probe(sha256) or (sha256 in learnt and p is None))

    return {sha256 for sha256 in learnt.keys() | latest.keys() if is_known(sha256)}


def _done_with(ruling: Ruling, resting: Collection[str], settings: LearnSettings) -> bool:
    if for_probe(ruling.sha256) or not counts(ruling, settings):
        return True
    return ruling.who == "model" and ruling.sha256 in resting
