"""Readers: a folder or a CSV file becomes a :class:`~saec.data.dataset.Dataset`, whichever layout it has.

Layouts, tried in this order by ``auto``:

==========  ==========================================================================================================
manifest    built by ``saec data``: the ``manifest.json`` names product, label and split of every image
csv         a ``.csv`` file with the columns ``path,label[,product,split,kind,mask]``, paths relative to the file
ksdd2       ``train|test/NNNNN.png`` with ``NNNNN_GT.png``; a mask that is not empty means defect
ksdd        ``kosNN/PartM.jpg`` with ``PartM_label.bmp``; a mask that is not empty means defect
mvtec       ``[product/]train|calibration|test/<kind>/x.png``, masks in ``[product/]ground_truth/<kind>/x_mask.png``
folder      ``[product/]good|defect/x.png``; next to a ``good`` folder any other folder is a kind of defect
plain       images and nothing known about them: label and split are ``None``
==========  ==========================================================================================================
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from saec.data.dataset import Dataset, list_images, make_dataset
from saec.data.decode import MAX_PIXELS, UnreadableImage, read_image
from saec.data.manifest import MANIFEST_NAME, load_manifest
from saec.errors import BadInput
from saec.types import Label, Part

Kind = Literal["auto", "manifest", "csv", "ksdd2", "ksdd", "mvtec", "folder", "plain"]

_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "calibration": "calibration", "calib": "calibration", "cal": "calibration",
    "test": "test", "testing": "test", "val": "test", "validation": "test",
}  # fmt: skip
_GOOD_NAMES = frozenset({"good", "normal", "ok"})
_DEFECT_NAMES = frozenset({"defect", "defects", "defective", "anomaly", "anomalous", "bad", "ng"})
_LABELS = dict.fromkeys((*_GOOD_NAMES, "0"), Label.GOOD) | dict.fromkeys((*_DEFECT_NAMES, "1"), Label.DEFECT)
_MASKS = "ground_truth"
_KSDD_MASK = re.compile(r"(?i)part\d+_label\.bmp")
_KSDD2_MASK = re.compile(r"(?i)\d+_GT\.png")


def read_dataset(root: Path, *, kind: Kind = "auto", max_pixels: int = MAX_PIXELS) -> Dataset:
    """List the images below ``root`` (or in a CSV file) with product, label, split, kind and mask where known.

    Pictures are not opened, except the masks of KolektorSDD and KolektorSDD2, which hold the labels. Hidden files and
    files that are no images are left out, and so are images that the layout has no place for (beside ``train/``, say).
    Symbolic links are followed, each folder once; a link that leads nowhere stays a part, so that the run can record
    it as unreadable.

    Raises:
        BadInput: nothing there, no images, not the layout asked for, or a damaged CSV, mask or manifest.
    """
    if kind not in get_args(Kind):
        raise BadInput("unknown data layout", where=kind, fix="one of " + ", ".join(get_args(Kind)))
    root = Path(root)
    if not root.exists():
        raise BadInput("no such file or folder", where=root)
    if root.is_file():
        if kind not in ("auto", "csv") or (kind == "auto" and root.suffix.lower() != ".csv"):
            raise BadInput("not a folder", where=root, fix="pass a folder of images or a .csv file")
        return _read_csv(root)
    if kind == "csv":
        raise BadInput("is a folder, not a CSV file", where=root)
    if kind == "manifest" or (kind == "auto" and (root / MANIFEST_NAME).is_file()):
        return _read_manifest(root)
    tree = _Tree(root, max_pixels)
    if kind == "auto":
        kind = next(name for name, (fits, _) in _LAYOUTS.items() if fits(tree))  # plain fits anything
    fits, read = _LAYOUTS[kind]
    if not fits(tree):
        raise BadInput(f"not the {kind} layout", where=root, fix="see saec data --help, or let --kind be auto")
    return make_dataset(_name_of(root), root, read(tree))


class _Tree:
    """The image files below a root, as POSIX paths relative to it."""

    def __init__(self, root: Path, max_pixels: int) -> None:
        self.root = root
        self.max_pixels = max_pixels
        self.files = sorted(list_images(root))
        self.known = frozenset(self.files)
        folders = {parent for file in self.files for parent in file.parents if parent.parts}
        self.beside_good = frozenset(folder.parent for folder in folders if folder.name.lower() in _GOOD_NAMES)

    def is_defect(self, mask: PurePosixPath) -> bool:
        try:
            return bool(read_image(self.root / mask, max_pixels=self.max_pixels).any())
        except UnreadableImage as error:
            raise BadInput(f"unreadable mask ({error.why})", where=error.path) from None


def _name_of(root: Path) -> str:
    """The folder's name; above it when that only says which part of a data set the folder is."""
    path = root.resolve()
    generic = _SPLIT_NAMES.keys() | _GOOD_NAMES | _DEFECT_NAMES
    while path.name.lower() in generic and path.parent != path:
        path = path.parent
    return path.name or "images"


