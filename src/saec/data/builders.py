"""Builders: a public or own data set becomes a leak-proof train, calibration and test layout, or a balanced holdout.

All read every image once, group the same content, choose with a seed, and write images with a manifest atomically.
Repeating a command is a no-op; another set in the output folder is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np

from saec.data.assemble import Mode, assemble, check_target, plan
from saec.data.dataset import Dataset
from saec.data.decode import MAX_PIXELS
from saec.data.hashing import NEAR_DUPLICATE_BITS
from saec.data.manifest import Manifest
from saec.data.readers import Kind, read_dataset
from saec.data.splitting import DEFAULT_SHARES, GroupedPart, Shares, group_parts, split_by_content, split_by_item
from saec.data.verify import content_hashes
from saec.errors import BadInput
from saec.types import Label

KSDD_SHARES = Shares(train=0.4)
"""Each of the 50 items has about one defect, and items that train lose theirs: a smaller share keeps more to test."""


def build_mvtec_holdout(
    src: Path,
    out: Path,
    *,
    n_good: int = 500,
    n_defect: int = 500,
    seed: int = 2025,
    exclude: Sequence[Path] = (),
    mode: Mode = "copy",
    bits: int = NEAR_DUPLICATE_BITS,
    max_pixels: int = MAX_PIXELS,
) -> Manifest:
    """Build ``val/{good,defect}`` from the test images of MVTec AD (or any data set with a train and a test split).

    A test image is left out when its content is also in the source's train or calibration split, or in ``exclude``
    (manifests, built folders, SFT files, exclusion lists): the reference's holdout contained its own training defects.
    Fewer images than asked for are taken as they come and noted (MVTec AD has 467 good test images).

    Raises:
        BadInput: no test images, none left of a label that was asked for, an unreadable image, or a bad ``out``.
    """
    check_target(out, source=src)
    dataset = read_dataset(src, max_pixels=max_pixels)
    if "test" not in dataset.splits:
        raise BadInput("no test split", where=src, fix="pass the MVTec AD folder or one of its products")
    parts = group_parts(dataset, bits=bits, max_pixels=max_pixels)
    test = [one for one in parts if one.part.split == "test"]
    seen = [one for one in parts if one.part.split != "test"]
    excluded = content_hashes(exclude)
    free, notes = _unseen(test, seen, excluded)
    rng = np.random.default_rng(seed)
    chosen: list[GroupedPart] = []
    for label, wanted in ((Label.GOOD, n_good), (Label.DEFECT, n_defect)):
        chosen += _draw([one for one in free if one.part.label is label], wanted, rng, notes, where=src)
    planned = [plan(one, split="test", layout="holdout") for one in chosen]
    parameters = {"n_good": n_good, "n_defect": n_defect, "excluded": len(excluded)}
    return assemble(
        out,
        planned,
        dataset=f"{dataset.name}-holdout",
        command="mvtec-holdout",
        seed=seed,
        parameters=parameters,
        notes=notes,
        mode=mode,
    )


def build_ksdd2(
    src: Path,
    out: Path,
    *,
    n_good: int | None = None,
    with_train: bool = False,
    seed: int = 2025,
    exclude: Sequence[Path] = (),
    mode: Mode = "copy",
    bits: int = NEAR_DUPLICATE_BITS,
    max_pixels: int = MAX_PIXELS,
) -> Manifest:
    """Build ``val/{good,defect}`` from KolektorSDD2: all defects (masks not empty) and equally many good parts.

    Both official splits are pooled, as in the reference (356 + 356). ``with_train`` also writes the other good parts
    to ``train/good``: without it nothing disjoint is left to fit on.

    Raises:
        BadInput: not that layout, no defects or no good parts left, an unreadable image, or a bad ``out``.
    """
    check_target(out, source=src)
    dataset = read_dataset(src, kind="ksdd2", max_pixels=max_pixels)
    parts = [one for one in group_parts(dataset, bits=bits, max_pixels=max_pixels) if one.part.label is not None]
    excluded = content_hashes(exclude)
    free, notes = _unseen(parts, [], excluded)
    defects = [one for one in free if one.part.label is Label.DEFECT]
    if not defects:
        raise BadInput("no defects (every mask is empty)", where=src, fix="pass the folder with train/ and test/")
    good = [one for one in free if one.part.label is Label.GOOD]
    wanted = len(defects) if n_good is None else n_good
    chosen = defects + _draw(good, wanted, np.random.default_rng(seed), notes, where=src)
    planned = [plan(one, split="test", layout="holdout") for one in chosen]
    if with_train:
        taken = {one.group for one in chosen}
        rest = [one for one in good if one.group not in taken]
        planned += [plan(one, split="train", layout="holdout") for one in rest]
    return assemble(
        out,
        planned,
        dataset="KolektorSDD2-holdout",
        command="ksdd2",
        seed=seed,
        parameters={"n_good": n_good, "with_train": with_train, "excluded": len(excluded)},
        notes=notes,
        mode=mode,
    )


def build_ksdd(
    src: Path,
    out: Path,
    *,
    seed: int = 2025,
    unit: Literal["item", "content"] = "item",
    shares: Shares = KSDD_SHARES,
    mode: Mode = "copy",
    bits: int = NEAR_DUPLICATE_BITS,
    max_pixels: int = MAX_PIXELS,
) -> Manifest:
    """Build train, calibration and test from KolektorSDD, which repeats items (kos01 = kos26, kos27 = kos34).

    ``item`` keeps all images of a physical item (a kosNN folder, and every folder that shares content with it)
    together; a defect on an item used for training is left out. ``content`` keeps only equal images together and uses
    every defect.

    Raises:
        BadInput: not that layout, no good parts, an unreadable image, or a bad ``out``.
    """
    check_target(out, source=src)
    dataset = read_dataset(src, kind="ksdd", max_pixels=max_pixels)
    if unit not in ("item", "content"):
        raise BadInput("unknown unit of splitting", where=unit, fix="item or content")
    by_item = unit == "item"
    parts = group_parts(
        dataset, bits=bits, max_pixels=max_pixels, item=(lambda part: part.path.parent.name) if by_item else None
    )
    splits = (split_by_item if by_item else split_by_content)(parts, shares, seed=seed)
    return _assemble_split(out, dataset, parts, splits, command="ksdd", seed=seed, shares=shares, unit=unit, mode=mode)


def build_folder(
    src: Path,
    out: Path,
    *,
    shares: Shares = DEFAULT_SHARES,
    seed: int = 2025,
    kind: Kind = "auto",
    mode: Mode = "copy",
    bits: int = NEAR_DUPLICATE_BITS,
    max_pixels: int = MAX_PIXELS,
) -> Manifest:
    """Build ``<product>/{train,calibration,test}/<kind>`` from any labelled data set; its own splits are pooled.

    Raises:
        BadInput: images without labels, a product without good parts, an unreadable image, or a bad ``out``.
    """
    check_target(out, source=src)
    source = read_dataset(src, kind=kind, max_pixels=max_pixels)
    dataset = replace(source, parts=tuple(replace(part, split=None) for part in source))
    unlabelled = next((part for part in dataset if part.label is None), None)
    if unlabelled is not None:
        raise BadInput(
            f"{unlabelled.part_id} has no label", where=src, fix="sort the images into good/ and defect/, or pass a CSV"
        )
    dataset.require_good()
    parts = group_parts(dataset, bits=bits, max_pixels=max_pixels)
    splits = split_by_content(parts, shares, seed=seed)
    return _assemble_split(out, dataset, parts, splits, command="folder", seed=seed, shares=shares, mode=mode)


def _unseen(
    candidates: Sequence[GroupedPart], seen: Sequence[GroupedPart], excluded: frozenset[str]
) -> tuple[list[GroupedPart], list[str]]:
    """Return the candidates whose content is neither in ``seen`` nor excluded, and a note about the others."""
    blocked = {one.group for one in seen} | {one.group for one in candidates if one.print.sha256 in excluded}
    free = [one for one in candidates if one.group not in blocked]
    left_out = len(candidates) - len(free)
    notes = (
        [f"{left_out} images left out: same content as training, calibration or excluded images"] if left_out else []
    )
    return free, notes


def _draw(
    parts: Sequence[GroupedPart], wanted: int, rng: np.random.Generator, notes: list[str], *, where: Path
) -> list[GroupedPart]:
    """Draw ``wanted`` parts of one label, or all of them with a note when there are fewer."""
    if wanted < 0:
        raise BadInput("a number of images below zero", where=wanted)
    if wanted and not parts:
        raise BadInput("no images of one label are left to draw from", where=where, fix="ask for 0, or exclude fewer")
    if len(parts) < wanted:
        notes.append(f"{parts[0].part.label}: {len(parts)} of {wanted} images asked for")
    return [parts[at] for at in sorted(rng.permutation(len(parts))[:wanted].tolist())]


def _assemble_split(
    out: Path,
    dataset: Dataset,
    parts: Sequence[GroupedPart],
    splits: Mapping[str, str],
    *,
    command: str,
    seed: int,
    shares: Shares,
    mode: Mode,
    unit: str = "content",
) -> Manifest:
    kept = [one for one in parts if one.part.part_id in splits]
    for product in dataset.products:
        if not any(one.part.product == product and splits[one.part.part_id] == "train" for one in kept):
            raise BadInput(f"product {product!r} has too few good images to train on", where=dataset.root)
    left_out = len(parts) - len(kept)
    return assemble(
        out,
        [plan(one, split=splits[one.part.part_id], layout="product") for one in kept],
        dataset=dataset.name,
        command=command,
        seed=seed,
        parameters={**asdict(shares), "unit": unit},
        notes=[f"{left_out} defects left out: their items are used for training"] if left_out else [],
        mode=mode,
    )
