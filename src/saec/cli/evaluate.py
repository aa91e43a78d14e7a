"""``saec evaluate``, ``sweep`` and ``report``: how good a station is on parts that it has never seen."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saec.cli.asked import Baseline, ClassifierOption, SideOption, baseline_arm
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
    dataset_of,
    load_station,
    open_cloud,
    open_explainer,
    patient,
    refuse_learnt,
    settings_of,
)
from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.edge.station import Station
    from saec.evaluate.bench_table import Arm
    from saec.evaluate.runner import Outcome
    from saec.evaluate.runner import Station as Judge
    from saec.types import CloudClient, Explainer, Part

SWEEP = "sweep.json"

Data = Annotated[
    Path, typer.Argument(metavar="DATA", help="Labelled parts: the test split, or all where there are no splits.")
]


def evaluate(
    data: Data,
    station: StationOption,
    out: RunOption,
    edge_only: Annotated[bool, typer.Option("--edge-only", help="Ask nobody: the edge decides alone.")] = False,
    cloud_only: Annotated[bool, typer.Option("--cloud-only", help="Ask the cloud about every part.")] = False,
    random_ratio: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Ask about this share of the parts, drawn by lot.", show_default=False),
    ] = None,
    baseline: Annotated[
        Baseline | None,
        typer.Option(help="What the SAEC paper compares with, in the place of the cascade.", show_default=False),
    ] = None,
    classifier: ClassifierOption = None,
    side: SideOption = 448,
    cloud: CloudOption = None,
    uplink: UplinkOption = None,
    explain: ExplainOption = None,
    product: ProductOption = None,
    escalation: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="At most this share of the parts goes to the cloud.", show_default=False),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(metavar="FIGURE>=VALUE", help="Exit 1 unless it holds, as in accuracy>=0.9.", show_default=False),
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(metavar="RATE", help="The gate accuracy>=RATE.", show_default=False)
    ] = None,
    max_escape: Annotated[
        float | None, typer.Option(metavar="RATE", help="The gate escape_rate<=RATE.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Judge labelled parts that the station has never seen, and say how often it was right.

    Refused when one of the images is among those that the station was fitted or calibrated on. A gate on any figure
    of summary.json (dots lead inside: latency_ms.p99<=60) turns a miss into exit code 1.

    Baselines: qwen-zero-shot puts every part to a multimodal LLM without adapter (--cloud URL, openai, or the default
    mllm), llava-zero-shot to LLaVA-1.5, which answers in two tokens; yolo-cls judges by an ImageNet classifier alone
    (--classifier). A part that a model does not answer usably counts as wrong.
    """
    from saec.cli.tell import refuse_unreadable, tell_run
    from saec.evaluate.gates import parse_gate, require

    gates = [parse_gate(text) for text in gate or ()]
    gates += [parse_gate(f"accuracy>={min_accuracy}")] if min_accuracy is not None else []
    gates += [parse_gate(f"escape_rate<={max_escape}")] if max_escape is not None else []
    if baseline is not None and explain is not None:
        raise BadInput("a baseline explains nothing", fix="choose one of --baseline and --explain")
    mode = _mode(edge_only, cloud_only, random_ratio, baseline)
    dials = {"route__mode": mode, "route__random_ratio": random_ratio, "route__budget_share": escalation}
    settings = patient(settings_of(config, set_, explain__model=explain, cloud__uplink=uplink, **dials), cloud)
    judge = load_station(station, settings)
    parts = labelled_parts(data, judge, settings, product)
    arm = None
    if baseline is not None:
        arm = baseline_arm(baseline, settings, station, cloud=cloud, file=classifier, side=side)
        opened = nullcontext() if arm.asked is None else arm.asked.opened()
    elif settings.route.mode == "edge_only":
        opened = nullcontext()
    else:
        _needs_cloud(mode, cloud, settings)
        refuse_learnt(cloud, settings, parts)
        opened = open_cloud(cloud, settings, station)
    with open_explainer(settings) if arm is None else nullcontext() as explainer:
        outcome = _run("evaluating", parts, judge, settings, out, opened, arm=arm, explainer=explainer)
    tell_run(outcome, total=len(parts), json_=json_, skipped={})
    if outcome.summary is not None:
        refuse_unreadable(outcome.summary, [data], out)
        require(gates, outcome.summary)