# --- one function a layout -------------------------------------------------------------------------------------------


def _fits_ksdd2(tree: _Tree) -> bool:
    return any(
        _KSDD2_MASK.fullmatch(file.name) and file.parent.name.lower() in _SPLIT_NAMES and len(file.parts) == 2
        for file in tree.files
    )


def _read_ksdd2(tree: _Tree) -> Iterator[Part]:
    for file in tree.files:
        if len(file.parts) == 2 and not _KSDD2_MASK.fullmatch(file.name):
            split = _SPLIT_NAMES.get(file.parent.name.lower())
            yield _masked_part(tree, file, f"{file.stem}_GT.png", product="KolektorSDD2", split=split)


def _fits_ksdd(tree: _Tree) -> bool:
    return any(_KSDD_MASK.fullmatch(file.name) for file in tree.files)


def _read_ksdd(tree: _Tree) -> Iterator[Part]:
    for file in tree.files:
        if not _KSDD_MASK.fullmatch(file.name):
            yield _masked_part(tree, file, f"{file.stem}_label.bmp", product="KolektorSDD", split=None)


def _masked_part(tree: _Tree, file: PurePosixPath, mask_name: str, *, product: str, split: str | None) -> Part:
    mask = file.with_name(mask_name)
    label = (Label.DEFECT if tree.is_defect(mask) else Label.GOOD) if mask in tree.known else None
    return Part(
        part_id=str(file),
        product=product,
        path=tree.root / file,
        label=label,
        split=split,
        kind=str(label) if label else None,
        mask=tree.root / mask if label is Label.DEFECT else None,
    )


def _split_index(file: PurePosixPath) -> int | None:
    if _MASKS in file.parts:
        return None
    return next((i for i, step in enumerate(file.parts[:-1]) if step.lower() in _SPLIT_NAMES), None)


def _label_index(tree: _Tree, file: PurePosixPath, start: int = 0) -> int | None:
    """Where the path names a label: a folder named for one, or any folder beside one for good parts."""
    if _MASKS in file.parts:
        return None
    steps = file.parts[:-1]
    for i in range(start, len(steps)):
        if steps[i].lower() in _GOOD_NAMES | _DEFECT_NAMES or PurePosixPath(*steps[:i]) in tree.beside_good:
            return i
    return None


def _fits_mvtec(tree: _Tree) -> bool:
    return any(_split_index(file) is not None for file in tree.files)


def _read_mvtec(tree: _Tree) -> Iterator[Part]:
    """Read images inside a split; those of a product that only has label folders are parts of no split."""
    for file in tree.files:
        at = _split_index(file)
        start = 0 if at is None else at + 1
        label_at = _label_index(tree, file, start)
        if at is None:
            if label_at is not None:
                yield _labelled_part(tree, file, file.parts[:label_at], file.parts[label_at], split=None)
            continue
        if label_at is None:
            label_at = start  # a test folder with kinds of defects and no good parts
        kind = file.parts[label_at] if label_at < len(file.parts) - 1 else None
        product = file.parts[:at] + file.parts[start:label_at]
        yield _labelled_part(tree, file, product, kind, split=_SPLIT_NAMES[file.parts[at].lower()])


