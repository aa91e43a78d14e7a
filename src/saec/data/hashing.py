"""Content hashes and near-duplicates, so that no image can be on both sides of a split.

Byte-identical files are found by SHA-256. A *near-duplicate* is the same shot again: re-encoded, resized, or with
another gain or offset. Two conditions must hold. The 256-bit difference hashes differ in at most ``bits`` places, and
on 32 x 32 grey thumbnails the one is the other up to gain and offset, within :data:`MAX_RESIDUAL` grey levels (RMS).
A hash alone fails here: aligned parts (bottles on a back light) differ in fewer bits than a photo does from its JPEG.

Measured on the real sets, the residual of copies (JPEG quality 60-75, half size, gain 0.9-1.05, offset +-8) is at most
1.04 and typically 0.4; that of different parts at least 2.07 (bottle), 2.79 (screw), 3.88 (circuit_board), 1.06 (ELPV).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from saec.data.decode import MAX_PIXELS, read_with_hash
from saec.types import Image

NEAR_DUPLICATE_BITS = 24
"""Default of ``data.near_duplicate_bits``: copies were at most 16 bits apart."""

MAX_RESIDUAL = 1.0
"""Grey levels (RMS over the thumbnail) that a copy may differ after gain and offset are removed."""

WORKERS = min(4, os.cpu_count() or 1)
"""Threads that decode and hash; OpenCV, zlib and SHA-256 release the interpreter lock."""

_DEAD_ZONE = 2.0  # grey levels: in flat regions only noise decides the sign of a gradient, and copies would differ
_THUMB = 32
_DARK, _BRIGHT = 6, 247  # thumbnail pixels outside are clipped: gain and offset do not act on them
_MIN_SHARED, _MIN_SEEN = 0.85, 0.2
_MAX_GAIN = 1.35
_MAX_UNEXPLAINED = 0.02  # share of the variance; keeps blank parts, whose every residual is small, apart
_BLOCK = 256

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Fingerprint:
    """What identifies an image: ``sha256`` of the file, 256-bit ``difference`` hash, ``thumb`` [1024] uint8 grey."""

    sha256: str
    difference: int
    thumb: NDArray[np.uint8]


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits, reading it in pieces.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(tree: object) -> str:
    """Return the SHA-256 of plain JSON types, independent of the order of keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def difference_hash(image: Image) -> int:
    """Return the 256-bit gradient hash of a BGR image: 16 x 16 signs of horizontal differences on a 17 x 16 thumbnail.

    A bit is set where brightness rises by more than two grey levels; the dead zone keeps flat regions at zero.
    """
    rows = cv2.resize(_grey(image), (17, 16), interpolation=cv2.INTER_AREA).astype(np.float32)
    rises = (rows[:, 1:] - rows[:, :-1]) > _DEAD_ZONE
    return int.from_bytes(np.packbits(rises).tobytes(), "big")


def fingerprint_image(sha256: str, image: Image) -> Fingerprint:
    """Return the fingerprint of a decoded image whose file has this hash."""
    thumb = cv2.resize(_grey(image), (_THUMB, _THUMB), interpolation=cv2.INTER_AREA)
    return Fingerprint(sha256, difference_hash(image), np.asarray(thumb, np.uint8).reshape(-1))


def fingerprint(path: Path, *, max_pixels: int = MAX_PIXELS) -> Fingerprint:
    """Read a file and return its fingerprint.

    Raises:
        saec.data.decode.UnreadableImage: the file is not a usable image.
    """
    return fingerprint_image(*read_with_hash(path, max_pixels=max_pixels))


def fingerprints(paths: Iterable[Path], *, max_pixels: int = MAX_PIXELS, workers: int = WORKERS) -> list[Fingerprint]:
    """Return the fingerprints of many files in order; decoding runs in ``workers`` threads.

    Raises:
        saec.data.decode.UnreadableImage: for the first file that is not a usable image.
    """
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda path: fingerprint(path, max_pixels=max_pixels), paths))


