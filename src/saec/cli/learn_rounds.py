"""``saec learn rounds``: what learning is worth on a stream of real parts that changes, part by part."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.cloud import RUNTIMES, Kind
from saec.cli.learn_plan import STATION, Plan, begin, changed, made_of
from saec.cli.options import (
    ConfigOption,
    SetOption,
    UplinkOption,
    dataset_of,
    open_cloud,
    open_tokeniser,
    patient,
    settings_of,
)
from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.data.dataset import Dataset
    from saec.evaluate.learning import RealWorld
    from saec.learn.rounds import Arm, Tell
    from saec.learn.stream import Stream

SEED = 2025
ROUNDS, REPORT = "rounds.json", "report.html"


class Drift(StrEnum):
    """What may change about a stream beside its product."""

    LIGHTING = "lighting"


class Master(StrEnum):
    """Who teaches."""

    MODEL = "model"
    LABELS = "labels"


def rounds(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Labelled parts of two products, such as saec data elpv makes.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder; an interrupted run goes on.", show_default=False)
    ],
    first: Annotated[str, typer.Option(metavar="PRODUCT", help="What the station is fitted to.", show_default=False)],
    then: Annotated[
        str | None, typer.Option(metavar="PRODUCT", help="What comes after it.", show_default=False)
    ] = None,
    drift: Annotated[Drift | None, typer.Option(help="Or what happens to it.", show_default=False)] = None,
    rounds_: Annotated[int, typer.Option("--rounds", min=2, help="Rounds.")] = 5,
    parts: Annotated[int, typer.Option(min=2, help="Parts in a round, fewer where there are not enough.")] = 100,
    arms: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="Only these, such as: adapted,no adaptation.", show_default=False),
    ] = None,
    backend: Annotated[Kind, typer.Option(help="The cloud's model, see saec cloud serve.")] = Kind.ONNX,
    teacher: Annotated[
        Master, typer.Option(help="The cloud's model teaches, or people do: the data set's labels.")
    ] = Master.MODEL,
    uplink: UplinkOption = None,
    link_mbit: Annotated[
        float, typer.Option(min=0.001, help="Link in Mbit/s, for the seconds that bytes take.")
    ] = 10.0,
    bytes_: Annotated[
        Path | None,
        typer.Option(
            "--bytes", metavar="FILE", help="Draw what saec bench uplink --json saved here, too.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of which parts are held out, and of the order of the others.")] = SEED,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Let a station learn over rounds of a stream that changes, with the cloud as a process of its own; and without.

    The station is fitted to the train and calibration parts of the first product. The stream has parts that neither it
    nor the cloud's model has seen; from round to round more of them are of the other product, or in an older light, all
    under one name. After each round every arm is measured on parts of the last round's kind that are in no round.
    """
    from saec.cli.console import print_tables, say, say_path
    from saec.evaluate.report_learn import read_curve, rounds_table, write_learn_report

    begun = time.monotonic()
    if (then is None) == (drift is None) or then == first:
        raise BadInput("what changes?", fix="pass --then ANOTHER PRODUCT or --drift lighting")
    # All that can be refused is refused before the first minute is spent, and before anything is written.
    chosen, curve = _arms(arms), None if bytes_ is None else read_curve(bytes_)
    settings = patient(settings_of(config, set_, cloud__uplink=uplink), "mllm")
    dials = [*(["--config", str(config)] if config else []), *(f"--set={item}" for item in set_ or ())]
    dataset = dataset_of(data, settings)
    fitting = _fitting(dataset, first)
    stream = _stream(dataset, fitting, settings, backend, first, then, rounds_, parts, seed)
    plan = Plan(
        *(data.resolve().name, first, then, drift, first, backend, teacher, settings.cloud.uplink),
        *(rounds_, parts, link_mbit, seed, stream.digest(), changed(settings)),
    )
    begin(plan, out)
    try:
        tree = _run(plan, fitting, stream, chosen, settings, dials, out)
        write_learn_report(tree, out / REPORT, uplink=curve)
    except OSError as error:
        fix = error.strerror or "check the disk"
        raise BadInput("the rounds cannot be written", where=error.filename or out, fix=fix) from None
    print_tables(rounds_table(tree))
    say(f"Done in {time.monotonic() - begun:.0f} s.")
    say_path("Report:", out / REPORT)


def _fitting(dataset: Dataset, first: str) -> Dataset:
    """Return what the station is fitted to and calibrated on: those splits of the first product."""
    from saec.data.dataset import make_dataset

    found = dataset.select(product=first)
    if not len(found):
        raise BadInput("no such product in this data set", where=first, fix=f"it has {', '.join(dataset.products)}")
    kept = [part for part in found if part.split in ("train", "calibration")]
    if not kept:
        what = "no part is of a train or calibration split: nothing to fit to that leaves a stream"
        raise BadInput(what, where=first, fix="build the data set with saec data, which keeps splits apart")
    fitting = make_dataset(dataset.name, dataset.root, kept)
    fitting.require_good()
    return fitting


