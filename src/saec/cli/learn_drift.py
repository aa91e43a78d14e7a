"""``saec learn drift``: has the line moved away from its calibration, and what should be done about it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saec.cli.codes import GATE_FAILED
from saec.cli.options import ConfigOption, JsonOption, SetOption, StationOption, load_station, settings_of
from saec.errors import BadInput


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
    """Hold a run against its station's calibration: alarms with their evidence, and a proposal.

    Exit code 0 where no alarm stands at the run's end, 1 where one does. People's labels count; without any, the known
    truth does. What the cloud said of escalated and audited parts is compared as well.
    """
    from saec.cli.console import print_json, print_tables, say
    from saec.evaluate.drift import drift_summary
    from saec.evaluate.runner import recorded
    from saec.learn.rulings import read_labels

    settings = settings_of(config, set_)
    judge = load_station(station, settings)
    verdicts = recorded(run)
    if not verdicts:
        raise BadInput("no run with verdicts here", where=run, fix="pass the folder given to saec inspect --out")
    names = None if labels is None else read_labels(labels)
    human = None if names is None else {v.sha256: names[n] for v in verdicts for n in _names(v) if n in names}
    if human == {}:
        raise BadInput("no label is about a part of this run", where=labels, fix="name parts by id, path or SHA-256")
    # Verdicts of another version of the station are measured against nothing that they were made with.
    own = [verdict for verdict in verdicts if judge.models.items() <= verdict.models.items()]
    if not own:
        raise BadInput("no verdict of the run is of this station", where=run, fix="pass the station that judged it")
    known = {verdict.product for verdict in own} & set(judge.products)
    calibrations = {product: judge.calibration(product) for product in sorted(known)}
    found = drift_summary(own, calibrations, settings, human)
    if not found:
        raise BadInput("the station holds nothing to compare with", where=station, fix="fit it again")
    if json_:
        print_json(found)
    else:
        for product, seen in found.items():
            if seen["raised"]:
                print_tables(_table(product, seen))
                say(f"{product}: {_said(seen['proposal'])}")
            else:
                say(f"{product}: quiet over {seen['n']} parts.")
    if any(seen["standing"] for seen in found.values()):
        raise typer.Exit(GATE_FAILED)


def _names(verdict: Any) -> tuple[str, ...]:
    return verdict.sha256, verdict.part_id, verdict.path


def _table(product: str, seen: dict[str, Any]) -> Any:
    from saec.evaluate.table import Table

    standing = {alarm["kind"] for alarm in seen["standing"]}
    rows = [
        {
            "alarm": alarm["kind"],
            "value": round(alarm["value"], 3),
            "limit": round(alarm["limit"], 3),
            "parts": alarm["n"],
            "since part": alarm["since"],
            "now": "stands" if alarm["kind"] in standing else "over",
            "evidence": alarm["statement"],
        }
        for alarm in seen["raised"]
    ]
    return Table(f"Drift of {product}, {seen['n']} parts", tuple(rows[0]), rows, (f"window: {seen['window']} parts",))


def _said(proposal: dict[str, Any]) -> str:
    """Return the proposal in words."""
    counts = f"{proposal['n_good']} good, {proposal['n_defect']} defects labelled, {proposal['by_people']} by people"
    text = f"{proposal['action']} ({counts}): {proposal['why']}."
    for name in ("old", "new"):
        if name in proposal:
            p = proposal[name]
            escape = "" if p["escape"] is None else f", escape {p['escape']:.1%}"
            text += f" {name.capitalize()} threshold {p['threshold']:.4g}: overkill {p['overkill']:.1%}{escape}."
    return text
