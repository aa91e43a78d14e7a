"""``saec demo``: the whole product on real images, with the cloud as a process of its own."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.options import (
    ConfigOption,
    SetOption,
    dataset_of,
    load_station,
    patient,
    refuse_learnt,
    settings_of,
)
from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.data.dataset import Dataset
    from saec.edge.station import Station
    from saec.evaluate.meter import Meter
    from saec.types import CloudClient, Part

SEED = 2025
"""Of the draw of the cells to inspect."""


class Cloud(StrEnum):
    """Who is asked about the parts that the edge is unsure of."""

    LOUPE = "loupe"
    EXPERT = "expert"


LOUPE = "loupe"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where everything is put.")] = Path(
        "runs/demo"
    ),
    parts: Annotated[int, typer.Option(help="Test images to inspect.")] = 250,
    cloud: Annotated[
        Cloud, typer.Option(help="The cloud: Loupe, the small multimodal LLM, or an expert fitted on the spot.")
    ] = Cloud.LOUPE,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Real solar cells, end to end: fit, calibrate, start the cloud, inspect in four ways, compare, report.

    Images: ELPV, 2,624 photographs of solar cells by electroluminescence, two products (mono, poly), from the
    elpv-dataset package. A second call uses data and station again; an interrupted one goes on where it was.
    """
    from saec.cli.console import print_tables, say, say_path
    from saec.data.elpv import build_elpv
    from saec.evaluate.arms import comparison
    from saec.evaluate.report import RunFolder, write_report
    from saec.evaluate.runner import REPORT

    begun = time.monotonic()
    if parts < 8:
        raise BadInput("too few parts to compare anything", where=f"--parts {parts}", fix="at least 8")
    settings = patient(settings_of(config, set_), "mllm" if cloud is Cloud.LOUPE else None)
    manifest = build_elpv(out / "data")
    say(f"1  Data: {len(manifest.entries)} photographs of solar cells, split by content, the same image never twice.")
    dataset = dataset_of(out / "data", settings)
    chosen = sample(dataset.select(split="test").parts, parts)
    place = out if cloud is Cloud.LOUPE else out / cloud
    place.mkdir(exist_ok=True)
    if (place / REPORT).is_file():  # the last demo came to its end: this is a new one
        shutil.rmtree(place / "runs", ignore_errors=True)
        (place / REPORT).unlink()
    dials = [*(["--config", str(config)] if config else []), *(f"--set={item}" for item in set_ or ())]
    asked = _ask_loupe if cloud is Cloud.LOUPE else _ask_expert
    with asked(place, dataset, settings, dials) as (station, client):
        say(f"3  Inspecting {len(chosen)} cells that nobody has seen yet, in four ways; the cloud is its own process.")
        summaries = run_arms(chosen, station, settings, client, place / "runs")
    print_tables(comparison(summaries, title=f"{len(chosen)} solar cells of ELPV, mono and poly"))
    say(verdict(summaries))
    write_report([RunFolder.load(place / "runs" / name) for name in summaries], place / REPORT)
    say(f"Done in {time.monotonic() - begun:.0f} s.")
    say_path("Report (one file, opens offline in any browser):", (place / REPORT).resolve())


@contextmanager
def _ask_loupe(
    place: Path, dataset: Dataset, settings: Settings, dials: Sequence[str]
) -> Iterator[tuple[Station, CloudClient]]:
    """Start Loupe as the cloud, and calibrate the station with what it says of held-out cells."""
    from saec.cli.console import say
    from saec.cli.models import pulled
    from saec.cli.vlm_export import exported

    pulled(LOUPE)
    exported(settings.mllm)
    refuse_learnt("mllm", settings, [part for part in dataset if part.split != "train"])
    say("   Cloud: Loupe, a multimodal LLM of 160 million parameters in 8 bit, as a service on this machine.")
    command = ["--backend", "onnx-vlm", "--model", LOUPE, *dials]
    with _service(command, place, settings) as (url, client):
        yield _station(place / "station", dataset, settings, cloud=url, asked=client.model_id), client


@contextmanager
def _ask_expert(
    place: Path, dataset: Dataset, settings: Settings, dials: Sequence[str]
) -> Iterator[tuple[Station, CloudClient]]:
    """Fit an expert with the station, and start it as the cloud."""
    station = _station(place / "station", dataset, settings, cloud=None, asked="expert")
    command = ["--backend", "expert", "--station", str(place / "station"), *dials]
    with _service(command, place, settings) as (_, client):
        yield station, client


