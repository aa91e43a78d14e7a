"""What benchmarks measure on, and how their tables leave: shared by the commands of :mod:`saec.cli.bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from saec.errors import BadInput

if TYPE_CHECKING:
    from saec.config import MllmSettings, Settings
    from saec.evaluate.bench_vlm_arm import Cell
    from saec.evaluate.table import Table
    from saec.types import Image


def finish(file: Path | None, *tables: Table) -> None:
    """Print the tables, and save ``{"tables": [...], "environment": {...}}`` to ``file``; ``-`` prints that instead.

    Raises:
        BadInput: the file cannot be written.
    """
    import json

    from saec.cli.console import print_json, print_tables, say_path
    from saec.evaluate.run_record import environment
    from saec.evaluate.summary import write_atomically

    tree = {"tables": [table.to_json() for table in tables], "environment": environment()}
    if file is not None and str(file) == "-":
        print_json(tree)
        return
    print_tables(*tables)
    if file is not None:
        write_atomically(file, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
        say_path("Saved", file)


def images_of(folder: Path | None, limit: int) -> list[Image]:
    """Return the first readable images of a folder, or made-up ones of several sizes."""
    if limit < 1:
        raise BadInput("nothing to measure with", where=f"--limit {limit}", fix="at least 1")
    if folder is None:
        return _made_up(limit)
    from saec.data.decode import UnreadableImage, read_image
    from saec.data.readers import read_dataset

    found = []
    for part in read_dataset(folder).parts[:limit]:
        try:
            found.append(read_image(part.path))
        except UnreadableImage as error:
            raise BadInput(f"unreadable image ({error.why})", where=error.path, fix="leave it out") from None
    return found


def cells_of(data: Path | None, station: Path | None, settings: Settings, scratch: Path, limit: int) -> list[Cell]:
    """Return parts to ask a VLM about, a fair share of each product and label, test parts where there are splits.

    Anomaly maps are those of ``station``, none without one. Everything made here lies in ``scratch``. Without ``data``
    the parts are ELPV's, from its package.

    Raises:
        BadInput: no parts, a product that the station does not know, or the package is not installed.
    """
    import numpy as np

    from saec.cli.demo import sample
    from saec.cli.options import dataset_of, load_station
    from saec.data.decode import read_image
    from saec.data.elpv import build_elpv
    from saec.evaluate.bench_vlm_arm import Cell
    from saec.evaluate.runner import check_products

    if data is None:
        data = scratch / "elpv"
        build_elpv(data, mode="symlink")
    dataset = dataset_of(data, settings)
    parts = sample(dataset.select(split="test" if dataset.splits else None).parts, limit)
    cells = [Cell(image=part.path, product=part.product) for part in parts]
    if station is None:
        return cells
    judge = load_station(station, settings)
    check_products(parts, judge)
    for number, cell in enumerate(cells):
        heatmap = judge.predict(read_image(cell.image), cell.product).heatmap
        if heatmap is not None:
            cell.anomaly_map = scratch / f"{number}.npy"
            np.save(cell.anomaly_map, heatmap, allow_pickle=False)
    return cells


def bundles_of(settings: MllmSettings, precisions: str) -> dict[str, Path]:
    """Return the bundle of a model in each precision, such as ``float32,int8``, exported where it is not yet.

    A model that is a bundle itself has the one that it was exported in.

    Raises:
        BadInput: an unknown precision, or a model that cannot be exported.
    """
    from typing import get_args

    from saec.cli.console import console
    from saec.config import MllmSettings
    from saec.vlm.contract.bundle import RECORD, read_bundle
    from saec.vlm.export.ready import ready_bundle

    folder = Path(settings.model)
    if (folder / RECORD).is_file():
        return {read_bundle(folder, hashes=False).precision: folder}
    known = get_args(MllmSettings.model_fields["precision"].annotation)
    found = {}
    for name in precisions.split(","):
        if name not in known:
            raise BadInput("unknown precision", where=name, fix=f"of {', '.join(known)}, with commas between them")
        with console(stderr=True).status(f"{settings.model} in {name}"):
            found[name] = ready_bundle(settings.model_copy(update={"precision": name}))
    return found


def torch_runs(settings: MllmSettings) -> bool:
    """Return whether this model can run in torch here."""
    from importlib.util import find_spec

    from saec.vlm.contract.bundle import RECORD

    installed = all(find_spec(name) is not None for name in ("torch", "transformers", "peft"))
    return installed and not (Path(settings.model) / RECORD).is_file()


def _made_up(count: int) -> list[Image]:
    """Return smooth textures with some noise, 448 pixels square: neither flat nor white noise, as parts are."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(2025)
    images = []
    for _ in range(count):
        coarse = rng.integers(40, 215, (28, 28, 3), dtype=np.uint8)
        smooth = np.asarray(cv2.resize(coarse, (448, 448), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
        grain = rng.integers(0, 12, smooth.shape, dtype=np.uint8)
        images.append(np.asarray(cv2.add(smooth, grain), dtype=np.uint8))
    return images


def levels_of(text: str) -> list[int]:
    """Read sizes of batches, or numbers of questions at once, such as ``1,2,4``.

    Raises:
        BadInput: anything else.
    """
    try:
        levels = [int(step) for step in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise BadInput("not a list of sizes", where=text, fix="whole numbers from 1 on, such as 1,2,4")
    return levels
