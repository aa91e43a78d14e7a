"""ELPV: 2,624 real solar cells with expert defect probabilities, from the ``elpv-dataset`` package.

The package is not imported, only its files are read: its loader would hold all images in memory.
Source: Buerhop-Lutz et al., *A Benchmark for Visual Identification of Defective Solar Cells* (CC BY-NC-SA 4.0).
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from saec.data.assemble import Mode, assemble, check_target, plan
from saec.data.dataset import make_dataset
from saec.data.hashing import NEAR_DUPLICATE_BITS
from saec.data.manifest import Manifest
from saec.data.splitting import GroupedPart, Shares, group_parts, product_rng, split_by_content
from saec.errors import BadInput
from saec.types import Label, Part

Labels = Literal["certain", "all"]
Uncertain = Literal["drop", "train"]

ELPV_SHARES = Shares(defect_calibration=0.2, defect_train=0.4)
"""Unlike elsewhere defects train here too: the shipped multimodal model learns from these, and from no others."""

_PACKAGE = "elpv_dataset"


def build_elpv(
    out: Path,
    *,
    labels: Labels = "certain",
    shares: Shares = ELPV_SHARES,
    uncertain: Uncertain = "drop",
    limit: int | None = None,
    seed: int = 2025,
    mode: Mode = "copy",
    source: Path | None = None,
    bits: int = NEAR_DUPLICATE_BITS,
) -> Manifest:
    """Build ``out/{mono,poly}/{train,calibration,test}/{good,defect}``.

    ``certain`` takes the cells on which the experts agreed (probability 0: good, 1: defect); ``all`` calls a cell
    defective from 0.5 on. With ``uncertain="train"`` the cells in doubt (1/3, 2/3) go to ``train/uncertain``, for
    models that learn from soft labels; one that resembles a held-out image stays out. The manifest keeps the
    probability. ``limit`` caps the test parts of each product, keeping
    the share of defects. ``source`` is a folder with ``labels.csv`` instead of the package's.

    Raises:
        BadInput: the package is missing or damaged, an unknown ``labels`` or ``uncertain``, or a bad ``out``.
    """
    check_target(out)
    if labels not in ("certain", "all"):
        raise BadInput("unknown choice of labels", where=labels, fix="certain or all")
    if uncertain not in ("drop", "train") or (uncertain == "train" and labels == "all"):
        raise BadInput("unknown choice of uncertain cells", where=uncertain, fix="drop, or train with labels certain")
    if limit is not None and limit < 2:
        raise BadInput("a limit of test parts below 2", where=limit)
    root = source or _package_folder()
    cells = _read_labels(root / "labels.csv")
    taken = {path: cell for path, cell in cells.items() if labels == "all" or cell[0] in (0.0, 1.0)}
    parts = _grouped(root, taken, bits)
    splits = split_by_content(parts, shares, seed=seed)
    if uncertain == "train":
        parts, splits = _with_uncertain(parts, splits, _grouped(root, cells, bits))
        taken = cells
    keep = _limited(parts, splits, limit, seed)
    kept = [one for one in parts if one.part.part_id in keep]
    planned = [
        plan(one, split=splits[one.part.part_id], layout="product", probability=taken[one.part.part_id][0])
        for one in kept
    ]
    left_out = len(parts) - len(kept)
    return assemble(
        out,
        planned,
        dataset="elpv",
        command="elpv",
        seed=seed,
        parameters={**asdict(shares), "labels": labels, "uncertain": uncertain, "limit": limit},
        notes=[f"{left_out} test parts left out: limit of {limit} a product"] if left_out else [],
        mode=mode,
    )


def _grouped(root: Path, cells: Mapping[str, tuple[float, str]], bits: int) -> list[GroupedPart]:
    dataset = make_dataset("elpv", root, [_part(root, path, *cell) for path, cell in cells.items()])
    dataset.require_good()
    return group_parts(dataset, bits=bits)


def _with_uncertain(
    parts: Sequence[GroupedPart], splits: Mapping[str, str], everything: Sequence[GroupedPart]
) -> tuple[list[GroupedPart], dict[str, str]]:
    """Add the cells that are in no split to train, but for those in one group with a held-out one."""
    held = {one.group for one in everything if splits.get(one.part.part_id) in ("calibration", "test")}
    added = [one for one in everything if one.part.part_id not in splits and one.group not in held]
    renamed = [replace(one, part=replace(one.part, kind="uncertain", label=Label.DEFECT)) for one in added]
    return [*parts, *renamed], {**splits, **{one.part.part_id: "train" for one in added}}


def _package_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    folder = next(
        (Path(folder) / "data" for folder in folders if (Path(folder) / "data" / "labels.csv").is_file()), None
    )
    if folder is None:
        raise BadInput("the package elpv-dataset is missing", fix='pip install "saec[elpv]"')
    return folder


def _read_labels(file: Path) -> dict[str, tuple[float, str]]:
    """Return path → (probability, product) from lines such as ``images/cell0001.png  1.0  mono``."""
    try:
        rows = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {path: (float(probability), product) for path, probability, product in rows}
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read the labels of ELPV ({error})", where=file, fix="reinstall elpv-dataset") from None


def _part(root: Path, path: str, probability: float, product: str) -> Part:
    label = Label.DEFECT if probability >= 0.5 else Label.GOOD
    return Part(path, product, root / path, label, kind=str(label))


def _limited(parts: Sequence[GroupedPart], splits: Mapping[str, str], limit: int | None, seed: int) -> frozenset[str]:
    """Return the ids to keep: all of train and calibration, and of each product's test parts a stratified sample."""
    keep = {part_id for part_id, split in splits.items() if split != "test"}
    test = [one.part for one in parts if splits[one.part.part_id] == "test"]
    totals = Counter(part.product for part in test)
    strata: dict[tuple[str, str], list[str]] = {}
    for part in test:
        strata.setdefault((part.product, str(part.label)), []).append(part.part_id)
    for (product, _), ids in sorted(strata.items()):
        share = 1.0 if limit is None else min(1.0, limit / totals[product])
        order = product_rng(seed, product).permutation(len(ids))
        keep.update(ids[at] for at in order[: round(share * len(ids))])
    return frozenset(keep)
