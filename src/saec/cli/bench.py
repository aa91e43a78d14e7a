"""``saec bench``: side-by-side benchmarks. Each prints its tables and saves them as JSON where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saec.cli.asked import Baseline, ClassifierOption, SideOption
from saec.cli.bench_uplink import uplink
from saec.cli.cloud import Kind, backend_of
from saec.cli.measured import finish, images_of, levels_of
from saec.cli.options import CloudOption, ConfigOption, JsonOption, ProductOption, SetOption, StationOption, settings_of
from saec.errors import BadInput

app = typer.Typer(no_args_is_help=True, help="Benchmarks: tables, and JSON with --json FILE.")
app.command()(uplink)

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also save the tables as JSON; - prints it instead.", show_default=False
    ),
]
ImagesOption = Annotated[
    Path | None,
    typer.Option("--images", metavar="DIR", help="Use these images; made-up ones by default.", show_default=False),
]


@app.command()
def scene(
    images: ImagesOption = None,
    limit: Annotated[int, typer.Option(help="At most this many images.")] = 40,
    rounds: Annotated[int, typer.Option(help="Passes over the images.")] = 30,
    json_: JsonFile = None,
) -> None:
    """Scene complexity against a plain OpenCV transcription of the reference's definition."""
    from saec.evaluate.bench_scene import BENCH_SIZES, bench_scene, scene_agreement

    found = images_of(images, limit)
    sizes = BENCH_SIZES if images is None else None
    tables = [bench_scene(found, sizes=sizes, rounds=rounds)]
    if len(found) >= 3:
        tables.append(scene_agreement(found))
    finish(json_, *tables)


@app.command()
def pipeline(
    parts: Annotated[int, typer.Option(help="Parts of a run.")] = 300,
    escalation: Annotated[float, typer.Option(help="Share that goes to the cloud.")] = 0.3,
    edge_ms: Annotated[float, typer.Option(help="How long the edge takes for a part.")] = 20.0,
    cloud_ms: Annotated[float, typer.Option(help="How long the cloud takes for a question.")] = 60.0,
    in_flight: Annotated[int, typer.Option(help="Questions to the cloud at once.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds, of which the median counts.")] = 3,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFile = None,
) -> None:
    """Wall time of the cascade against each of its branches alone, with models that take a stated time."""
    from saec.evaluate.bench_pipeline import bench_pipeline, sleeping_line

    settings = settings_of(config, set_, cloud__in_flight=in_flight)
    line = sleeping_line(parts, escalation=escalation, edge_ms=edge_ms, cloud_ms=cloud_ms)
    finish(json_, bench_pipeline(line, settings, repeats=repeats))


