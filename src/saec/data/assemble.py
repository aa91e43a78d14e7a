"""Writing a planned data set: into a temporary sibling folder, then one rename, so that half a set never exists."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from saec.data.manifest import MANIFEST_NAME, Manifest, ManifestEntry, load_manifest
from saec.data.splitting import GroupedPart
from saec.errors import BadInput
from saec.types import Label

Mode = Literal["copy", "symlink"]
Layout = Literal["product", "holdout"]


@dataclass(frozen=True, slots=True)
class Planned:
    """One image of the set to be built and where its bytes come from."""

    entry: ManifestEntry
    source: Path
    mask: Path | None


def plan(one: GroupedPart, *, split: str, layout: Layout, probability: float | None = None) -> Planned:
    """Place a labelled part in a layout.

    ``product``: ``<product>/<split>/<kind>/<name>`` as MVTec AD has it; ``holdout``: ``val/good|defect/<name>``, or
    ``train/good/<name>``. The name is the part's id with ``__`` for ``/``, so it stays unique and tells its origin.

    Raises:
        BadInput: the part has no label, or its product's name cannot be a folder.
    """
    part = one.part
    if part.label not in (Label.GOOD, Label.DEFECT):
        raise BadInput("an image without a label cannot be put into a split", where=part.part_id)
    kind = "good" if part.label is Label.GOOD else (part.kind or "defect").replace("/", "_")
    name = "__".join(step for step in PurePosixPath(part.part_id).parts if step not in ("..", "/"))
    mask_name = f"{Path(name).stem}_mask{part.mask.suffix}" if part.mask else None
    if layout == "holdout":
        base, folder = PurePosixPath(), PurePosixPath("val" if split == "test" else split, str(part.label))
    else:
        base = _product_folder(part.product)
        folder = base / split / kind
    entry = ManifestEntry(
        path=str(folder / name),
        sha256=one.print.sha256,
        group=one.group,
        product=part.product,
        label=part.label,
        split=split,
        kind=kind,
        source=part.part_id,
        probability=probability,
        mask=str(base / "ground_truth" / kind / mask_name) if mask_name else None,
    )
    return Planned(entry, part.path, part.mask)


def _product_folder(product: str) -> PurePosixPath:
    path = PurePosixPath(product)
    if path.is_absolute() or not path.parts or any(step.startswith(".") for step in path.parts):
        raise BadInput("this product name cannot be a folder", where=repr(product))
    return path


def check_target(out: Path, *, source: Path | None = None) -> None:
    """Refuse, before any work, an output folder that could never be written.

    Raises:
        BadInput: ``out`` is a file, lies inside ``source``, or is a folder with something other than a built set.
    """
    if source is not None and out.resolve().is_relative_to(source.resolve()):
        raise BadInput("the output folder lies inside its source", where=out, fix="choose a folder beside it")
    if out.exists() and not out.is_dir():
        raise BadInput("the output is a file", where=out, fix="choose another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_NAME).is_file():
        raise BadInput("the output folder is not empty", where=out, fix="choose another folder or empty it")


def assemble(
    out: Path,
    planned: Sequence[Planned],
    *,
    dataset: str,
    command: str,
    seed: int,
    parameters: Mapping[str, str | int | float | bool | None],
    notes: Sequence[str] = (),
    mode: Mode = "copy",
) -> Manifest:
    """Write images, masks and ``manifest.json`` to ``out`` and return the manifest.

    A folder that already holds exactly this set is left as it is. With ``symlink`` the images stay where they are.

    Raises:
        BadInput: nothing planned, the folder holds another set, or the disk refuses.
    """
    if mode not in ("copy", "symlink"):
        raise BadInput("unknown mode", where=mode, fix="copy or symlink")
    if not planned:
        raise BadInput("nothing to build: no image is left", where=out)
    ordered = sorted(planned, key=lambda one: one.entry.path)
    paths = [one.entry.path for one in ordered]
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise BadInput("two images would get the same name", where=twice, fix="rename one of them in the source")
    manifest = Manifest(dataset, command, seed, tuple(one.entry for one in ordered), dict(parameters), tuple(notes))
    if _already_built(out, manifest):
        return manifest
    try:
        _write(out, ordered, manifest, mode)
    except OSError as error:
        raise BadInput("cannot write the data set", where=out, fix=error.strerror or "check the disk") from None
    return manifest


def _already_built(out: Path, manifest: Manifest) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    check_target(out)
    if load_manifest(out) != manifest:
        raise BadInput("the output folder holds another data set", where=out, fix="choose another folder or remove it")
    lost = next((path for path in manifest.files() if not (out / path).is_file()), None)
    if lost is not None:
        raise BadInput(f"the output folder holds this data set, but {lost} is gone", where=out, fix="remove the folder")
    return True


def _write(out: Path, planned: Sequence[Planned], manifest: Manifest, mode: Mode) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        building.chmod(0o755)
        for one in planned:
            _place(one.source, building / one.entry.path, mode)
            if one.mask is not None and one.entry.mask is not None:
                _place(one.mask, building / one.entry.mask, mode)
        manifest.write(building / MANIFEST_NAME)
        building.replace(out)  # over nothing or over an empty folder
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _place(source: Path, target: Path, mode: Mode) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if mode == "symlink":
        target.symlink_to(source.resolve())
    else:
        shutil.copyfile(source, target)