def sweep(
    data: Data,
    station: StationOption,
    out: RunOption,
    cloud: CloudOption = None,
    product: ProductOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Ask edge and cloud about every part once, then try all thresholds: accuracy, time and escalation of each."""
    from saec.cli.console import print_json, print_tables, say_path
    from saec.cli.tell import tell_run
    from saec.evaluate.arms import AskAlways
    from saec.evaluate.arms import sweep as try_thresholds
    from saec.evaluate.report import RunFolder, write_report
    from saec.evaluate.runner import REPORT
    from saec.evaluate.summary import write_atomically

    settings = patient(settings_of(config, set_, route__mode="cascade", route__budget_share=""), cloud)
    judge = load_station(station, settings)
    parts = labelled_parts(data, judge, settings, product)
    _needs_cloud("cloud_only", cloud, settings)
    refuse_learnt(cloud, settings, parts)
    opened = open_cloud(cloud, settings, station)
    outcome = _run("asking both", parts, AskAlways(judge), settings, out, opened, report=False)
    if outcome.summary is None:
        tell_run(outcome, total=len(parts), json_=json_, skipped={})
        return
    run = RunFolder.load(out)
    busy_s, answered = outcome.summary["time"]["cloud_s"], outcome.summary["routing"]["cloud"]
    seconds = busy_s / answered if busy_s is not None and answered else None
    found = try_thresholds(run.verdicts, judge, cloud_seconds=seconds)
    write_atomically(out / SWEEP, json.dumps(found.to_json(), indent=2) + "\n")
    write_report([run], out / REPORT, sweep=found.points)
    if json_:
        print_json({"run": str(out), **found.to_json()})
        return
    print_tables(found.table())
    say_path("Report:", out / REPORT)


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared side by side.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The page. Default: report.html in the run's folder, or beside the folders of several.",
            show_default=False,
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Write one self-contained HTML page about one or several runs; it opens offline."""
    from saec.cli.console import print_json, print_tables, say_path
    from saec.evaluate.arms import Sweep, comparison
    from saec.evaluate.report import RunFolder, write_report
    from saec.evaluate.runner import REPORT

    loaded = [RunFolder.load(run) for run in runs]
    page = out or (runs[0] / REPORT if len(runs) == 1 else runs[0].resolve().parent / REPORT)
    swept = next((run / SWEEP for run in runs if (run / SWEEP).is_file()), None)
    points = Sweep.from_json(_read_json(swept), where=swept).points if swept is not None else None
    write_report(loaded, page, sweep=points)
    if json_:
        print_json({"report": str(page), "runs": [str(run) for run in runs]})
        return
    if len(loaded) > 1:
        print_tables(comparison({run.name: run.summary for run in loaded}))
    say_path("Report:", page)


def labelled_parts(data: Path, station: Station, settings: Settings, product: str | None) -> list[Part]:
    """Return the labelled parts to judge, none of which the station has seen.

    Raises:
        BadInput: no such parts, or one of them was used to fit or calibrate the station.
    """
    from dataclasses import replace

    from saec.data.verify import refuse_overlap
    from saec.evaluate.runner import check_products

    dataset = dataset_of(data, settings)
    if dataset.splits and "test" not in dataset.splits:
        raise BadInput("the data set has splits, but no test split", where=data, fix="build one with saec data")
    parts = [part for part in dataset.select(split="test" if dataset.splits else None) if part.label is not None]
    if not parts:
        raise BadInput("no labelled parts", where=data, fix="sort the images into good/ and defect/, or pass a CSV")
    if product is not None:
        parts = [replace(part, product=product) for part in parts]
    check_products(parts, station)
    refuse_overlap(station.manifest.train_sha256, parts, what="fitting the station")
    refuse_overlap(station.manifest.calibration_sha256, parts, what="calibrating the station")
    return parts


def _run(
    title: str,
    parts: Sequence[Part],
    judge: Judge,
    settings: Settings,
    out: Path,
    opened: AbstractContextManager[CloudClient | None],
    *,
    arm: Arm | None = None,
    explainer: Explainer | None = None,
    report: bool = True,
) -> Outcome:
    """Run the parts, or a baseline's arm over them, with progress."""
    from functools import partial

    from saec.cli.live import live
    from saec.evaluate.bench_table import run_arm
    from saec.evaluate.runner import recorded, run_parts

    run: Callable[..., Outcome] = partial(run_parts, explainer=explainer) if arm is None else partial(run_arm, arm)
    with opened as client, live(title, len(parts), done=recorded(out)) as shown:
        return run(parts, judge, settings, cloud=client, out=out, command=sys.argv[1:], progress=shown, report=report)


def _mode(edge_only: bool, cloud_only: bool, random_ratio: float | None, baseline: Baseline | None) -> str | None:
    chosen = [
        name
        for name, wanted in (
            ("edge_only", edge_only),
            ("cloud_only", cloud_only),
            ("random", random_ratio is not None),
        )
        if wanted
    ]
    if len(chosen) + (baseline is not None) > 1:
        raise BadInput("choose one of --edge-only, --cloud-only, --random-ratio and --baseline")
    return chosen[0] if chosen else None


def _needs_cloud(mode: str | None, cloud: str | None, settings: Settings) -> None:
    if mode in ("cloud_only", "random") and (cloud or settings.cloud.url or "off") == "off":
        raise BadInput("this asks the cloud, and there is none", fix="pass --cloud URL or --cloud embedded")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read the sweep ({error})", where=file, fix="run saec sweep again") from None
    return tree
