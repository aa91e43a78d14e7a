"""``saec inspect``: verdicts for images, folders, data sets, or whatever arrives in a folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from saec.cli.options import (
    CloudOption,
    ConfigOption,
    ExplainOption,
    JsonOption,
    ProductOption,
    RunOption,
    SetOption,
    StationOption,
    UplinkOption,
    follow_station,
    open_cloud,
    open_explainer,
    patient,
    read_parts,
    settings_of,
)
from saec.errors import BadInput

Images = Annotated[
    list[Path],
    typer.Argument(metavar="IMAGES...", help="Image files, folders, data sets or CSV files.", show_default=False),
]
Watch = Annotated[bool, typer.Option("--watch", help="Inspect what arrives in the folder, until Ctrl-C.")]
Escalation = Annotated[
    float | None,
    typer.Option(
        "--escalation", metavar="SHARE", help="At most this share of the parts goes to the cloud.", show_default=False
    ),
]


def inspect(
    images: Images,
    station: StationOption,
    out: RunOption,
    cloud: CloudOption = None,
    uplink: UplinkOption = None,
    explain: ExplainOption = None,
    product: ProductOption = None,
    watch: Watch = False,
    escalation: Escalation = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Inspect images: a verdict for every part, in a run folder with a report.

    Interrupted by Ctrl-C, a kill or a power cut, the same command goes on where it was: no part is lost or judged
    twice. The run folder may grow: new images under new names are added to it. A new version of the station (saec
    learn) is taken up between two parts; each verdict names the version that judged it.
    """
    from saec.cli.live import live
    from saec.cli.tell import refuse_unreadable, tell_run
    from saec.cli.watch import Watcher, product_chooser
    from saec.evaluate.runner import check_products, contents, recorded, run_parts

    dials = {"route__budget_share": escalation, "explain__model": explain, "cloud__uplink": uplink}
    settings = patient(settings_of(config, set_, **dials), cloud)
    _refuse_inside(out, images)
    judge = follow_station(station, settings)
    done = recorded(out)
    watcher = None
    total = None
    if watch:
        if len(images) != 1:
            raise BadInput("one folder can be watched", where=" ".join(map(str, images)), fix="start one run for each")
        watcher = Watcher(images[0], product_chooser(judge.products, product), contents(done))
    else:
        parts = read_parts(images, settings, judge.products, product)
        check_products(parts, judge)
        total = len(parts)
        names = {part.part_id for part in parts}
        done = [verdict for verdict in done if verdict.part_id in names]
    with (
        open_cloud(cloud, settings, station) as client,
        open_explainer(settings) as explainer,
        stopping_on_sigterm(),
        live("watching" if watch else "inspecting", total, done=done) as shown,
    ):
        if watcher is not None:
            watcher.on_skip = shown.skip
        outcome = run_parts(
            parts if watcher is None else watcher.parts(),
            judge,
            settings,
            cloud=client,
            explainer=explainer,
            out=out,
            command=sys.argv[1:],
            progress=shown,
        )
    tell_run(outcome, total=total, json_=json_, skipped=watcher.skipped if watcher is not None else {})
    if outcome.summary is not None and not watch:
        refuse_unreadable(outcome.summary, images, out)


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C: a service manager's stop ends a run in order, with every taken part recorded."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_inside(out: Path, images: Sequence[Path]) -> None:
    """A run folder inside the images would have its own heatmaps inspected the next time."""
    inside = next((path for path in images if path.is_dir() and out.resolve().is_relative_to(path.resolve())), None)
    if inside is not None:
        raise BadInput("the run folder lies inside the images", where=out, fix="choose a folder beside them")