def group_near_duplicates(prints: Sequence[Fingerprint], *, bits: int = NEAR_DUPLICATE_BITS) -> list[tuple[int, ...]]:
    """Partition indices into groups of the same content: byte-identical files always, near-duplicates transitively.

    Every index is in exactly one group; groups are ordered by their first index. ``bits`` is the largest Hamming
    distance of difference hashes, 0 to 256. Takes at most 3 s for 5,000 images on one core, 0.5 s when most hashes
    differ.
    """
    parent = list(range(len(prints)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, one in enumerate(prints):
        parent[i] = first.setdefault(one.sha256, i)
    # Only one file of each content is compared, or a folder of copies would make every pair a match.
    unique = list(first.values())
    for a, b in near_duplicate_pairs([prints[i] for i in unique], bits=bits):
        i, j = root(unique[a]), root(unique[b])
        parent[max(i, j)] = min(i, j)
    groups: dict[int, list[int]] = {}
    for i in range(len(prints)):
        groups.setdefault(root(i), []).append(i)
    return [tuple(members) for _, members in sorted(groups.items())]


def near_duplicate_pairs(
    left: Sequence[Fingerprint], right: Sequence[Fingerprint] | None = None, *, bits: int = NEAR_DUPLICATE_BITS
) -> list[tuple[int, int]]:
    """Return the index pairs (i in ``left``, j in ``right``) of near-duplicates, sorted.

    Without ``right``, pairs i < j within ``left``. Blank images, which have nothing to compare, are never paired.
    """
    rows, columns = _Planes.of(left), _Planes.of(left if right is None else right)
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(left), _BLOCK):
        skip = start if right is None else 0  # the other half of the symmetric matrix is known
        same = _same_content(rows.part(start, start + _BLOCK), columns.part(skip), bits)
        found = np.argwhere(same) + np.array([start, skip])
        pairs.extend((i, j) for i, j in found.tolist() if right is not None or i < j)
    return pairs


@dataclass(frozen=True, slots=True)
class _Planes:
    """Matrices, one row per image, whose products give all pairwise statistics at once."""

    seen: Floats  # [n, 1024] 1 where the thumbnail is not clipped
    value: Floats  # [n, 1024] grey - 128
    bits: Floats  # [n, 256] difference hash

    @classmethod
    def of(cls, prints: Sequence[Fingerprint]) -> _Planes:
        thumbs = np.array([one.thumb for one in prints], np.uint8).reshape(len(prints), _THUMB * _THUMB)
        hashes = np.frombuffer(b"".join(one.difference.to_bytes(32, "big") for one in prints), np.uint8)
        return cls(
            seen=((thumbs > _DARK) & (thumbs < _BRIGHT)).astype(np.float32),
            value=thumbs.astype(np.float32) - np.float32(128),
            bits=np.unpackbits(hashes.reshape(len(prints), 32), axis=1).astype(np.float32),
        )

    def part(self, start: int, stop: int | None = None) -> _Planes:
        return _Planes(self.seen[start:stop], self.value[start:stop], self.bits[start:stop])

    def rows(self, chosen: NDArray[np.bool_]) -> _Planes:
        return _Planes(self.seen[chosen], self.value[chosen], self.bits[chosen])


def _same_content(a: _Planes, b: _Planes, bits: int) -> NDArray[np.bool_]:
    """Return [len(a), len(b)]: close hashes, and thumbnails equal up to gain and offset.

    The comparison counts either all pixels, or those clipped in neither image (a brighter copy of a part on a white
    ground keeps its ground), if the two clip nearly the same pixels.
    """
    close = a.bits.sum(1)[:, None] + b.bits.sum(1)[None, :] - 2 * (a.bits @ b.bits.T) <= bits
    same = close & _equal_everywhere(a.value, b.value)
    open_rows, open_cols = (close & ~same).any(axis=1), (close & ~same).any(axis=0)
    if open_rows.any():
        block = np.ix_(open_rows, open_cols)
        same[block] |= close[block] & _equal_where_seen(a.rows(open_rows), b.rows(open_cols))
    return np.asarray(same)


def _equal_everywhere(x: Floats, y: Floats) -> NDArray[np.bool_]:
    n = np.float32(x.shape[1])
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    return _fits((x * x).sum(1)[:, None] / n, (y * y).sum(1)[None, :] / n, x @ y.T / n)


def _equal_where_seen(a: _Planes, b: _Planes) -> NDArray[np.bool_]:
    shared = a.seen @ b.seen.T
    most = np.maximum(a.seen.sum(1)[:, None], b.seen.sum(1)[None, :])
    comparable = (shared >= _MIN_SHARED * most) & (shared >= _MIN_SEEN * a.seen.shape[1])
    n, x, y = np.maximum(shared, 1), a.value * a.seen, b.value * b.seen
    mean_x, mean_y = x @ b.seen.T / n, a.seen @ y.T / n
    var_x = (x * x) @ b.seen.T / n - mean_x**2
    var_y = a.seen @ (y * y).T / n - mean_y**2
    return np.asarray(comparable & _fits(var_x, var_y, x @ y.T / n - mean_x * mean_y))


def _fits(var_x: Floats, var_y: Floats, covariance: Floats) -> NDArray[np.bool_]:
    """Return where one thumbnail is the other up to gain and offset, from the (co)variances of each pair."""
    var_x, var_y = np.maximum(var_x, 1e-6), np.maximum(var_y, 1e-6)
    unexplained = np.clip(1 - covariance**2 / (var_x * var_y), 0, 1)
    residual, gain = np.minimum(var_x, var_y) * unexplained, var_x / var_y
    return np.asarray(
        (covariance > 0)
        & (residual <= MAX_RESIDUAL**2)
        & (unexplained <= _MAX_UNEXPLAINED)
        & (gain <= _MAX_GAIN**2)
        & (gain >= _MAX_GAIN**-2)
    )


def _grey(image: Image) -> Image:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), np.uint8)
