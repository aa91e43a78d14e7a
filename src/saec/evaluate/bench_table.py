"""SAEC's table: edge only, cloud only zero-shot and tuned, the cascade, and its ablations, on the same parts.

Columns as in the paper (§5, §6 of the specification): accuracy, wall time, GPU utilisation, power, energy per correct
verdict, memory, and the share of the parts that the cloud was asked about. Each arm is a run folder of its own under
``OUT/arms``, so that an interrupted table goes on where it was and an arm that is done is not run again.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from saec.calibrate.policy import Mode, Policy
from saec.config import Settings
from saec.edge.classifier import OnnxClassifier
from saec.errors import BadInput
from saec.evaluate.arms import Varied, arm_settings, escalated_share
from saec.evaluate.baselines import Asked, ClassifierEdge, Shown, as_baseline, image_alone, refuse_learnt, zero_shot
from saec.evaluate.meter import Meter
from saec.evaluate.report import RunFolder, write_report
from saec.evaluate.runner import LEDGER, MANIFEST, REPORT, SUMMARY, Outcome, Station, recorded, run_parts
from saec.evaluate.summary import write_summary
from saec.fleet.ledger import read_verdicts
from saec.route.pipeline import OnVerdict
from saec.route.verdicts import printable
from saec.types import CloudClient, Part, Verdict

ARMS = "arms"
"""Folder of the arms' run folders inside a table's."""

NO_COMPLEXITY = "no-complexity"

Progress = Callable[[str, int, Sequence[Verdict]], AbstractContextManager[OnVerdict]]
"""``(arm, parts, recorded verdicts)``: shows the progress of one arm."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One row. ``dress`` changes the station and marks its verdicts, ``show`` what the cloud is shown."""

    name: str
    mode: Mode
    asked: Asked | None = None
    dress: Callable[[Station, Mapping[str, str]], Station] = Varied
    show: Callable[[CloudClient], CloudClient] = lambda client: client
    published_thresholds: bool = False
    missing: BadInput | None = None

    @property
    def absent(self) -> BadInput | None:
        """How to get what this arm needs and has not got; ``None`` where everything is at hand."""
        return self.missing or (self.asked.missing if self.asked is not None else None)

    @property
    def marks(self) -> dict[str, str]:
        """What its verdicts' models say beside the station's: an arm is never resumed with another cloud."""
        return {"arm": self.name, **({"asked": self.asked.name} if self.asked is not None else {})}

    @property
    def is_baseline(self) -> bool:
        """Whether only the cloud's own answers count."""
        return self.mode == "cloud_only" or self.published_thresholds


@dataclass(frozen=True, slots=True)
class Row:
    """What became of an arm: its summary, or why there is none. ``same_as`` names the arm whose run it shares."""

    arm: str
    summary: Mapping[str, Any] | None
    absent: BadInput | None = None
    same_as: str | None = None


@dataclass(frozen=True, slots=True)
class TableRun:
    """Rows in the order of the arms. ``interrupted`` is the run that Ctrl-C has ended; then rows are missing."""

    rows: Sequence[Row]
    interrupted: Outcome | None = None


def zero_shot_arm(name: str, asked: Asked) -> Arm:
    """Return the arm in which a model without adapter judges everything, shown the part alone."""
    return Arm(name, "cloud_only", asked, zero_shot, image_alone, published_thresholds=True)


def classifier_arm(name: str, classifier: OnnxClassifier | BadInput) -> Arm:
    """Return the arm in which an ImageNet classifier judges everything; an error says how to get one."""
    if isinstance(classifier, BadInput):
        return Arm(name, "edge_only", missing=classifier)

    def dress(station: Station, marks: Mapping[str, str]) -> Station:
        return ClassifierEdge(station, marks, classifier)

    return Arm(name, "edge_only", dress=dress, published_thresholds=True)


def table_arms(tuned: Asked, untuned: Asked, *others: Arm) -> list[Arm]:
    """Return all arms: ``tuned`` is the cloud at its best, ``untuned`` the model without adapter, then ``others``."""
    return [
        Arm("edge-only", "edge_only"),
        *(arm for arm in others if arm.mode == "edge_only"),
        zero_shot_arm("zero-shot", untuned),
        *(arm for arm in others if arm.mode != "edge_only"),
        Arm("cloud-only", "cloud_only", tuned),
        Arm("cascade", "cascade", tuned),
        Arm("no-tuning", "cascade", untuned, zero_shot),
        Arm(NO_COMPLEXITY, "cascade", tuned, without_complexity),
        Arm("random", "random", tuned),
        Arm("no-reference", "cascade", tuned, show=partial(Shown, references=False)),
        Arm("no-anomaly-map", "cascade", tuned, show=partial(Shown, anomaly_map=False)),
    ]


def without_complexity(station: Station, marks: Mapping[str, str]) -> Varied:
    """Return the station that no scene is too complex for."""

    def change(policy: Policy) -> Policy:
        return replace(policy, thresholds=replace(policy.thresholds, tau_scene=math.inf))

    return Varied(station, marks, change)


