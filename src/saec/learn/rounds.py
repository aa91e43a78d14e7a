"""Rounds of learning on a stream that changes: the whole of it, nothing of it, and each part of it switched off.

Every arm has its own copy of the station and sees the same parts in the same order. What runs a pipeline and what talks
to the cloud is handed in (:class:`World`): this module only says what happens when, and keeps what was measured, a file
for each arm and round, so that a killed run goes on with the round that it was in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from saec.calibrate.policy import Mode
from saec.data.manifest import write_atomic
from saec.errors import BadInput
from saec.learn.line import Learnt
from saec.learn.samples import choose
from saec.learn.stream import Stream
from saec.learn.teaching import Without
from saec.types import Label, Part, Verdict, Where

RECORD, STATION = "record.json", "station"

Tell = Callable[[str], None]
"""Told what is done next."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to go about the same stream. ``what`` is said in the report; ``learn`` changes settings of that section;
    ``human`` is the number of samples a round that people label; ``cloud``: also measure the cloud alone."""

    name: str
    what: str
    learns: bool = True
    uncertain: bool = True
    human: int = 0
    cloud: bool = False
    without: tuple[Without, ...] = ()
    learn: Mapping[str, Any] = field(default_factory=dict)


ADAPTED, UNADAPTED = "adapted", "no adaptation"

ARMS = (
    Arm(
        ADAPTED,
        "uncertain samples and audits; sure opinions; bank, head and thresholds; compressed",
        cloud=True,
    ),
    Arm(UNADAPTED, "the station as it was fitted", learns=False),
    Arm(
        "pseudo-labels only",
        "every opinion of the teacher, sure or not, on samples drawn by lot; head and thresholds, the bank stays",
        uncertain=False,
        learn={"min_teacher": 0.5, "bank_rows": 0},
    ),
    Arm("random samples", "UTS off: as many samples, drawn by lot from all parts", uncertain=False),
    Arm("bank off", "the memory bank stays as it was fitted", learn={"bank_rows": 0}),
    Arm("head off", "AKD off, as far as a detector has it: no head learns from the teacher", without=("head",)),
    Arm("dense update", "DWC off: every tensor goes down whole", without=("compression",)),
    Arm("human labels", "people label the least certain samples of each round", human=20),
)


@dataclass(frozen=True, slots=True)
class Inspected:
    """Verdicts of some parts, and the alarms of the drift watch over them, the first of each kind."""

    verdicts: Sequence[Verdict]
    alarms: Sequence[Mapping[str, Any]] = ()


class World(Protocol):
    """What reaches outside."""

    def inspect(
        self, station: Path, parts: Sequence[Part], out: Path, mode: Mode, *, audited: bool = False
    ) -> Inspected:
        """Run parts through the pipeline with the station at a folder, into a run folder."""
        ...

    def learn(self, arm: Arm, station: Path, verdicts: Sequence[Verdict], labels: Mapping[str, Label]) -> Learnt:
        """Let the station learn from a round's verdicts and people's labels, by content hash."""
        ...


def run_rounds(
    stream: Stream,
    station: Path,
    out: Path,
    world: World,
    *,
    arms: Sequence[Arm] = ARMS,
    tell: Tell = lambda what: None,
) -> dict[str, Any]:
    """Run all arms; return ``{"start": figures, "arms": [{"name", "what", "rounds": [record, …]}, …]}``.

    Rounds that are finished in ``out`` are not run again.
    """
    start = _kept(out / "start", lambda folder: _measured(stream, station, folder, world, cloud=True, tell=tell))
    found = []
    for arm in arms:
        place, records, before = out / "arms" / arm.name.replace(" ", "-"), [], station
        for number in range(len(stream.rounds)):

            def one(folder: Path, before: Path = before, number: int = number, arm: Arm = arm) -> dict[str, Any]:
                return _round(arm, number, stream, before, folder, world, tell)

            records.append(_kept(place / str(number), one))
            if number:
                shutil.rmtree(place / str(number - 1) / STATION, ignore_errors=True)
            before = place / str(number) / STATION
        found.append({"name": arm.name, "what": arm.what, "rounds": records})
    return {"start": start, "arms": found}


def _kept(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return the record in a folder, made where there is none; a folder without one is a killed round's, and goes."""
    file = folder / RECORD
    if file.is_file():
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"damaged record ({error})", where=file, fix="delete it: its round runs again") from None
        return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record = make(folder)
    write_atomic(file, json.dumps(record, indent=1))
    return record


