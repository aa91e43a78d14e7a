"""``saec bench uplink``: bytes of a question against what its answer is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saec.cli.options import ConfigOption, ProductOption, SetOption
from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.evaluate.table import Table


def uplink(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Labelled parts: the test split, or all.")],
    station: Annotated[
        Path | None,
        typer.Option(
            "--station",
            "-s",
            metavar="DIR",
            help="Station of these parts; without it, masks alone.",
            show_default=False,
        ),
    ] = None,
    product: ProductOption = None,
    limit: Annotated[
        int, typer.Option(min=1, help="At most this many parts, each product and label with its share.")
    ] = 120,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Also draw accuracy over bytes.", show_default=False)
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also save the tables as JSON; - prints it.", show_default=False),
    ] = None,
) -> None:
    """Image, crop, JPEGs of falling quality, and tokens: bytes of a question, accuracy of its answer, alone and fused.

    The multimodal LLM of the settings answers in this process, about what a service would read on the wire. Where parts
    have masks, also how often the tokens that are sent touch the defect.
    """
    from saec.cli.console import steps
    from saec.cli.demo import sample
    from saec.cli.evaluate import labelled_parts
    from saec.cli.fit import stepper
    from saec.cli.measured import finish
    from saec.cli.options import dataset_of, load_station, mllm_backend, refuse_learnt, settings_of
    from saec.cloud.backend import close, warm_up
    from saec.evaluate.bench_masks import bench_masks, with_masks
    from saec.evaluate.bench_uplink import bench_uplink, curve, default_ways
    from saec.evaluate.report_svg import alone
    from saec.evaluate.summary import write_atomically
    from saec.vlm.tokens.tower import TowerTokeniser

    if station is None and (chart is not None or product is not None):
        raise BadInput("without a station masks alone are looked at: no chart, no product", fix="pass --station")
    settings = settings_of(config, set_)
    judge = None if station is None else load_station(station, settings)
    found = labelled_parts(data, judge, settings, product) if judge else with_masks(dataset_of(data, settings))
    parts = sample(found, limit)
    tower = TowerTokeniser.load(settings)
    tables: list[Table] = []
    with steps() as progress:
        if judge is not None:
            refuse_learnt("mllm", settings, parts)
            backend = mllm_backend(settings)
            warm_up(backend)
            ways = default_ways(settings.tokens)
            tables += bench_uplink(backend, judge, tower, parts, settings, ways, progress=stepper(progress))
            close(backend)
        if judge is None or any(part.mask is not None for part in parts):
            tables.append(bench_masks(tower, parts, settings, progress=stepper(progress)))
    finish(json_, *tables)
    if chart is not None:
        write_atomically(chart, alone(curve(tables[0])))
