"""``saec vlm export-decoder``: from a checkpoint to a bundle of ONNX graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from saec.cli.options import JsonOption

if TYPE_CHECKING:
    from saec.config import MllmSettings

_PARTS = "decoder,vision,embed"


def export_decoder(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="loupe, a checkpoint's folder, or a decoder's GGUF file.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New folder.", show_default=False)],
    precision: Annotated[
        Literal["float32", "float16", "int8", "int4"], typer.Option(help="Number format of the matrix products.")
    ] = "int8",
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a conversation. Default: 512 for loupe, else 2048.", show_default=False),
    ] = None,
    ar: Annotated[
        int | None,
        typer.Option(
            "--ar",
            metavar="N",
            min=1,
            help="Fix all dimensions: N new tokens a step. NPUs want it.",
            show_default=False,
        ),
    ] = None,
    kv_style: Annotated[Literal["dot", "genie"], typer.Option(help="How the cache's tensors are called.")] = "dot",
    rope: Annotated[
        Literal["inside", "inputs"], typer.Option(help="Whether the graph computes sine and cosine of positions.")
    ] = "inside",
    embeddings: Annotated[
        Literal["outside", "inside"], typer.Option(help="Whether the decoder takes embeddings or token ids.")
    ] = "outside",
    embedded_weights: Annotated[bool, typer.Option("--embedded-weights", help="One file a graph, below 2 GB.")] = False,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="LoRA adapter to merge. Default: loupe's own.", show_default=False),
    ] = None,
    parts: Annotated[str, typer.Option(metavar="PARTS", help="Graphs to write, comma-separated.")] = _PARTS,
    json_: JsonOption = False,
) -> None:
    """From a checkpoint to ONNX graphs: decoder with a fixed cache, vision encoder, embeddings, and their record."""
    from saec.cli.console import print_json, say, say_path, steps
    from saec.errors import BadInput
    from saec.vlm.export.bundle import export_bundle
    from saec.vlm.export.source import PARTS, Layout

    asked = [part.strip() for part in parts.split(",")]
    unknown = [part for part in asked if part not in PARTS]
    if unknown:
        raise BadInput("no such part", where=unknown[0], fix=f"choose among {_PARTS}")
    with steps() as progress:
        task = progress.add_task("reading", total=None)
        bundle = export_bundle(
            model,
            out,
            precision=precision,
            context=context,
            adapter=adapter,
            n=ar,
            parts=[part for part in PARTS if part in asked],
            layout=Layout(style=kv_style, rope=rope, embeddings=embeddings, embedded=embedded_weights),
            progress=lambda what: progress.update(task, description=what),
        )
    if json_:
        print_json({"folder": str(out), **bundle.model_dump(mode="json")})
        return
    size = sum(file.size for file in bundle.files.values())
    say(f"{bundle.model_id}: {size / 1e6:,.0f} MB, context {bundle.signature.context}")
    say_path("Bundle:", out)


def exported(settings: MllmSettings) -> Path:
    """Return the ready bundle of a model, exported under a progress line if it is not there.

    Raises:
        BadInput: it cannot be exported.
    """
    from saec.cli.console import steps
    from saec.vlm.export.ready import ready_bundle

    with steps() as progress:
        task = progress.add_task("looking for the exported model", total=None)
        return ready_bundle(settings, progress=lambda what: progress.update(task, description=f"exporting: {what}"))