@app.command()
def cloud(
    url: Annotated[str | None, typer.Argument(metavar="URL", help="A running service.", show_default=False)] = None,
    backend: Annotated[
        Kind | None,
        typer.Option(help="Instead: a backend in this process, decisions alone.", show_default=False),
    ] = None,
    station: Annotated[
        Path | None,
        typer.Option("--station", "-s", metavar="DIR", help="Station whose expert answers.", show_default=False),
    ] = None,
    burst: Annotated[
        int | None,
        typer.Option(help="A tenth so many questions at once, then so many, twice.", min=10, show_default=False),
    ] = None,
    batches: Annotated[str, typer.Option(help="Sizes of a backend's batches.")] = "1,2,4,8,16,32",
    images: ImagesOption = None,
    product: Annotated[str, typer.Option(help="Product to name in the questions.")] = "part",
    limit: Annotated[int, typer.Option(help="At most this many images.")] = 32,
    concurrency: Annotated[str, typer.Option(help="Questions at once, one level after the other.")] = "1,2,4,8,16,32",
    seconds: Annotated[float, typer.Option(help="Duration of each level.")] = 5.0,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFile = None,
) -> None:
    """How fast a running cloud service answers, how it bears a burst, or how fast a backend decides.

    A service: throughput, latency and batch sizes over the number of questions at once; with --burst, what becomes of
    ten times as many as are usual. A backend: decisions a second over the size of the batch, with GPU utilisation,
    power and memory where there is a GPU (saec bench cloud --backend transformers --set mllm.model=NAME).
    """
    from saec.cloud.client import HttpCloudClient, probe
    from saec.evaluate.bench_batches import bench_batches
    from saec.evaluate.bench_burst import bench_burst
    from saec.evaluate.bench_cloud import bench_cloud, http_batches
    from saec.types import Query

    levels = levels_of(concurrency)
    settings = settings_of(config, set_, cloud__in_flight=max(levels))
    queries = [
        Query(f"bench-{i}", product, image, (image.shape[1], image.shape[0]), edge_p_defect=0.5, evidence=not backend)
        for i, image in enumerate(images_of(images, limit))
    ]
    if backend is not None and url is None and burst is None:
        made = backend_of(backend, station, settings)
        finish(json_, bench_batches(made, queries, sizes=levels_of(batches), seconds=seconds))
        return
    if url is None or backend is not None:
        raise BadInput("choose what to measure", fix="pass the URL of a service, also with --burst, or --backend")
    health = probe(url, settings.cloud)
    if burst is not None:
        finish(json_, bench_burst(url, settings.cloud, queries, waves=(burst // 10, burst, burst)))
        return
    client = HttpCloudClient(url, settings.cloud, model_id=health.model_id)
    try:
        tables = bench_cloud(
            client,
            queries,
            http_batches(url),
            timeout_s=settings.cloud.timeout_s,
            concurrency=levels,
            seconds=seconds,
        )
    finally:
        client.close()
    finish(json_, *tables)


@app.command()
def vlm(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A name, a checkpoint's folder or a bundle. Default: mllm.model.", show_default=False
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="Number formats under ONNX Runtime.")] = "float32,int8,int4",
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA", help="Ask about these parts; by default ELPV's, from its package.", show_default=False
        ),
    ] = None,
    station: Annotated[
        Path | None,
        typer.Option("--station", "-s", metavar="DIR", help="Station that makes anomaly maps.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(help="At most this many images.")] = 120,
    rounds: Annotated[int, typer.Option(help="Rounds of all arms, each with its share of the images.")] = 3,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFile = None,
) -> None:
    """An exported VLM in ONNX Runtime against the same model in torch: stages, memory, start, and agreement.

    Each arm runs in a process of its own on mllm.threads threads, one question at a time. What is not exported yet is
    exported first. Where torch is not installed, its arm is left out.
    """
    from tempfile import TemporaryDirectory

    from saec.cli.console import steps
    from saec.cli.fit import stepper
    from saec.cli.measured import bundles_of, cells_of, torch_runs
    from saec.evaluate.bench_vlm import bench_vlm
    from saec.vlm.trained import as_trained

    settings = settings_of(config, set_, mllm__model=model)
    wanted = as_trained(settings.mllm)
    bundles = bundles_of(wanted, precision)
    with TemporaryDirectory(prefix="saec-bench-") as scratch, steps() as progress:
        cells = cells_of(images, station, settings, Path(scratch), limit)
        shown = stepper(progress)
        tables = bench_vlm(bundles, wanted, cells, torch=torch_runs(wanted), rounds=rounds, progress=shown)
    finish(json_, *tables)


@app.command()
def accuracy(
    data: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DATA…", help="Data sets in any layout saec reads.", show_default=False),
    ] = None,
    elpv: Annotated[
        bool, typer.Option("--elpv", help="Also ELPV's solar cells, from the elpv-dataset package.")
    ] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFile = None,
) -> None:
    """AUROC and accuracy of the default detector: fitted on good parts, threshold from good parts alone."""
    from saec.cli.console import steps
    from saec.cli.fit import stepper
    from saec.evaluate.bench_accuracy import bench_accuracy, with_splits

    if not data and not elpv:
        raise BadInput("nothing to measure on", fix="name data sets, or pass --elpv")
    settings = settings_of(config, set_)
    with with_splits(data or [], elpv=elpv) as datasets, steps() as progress:
        table = bench_accuracy(datasets, settings, progress=stepper(progress))
    finish(json_, table)


@app.command()
def edge(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Data set; its test parts are timed.")],
    images: Annotated[int, typer.Option(help="At most this many images of each product.")] = 100,
    rounds: Annotated[int, typer.Option(help="Passes over them.")] = 3,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFile = None,
) -> None:
    """Latency from pixels and from files, cold start, and memory of the default detector."""
    from saec.cli.options import dataset_of
    from saec.evaluate.bench_edge import bench_edge

    settings = settings_of(config, set_)
    finish(json_, bench_edge(dataset_of(data, settings), settings, images=images, rounds=rounds))


