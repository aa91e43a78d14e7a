"""Proofs that no image is on both sides: between folders, between the splits of one folder, and against a station."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from saec.data.dataset import Dataset
from saec.data.decode import MAX_PIXELS, UnreadableImage
from saec.data.hashing import NEAR_DUPLICATE_BITS, WORKERS, Fingerprint, fingerprint, near_duplicate_pairs, sha256_file
from saec.data.manifest import MANIFEST_NAME, load_manifest
from saec.data.readers import read_dataset
from saec.errors import BadInput
from saec.types import Part


@dataclass(frozen=True, slots=True)
class Overlap:
    """One content found on both sides; ``near`` when the bytes differ. Paths are as they were found."""

    left: str
    right: str
    near: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Outcome of :func:`verify_disjoint`. ``sets`` are (name, images) compared pairwise; ``unreadable`` images could be
    compared byte for byte only."""

    sets: tuple[tuple[str, int], ...]
    overlaps: tuple[Overlap, ...]
    unreadable: tuple[str, ...] = ()

    @property
    def disjoint(self) -> bool:
        """True when no content is in two sets."""
        return not self.overlaps

    def require_disjoint(self) -> None:
        """Raise :class:`BadInput` naming the first overlap, if there is one."""
        if self.overlaps:
            first = self.overlaps[0]
            raise BadInput(
                f"{len(self.overlaps)} overlaps; the first is {'nearly ' if first.near else ''}the same image twice",
                where=f"{first.left} and {first.right}",
                fix="build the split anew with saec data, or exclude one of them",
            )


def verify_disjoint(
    sources: Sequence[Path], *, bits: int = NEAR_DUPLICATE_BITS, max_pixels: int = MAX_PIXELS
) -> Report:
    """Compare the images of folders, CSV files or manifests by content, byte for byte and as near-duplicates.

    Each source is a set of its own, or one set per split where it names splits, so that one built folder alone proves
    its train, calibration and test parts disjoint. All images are read and hashed again; a manifest is not believed.

    Raises:
        BadInput: a source does not exist, holds no images, or there is only one set to compare.
    """
    sets: list[tuple[str, list[Path]]] = []
    for source in sources:
        dataset = read_dataset(source.parent if source.name == MANIFEST_NAME else source, max_pixels=max_pixels)
        for split in (*dataset.splits, None):
            paths = [part.path for part in dataset if part.split == split]
            if paths:
                sets.append((f"{source}:{split}" if split else str(source), paths))
    if len(sets) < 2:
        raise BadInput("only one set of images to compare", where=", ".join(map(str, sources)), fix="pass two folders")
    return compare_images(sets, bits=bits, max_pixels=max_pixels)


def compare_images(
    sets: Sequence[tuple[str, Sequence[Path]]], *, bits: int = NEAR_DUPLICATE_BITS, max_pixels: int = MAX_PIXELS
) -> Report:
    """Compare named sets of image files pairwise by content, byte for byte and as near-duplicates; all are read."""
    with ThreadPoolExecutor(WORKERS) as pool:
        found = [list(pool.map(lambda path: _examine(path, max_pixels), paths)) for _, paths in sets]
    return Report(
        sets=tuple((name, len(paths)) for name, paths in sets),
        overlaps=tuple(overlap for left, right in combinations(found, 2) for overlap in _overlaps(left, right, bits)),
        unreadable=tuple(one.path for images in found for one in images if one.print is None),
    )


def refuse_overlap(known: Iterable[str], parts: Dataset | Iterable[Part], *, what: str = "training") -> None:
    """Refuse parts whose bytes are among the ``known`` SHA-256 (those a station was fitted and calibrated on).

    Unreadable files are left to the run, which records them.

    Raises:
        BadInput: naming the first such part and how many there are.
    """
    hashes = frozenset(known)
    found = [part.path for part in parts if (sha256 := _sha256(part.path)) is not None and sha256 in hashes]
    if found:
        raise BadInput(
            f"{len(found)} images were also used for {what}; the first",
            where=found[0],
            fix="evaluate on a split that saec data keeps apart",
        )


def content_hashes(sources: Iterable[Path]) -> frozenset[str]:
    """Return the SHA-256 of all images that the sources name: what ``exclude=`` of the builders accepts.

    A source is a manifest, a folder (hashed), an SFT ``.jsonl`` file or exclusion list with ``sha256`` in every line,
    or a text file with one SHA-256 at the start of each line (as ``sha256sum`` writes it).

    Raises:
        BadInput: not there, or none of these.
    """
    hashes: set[str] = set()
    for source in sources:
        if source.is_dir() or source.suffix == ".csv":
            found = (_sha256(part.path) for part in read_dataset(source))
            hashes.update(sha256 for sha256 in found if sha256 is not None)
        elif source.suffix == ".json":
            hashes.update(entry.sha256 for entry in load_manifest(source).entries)
        else:
            hashes.update(_listed(source))
    return frozenset(hashes)


def _listed(source: Path) -> list[str]:
    try:
        lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the exclusion list ({error})", where=source) from None
    return [_line_hash(line, f"{source}, line {number}") for number, line in enumerate(lines, start=1)]


def _line_hash(line: str, where: str) -> str:
    value: Any = line.split()[0]
    if line.lstrip().startswith("{"):
        try:
            value = json.loads(line).get("sha256")
        except ValueError:
            value = None
    if not isinstance(value, str) or len(value) != 64 or not set(value.lower()) <= set(string.hexdigits):
        raise BadInput("no SHA-256 in this line", where=where, fix="a manifest, an SFT file, or lines from sha256sum")
    return value.lower()


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    path: str
    sha256: str | None
    print: Fingerprint | None  # None: no image


def _examine(path: Path, max_pixels: int) -> _Found:
    try:
        one = fingerprint(path, max_pixels=max_pixels)
    except UnreadableImage as error:
        return _Found(str(path), error.sha256, None)
    return _Found(str(path), one.sha256, one)


def _overlaps(left: Sequence[_Found], right: Sequence[_Found], bits: int) -> list[Overlap]:
    places: dict[str, list[str]] = {}
    for there in right:
        if there.sha256 is not None:
            places.setdefault(there.sha256, []).append(there.path)
    same = [Overlap(here.path, path, False) for here in left for path in places.get(here.sha256 or "", ())]
    ours = [(here.path, here.print) for here in left if here.print is not None]
    theirs = [(there.path, there.print) for there in right if there.print is not None]
    pairs = near_duplicate_pairs([one for _, one in ours], [one for _, one in theirs], bits=bits)
    near = [(ours[i], theirs[j]) for i, j in pairs]
    return same + [Overlap(a, b, True) for (a, one), (b, other) in near if one.sha256 != other.sha256]


def _sha256(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except OSError:
        return None  # recorded as unreadable by whoever inspects it; it cannot be a copy of anything
