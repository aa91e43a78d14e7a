"""``saec vlm quantize``: a float32 model in fewer bits, and what that costs on real examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from saec.cli.options import ConfigOption, JsonOption, SetOption

if TYPE_CHECKING:
    from saec.config import Settings
    from saec.evaluate.table import Cell
    from saec.vlm.contract.bundle import Bundle
    from saec.vlm.export.quality import Example


def quantize(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="An exported model in float32.")],
    to: Annotated[
        Literal["int8", "int4", "w8a16"],
        typer.Option(help="int8 and int4 round weights, for CPUs; w8a16 rounds activations to 16 bits too, for NPUs."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New folder.", show_default=False)],
    images: Annotated[
        Path | None,
        typer.Option("--images", "-i", metavar="DIR", help="Real images of parts to ask about.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE.txt", help="Of a language model: one prompt a line.", show_default=False),
    ] = None,
    station: Annotated[
        Path | None,
        typer.Option(
            "--station", "-s", metavar="DIR", help="Where the parts' anomaly maps come from.", show_default=False
        ),
    ] = None,
    calibrate: Annotated[int, typer.Option(min=1, help="Examples that give w8a16 its ranges.")] = 32,
    measure: Annotated[int, typer.Option(min=1, help="Other examples, on which the loss is measured.")] = 64,
    ar: Annotated[int, typer.Option("--ar", metavar="N", min=1, help="New tokens at a time, of w8a16.")] = 32,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Round a float32 model's numbers, and measure on real examples what that costs; both are recorded."""
    from saec.cli.console import print_json, print_tables, say_path, steps
    from saec.cli.options import settings_of
    from saec.errors import BadInput
    from saec.evaluate.table import Table
    from saec.vlm.contract.bundle import read_bundle
    from saec.vlm.export.quantize import quantize as write

    if (images is None) == (prompts is None):
        raise BadInput("rounding is measured on real examples", fix="pass --images DIR, or --prompts FILE.txt")
    settings, wanted = settings_of(config, set_), measure + (calibrate if to == "w8a16" else 0)
    record = read_bundle(bundle)
    with steps() as progress:
        task = progress.add_task("reading examples", total=None)
        if prompts is not None:
            examples = _texts(prompts, wanted)
        elif images is not None:
            examples = _questions(images, station, settings, record, wanted)
        made = write(
            bundle,
            to,
            examples,
            out,
            n=ar,
            calibrate=calibrate,
            progress=lambda what: progress.update(task, description=what),
        )
    if json_:
        print_json({"folder": str(out), **made.model_dump(mode="json")})
        return
    size = sum(file.size for file in made.files.values()) / 1e6
    row: dict[str, Cell] = {
        "model": made.model_id,
        "MB": size,
        **{k.replace("_", " "): v for k, v in made.quality.items()},
    }
    print_tables(Table(f"Rounded to {to}", tuple(row), [row]))
    say_path("Written to", out)


def _questions(images: Path, station: Path | None, settings: Settings, bundle: Bundle, count: int) -> list[Example]:
    """Return the question for the verdict about images of a data set or a folder, chosen at random."""
    import random

    from saec.cli.options import load_station, read_parts
    from saec.data.decode import read_with_hash
    from saec.data.readers import read_dataset
    from saec.types import Query
    from saec.vlm.edge.family import at_its_size
    from saec.vlm.export.quality import Example
    from saec.vlm.prompt import Ask, build_question
    from saec.vlm.trained import as_trained

    edge = None if station is None else load_station(station, settings)
    if edge is None:
        parts = list(read_dataset(images, max_pixels=settings.data.max_pixels))
    else:
        parts = read_parts([images], settings, edge.products, None)
    asked = at_its_size(bundle, as_trained(settings.mllm))
    examples = []
    for part in random.Random(0).sample(parts, min(count, len(parts))):
        sha256, image = read_with_hash(part.path, max_pixels=settings.data.max_pixels)
        heatmap = None if edge is None else edge.predict(image, part.product).heatmap
        query = Query(part.part_id, part.product, image, (image.shape[1], image.shape[0]), anomaly_map=heatmap)
        question = build_question(query, Ask.LABEL, asked)
        examples.append(Example(part.part_id, sha256, question))
    return examples


def _texts(file: Path, count: int) -> list[Example]:
    import hashlib

    from saec.errors import BadInput
    from saec.vlm.export.quality import Example

    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise BadInput(f"prompts cannot be read ({why})", where=file) from None
    return [
        Example(f"{file.name}:{number}", hashlib.sha256(line.encode()).hexdigest(), line)
        for number, line in enumerate(lines[:count], 1)
    ]
