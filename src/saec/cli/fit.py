"""``saec fit``: from images of good parts to a station, with what is guaranteed about it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from saec.cli.options import (
    EXPERT,
    CloudOption,
    ConfigOption,
    JsonOption,
    SetOption,
    UplinkOption,
    dataset_of,
    open_cloud,
    patient,
    refuse_learnt,
    settings_of,
)
from saec.errors import BadInput

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from saec.config import Settings
    from saec.data.dataset import Dataset
    from saec.edge.station import Station
    from saec.evaluate.table import Table
    from saec.types import CloudClient


class Rule(StrEnum):
    """How to read a classifier; see :mod:`saec.edge.classifier`."""

    NORMALITY = "normality"
    BINARY = "binary"


@dataclass(frozen=True, slots=True)
class Edge:
    """A classifier to take as the edge."""

    model: Path
    rule: Literal["normality", "binary"]
    side: int
    defect_class: int


Progress = Callable[[str, int, int], None]
"""``(step, done, total)``."""


def fit(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="Good parts, and labelled defects where there are any: a folder of images; one with good/ and "
            "defect/; several of these, a product each; MVTec AD; KolektorSDD; KolektorSDD2; a CSV of path,label.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="STATION", help="Folder of the station; one that is there is replaced."),
    ],
    expert: Annotated[
        bool, typer.Option("--expert", help="Also fit the larger model that saec cloud serve offers.")
    ] = False,
    cloud: CloudOption = None,
    uplink: UplinkOption = None,
    classifier: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL.onnx",
            help="Take this image classifier as the edge instead, as SAEC's baseline does.",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        Rule,
        typer.Option(
            help="How to read the classifier: sure of any class means good, or one of its classes means defect."
        ),
    ] = Rule.NORMALITY,
    side: Annotated[int, typer.Option(metavar="PIXELS", help="Side of the classifier's input.")] = 224,
    defect_class: Annotated[int, typer.Option(metavar="INDEX", help="The class that means defect (binary).")] = 1,
    escape: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Prove that at most this share of defects is passed.", show_default=False),
    ] = None,
    overkill: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="Bound the share of good parts called defect.", show_default=False),
    ] = None,
    escalation: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of parts the router may send to the cloud.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Fit a station from images of good parts; labelled defects calibrate it when there are any.

    With --cloud, or with --expert, the cloud is asked about the calibration parts too, so that both opinions are
    weighed as well as the data allow.
    """
    from saec.cli.console import print_json, print_tables, say, say_path, steps

    dials = {"calibration__escape": escape, "calibration__overkill": overkill, "calibration__escalation": escalation}
    settings = patient(settings_of(config, set_, cloud__uplink=uplink, **dials), cloud)
    dataset = dataset_of(data, settings)
    dataset.require_good()
    begun = time.monotonic()
    how = Edge(classifier, rule.value, side, defect_class) if classifier is not None else None
    with steps() as progress:
        station = fit_into(
            out, dataset, settings, expert=expert, cloud=cloud, classifier=how, progress=stepper(progress)
        )
    if json_:
        print_json(_as_json(station, out))
        return
    say(f"Fitted and calibrated in {time.monotonic() - begun:.0f} s.")
    print_tables(calibration_table(station))
    for product in station.products:
        say(f"{product}: {statement(station, product)}")
    say_path("Station:", out)


def fit_into(
    out: Path,
    dataset: Dataset,
    settings: Settings,
    *,
    expert: bool,
    cloud: str | None,
    progress: Progress,
    classifier: Edge | None = None,
) -> Station:
    """Fit a station and, if wanted, its expert into ``out``; half a station never lies there.

    Raises:
        BadInput: unusable images, not enough data for what was asked, or a full disk.
    """
    if out.exists() and not out.is_dir():
        raise BadInput("the station folder is a file", where=out, fix="pass another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise BadInput("cannot make the station folder", where=out, fix=error.strerror or "check the path") from None
    try:
        opinions: dict[str, float] = {}
        if expert:
            from saec.cloud.expert import fit_expert

            opinions = fit_expert(dataset, settings, out=building / EXPERT, progress=progress)
        choice = cloud or settings.cloud.url or ("embedded" if expert else "off")
        held_out = [part for part in dataset if part.split != "train"]
        refuse_learnt(choice, settings, held_out)
        with open_cloud(choice, settings, building) as client:
            # The expert has learnt from the calibration parts: what counts is what its folds said of them unseen.
            own = opinions if choice == "embedded" else {}
            station = _fit(dataset, settings, client, own, classifier, progress)
        station.save(out)
        if expert:
            shutil.rmtree(out / EXPERT, ignore_errors=True)
            (building / EXPERT).replace(out / EXPERT)
    except OSError as error:
        raise BadInput("cannot write the station", where=out, fix=error.strerror or "check the disk") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return station


def _fit(
    dataset: Dataset,
    settings: Settings,
    cloud: CloudClient | None,
    opinions: dict[str, float],
    classifier: Edge | None,
    progress: Progress,
) -> Station:
    if classifier is None:
        from saec.edge.fit import fit_station

        return fit_station(dataset, settings, cloud=cloud, cloud_opinions=opinions, progress=progress)
    from saec.edge.classifier import ClassifierSpec
    from saec.edge.fit import fit_classifier_station

    spec = ClassifierSpec(rule=classifier.rule, side=classifier.side, defect_class=classifier.defect_class)
    return fit_classifier_station(dataset, settings, classifier.model, spec, cloud=cloud, progress=progress)


def stepper(progress: Bars) -> Progress:
    """Return a callback that draws the bar of the step at hand; those of earlier steps give way to it."""
    tasks: dict[str, TaskID] = {}

    def step(name: str, done: int, total: int) -> None:
        if name not in tasks:
            for earlier in tasks.values():
                progress.update(earlier, visible=False)
            tasks[name] = progress.add_task(name, total=total)
        progress.update(tasks[name], completed=done, total=total)

    return step


def calibration_table(station: Station) -> Table:
    """Return one row for each product: what calibrated it and where its thresholds lie."""
    from saec.calibrate.calibration import ONE_GOOD
    from saec.evaluate.table import Cell, Table

    rows: list[Mapping[str, Cell]] = []
    for product in station.products:
        c = station.calibration(product)
        alone = ONE_GOOD in c.notes  # n_good then counts its copies, and nothing is proven
        rows.append(
            {
                "product": product,
                "good": 1 if alone else c.n_good,
                "defects": c.n_defect,
                "method": c.method,
                "threshold": c.overkill.threshold,
                "overkill": None if alone else f"≤ {c.overkill.bound:.1%}",
                "escape": None if c.escape is None else f"≤ {c.escape.bound:.1%}",
                "to cloud": f"{c.escalation_expected:.1%}",
            }
        )
    notes = (
        "good, defects: parts it was calibrated on; overkill, escape: proven bounds; "
        "to cloud: share of these parts that the router would escalate",
    )
    return Table("Calibration", tuple(rows[0]), rows, notes)


def statement(station: Station, product: str) -> str:
    """Return what is guaranteed about a product, in words."""
    from saec.evaluate.summary import calibration_summary

    text: str = calibration_summary({product: station.calibration(product)})["products"][product]["statement"]
    return text


def _as_json(station: Station, out: Path) -> dict[str, Any]:
    from saec.evaluate.summary import calibration_summary

    found = calibration_summary({product: station.calibration(product) for product in station.products})
    return {"station": str(out), "sha256": station.manifest.sha256, **found}