@app.command()
def table(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Labelled parts: the test split, or all.")],
    station: StationOption,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Folder; an interrupted table is resumed.", show_default=False),
    ],
    cloud: CloudOption = None,
    zero_shot: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|URL",
            help="Who answers without adapter: a name that saec models list knows, a folder, a model of the endpoint "
            "(--cloud openai), or a service. Default: mllm.model without its adapter.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        list[Baseline] | None, typer.Option(help="Also this one; may be repeated.", show_default=False)
    ] = None,
    classifier: ClassifierOption = None,
    side: SideOption = 448,
    parts: Annotated[
        int | None,
        typer.Option(help="At most this many, each product and label with its share.", show_default=False),
    ] = None,
    published: Annotated[bool, typer.Option("--published", help="Also print the figures of the SAEC paper.")] = False,
    product: ProductOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """SAEC's table: edge, cloud zero-shot and tuned, cascade, and the ablations, on the same parts in one go.

    Arms whose model is not at hand are listed with the way to get it. The folder holds table.json, table.md and a run
    folder for each arm; an arm that is done is not run again. Without --cloud: cloud.url of the settings, else the
    station's expert, else mllm; --cloud openai asks the endpoint of the settings.
    """
    from saec.cli.asked import table_of
    from saec.cli.demo import sample
    from saec.cli.evaluate import labelled_parts
    from saec.cli.options import load_station
    from saec.cli.table import run_and_tell

    settings = settings_of(config, set_)
    judge = load_station(station, settings)
    found = labelled_parts(data, judge, settings, product)
    if parts is not None:
        if parts < 1:
            raise BadInput("nothing to measure on", where=f"--parts {parts}", fix="at least 1")
        found = sample(found, parts)
    arms = table_of(
        settings,
        station,
        cloud=cloud,
        zero_shot=zero_shot,
        baselines=baseline or (),
        file=classifier,
        side=side,
    )
    run_and_tell(arms, found, judge, settings, out, published=published, json_=json_)


@app.command()
def update(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Adapter that devices have.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The same adapter, taught.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Labelled parts: the test split, or all.")],
    station: Annotated[
        Path | None,
        typer.Option("--station", "-s", metavar="DIR", help="Station that makes anomaly maps.", show_default=False),
    ] = None,
    keep: Annotated[str, typer.Option(help="Shares of the changed weights.")] = "0.005,0.01,0.02,0.03",
    bits: Annotated[str, typer.Option(help="Bits of a changed weight.")] = "2,4",
    limit: Annotated[int, typer.Option(help="At most this many parts.")] = 300,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFile = None,
) -> None:
    """Compressed updates of an adapter: bytes against accuracy, by share kept, bits, and how weights are chosen."""
    from saec.cli.console import steps
    from saec.cli.demo import sample
    from saec.cli.fit import stepper
    from saec.cli.options import load_station, mllm_backend
    from saec.evaluate.bench_update import SELECTIONS, Way, bench_update
    from saec.evaluate.probe import AdapterProbe, labelled
    from saec.learn.gain import PARTS as GAIN_PARTS

    settings = settings_of(config, set_)
    parts = sample(labelled(data, settings), limit)
    maps = None if station is None else load_station(station, settings)
    try:
        ways = [Way(float(k), int(b), how) for k in keep.split(",") for b in bits.split(",") for how in SELECTIONS]
    except ValueError:
        raise BadInput(
            "not a list of shares or bits", where=f"{keep} {bits}", fix="such as 0.01,0.02 and 2,4"
        ) from None
    backend = mllm_backend(settings)
    every = max(2, len(parts) // GAIN_PARTS)
    aside, measured = parts[::every], [part for number, part in enumerate(parts) if number % every]
    if not measured:
        raise BadInput("too few parts", where=data, fix="pass at least 3 labelled ones")
    probe, answers = (AdapterProbe(backend, some, settings, maps) for some in (measured, aside))
    with steps() as progress:
        table = bench_update(base, new, probe, ways, answers=answers, progress=stepper(progress))
    finish(json_, table)
