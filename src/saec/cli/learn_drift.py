"""``saec learn drift``: has the line moved away from its calibration, and what should be done about it?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.codes import GATE_FAILED
from saec.cli.options import ConfigOption, JsonOption, SetOption, StationOption, settings_of
from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.edge.station import Station
    from saec.evaluate.table import Table
    from saec.types import Verdict


def drift(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of saec inspect.", show_default=False)],
    station: StationOption,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="What people say: the columns part and label.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Hold a run against the calibration of the version that judged it: alarms with their evidence, and a proposal.

    Exit code 0 where no alarm stands at the run's end, 1 where one does. People's labels count; without any, the known
    truth does. What the cloud said of escalated and audited parts is compared as well.
    """
    from saec.cli.console import print_json, print_tables, say
    from saec.evaluate.drift import drift_summary
    from saec.evaluate.runner import recorded
    from saec.fleet.slots import Slots
    from saec.learn.rulings import read_labels

    settings = settings_of(config, set_)
    verdicts = recorded(run)
    if not verdicts:
        raise BadInput("no run with verdicts here", where=run, fix="pass the folder given to saec inspect --out")
    names = None if labels is None else read_labels(labels)
    human = None if names is None else {v.sha256: names[n] for v in verdicts for n in _names(v) if n in names}
    if human == {}:
        raise BadInput("no label is about a part of this run", where=labels, fix="name parts by id, path or SHA-256")
    judge, version, own = _last_judge(station, verdicts, settings)
    known = {verdict.product for verdict in own} & set(judge.products)
    calibrations = {product: judge.calibration(product) for product in sorted(known)}
    found = drift_summary(own, calibrations, settings, human)
    if not found:
        raise BadInput("the station holds nothing to compare with", where=station, fix="fit it again")
    others = len(verdicts) - len(own)
    if json_:
        print_json({product: {"version": version, "others": others, **seen} for product, seen in found.items()})
    else:
        for product, seen in found.items():
            if seen["raised"]:
                print_tables(_table(product, seen))
                say(f"{product}: {_said(seen['proposal'])}")
            else:
                say(f"{product}: quiet over {seen['n']} parts.")
        if others:
            say(f"{others} parts that other versions judged are left out; version {version} judged last.")
        if (now := Slots(station).pointer.current.version) != version:
            say(f"Version {version} judged the run, and version {now} counts now: inspect again to see how it does.")
    if any(seen["standing"] for seen in found.values()):
        raise typer.Exit(GATE_FAILED)


def _last_judge(root: Path, verdicts: Sequence[Verdict], settings: Settings) -> tuple[Station, int, list[Verdict]]:
    """Return the version of the station that made the run's last verdicts, its number, and all that it made.

    Verdicts of another version are measured against nothing that they were made with.
    """
    from saec.edge.hot import judge_of, judges_of
    from saec.edge.station import Station

    judges = judges_of(root)
    named = [judge_of(verdict.models) for verdict in verdicts]
    ours = [name for name in named if name[0] in {edge for edge, _ in judges}]
    if not ours:
        raise BadInput("no verdict of the run is of this station", where=root, fix="pass the station that judged it")
    last = judges.get(ours[-1])
    if last is None:
        fix = "inspect again with the version that counts now"
        raise BadInput(f"version {ours[-1][1]}, which judged the run, is gone", where=root, fix=fix)
    own = [verdict for verdict, name in zip(verdicts, named, strict=True) if judges.get(name) == last]
    return Station.load(root, settings=settings, version=last), last.version, own


def _names(verdict: Any) -> tuple[str, ...]:
    return verdict.sha256, verdict.part_id, verdict.path


_SHOWN: dict[str, tuple[str, float]] = {
    "score": ("score distance", 1),
    "scene": ("scene distance", 1),
    "rejects": ("rejected, %", 100),
    "escalation": ("escalated, %", 100),
    "accuracy": ("accuracy lost, %", 100),
    "cascade": ("accuracy below the cascade's, %", 100),
    "cloud lost": ("unanswered, %", 100),
    "cloud slow": ("slowest tenth of the answers, s", 1e-3),
}
"""What a terminal calls each alarm, with its unit, and the factor that makes that unit."""


def _table(product: str, seen: dict[str, Any]) -> Table:
    """Return the alarms: one that stands with its figures now, one that is over with its first."""
    from saec.evaluate.table import Table

    standing = {alarm["kind"]: alarm for alarm in seen["standing"]}
    rows = [_row(standing.get(alarm["kind"], alarm), stands=alarm["kind"] in standing) for alarm in seen["raised"]]
    return Table(f"Drift of {product}, {seen['n']} parts", tuple(rows[0]), rows, (f"window: {seen['window']} parts",))


def _row(alarm: dict[str, Any], *, stands: bool) -> dict[str, Any]:
    name, factor = _SHOWN[alarm["kind"]]
    digits = 3 if factor == 1 else 1
    return {
        "alarm": name,
        "value": round(alarm["value"] * factor, digits),
        "limit": round(alarm["limit"] * factor, digits),
        "parts": alarm["n"],
        "since part": alarm["since"],
        "now": "stands" if stands else "over",
        "evidence": alarm["statement"],
    }


def _said(proposal: dict[str, Any]) -> str:
    """Return the proposal in words."""
    from saec.evaluate.report_words import percent

    by = f"{proposal['by_truth']} by known truth" if proposal["by_truth"] else f"{proposal['by_people']} by people"
    counts = f"{proposal['n_good']} good, {proposal['n_defect']} defects labelled, {by}"
    text = f"{proposal['action']} ({counts}): {proposal['why']}."
    for name in ("old", "new"):
        if name in proposal:
            p = proposal[name]
            escape = "" if p["escape"] is None else f", escape {percent(p['escape'])}"
            text += f" {name.capitalize()} threshold {p['threshold']:.4g}: overkill {percent(p['overkill'])}{escape}."
    return text