def _fits_folder(tree: _Tree) -> bool:
    return any(_label_index(tree, file) is not None for file in tree.files)


def _read_folder(tree: _Tree) -> Iterator[Part]:
    for file in tree.files:
        at = _label_index(tree, file)
        if at is not None:
            yield _labelled_part(tree, file, file.parts[:at], file.parts[at], split=None)


def _labelled_part(
    tree: _Tree, file: PurePosixPath, product: tuple[str, ...], kind: str | None, *, split: str | None
) -> Part:
    label = None if kind is None else (Label.GOOD if kind.lower() in _GOOD_NAMES else Label.DEFECT)
    masks = PurePosixPath(*product, _MASKS, kind or "")
    mask = next((m for m in (masks / f"{file.stem}_mask.png", masks / f"{file.stem}.png") if m in tree.known), None)
    return Part(
        part_id=str(file),
        product="/".join(product) or _name_of(tree.root),
        path=tree.root / file,
        label=label,
        split=split,
        kind=kind,
        mask=tree.root / mask if mask and label is Label.DEFECT else None,
    )


def _read_plain(tree: _Tree) -> Iterator[Part]:
    for file in tree.files:
        yield Part(part_id=str(file), product=_name_of(tree.root), path=tree.root / file)


_LAYOUTS: dict[Kind, tuple[Callable[[_Tree], bool], Callable[[_Tree], Iterator[Part]]]] = {
    "ksdd2": (_fits_ksdd2, _read_ksdd2),
    "ksdd": (_fits_ksdd, _read_ksdd),
    "mvtec": (_fits_mvtec, _read_mvtec),
    "folder": (_fits_folder, _read_folder),
    "plain": (lambda tree: True, _read_plain),
}


# --- files that list their images ------------------------------------------------------------------------------------


def _read_manifest(root: Path) -> Dataset:
    manifest = load_manifest(root / MANIFEST_NAME)
    listed = frozenset(manifest.files())
    stray = next((str(file) for file in sorted(list_images(root)) if str(file) not in listed), None)
    if stray is not None:
        raise BadInput(
            f"{stray} is not in the folder's {MANIFEST_NAME}", where=root, fix="move it away or build the folder anew"
        )
    return make_dataset(manifest.dataset, root, (entry.as_part(root) for entry in manifest.entries))


def _read_csv(file: Path) -> Dataset:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, skipinitialspace=True)
            names = [name.strip().lower() for name in table.fieldnames or ()]
            if not {"path", "label"} <= set(names):
                raise BadInput("the CSV file needs a first line with path,label", where=file)
            table.fieldnames = names
            parts = [_csv_part(file, table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot read the CSV file ({error})", where=file) from None
    if parts and not any(part.path.is_file() for part in parts):
        raise BadInput("none of the listed images exists", where=file, fix="paths are relative to the CSV file")
    return make_dataset(_name_of(file.parent), file.parent, parts)


def _csv_part(file: Path, line: int, row: dict[str, str | None]) -> Part:
    cells = {name: (value or "").strip() for name, value in row.items() if isinstance(value, str)}
    where = f"{file}, line {line}"
    path, label, split = cells.get("path", ""), cells.get("label", "").lower(), cells.get("split", "").lower()
    if not path:
        raise BadInput("no path in this line", where=where)
    if label and label not in _LABELS:
        raise BadInput(f"unknown label {label!r}", where=where, fix="good or defect, 0 or 1, or nothing")
    if split and split not in _SPLIT_NAMES:
        raise BadInput(f"unknown split {split!r}", where=where, fix="train, calibration or test, or nothing")
    mask = cells.get("mask")
    return Part(
        part_id=PurePosixPath(path).as_posix(),
        product=cells.get("product") or _name_of(file.parent),
        path=file.parent / path,
        label=_LABELS.get(label),
        split=_SPLIT_NAMES.get(split),
        kind=cells.get("kind") or None,
        mask=file.parent / mask if mask else None,
    )
