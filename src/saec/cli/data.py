"""``saec data``: build leak-proof data sets from public or own images, and prove that they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from saec.cli.options import JsonOption

if TYPE_CHECKING:
    from saec.data.manifest import Manifest
    from saec.data.verify import Report
    from saec.evaluate.table import Table

app = typer.Typer(no_args_is_help=True, help="Build data sets with disjoint splits, and prove that they are.")

Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="The data set as it was downloaded.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to build.")]
Seed = Annotated[int, typer.Option(help="Seed of all choices.")]
Exclude = Annotated[
    list[Path] | None,
    typer.Option(
        help="Leave out the images of this manifest, folder, SFT file or list of hashes; may be repeated.",
        show_default=False,
    ),
]
HowMode = Annotated[Literal["copy", "symlink"], typer.Option(help="Copy the images, or link to them.")]
Train = Annotated[float, typer.Option(help="Share of the good parts to fit on.")]
Calibration = Annotated[float, typer.Option(help="Share of the good parts to calibrate on.")]
DefectCalibration = Annotated[float, typer.Option(help="Share of the defects to calibrate on.")]


@app.command()
def elpv(
    out: Out,
    labels: Annotated[Literal["certain", "all"], typer.Option(help="Cells the experts agreed on, or all.")] = "certain",
    limit: Annotated[
        int | None, typer.Option(help="At most this many test parts of each product.", show_default=False)
    ] = None,
    uncertain: Annotated[
        Literal["drop", "train"], typer.Option(help="Cells in doubt: left out, or to train on with soft labels.")
    ] = "drop",
    train: Train = 0.5,
    calibration: Calibration = 0.2,
    defect_train: Annotated[float, typer.Option(help="Share of the defects for saec train.")] = 0.4,
    defect_calibration: DefectCalibration = 0.2,
    seed: Seed = 2025,
    mode: HowMode = "copy",
    json_: JsonOption = False,
) -> None:
    """Real solar cells from the elpv-dataset package: two products, mono and poly."""
    from saec.data.elpv import build_elpv
    from saec.data.splitting import Shares

    shares = Shares(train, calibration, defect_calibration, defect_train)
    made = build_elpv(
        out,
        labels=labels,
        shares=shares,
        uncertain=uncertain,
        limit=limit,
        seed=seed,
        mode=mode,
    )
    _tell(made, out, json_=json_)


@app.command("mvtec-holdout")
def mvtec_holdout(
    source: Source,
    out: Out,
    n_good: Annotated[int, typer.Option(help="Good parts.")] = 500,
    n_defect: Annotated[int, typer.Option(help="Defects.")] = 500,
    seed: Seed = 2025,
    exclude: Exclude = None,
    mode: HowMode = "copy",
    json_: JsonOption = False,
) -> None:
    """A holdout val/{good,defect} from the test images of MVTec AD, disjoint from training and exclusion lists."""
    from saec.data.builders import build_mvtec_holdout

    made = build_mvtec_holdout(
        source, out, n_good=n_good, n_defect=n_defect, seed=seed, exclude=exclude or (), mode=mode
    )
    _tell(made, out, json_=json_)


@app.command()
def ksdd2(
    source: Source,
    out: Out,
    n_good: Annotated[
        int | None, typer.Option(help="Good parts; as many as defects by default.", show_default=False)
    ] = None,
    with_train: Annotated[bool, typer.Option("--with-train", help="Also write other good parts to fit on.")] = False,
    seed: Seed = 2025,
    exclude: Exclude = None,
    mode: HowMode = "copy",
    json_: JsonOption = False,
) -> None:
    """KolektorSDD2: all defects and equally many good parts."""
    from saec.data.builders import build_ksdd2

    made = build_ksdd2(source, out, n_good=n_good, with_train=with_train, seed=seed, exclude=exclude or (), mode=mode)
    _tell(made, out, json_=json_)


@app.command()
def ksdd(
    source: Source,
    out: Out,
    unit: Annotated[
        Literal["item", "content"], typer.Option(help="Keep whole items together, or only equal images.")
    ] = "item",
    train: Train = 0.4,
    calibration: Calibration = 0.2,
    defect_calibration: DefectCalibration = 0.4,
    seed: Seed = 2025,
    mode: HowMode = "copy",
    json_: JsonOption = False,
) -> None:
    """KolektorSDD: train, calibration and test of 50 items, some of which it repeats."""
    from saec.data.builders import build_ksdd
    from saec.data.splitting import Shares

    shares = Shares(train, calibration, defect_calibration)
    made = build_ksdd(source, out, unit=unit, shares=shares, seed=seed, mode=mode)
    _tell(made, out, json_=json_)


@app.command()
def folder(
    source: Source,
    out: Out,
    train: Train = 0.5,
    calibration: Calibration = 0.2,
    defect_calibration: DefectCalibration = 0.4,
    seed: Seed = 2025,
    mode: HowMode = "copy",
    json_: JsonOption = False,
) -> None:
    """Your own images in good/ and defect/ folders or a CSV file: train, calibration and test."""
    from saec.data.builders import build_folder
    from saec.data.splitting import Shares

    shares = Shares(train, calibration, defect_calibration)
    _tell(build_folder(source, out, shares=shares, seed=seed, mode=mode), out, json_=json_)


@app.command()
def sft(
    source: Annotated[Path, typer.Argument(metavar="DATA", help="A data set with train and test splits.")],
    out: Out,
    defect_train_ratio: Annotated[
        float | None, typer.Option(help="Share of the test defects to train on; 0.5 by default.", show_default=False)
    ] = None,
    val: Annotated[
        Literal["test", "calibration"],
        typer.Option(help="What validates; calibration: the test split is left alone, train defects train."),
    ] = "test",
    maps: Annotated[
        bool, typer.Option("--maps", help="Add anomaly maps, each from a memory without the part, and evidence.")
    ] = False,
    seed: Seed = 2025,
    json_: JsonOption = False,
) -> None:
    """Fine-tuning files train.jsonl and val.jsonl, and the list of what was trained on."""
    from saec.cli.console import print_json, print_tables
    from saec.data.readers import read_dataset
    from saec.data.sft import write_sft
    from saec.evaluate.table import Cell, Table

    extras = None
    if maps:
        from saec.train.maps import MapWriter

        extras = MapWriter(out)
    files = write_sft(
        read_dataset(source), out, defect_train_ratio=defect_train_ratio, val=val, seed=seed, extras=extras
    )
    counts = ((files.train, files.n_train), (files.val, files.n_val))
    rows: list[Mapping[str, Cell]] = [{"file": str(file), "images": count} for file, count in counts]
    if json_:
        print_json({"files": rows, "exclusion": str(files.exclusion), "left_out": files.left_out})
        return
    notes = [f"images to exclude from any test: {files.exclusion}"]
    other = "calibration" if val == "test" else "test"
    notes += [f"{files.left_out} images of the {other} split are in neither"] if files.left_out else []
    print_tables(Table("Fine-tuning files", ("file", "images"), rows, notes))


@app.command()
def verify(
    sources: Annotated[
        list[Path], typer.Argument(metavar="FOLDERS...", help="Built folders, image folders or CSV files.")
    ],
    json_: JsonOption = False,
) -> None:
    """Prove that no image is in two of these sets or splits, byte for byte or nearly; else exit code 1."""
    from dataclasses import asdict

    from saec.cli.console import print_json, print_tables
    from saec.data.manifest import MANIFEST_NAME, verify_manifest
    from saec.data.verify import verify_disjoint
    from saec.errors import BadInput, GateFailed

    for source in sources:
        if (source / MANIFEST_NAME).is_file() and (tampering := verify_manifest(source)):
            what = next((f"{paths[0]} was {how}" for how, paths in asdict(tampering).items() if paths), "changed")
            raise GateFailed(f"the folder {source} is not what its manifest says: {what} (build it anew)")
    report = verify_disjoint(sources)
    if json_:
        print_json({"disjoint": report.disjoint, **asdict(report)})
    else:
        print_tables(_proof(report))
    try:
        report.require_disjoint()
    except BadInput as error:
        raise GateFailed(str(error)) from None


def _proof(report: Report) -> Table:
    from saec.evaluate.table import Cell, Table

    rows: list[Mapping[str, Cell]] = [{"set": name, "images": count} for name, count in report.sets]
    found = "disjoint" if report.disjoint else f"{len(report.overlaps)} overlaps"
    notes = [f"{found}: compared byte for byte and as near-duplicates"]
    if report.unreadable:
        notes.append(f"{len(report.unreadable)} unreadable images could be compared byte for byte only")
    return Table("Sets", ("set", "images"), rows, notes)


def _tell(manifest: Manifest, out: Path, *, json_: bool) -> None:
    from saec.cli.console import print_json, print_tables, say_path
    from saec.evaluate.table import Cell, Table

    counts = manifest.counts()
    if json_:
        print_json({"out": str(out), "dataset": manifest.dataset, "counts": counts, "notes": list(manifest.notes)})
        return
    rows: list[Mapping[str, Cell]] = [
        {"product": product, "split": split, "good": labels.get("good", 0), "defect": labels.get("defect", 0)}
        for product, splits in counts.items()
        for split, labels in sorted(splits.items(), key=lambda item: _ORDER.index(item[0]))
    ]
    print_tables(Table(manifest.dataset, ("product", "split", "good", "defect"), rows, manifest.notes))
    say_path("Built", out)


_ORDER: Sequence[str] = ("train", "calibration", "test")
