"""``saec learn once``: a station learns from what it was unsure of in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.options import (
    ConfigOption,
    JsonOption,
    SetOption,
    StationOption,
    UplinkOption,
    load_station,
    open_tokeniser,
    settings_of,
)
from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.learn.line import Learnt
    from saec.types import Label, Verdict


def once(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of saec inspect; its images must be there.")],
    station: StationOption,
    cloud: Annotated[
        str, typer.Option("--cloud", metavar="URL", help="A service started with --learn.", show_default=False)
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="What people say: columns part (id, path or SHA-256 of the image) and label (good or defect).",
            show_default=False,
        ),
    ] = None,
    uplink: UplinkOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Let a station learn from what it was unsure of in a run, such as the day's.

    The least certain parts and those with a label go up; the cloud's model has its say on them, and people's labels
    win. An update comes down, and counts from then on unless it is worse on the probe set. Cut off, the same command
    goes on where it was. No part goes up twice.
    """
    from saec.cli.console import print_json, print_tables, steps
    from saec.cli.fit import stepper
    from saec.cloud.learning import LearnClient
    from saec.evaluate.learning import sampler
    from saec.evaluate.runner import recorded
    from saec.learn.line import Line, learn
    from saec.learn.rulings import read_labels
    from saec.types import CloudError

    settings = settings_of(config, set_, cloud__uplink=uplink)
    judge = load_station(station, settings)
    verdicts = [_found(verdict, run) for verdict in recorded(run)]
    if not verdicts:
        raise BadInput("no verdicts to learn from", where=run, fix="pass the run folder of saec inspect")
    people = _by_content(read_labels(labels), verdicts) if labels is not None else {}
    sample_of = sampler(judge, settings, open_tokeniser(settings))
    client = LearnClient(cloud, settings.cloud)
    told: dict[str, Any] = {}
    try:
        for product in judge.products:
            with steps() as progress:
                line, step = Line(station, product, settings), stepper(progress)
                told[product] = learn(line, verdicts, client, sample_of, labels=people, step=step)
    except CloudError as error:
        raise BadInput(f"the cloud did not do its part ({error})", where=cloud, fix="call again to go on") from None
    finally:
        client.close()
    if json_:
        print_json({product: _as_json(learnt) for product, learnt in told.items()})
        return
    print_tables(_table(told))
    for product, learnt in told.items():
        _say_outcome(product, learnt)


def _found(verdict: Verdict, run: Path) -> Verdict:
    """Return the verdict with the place where its image is: as recorded, or from the run folder."""
    inside = run / verdict.path
    return replace(verdict, path=str(inside)) if not Path(verdict.path).is_file() and inside.is_file() else verdict


def _by_content(labels: Mapping[str, Label], verdicts: Sequence[Verdict]) -> dict[str, Label]:
    found = {}
    for verdict in verdicts:
        for name in (verdict.sha256, verdict.part_id, verdict.path):
            if name in labels:
                found[verdict.sha256] = labels[name]
    if not found:
        raise BadInput("no label is about a part of this run", fix="name parts by id, path or SHA-256")
    return found


def _table(told: Mapping[str, Learnt]) -> Any:
    from saec.evaluate.report_words import percent
    from saec.evaluate.table import Cell, Table

    rows: list[Mapping[str, Cell]] = []
    for product, learnt in told.items():
        applied = learnt.applied
        rows.append(
            {
                "product": product,
                "samples": learnt.samples,
                "opinions": len(learnt.rulings),
                "by people": sum(ruling.who == "human" for ruling in learnt.rulings),
                "probe before": None if applied is None else percent(applied.before),
                "after": None if applied is None else percent(applied.after),
                "KB up": round(learnt.bytes_up / 1e3, 1),
                "KB down": round(learnt.bytes_down / 1e3, 1),
                "s": round(learnt.seconds, 1),
            }
        )
    return Table("Learnt", tuple(rows[0]), rows, ("probe: accuracy on parts held out from every lesson",))


def _say_outcome(product: str, learnt: Learnt) -> None:
    from saec.cli.console import say

    applied = learnt.applied
    if not learnt.samples:
        say(f"{product}: nothing that was not learnt from before.")
    elif applied is None:
        say(f"{product}: no opinion was sure enough to learn from.")
    elif applied.kept:
        say(f"{product}: version {applied.version} counts from now on, taught in the {learnt.taught}.")
    else:
        say(f"{product}: version {applied.version} was worse on the probe set and was dropped; nothing has changed.")


def _as_json(learnt: Learnt) -> dict[str, Any]:
    from dataclasses import asdict

    applied = learnt.applied
    tree = asdict(learnt)
    return tree | {"applied": None if applied is None else {**asdict(applied), "slot": str(applied.slot)}}