def run_table(
    arms: Sequence[Arm],
    parts: Sequence[Part],
    station: Station,
    settings: Settings,
    out: Path,
    *,
    shown: Progress,
    command: Sequence[str] = (),
    meter: Callable[[], Meter] = Meter,
) -> TableRun:
    """Run the arms that are not done, those of one cloud together: no two models are in memory at once.

    Raises:
        BadInput: an adapter was trained on some of the parts, the folder holds arms over other parts, another station
            or other settings, or a cloud cannot be opened; the arms that are done stay.
    """
    for adapter in {arm.asked.adapter for arm in arms if arm.asked is not None}:
        refuse_learnt(adapter, parts)
    names = {printable(part.part_id) for part in parts}
    for arm in arms:
        _refuse_others(out / ARMS / arm.name, names)
    found: dict[str, Row] = {arm.name: Row(arm.name, None, arm.absent) for arm in arms if arm.absent}
    shared = {NO_COMPLEXITY} if _needs_no_scene(station, parts) else set()
    for asked, group in _by_cloud([arm for arm in arms if not arm.absent and arm.name not in shared]):
        done = all(_finished(out / ARMS / arm.name, names) for arm in group)
        with nullcontext() if asked is None or done else asked.opened() as client:
            for arm in group:
                cascade = found["cascade"].summary if arm.mode == "random" else None
                ratio = None if cascade is None else escalated_share(cascade)
                folder = out / ARMS / arm.name
                with shown(arm.name, len(parts), recorded(folder)) as progress:
                    outcome = run_arm(
                        arm,
                        parts,
                        station,
                        settings,
                        cloud=client,
                        out=folder,
                        ratio=ratio,
                        command=command,
                        progress=progress,
                        meter=meter,
                    )
                if outcome.summary is None:
                    return TableRun([found[a.name] for a in arms if a.name in found], outcome)
                found[arm.name] = Row(arm.name, outcome.summary)
        del client
        gc.collect()  # a model that nobody asks any more must not count as the next arms' memory
    for name in shared & {arm.name for arm in arms}:
        found[name] = replace(found["cascade"], arm=name, same_as="cascade")
    return TableRun([found[arm.name] for arm in arms])


def run_arm(
    arm: Arm,
    parts: Sequence[Part],
    station: Station,
    settings: Settings,
    *,
    cloud: CloudClient | None,
    out: Path,
    ratio: float | None = None,
    command: Sequence[str] = (),
    progress: OnVerdict | None = None,
    meter: Callable[[], Meter] = Meter,
    report: bool = False,
) -> Outcome:
    """Run one arm into ``out``, or take it up again; ``ratio`` is the escalated share of random routing.

    Raises:
        BadInput: the arm's model is not at hand, or as :func:`~saec.evaluate.runner.run_parts`.
    """
    if arm.absent is not None:
        raise arm.absent
    if arm.asked is not None:
        settings = arm.asked.patient(settings, baseline=arm.is_baseline)
    outcome = run_parts(
        parts,
        arm.dress(station, arm.marks),
        arm_settings(settings, arm.mode, ratio=ratio),
        cloud=None if cloud is None else arm.show(cloud),
        out=out,
        command=command,
        progress=progress,
        meter=meter,
        report=False,
    )
    if outcome.summary is None:
        return outcome
    if arm.is_baseline:
        verdicts = list(read_verdicts(out / LEDGER))
        summary = as_baseline(outcome.summary, verdicts, published_thresholds=arm.published_thresholds)
        write_summary(summary, out / SUMMARY)
        outcome = replace(outcome, summary=summary)
    if report:
        write_report([RunFolder.load(out)], out / REPORT)
    return outcome


def _by_cloud(arms: Sequence[Arm]) -> Iterator[tuple[Asked | None, list[Arm]]]:
    """Group arms by whom they ask, nobody first: the memory of the edge alone holds no model."""
    clouds = dict.fromkeys(arm.asked for arm in arms)
    for asked in sorted(clouds, key=lambda cloud: cloud is not None):
        yield asked, [arm for arm in arms if arm.asked is asked]


def _needs_no_scene(station: Station, parts: Sequence[Part]) -> bool:
    """Whether calibration found no use for the scene score, so that doing without changes nothing."""
    return all(math.isinf(station.policy(name).thresholds.tau_scene) for name in {part.product for part in parts})


def _finished(folder: Path, names: set[str]) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    try:
        pending = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["pending"]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"the manifest is damaged ({error})", where=folder, fix="delete this arm's folder") from None
    return not pending and {verdict.part_id for verdict in recorded(folder)} == names


def _refuse_others(folder: Path, names: set[str]) -> None:
    stranger = next((verdict.part_id for verdict in recorded(folder) if verdict.part_id not in names), None)
    if stranger is not None:
        fix = "pass the same data, or another --out"
        raise BadInput(f"the table was begun on other parts, {stranger} among them", where=folder, fix=fix)
