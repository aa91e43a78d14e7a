"""Frames: the typed messages of learning, up and down. A header of plain JSON and named arrays, never code.

    magic   4 bytes  b"SAEC"
    version 1 byte   1
    length  8 bytes  of the body, big endian
    sha256  32 bytes of the body
    body             zstd of a safetensors file; its metadata hold ``frame``, the JSON of [kind, header]

A frame's name is the sha256 of all of its bytes, so that storing it twice is storing it once. Whoever reads one states
which kinds it takes and how large it may be, unpacked as well; nothing larger is ever unpacked.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from saec.errors import SaecError

VERSION = 1
CONTENT_TYPE = "application/vnd.saec.frame"

_MAGIC = b"SAEC"
_HEAD = struct.Struct(">4sBQ32s")
_LEVEL = 9
_MOST_WORDS = 4_000_000  # bytes of safetensors' own header: parsed JSON takes many times its length in memory


class BadFrame(SaecError):
    """Bytes that are no frame, or not one that may be used here; the text says which."""


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One message. ``header`` is JSON; ``arrays`` have any dtype that safetensors and NumPy share."""

    kind: str
    header: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def frame_id(data: bytes) -> str:
    """Return the name of an encoded frame: the sha256 of its bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def encode_frame(frame: Frame) -> bytes:
    """Return the bytes of a frame: the same for the same frame, wherever it is encoded with this zstd.

    Raises:
        ValueError: a header that JSON does not have, such as NaN, or that is too long; a dtype without a name there.
    """
    # One entry: safetensors writes several in an order that differs from process to process.
    metadata = {"frame": json.dumps([frame.kind, dict(frame.header)], sort_keys=True, allow_nan=False)}
    arrays = {name: np.asarray(frame.arrays[name], order="C") for name in sorted(frame.arrays)}
    try:
        plain = dump_tensors(arrays, metadata=metadata)
    except SafetensorError as error:
        raise ValueError(f"these arrays do not go into a frame ({error})") from None
    if _length_of_words(plain) > _MOST_WORDS:
        raise ValueError(f"a header of more than {_MOST_WORDS} bytes")
    body = zstandard.ZstdCompressor(level=_LEVEL).compress(plain)
    return _HEAD.pack(_MAGIC, VERSION, len(body), hashlib.sha256(body).digest()) + body


def decode_frame(data: bytes, *, kinds: Collection[str], most: int) -> Frame:
    """Return the frame in ``data``, of one of ``kinds``, which unpacks to at most ``most`` bytes.

    Raises:
        BadFrame: not a frame, of another version, cut off, changed, too large, or of another kind.
    """
    if len(data) < _HEAD.size or data[:4] != _MAGIC:
        raise BadFrame("not a frame")
    _, version, length, digest = _HEAD.unpack_from(data)
    if version != VERSION:
        raise BadFrame(f"a frame of version {version}, not {VERSION}")
    body = data[_HEAD.size :]
    if len(body) != length:
        raise BadFrame(f"cut off: {len(body)} bytes of {length}")
    if hashlib.sha256(body).digest() != digest:
        raise BadFrame("changed on its way: its bytes do not have the hash that it states")
    plain = _unpacked(body, most)
    try:
        kind, header = _words(plain)
        arrays = load_tensors(plain)
    except (SafetensorError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise BadFrame(f"not a frame: {str(error) or type(error).__name__:.200}") from None
    if kind not in kinds:
        raise BadFrame(f"a frame of kind {kind!r:.40}, not {' or '.join(sorted(kinds))}")
    return Frame(kind, header, arrays)


def _unpacked(body: bytes, most: int) -> bytes:
    """Unpack a body that states its size, which is allocated only if it is at most ``most`` bytes."""
    try:
        size = zstandard.frame_content_size(body)
        if size > most:
            raise BadFrame(f"larger than {most} bytes once unpacked")
        if size < 0:
            raise BadFrame("cannot be unpacked (it does not state its size)")
        unpacker = zstandard.ZstdDecompressor(max_window_size=max(most, 1024))
        return unpacker.decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadFrame(f"cannot be unpacked ({error})") from None


def _length_of_words(plain: bytes) -> int:
    """Return the length of a safetensors file's JSON, which its first eight bytes state."""
    return int.from_bytes(plain[:8], "little")


def _words(plain: bytes) -> tuple[str, dict[str, Any]]:
    """Return kind and header of a safetensors file: eight bytes of length, then JSON with ``__metadata__``."""
    length = _length_of_words(plain)
    if length > _MOST_WORDS:
        raise ValueError(f"a header of more than {_MOST_WORDS} bytes")
    kind, header = json.loads(json.loads(plain[8 : 8 + length])["__metadata__"]["frame"])
    if not isinstance(kind, str) or not isinstance(header, dict):
        raise ValueError("its header is no object")
    json.dumps(header, allow_nan=False)  # Python reads NaN, and 1e999 as infinity; JSON has neither
    return kind, header
