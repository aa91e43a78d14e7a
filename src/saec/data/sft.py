"""Fine-tuning files: ``train.jsonl`` and ``val.jsonl`` with one schema, and the list of what was trained on.

Recipe of the SAEC reference: every train/good image as label 0 and a fraction of the test defects as label 1 train;
the other test images validate. Images of the same content never straddle the two files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saec.data.dataset import Dataset
from saec.data.decode import MAX_PIXELS
from saec.data.hashing import NEAR_DUPLICATE_BITS
from saec.data.manifest import MANIFEST_NAME, load_manifest, write_atomic
from saec.data.splitting import GroupedPart, group_parts, product_rng
from saec.errors import BadInput
from saec.types import Label

EXCLUSION_NAME = "exclude.txt"

HALF = 0.5
"""Share of the test defects that train, unless another is given."""

Extras = Callable[[Sequence[GroupedPart], Sequence[GroupedPart]], Mapping[str, Mapping[str, str]]]
"""(training parts, validation parts) -> further keys of rows, by the sha256 of the image."""


@dataclass(frozen=True, slots=True)
class SftFiles:
    """What was written: rows in each file, and the parts in neither (the source's calibration split)."""

    train: Path
    val: Path
    exclusion: Path
    n_train: int
    n_val: int
    left_out: int


def write_sft(
    dataset: Dataset,
    out: Path,
    *,
    defect_train_ratio: float | None = None,
    val: Literal["test", "calibration"] = "test",
    seed: int = 2025,
    bits: int = NEAR_DUPLICATE_BITS,
    max_pixels: int = MAX_PIXELS,
    extras: Extras | None = None,
) -> SftFiles:
    """Write ``train.jsonl``, ``val.jsonl`` and ``exclude.txt`` into the folder ``out``.

    A row has ``image`` (path relative to the file's folder), ``part_id``, ``product``, ``label`` (0 good, 1 defect),
    ``answer`` ("0" or "1": what follows the prompt's ``Label: ``), ``kind``, ``split`` (train or val),
    ``source_split``, ``sha256`` and ``group``. ``exclude.txt`` names the training images as ``sha256sum`` does, for the
    ``exclude=`` of the holdout builders. A test image with the content of a training image trains too. The same input
    gives the same bytes. A built set that states P(defect) of an image adds ``p_defect``; ``extras`` adds keys to rows.

    ``defect_train_ratio`` is the share of the test defects that train: half of them, if none is given.
    With ``val="calibration"`` the train split trains, its defects included, the calibration split validates, and the
    test split is left alone: for data sets whose own train split has defects. No share of test defects is taken then.

    Raises:
        BadInput: no train split with good parts, no test split, an unlabelled or unreadable image, a bad ratio, or
            ``out`` holds other files of these names.
    """
    if val == "calibration" and defect_train_ratio is not None:
        fix = "leave the share out, or validate on the test split"
        raise BadInput("no test defects train", where=f"defect_train_ratio {defect_train_ratio}", fix=fix)
    ratio = HALF if defect_train_ratio is None else defect_train_ratio
    if not 0 <= ratio <= 1:
        raise BadInput("bad share of the defects", where=ratio, fix="between 0 and 1")
    if not {"train", val} <= set(dataset.splits):
        raise BadInput(f"no train and {val} splits", where=dataset.root, fix="build them with saec data folder")
    dataset.require_good()
    used = Dataset(dataset.name, dataset.root, tuple(part for part in dataset if part.split in ("train", val)))
    unlabelled = next((part for part in used if part.label is None), None)
    if unlabelled is not None:
        raise BadInput("an image without a label", where=unlabelled.path)
    parts = group_parts(used, bits=bits, max_pixels=max_pixels)
    training = _training_groups(parts, ratio, seed)
    train = [one for one in parts if one.group in training]
    held_out = [one for one in parts if one.group not in training]
    exclusion = {EXCLUSION_NAME: "".join(f"{one.print.sha256}  {one.part.part_id}\n" for one in train)}
    _write(out, exclusion)  # refused if another set lies there, whose extras would be overwritten
    added = extras(train, held_out) if extras is not None else {}
    stated = _stated(dataset.root)
    texts = {
        "train.jsonl": _jsonl(train, "train", out, stated, added),
        "val.jsonl": _jsonl(held_out, "val", out, stated, added),
        **exclusion,
    }
    _write(out, texts)
    return SftFiles(
        out / "train.jsonl",
        out / "val.jsonl",
        out / EXCLUSION_NAME,
        len(train),
        len(held_out),
        len(dataset) - len(used),
    )


def _training_groups(parts: Sequence[GroupedPart], ratio: float, seed: int) -> frozenset[str]:
    """Return the groups that train: those of the train split, then test defects until the ratio is reached."""
    training = {one.group for one in parts if one.part.split == "train"}
    for product in sorted({one.part.product for one in parts}):
        defects = [one for one in parts if one.part.product == product and _is_test_defect(one)]
        wanted = round(ratio * len(defects)) - sum(one.group in training for one in defects)
        for at in product_rng(seed, product).permutation(len(defects)):
            if wanted <= 0:
                break
            group = defects[at].group
            if group not in training:
                training.add(group)
                wanted -= sum(one.group == group for one in defects)
    return frozenset(training)


def _is_test_defect(one: GroupedPart) -> bool:
    return one.part.split == "test" and one.part.label is Label.DEFECT


def _stated(root: Path) -> dict[str, float]:
    """Return the probabilities between 0 and 1 that a built set's manifest states, by part id."""
    if not (root / MANIFEST_NAME).is_file():
        return {}
    entries = load_manifest(root).entries
    return {entry.path: entry.probability for entry in entries if entry.probability not in (None, 0.0, 1.0)}


def _jsonl(
    parts: Sequence[GroupedPart],
    split: str,
    out: Path,
    stated: Mapping[str, float],
    added: Mapping[str, Mapping[str, str]],
) -> str:
    lines = []
    for one in parts:
        label = int(one.part.label is Label.DEFECT)
        row: dict[str, object] = {
            "image": Path(os.path.relpath(one.part.path.absolute(), out.absolute())).as_posix(),
            "part_id": one.part.part_id,
            "product": one.part.product,
            "label": label,
            "answer": str(label),
            "kind": one.part.kind,
            "split": split,
            "source_split": one.part.split,
            "sha256": one.print.sha256,
            "group": one.group,
        }
        if one.part.part_id in stated:
            row["p_defect"] = stated[one.part.part_id]
        row |= added.get(one.print.sha256, {})
        lines.append(json.dumps(row, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def _write(out: Path, texts: Mapping[str, str]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            file = out / name
            if file.exists() and file.read_bytes() != text.encode():
                raise BadInput(
                    "another fine-tuning set lies here", where=file, fix="choose another folder or remove it"
                )
        for name, text in texts.items():
            write_atomic(out / name, text)
    except OSError as error:
        raise BadInput("cannot write the files", where=out, fix=error.strerror or "check the folder") from None