@contextmanager
def _service(command: Sequence[str], place: Path, settings: Settings) -> Iterator[tuple[str, CloudClient]]:
    from saec.cli.service import service_process
    from saec.cloud.client import HttpCloudClient, probe

    with service_process(["cloud", "serve", "--port", "0", *command], place / "cloud.log") as url:
        client = HttpCloudClient(url, settings.cloud, model_id=probe(url, settings.cloud).model_id)
        try:
            yield url, client
        finally:
            client.close()


def _station(folder: Path, dataset: Dataset, settings: Settings, *, cloud: str | None, asked: str) -> Station:
    """Return the station of an earlier demo where it still fits, else fit one: for a cloud, or with an expert.

    A station is calibrated for one model; ``asked`` names it, in a file beside the station.
    """
    from saec.cli.console import say, steps
    from saec.cli.fit import fit_into, statement, stepper

    calibrated_for = folder.with_suffix(".cloud")
    if calibrated_for.is_file() and calibrated_for.read_text(encoding="utf-8") == asked:
        try:
            station = load_station(folder, settings)
            say("2  Station: the one of the last demo.")
            return station
        except BadInput as error:
            say(f"2  The station of the last demo cannot be used ({error.what}): fitting another.")
    shutil.rmtree(folder.parent / "runs", ignore_errors=True)
    begun = time.monotonic()
    with steps() as progress:
        fit_into(folder, dataset, settings, expert=cloud is None, cloud=cloud, progress=stepper(progress))
    station = load_station(folder, settings)
    calibrated_for.write_text(asked, encoding="utf-8")
    say(f"2  Station: fitted on good cells, calibrated on others, in {time.monotonic() - begun:.0f} s.")
    for product in station.products:
        say(f"   {product}: {statement(station, product)}")
    return station


def verdict(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return in one sentence what the cloud was worth."""
    from saec.evaluate.arms import escalated_share

    right = {name: summary["accuracy"] for name, summary in summaries.items()}
    return (
        f"The cascade is right in {right['cascade']:.1%} of the cases and asks the cloud about "
        f"{escalated_share(summaries['cascade']):.0%} of them; the edge alone is right in {right['edge-only']:.1%}, "
        f"the cloud alone in {right['cloud-only']:.1%}, and as many questions drawn by lot give {right['random']:.1%}."
    )


def run_arms(
    parts: Sequence[Part], station: Station, settings: Settings, client: CloudClient, out: Path
) -> dict[str, dict[str, Any]]:
    """Run edge only, cloud only, the cascade, and random routing at the cascade's ratio; return their summaries.

    The cascade's share of the cloud is not only calibrated but also bounded: never more than the dial says.

    Raises:
        typer.Exit: interrupted; the runs are taken up by the next call.
    """
    from saec.cli.live import live
    from saec.cli.tell import tell_run
    from saec.evaluate.arms import ARMS, arm_settings, escalated_share
    from saec.evaluate.runner import recorded, run_parts

    bounded = settings.route.model_copy(update={"budget_share": settings.calibration.escalation})
    summaries: dict[str, dict[str, Any]] = {}
    for name, mode in ARMS.items():
        ratio = escalated_share(summaries["cascade"]) if mode == "random" else None
        of_arm = settings.model_copy(update={"route": bounded}) if mode == "cascade" else settings
        with live(f"   {name:<10}", len(parts), done=recorded(out / name)) as shown:
            outcome = run_parts(
                parts,
                station,
                arm_settings(of_arm, mode, ratio=ratio),
                cloud=None if mode == "edge_only" else client,
                out=out / name,
                command=sys.argv[1:],
                progress=shown,
                meter=_own_meter,
                report=False,
            )
        if outcome.summary is None:
            tell_run(outcome, total=len(parts), json_=False, skipped={})
        else:
            summaries[name] = outcome.summary
    return summaries


def sample(parts: Sequence[Part], count: int) -> list[Part]:
    """Return ``count`` parts, each product and label with its share, always the same ones, in their own order."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault((part.product, str(part.label)), []).append(i)
    # Drawn by lot: the first cells of the data set come from the same few modules. The k-th drawn of a group of n
    # stands at (k + 1/2) / n: the first `count` of all, so ordered, are a fair share of each group.
    lot = random.Random(SEED)
    for members in groups.values():
        lot.shuffle(members)
    ranked = sorted((((k + 0.5) / len(members)), i) for members in groups.values() for k, i in enumerate(members))
    return [parts[i] for i in sorted(i for _, i in ranked[:count])]


def _own_meter() -> Meter:
    """A meter of this process alone: the cloud service, its child here, is another machine in earnest."""
    import psutil

    from saec.evaluate.meter import Meter, ProcessUse

    me = psutil.Process()

    def use() -> ProcessUse:
        times = me.cpu_times()
        return ProcessUse(me.memory_info().rss, times.user + times.system)

    return Meter(use=use)
