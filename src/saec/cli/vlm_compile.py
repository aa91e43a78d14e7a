"""``saec vlm compile``, ``profile`` and ``quantize``: graphs for devices, and what devices measured of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from saec.cli.options import JsonOption

if TYPE_CHECKING:
    from saec.evaluate.table import Table
    from saec.vlm.compile.job import Provider
    from saec.vlm.compile.record import Metadata, Plan

DEVICE = "Snapdragon 8 Elite QRD"


def compile_(
    target: Annotated[Path, typer.Argument(metavar="BUNDLE|FILE.onnx", help="An exported model, or one graph.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PREFIX", help="Results go to PREFIX_<job>/.", show_default=False),
    ] = Path("compiled"),
    provider: Annotated[
        Literal["qnn-local", "qai-hub", "ort"],
        typer.Option(help="QNN's compiler on this machine, Qualcomm AI Hub, or ONNX Runtime for this CPU."),
    ] = "qnn-local",
    soc: Annotated[int, typer.Option(metavar="ID", help="Qualcomm's id of the SoC, for qnn-local.")] = 57,
    device: Annotated[str, typer.Option(metavar="NAME", help="AI Hub's name of the device, for qai-hub.")] = DEVICE,
    ar: Annotated[
        int,
        typer.Option("--ar", metavar="N", min=1, help="New tokens at a time, where the bundle's graph leaves it free."),
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; compile and upload nothing.")] = False,
    json_: JsonOption = False,
) -> None:
    """Compile a graph for a device, and compare what was made with the CPU; exit code 1 if the compiler fails."""
    from saec.cli.console import print_json, print_tables, say_path, steps
    from saec.vlm.compile.job import run
    from saec.vlm.compile.source import open_source

    source, chosen = open_source(target), _provider(provider, soc, device, ar)
    if dry_run:
        print_json(chosen.plan(source).model_dump(mode="json"))
        return
    with steps() as progress:
        progress.add_task(f"compiling with {provider}", total=None)
        folder, record = run(chosen, source, out)
    if json_:
        print_json({"folder": str(folder), **record.model_dump(mode="json")})
    else:
        print_tables(_compiled(record))
        say_path("Compiled to", folder)


def _provider(name: str, soc: int, device: str, ar: int) -> Provider:
    if name == "ort":
        from saec.vlm.compile.ort import OrtLocal

        return OrtLocal()
    if name == "qai-hub":
        from saec.vlm.compile.hub import QaiHub

        return QaiHub(device, ar)
    from saec.vlm.compile.qnn import QnnLocal

    return QnnLocal(QnnLocal.known(soc), ar)


def _compiled(record: Metadata) -> Table:
    from saec.evaluate.table import Cell, Table

    plan, result = record.plan, record.result
    row: dict[str, Cell] = {
        "for": plan.target.device,
        "nodes": ", ".join(f"{count} {provider}" for provider, count in result.placement.items()) or None,
        "seconds": result.seconds,
        "MB": record.size / 1e6,
        "peak MB": result.peak_mb,
    }
    compared = list(result.compared.items())[:1]
    rest = list(result.compared.items())[1:]
    compared += [max(rest, key=lambda item: item[1].max_abs)] if rest else []
    notes = [f"{name}: at most {gap.max_abs:.2g} from the CPU's, of {gap.largest:.3g}" for name, gap in compared]
    notes += [f"the graph was built anew: {_form(plan)}"] if plan.rebuilt else []
    return Table(f"Compiled with {plan.provider}", tuple(row), [row], notes)


def _form(plan: Plan) -> str:
    signature = plan.signature
    return f"{signature.n} new tokens, cache {signature.cache}, {signature.dtype}" if signature else "fixed"


def profile(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE.json...", help="Profiles of one model, by genie-t2t-run or AI Hub.")
    ],
    json_: JsonOption = False,
) -> None:
    """Show what a device measured: least, median and 90th percentile of each quantity, and what is wrong with it."""
    from saec.cli.console import print_json, print_tables
    from saec.evaluate.table import Cell, Table
    from saec.vlm.compile.profile import read_profiles

    found = read_profiles(files)
    if json_:
        print_json(found.model_dump(mode="json"))
        return
    rows: list[dict[str, Cell]] = [
        {"what": name, "unit": one.unit, "runs": one.runs, "min": one.min, "median": one.median, "p90": one.p90}
        for name, one in found.measured.items()
    ]
    units = ", ".join(f"{count} {unit}" for unit, count in found.layers.items())
    notes = [*([f"layers: {units}"] if units else []), *found.notes]
    print_tables(Table(f"Profile of {found.source}", ("what", "unit", "runs", "min", "median", "p90"), rows, notes))
