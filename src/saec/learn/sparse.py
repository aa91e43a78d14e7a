"""Which weights changed and by how much, in few bytes: positions as gaps or as a bitmap, changes as sign and level.

A chosen change lies between the smallest and the largest of its tensor; that range is cut into ``2 ** (bits - 1)``
equal levels, of which the middle is sent, and the sign takes one bit more. So no code is spent on the changes around 0
that were not chosen. All of it is integer and float32 arithmetic, one operation at a time: the same on every machine.
"""

from __future__ import annotations

import numpy as np
import zstandard
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Positions = NDArray[np.int64]
Floats = NDArray[np.float32]

_LEVEL = 19
_LONGEST = 5  # bytes of a gap: 2 ** 35 positions


def packed(positions: Positions, total: int) -> tuple[str, Bytes]:
    """Return how increasing ``positions`` below ``total`` are written, ``gaps`` or ``bitmap``, and the bytes."""
    bits = np.zeros(total, dtype=np.uint8)
    bits[positions] = 1
    ways = {"gaps": zipped(_varints(np.diff(positions, prepend=-1) - 1)), "bitmap": zipped(np.packbits(bits))}
    return min(ways.items(), key=lambda way: way[1].size)


def unpacked(way: str, data: Bytes, count: int, total: int) -> Positions:
    """Return the ``count`` positions below ``total`` that :func:`packed` wrote.

    Raises:
        ValueError: they are not ``count`` increasing positions below ``total``.
    """
    if not 0 <= count <= total:
        raise ValueError("more changes than weights")
    if way == "gaps":
        positions = np.cumsum(_of_varints(unzipped(data, _LONGEST * count)) + 1) - 1
    else:
        positions = np.flatnonzero(np.unpackbits(unzipped(data, -(-total // 8)), count=total))
    if len(positions) != count or (count and positions[-1] >= total):
        raise ValueError("positions that do not fit the weights")
    return np.asarray(positions, dtype=np.int64)


def quantised(changes: Floats, bits: int) -> tuple[Bytes, Floats]:
    """Return a code for each of ``changes`` [n], n >= 1, and the scale: the smallest magnitude and the step."""
    size = np.abs(changes)
    lowest, levels = size.min(), 1 << (bits - 1)
    step = (size.max() - lowest) / np.float32(levels)
    level = np.zeros(len(size)) if step == 0 else np.minimum((size - lowest) / step, levels - 1)
    return (2 * level.astype(np.uint8) + (changes < 0)).astype(np.uint8), np.array([lowest, step], dtype=np.float32)


def changes_of(codes: Bytes, scale: Floats) -> Floats:
    """Return what :func:`quantised` stands for, [n] float32: at most half a step from the changes."""
    middle = (codes >> 1).astype(np.float32) + np.float32(0.5)
    size = scale[0] + middle * scale[1]
    return np.asarray(np.where(codes & 1, -size, size), dtype=np.float32)


def zipped(data: Bytes) -> Bytes:
    """Return the bytes, compressed on their own: positions and codes have too little in common to share a table."""
    return np.frombuffer(zstandard.ZstdCompressor(level=_LEVEL).compress(data.tobytes()), dtype=np.uint8)


def unzipped(data: Bytes, most: int) -> Bytes:
    """Return what was compressed, at most ``most`` bytes.

    Raises:
        ValueError: not compressed, or larger.
    """
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data.tobytes()) as reader:
            plain = reader.read(most + 1)
    except zstandard.ZstdError as error:
        raise ValueError(f"cannot be unpacked ({error})") from None
    if len(plain) > most:
        raise ValueError(f"larger than {most} bytes once unpacked")
    return np.frombuffer(plain, dtype=np.uint8)


def _varints(values: Positions) -> Bytes:
    """Return LEB128: seven bits a byte, the lowest first, the eighth bit set in all but a value's last byte."""
    lengths = 1 + np.sum([values >= 1 << 7 * place for place in range(1, _LONGEST)], axis=0)
    starts = np.cumsum(lengths) - lengths
    data = np.zeros(int(lengths.sum()), dtype=np.uint8)
    for place in range(_LONGEST):
        there = lengths > place
        more = np.where(lengths[there] > place + 1, 0x80, 0)
        data[starts[there] + place] = (values[there] >> 7 * place & 0x7F) | more
    return data


def _of_varints(data: Bytes) -> Positions:
    if not len(data):
        return np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(data < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    if not len(ends) or ends[-1] != len(data) - 1 or (ends - starts).max() >= _LONGEST:
        raise ValueError("gaps that are cut off")
    place = np.arange(len(data)) - np.repeat(starts, ends - starts + 1)
    return np.asarray(np.add.reduceat((data & 0x7F).astype(np.int64) << 7 * place, starts), dtype=np.int64)
