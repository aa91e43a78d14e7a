"""Splitting a data set so that images of the same content, or of the same item, stay together."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saec.data.dataset import Dataset
from saec.data.decode import MAX_PIXELS, UnreadableImage
from saec.data.hashing import NEAR_DUPLICATE_BITS, Fingerprint, fingerprints, group_near_duplicates
from saec.errors import BadInput
from saec.types import Label, Part


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of a product's images: ``train`` and ``calibration`` of its good parts, ``defect_train`` and
    ``defect_calibration`` of its defects; the rest is test. A station is fitted on good parts only: defects of the
    train split are for models that learn from labels (``saec train``, the expert).

    Raises:
        BadInput: a share outside [0, 1], nothing to train on, or nothing left to test.
    """

    train: float = 0.5
    calibration: float = 0.2
    defect_calibration: float = 0.4
    defect_train: float = 0.0

    def __post_init__(self) -> None:
        if not (self.train > 0 and self.calibration >= 0 and self.train + self.calibration < 1):
            raise BadInput(
                "bad shares of the good parts",
                where=f"train {self.train}, calibration {self.calibration}",
                fix="train above 0, their sum below 1",
            )
        if not (self.defect_train >= 0 and self.defect_calibration >= 0 and sum(self._defects) < 1):
            raise BadInput(
                "bad shares of the defects",
                where=f"train {self.defect_train}, calibration {self.defect_calibration}",
                fix="at least 0, their sum below 1",
            )

    @property
    def of_good(self) -> dict[str, float]:
        """Shares of the good parts by split."""
        return {"train": self.train, "calibration": self.calibration, "test": 1 - self.train - self.calibration}

    @property
    def of_defects(self) -> dict[str, float]:
        """Shares of the defects by split."""
        train, calibration = self._defects
        rest = {"calibration": calibration, "test": 1 - train - calibration}
        return {"train": train, **rest} if train else rest

    @property
    def _defects(self) -> tuple[float, float]:
        return self.defect_train, self.defect_calibration


DEFAULT_SHARES = Shares()


@dataclass(frozen=True, slots=True)
class GroupedPart:
    """A part with the fingerprint of its image and the id of its group (16 hex digits, from the contents)."""

    part: Part
    print: Fingerprint
    group: str


def group_parts(
    dataset: Dataset,
    *,
    bits: int = NEAR_DUPLICATE_BITS,
    max_pixels: int = MAX_PIXELS,
    item: Callable[[Part], str] | None = None,
) -> list[GroupedPart]:
    """Read every image and group the parts by content, and by ``item`` (an id of the physical object) if given.

    Groups of content that touch the same item become one, so that neither an image nor an item is split.

    Raises:
        BadInput: an image cannot be read; a split with holes would not be the split that was asked for.
    """
    try:
        prints = fingerprints((part.path for part in dataset), max_pixels=max_pixels)
    except UnreadableImage as error:
        raise BadInput(f"unreadable image ({error.why})", where=error.path, fix="replace or remove it") from None
    groups: list[list[int]] = [list(group) for group in group_near_duplicates(prints, bits=bits)]
    if item is not None:
        groups = _merge_by_item(groups, [item(part) for part in dataset])
    names = {i: min(prints[j].sha256 for j in group)[:16] for group in groups for i in group}
    return [GroupedPart(part, prints[i], names[i]) for i, part in enumerate(dataset)]


def _merge_by_item(groups: Sequence[Sequence[int]], items: Sequence[str]) -> list[list[int]]:
    merged: dict[frozenset[str], list[int]] = {}
    for group in groups:
        touched = {items[i] for i in group}
        members = list(group)
        for key in [key for key in merged if key & touched]:
            touched |= key
            members += merged.pop(key)
        merged[frozenset(touched)] = members
    return list(merged.values())


def split_by_content(parts: Sequence[GroupedPart], shares: Shares, *, seed: int) -> dict[str, str]:
    """Return part id → split, product by product; groups stay whole, and one with a defect is dealt as a defect."""
    splits: dict[str, str] = {}
    for members, rng in _by_product(parts, seed):
        groups = _groups(members)
        with_defect = {name for name, group in groups.items() if any(one.part.label is not Label.GOOD for one in group)}
        good = {name: group for name, group in groups.items() if name not in with_defect}
        defect = {name: group for name, group in groups.items() if name in with_defect}
        for chosen, of in ((good, shares.of_good), (defect, shares.of_defects)):
            splits |= _deal(chosen, of, rng)
    return splits


def split_by_item(parts: Sequence[GroupedPart], shares: Shares, *, seed: int) -> dict[str, str]:
    """Return part id → split where a group is a whole item with good and defective images.

    Items are dealt by the shares of the good parts. A defect on an item that trains is in no split: it can neither
    train, nor be tested without leaking its item.
    """
    splits: dict[str, str] = {}
    for members, rng in _by_product(parts, seed):
        splits |= _deal(_groups(members), shares.of_good, rng)
        for one in members:
            if one.part.label is not Label.GOOD and splits[one.part.part_id] == "train":
                del splits[one.part.part_id]
    return splits


def product_rng(seed: int, product: str) -> np.random.Generator:
    """Return a generator of its own for each product, so that adding a product leaves the others' splits alone."""
    return np.random.default_rng([seed, zlib.crc32(product.encode())])


def _by_product(parts: Sequence[GroupedPart], seed: int) -> list[tuple[list[GroupedPart], np.random.Generator]]:
    products: dict[str, list[GroupedPart]] = {}
    for one in parts:
        products.setdefault(one.part.product, []).append(one)
    return [(members, product_rng(seed, product)) for product, members in products.items()]


def _groups(parts: Sequence[GroupedPart]) -> dict[str, list[GroupedPart]]:
    groups: dict[str, list[GroupedPart]] = {}
    for one in parts:
        groups.setdefault(one.group, []).append(one)
    return groups


def _deal(
    groups: Mapping[str, Sequence[GroupedPart]], shares: Mapping[str, float], rng: np.random.Generator
) -> dict[str, str]:
    """Deal shuffled groups, each to the split that is furthest below its share; counts end within one group of it."""
    total = sum(len(group) for group in groups.values())
    missing = {split: share * total for split, share in shares.items()}
    names = list(groups)
    splits: dict[str, str] = {}
    for at in rng.permutation(len(names)):
        group = groups[names[at]]
        split = max(missing, key=lambda name: missing[name])
        missing[split] -= len(group)
        splits |= {one.part.part_id: split for one in group}
    return splits