def _stream(
    dataset: Dataset,
    fitting: Dataset,
    settings: Settings,
    backend: Kind,
    first: str,
    then: str | None,
    rounds: int,
    parts: int,
    seed: int,
) -> Stream:
    from saec.cli.console import say
    from saec.evaluate.learning import unseen_stream
    from saec.vlm.trained import as_trained

    mllm = as_trained(settings.mllm) if backend in RUNTIMES else None
    stream = unseen_stream(
        dataset, fitting, mllm=mllm, first=first, then=then, product=first, rounds=rounds, parts=parts, seed=seed
    )
    sizes = ", ".join(str(len(each)) for each in stream.rounds)
    say(f"Stream: {sizes} parts; held out {len(stream.held_out)} of the last kind, {len(stream.before)} of the first.")
    return stream


def _run(
    plan: Plan,
    fitting: Dataset,
    stream: Stream,
    arms: Sequence[Arm],
    settings: Settings,
    dials: Sequence[str],
    out: Path,
) -> dict[str, Any]:
    """Fit the station, start the cloud, run all rounds that are not finished; return and write the record."""
    from saec import __version__
    from saec.edge.station import read_manifest
    from saec.evaluate.learning import refuse_fitted
    from saec.evaluate.run_record import environment
    from saec.evaluate.summary import write_atomically
    from saec.learn.rounds import run_rounds
    from saec.learn.stream import relight

    station = _fitted(out, fitting, settings, plan, dials)
    refuse_fitted(station, stream)
    if plan.drift is not None:
        stream = relight(stream, out / "relit")
    if plan.teacher == Master.LABELS:
        _write_labels(out / "cloud", stream)
    command = ["--backend", plan.backend, "--station", str(station), "--learn", str(out / "cloud"), *dials]
    with _service(command, out / "cloud.log") as url, _world(url, settings, plan.product) as world:
        made = made_of(world.cloud.model_id, read_manifest(station).sha256, out)
        found = run_rounds(stream, station, out, world, arms=arms, tell=_teller())
    versions = {"saec": __version__, **environment()}
    tree = {"plan": asdict(plan), "made": made, **found, "environment": versions}
    write_atomically(out / ROUNDS, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
    return tree


def _arms(names: str | None) -> list[Arm]:
    """Return the arms of these names, the main one first, however they were named."""
    from saec.learn.rounds import ARMS

    if names is None:
        return list(ARMS)
    known = [arm.name for arm in ARMS]
    wanted = [name.strip() for name in names.split(",")]
    stranger = next((name for name in wanted if name not in known), None)
    if stranger is not None:
        raise BadInput("no such arm", where=repr(stranger), fix=f"of {', '.join(known)}")
    return [arm for arm in ARMS if arm.name in wanted]


def _fitted(out: Path, fitting: Dataset, settings: Settings, plan: Plan, dials: Sequence[str]) -> Path:
    """Return the station fitted to the first product, calibrated with what the cloud says of its parts."""
    from saec.cli.console import say, steps
    from saec.cli.fit import fit_into, stepper

    folder = out / STATION
    if folder.is_dir():
        return folder
    begun = time.monotonic()
    with steps() as progress:
        step = stepper(progress)
        if plan.backend == Kind.EXPERT:
            fit_into(folder, fitting, settings, expert=True, cloud=None, progress=step)
        else:
            with _service(["--backend", plan.backend, *dials], out / "fit.log") as url:
                fit_into(folder, fitting, settings, expert=False, cloud=url, progress=step)
    say(f"Station: fitted to {plan.first} in {time.monotonic() - begun:.0f} s.")
    return folder


def _write_labels(desk: Path, stream: Stream) -> None:
    """Put the data set's labels where the cloud looks for people's."""
    from saec.learn.judged import LABELS
    from saec.learn.teacher import HOME

    folder = desk / HOME
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LABELS).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("part", "label"))
        writer.writerows((part.part_id, part.label) for parts in stream.rounds for part in parts)


@contextmanager
def _service(command: Sequence[str], log: Path) -> Iterator[str]:
    from saec.cli.service import service_process

    with service_process(["cloud", "serve", "--port", "0", *command], log) as url:
        yield url


def _teller() -> Tell:
    """Return what says on stderr, a line each, what is done now: also into a log, for rounds take their time."""
    from saec.cli.console import console

    error = console(stderr=True)
    return lambda what: error.print(what, style="dim")


@contextmanager
def _world(url: str, settings: Settings, product: str) -> Iterator[RealWorld]:
    """Yield the world whose cloud is the service at ``url``."""
    from saec.cloud.learning import LearnClient
    from saec.evaluate.learning import Looks, RealWorld, Remembering

    tokeniser = open_tokeniser(settings)
    learner = LearnClient(url, settings.cloud)
    with open_cloud(url, settings, Path()) as client:
        if client is None:
            raise BadInput("the cloud is off", where=url)
        looks = Looks(threads=settings.edge.threads)
        try:
            yield RealWorld(settings, product, Remembering(client), learner, tokeniser, looks)
        finally:
            learner.close()