def _round(
    arm: Arm, number: int, stream: Stream, before: Path, folder: Path, world: World, tell: Tell
) -> dict[str, Any]:
    parts, station = stream.rounds[number], folder / STATION
    shutil.copytree(before, station, ignore=shutil.ignore_patterns("expert"))
    tell(f"{arm.name}, round {number + 1}: inspecting {len(parts)} parts")
    seen = world.inspect(station, parts, folder / "stream", "cascade", audited=True)
    record: dict[str, Any] = {"stream": figures(seen.verdicts), "alarms": [dict(alarm) for alarm in seen.alarms]}
    if arm.learns:
        tell(f"{arm.name}, round {number + 1}: learning")
        asked = choose(seen.verdicts, most=arm.human, known=()) if arm.human else []
        labels = {verdict.sha256: verdict.truth for verdict in asked if verdict.truth is not None}
        record["learnt"] = _told(world.learn(arm, station, seen.verdicts, labels), seen.verdicts)
    return record | _measured(stream, station, folder, world, cloud=arm.cloud, tell=tell)


def _measured(stream: Stream, station: Path, folder: Path, world: World, *, cloud: bool, tell: Tell) -> dict[str, Any]:
    """Return how a station does on the parts held out, and, the edge alone, on those of the time before."""
    tell("measuring on the parts held out")
    found = {
        "held_out": figures(world.inspect(station, stream.held_out, folder / "held_out", "cascade").verdicts),
        "before": figures(world.inspect(station, stream.before, folder / "before", "edge_only").verdicts),
    }
    if cloud:
        alone = figures(world.inspect(station, stream.held_out, folder / "cloud", "cloud_only").verdicts)
        found["cloud_alone"] = alone["final"]
    return found


def figures(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return counts and shares of a run's verdicts; accuracies are over readable parts whose truth is known."""
    known = [v for v in verdicts if v.truth is not None and v.label is not Label.UNREADABLE]
    asked = [verdict for verdict in verdicts if verdict.where is not Where.EDGE]
    reasons: dict[str, int] = {}
    for verdict in asked:
        reason = str(verdict.escalated_for or verdict.reason)
        reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "n": len(verdicts),
        "edge": _share([verdict.edge_label is verdict.truth for verdict in known]),
        "final": _share([verdict.label is verdict.truth for verdict in known]),
        "escalated": _share([verdict.where is not Where.EDGE for verdict in verdicts]),
        "fallbacks": sum(verdict.where is Where.FALLBACK for verdict in verdicts),
        "reasons": reasons,
        "uplink_bytes": sum(verdict.uplink_bytes for verdict in verdicts),
    }


def _told(learnt: Learnt, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return what is kept of a round of learning. How often the teacher is right is known here alone, and of this
    round's parts: samples of an earlier one whose update was dropped come again."""
    truth = {verdict.sha256: verdict.truth for verdict in verdicts}
    models = [ruling for ruling in learnt.rulings if ruling.who == "model"]
    told = [ruling.label is truth[ruling.sha256] for ruling in models if ruling.sha256 in truth]
    applied = learnt.applied
    return {
        "samples": learnt.samples,
        "rulings": len(learnt.rulings),
        "by_people": len(learnt.rulings) - len(models),
        "teacher_right": _share(told),
        "taught": learnt.taught,
        "applied": None if applied is None else {**asdict(applied), "slot": applied.slot.name},
        "update_bytes": learnt.update_bytes,
        "bytes_up": learnt.bytes_up,
        "bytes_down": learnt.bytes_down,
        "seconds": round(learnt.seconds, 2),
    }


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None
